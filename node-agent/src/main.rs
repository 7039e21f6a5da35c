//! `warren-node-agent`: `run` (the default), `clean`, `fleet`, and the hidden `shim` and `files` that run beside a
//! sandbox.

use std::ffi::OsStr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use warren_node_agent::agent::{Agent, DataDir};
use warren_node_agent::config::{Args, Command, Config, FleetArgs, LogFormat};
use warren_node_agent::fleet::{Fleet, FleetConfig};
use warren_node_agent::{clean, drivers, files, shim};

/// Lines of a fleet come no faster: each counts all of its agents.
const SHORTEST_REPORT: Duration = Duration::from_millis(100);

/// Exit code for a configuration that cannot be used.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // Before any thread exists: a shim forks, and a process with threads cannot change its user namespace.
    if let Some(beside @ ("shim" | "files")) = std::env::args_os().nth(1).as_deref().and_then(OsStr::to_str) {
        let arguments: Vec<String> = std::env::args_os().skip(2).map(|a| a.to_string_lossy().into_owned()).collect();
        return if beside == "shim" { shim::run(&arguments) } else { files::helper::run(&arguments) };
    }
    let args = Args::parse();
    let command = args.command.unwrap_or_default();
    let loaded = match &command {
        Command::Run => Config::load(args.layer),
        Command::Clean => Config::load_offline(args.layer),
        Command::Fleet(_) => Config::load_fleet(args.layer),
    };
    let config = match loaded {
        Ok(config) => config,
        Err(error) => {
            eprintln!("warren-node-agent: the configuration cannot be used:\n{error}");
            return ExitCode::from(USAGE);
        }
    };
    init_logs(&config);
    match run(command, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(command: Command, config: Config) -> anyhow::Result<()> {
    match command {
        Command::Run => serve(config).await,
        Command::Clean => {
            let data_dir = DataDir::hold(&config.data_dir)?;
            clean::clean(&config, data_dir).await
        }
        Command::Fleet(args) => run_fleet(&args, &config).await,
    }
}

async fn run_fleet(args: &FleetArgs, config: &Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let fleet = Fleet::start(FleetConfig::new(args, config)?).await?;
    let interval = Duration::try_from_secs_f64(args.report).context("--report")?.max(SHORTEST_REPORT);
    let told_to_stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    fleet.report(interval, told_to_stop).await;
    fleet.stop().await;
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let data_dir = DataDir::hold(&config.data_dir)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let built = drivers::build(&config).await?;
    let mut agent = Agent::start(config, data_dir, built).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        error = agent.failed() => {
            agent.stop().await;
            return Err(error);
        }
    }
    tracing::info!("stopping; sandboxes run on");
    agent.stop().await;
    Ok(())
}

fn init_logs(config: &Config) {
    let filter = EnvFilter::new(&config.log_level);
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => logs.with_ansi(false).init(),
        LogFormat::Json => logs.json().init(),
    }
}
