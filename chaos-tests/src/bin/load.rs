//! `load`: figures of real processes. See `chaos-tests/README.md`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use warren_chaos::load::Place;
use warren_chaos::load::create::{self, Plan};
use warren_chaos::load::region::Shape;
use warren_chaos::load::{agents, exec, failover, state};

/// Measures schedulers and simulated nodes: real processes on this machine, started and ended here.
#[derive(Debug, Parser)]
#[command(name = "load")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Where data directories are made; on a disk [default: the directory for temporary files]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Durable creates a second, one at a time and in batches
    Create(CreateArgs),
    /// Longest time without an acknowledged create when the leader fails
    Failover(FailoverArgs),
    /// Very many nodes: a leader at rest, and all of them reconnecting when it is killed
    Agents(AgentsArgs),
    /// Very many sandboxes in one replica: memory, checkpoints, restart, lists, watches
    State(StateArgs),
    /// Real sandboxes: create and exec to the first output beside the bare runtime, memory, and many at once
    Exec(ExecArgs),
}

#[derive(Debug, Args)]
struct ExecArgs {
    /// OCI runtimes, each measured in a cluster of its own
    #[arg(long, value_delimiter = ',', default_value = "crun,runc")]
    runtimes: Vec<String>,
    /// Sandboxes and bare containers of each, in turns
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Sandboxes at once
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u16).range(1..=2000))]
    many: u16,
}

#[derive(Debug, Args)]
struct AgentsArgs {
    /// Nodes
    #[arg(long, default_value_t = 10_000)]
    count: usize,
    /// Seconds at rest over which processor time is taken
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    quiet: u64,
    /// A flag for every scheduler
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    scheduler_flag: Vec<String>,
}

#[derive(Debug, Args)]
struct StateArgs {
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    sandboxes: u32,
    /// Seconds of one create every 5 ms, while checkpoints are written
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    probe: u64,
    #[command(flatten)]
    region: RegionArgs,
}

#[derive(Debug, Args)]
struct FailoverArgs {
    #[arg(long, value_enum)]
    kind: FaultKind,
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    #[command(flatten)]
    region: RegionArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FaultKind {
    Sigkill,
    Sigstop,
    Partition,
}

impl From<FaultKind> for failover::Kind {
    fn from(kind: FaultKind) -> Self {
        match kind {
            FaultKind::Sigkill => Self::Sigkill,
            FaultKind::Sigstop => Self::Sigstop,
            FaultKind::Partition => Self::Partition,
        }
    }
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Measure a three-member etcd beside it, in turns
    #[arg(long)]
    vs_etcd: bool,
    /// How many clients call at once, each one call at a time
    #[arg(long, value_delimiter = ',', default_value = "1,64,512")]
    clients: Vec<usize>,
    /// How many clients send batches; 0: none
    #[arg(long, default_value_t = 16)]
    batch_clients: usize,
    /// Creates in a batch
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    batch: u16,
    /// Connections to the leader, shared by all clients; the same for both systems
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: u8,
    /// Seconds that are measured for each number of clients
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=300))]
    seconds: u64,
    /// Seconds of the same load before that
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=60))]
    warm_up: u64,
    #[command(flatten)]
    region: RegionArgs,
}

#[derive(Debug, Args)]
struct RegionArgs {
    /// Simulated nodes
    #[arg(long, default_value_t = 200)]
    nodes: usize,
    /// vCPUs of each, 20 sandboxes to one
    #[arg(long, default_value_t = 250)]
    node_cpus: u64,
    /// A flag for every scheduler, such as --scheduler-flag=--checkpoint-every=100000
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    scheduler_flag: Vec<String>,
    /// A flag for the fleet, such as --fleet-flag=--start-delay=60000
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    fleet_flag: Vec<String>,
}

impl RegionArgs {
    fn shape(&self, schedulers: usize) -> Shape {
        Shape {
            schedulers,
            nodes: self.nodes,
            node_cpus: self.node_cpus,
            scheduler_flags: self.scheduler_flag.clone(),
            fleet_flags: self.fleet_flag.clone(),
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    // What was started ends with the future that is dropped here: processes and directories.
    tokio::select! {
        outcome = measure(Cli::parse()) => outcome,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        _ = terminate.recv() => anyhow::bail!("told to end"),
    }
}

async fn measure(cli: Cli) -> anyhow::Result<()> {
    let place = Place::new(cli.data_dir)?;
    match cli.command {
        Command::Create(args) => {
            let report = create::run(&place, &plan(&args)).await?;
            show(cli.json, &report, create::Report::print)?;
            create::check(&report)
        }
        Command::Agents(args) => {
            let shape = Shape {
                schedulers: 3,
                nodes: args.count,
                node_cpus: 8,
                scheduler_flags: args.scheduler_flag,
                fleet_flags: Vec::new(),
            };
            let plan = agents::Plan { shape, quiet: Duration::from_secs(args.quiet) };
            let report = agents::run(&place, &plan).await?;
            show(cli.json, &report, agents::Report::print)?;
            agents::check(&report)
        }
        Command::State(args) => {
            let mut shape = args.region.shape(1);
            shape.scheduler_flags.insert(0, format!("--checkpoint-every={}", state::CHECKPOINT_EVERY));
            let sandboxes = usize::try_from(args.sandboxes)?;
            let plan = state::Plan { shape, sandboxes, probe: Duration::from_secs(args.probe) };
            let report = state::run(&place, &plan).await?;
            show(cli.json, &report, state::Report::print)
        }
        Command::Exec(args) => {
            let plan = exec::Plan { runtimes: args.runtimes, rounds: args.rounds.into(), many: args.many.into() };
            let report = exec::run(&place, &plan).await?;
            show(cli.json, &report, exec::Report::print)?;
            exec::check(&report, &plan)
        }
        Command::Failover(args) => {
            let kind = args.kind.into();
            if kind == failover::Kind::Partition
                && let Some(code) = failover::in_private_network().await?
            {
                std::process::exit(code);
            }
            let report = failover::run(&place, &args.region.shape(3), kind, args.runs.into()).await?;
            show(cli.json, &report, failover::Report::print)?;
            failover::check(&report)
        }
    }
}

fn plan(args: &CreateArgs) -> Plan {
    Plan {
        clients: args.clients.clone(),
        batch_clients: args.batch_clients,
        batch: args.batch.into(),
        connections: args.connections.into(),
        rounds: args.rounds.into(),
        warm_up: Duration::from_secs(args.warm_up),
        measured: Duration::from_secs(args.seconds),
        with_etcd: args.vs_etcd,
        shape: args.region.shape(3),
    }
}

fn show<T: Serialize>(json: bool, report: &T, print: impl Fn(&T)) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print(report);
    }
    Ok(())
}
