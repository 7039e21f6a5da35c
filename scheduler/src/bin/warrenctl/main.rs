//! `warrenctl`: what operators see of Warren, and do to it.
//!
//! Data goes to stdout, talk to stderr. Exit codes: see [`failure::Failure::exit_code`].
//!
//! `status` `server` `region` `raft` `node` `tenant` `template` `sandbox` (with `create` `update` `delete` `watch`, and what is done in one: `inside`) `top`
//! `doctor` `bundle` `contexts` are the commands. They make calls through
//! `client` (endpoints, retries), ask replicas one by one through `replicas`, follow changes through `follow`, and write through
//! `output`. They use the wire format alone, nothing of the scheduler; only `check FILE` reads a state as the scheduler does.

#![allow(
    clippy::disallowed_methods,
    reason = "a command line reads the clock for a person, and bounds how long it tries"
)]

mod bundle;
mod client;
mod context;
mod contexts;
mod create;
mod delete;
mod doctor;
mod failure;
mod follow;
mod import;
mod inside;
mod json;
mod names;
mod node;
mod output;
mod pack;
mod raft;
mod region;
mod replicas;
mod retry;
mod sandbox;
mod server;
mod settings;
mod status;
mod table;
mod template;
mod tenant;
mod terminal;
mod top;
mod update;
mod upload;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use client::Client;
use failure::Failure;
use output::{Format, Output};

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict or precondition, 5 unavailable or timed out, 6 permission,
7 resource exhausted. `sandbox run`, `exec` and `attach` exit with the process's own code; 125 is Warren's own failure in `run` and `exec`.";

/// Operates a Warren region
#[derive(Debug, Parser)]
#[command(name = "warrenctl", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// Schedulers, tried in turn: `host:port,...` [default: the context's, else 127.0.0.1:7070]
    #[arg(long, global = true, env = "WARREN_ENDPOINTS", value_name = "LIST", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// Tenant that bare sandbox names belong to [default: the context's, else `default`]
    #[arg(long, global = true, env = "WARREN_TENANT", value_name = "ID")]
    tenant: Option<String>,
    /// Context file [default: ~/.config/warren/contexts.toml]
    #[arg(long, global = true, env = "WARREN_CONTEXTS", value_name = "FILE")]
    contexts: Option<PathBuf>,
    /// Context to use instead of the file's current one
    #[arg(long, global = true, env = "WARREN_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// Output format
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    reads: client::Reads,
    /// How long to go on trying, such as `30s` or `500ms`
    #[arg(long, global = true, default_value = "30s", value_parser = names::duration)]
    timeout: Duration,
    /// PEM file of the authorities that servers are certified by: speaks TLS
    #[arg(long, global = true, env = "WARREN_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file of the client's certificate
    #[arg(long, global = true, env = "WARREN_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// PEM file of its key
    #[arg(long, global = true, env = "WARREN_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The region at a glance
    Status,
    /// Scheduler replicas
    #[command(subcommand)]
    Server(server::ServerCommand),
    /// Hosts that run sandboxes
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// What sandboxes start from
    #[command(subcommand)]
    Template(template::TemplateCommand),
    /// Sandboxes
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::SandboxCommand),
    /// Who owns sandboxes, and their quotas
    #[command(subcommand)]
    Tenant(tenant::TenantCommand),
    /// The region: pauses, the brake, the level of its rules
    #[command(subcommand)]
    Region(region::RegionCommand),
    /// The replicas' log and state
    #[command(subcommand)]
    Raft(raft::RaftCommand),
    /// What happens to sandboxes, a line an event; nodes and the region have no events: see `node list` and `region status`
    Events(watch::WatchArgs),
    /// Who uses most
    #[command(subcommand)]
    Top(top::TopCommand),
    /// Check that the ledger's rules hold, on every replica or in a backup; exit code 1 where one is broken, 5 where a replica
    /// was not checked
    Check {
        /// A backup (`server backup`), or a checkpoint out of a replica's data directory, instead of the region
        file: Option<PathBuf>,
    },
    /// Look for what is wrong, and say what to do
    Doctor,
    /// Regions that this command line knows
    #[command(subcommand)]
    Context(contexts::ContextCommand),
    /// For bug reports
    #[command(subcommand)]
    Debug(bundle::DebugCommand),
    /// Write completions for a shell to stdout
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// This program's version
    Version,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli).await {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    match &cli.command {
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "warrenctl", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Version => {
            println!("warrenctl {}", env!("CARGO_PKG_VERSION"));
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let output = Output::new(cli.global.output);
    if let Command::Context(command) = cli.command {
        return contexts::run(&cli.global, &output, command);
    }
    if let Command::Check { file: Some(file) } = &cli.command {
        return raft::check_file(&output, file);
    }
    let settings = context::settle(&cli.global)?;
    let client = Client::new(settings, cli.global.reads, cli.global.timeout)?;
    match cli.command {
        Command::Status => status::status(&client, &output).await,
        Command::Server(command) => server::run(&client, &output, command).await,
        Command::Tenant(command) => tenant::run(&client, &output, command).await,
        Command::Region(command) => region::run(&client, &output, command).await,
        Command::Raft(command) => raft::run(&client, &output, command).await,
        Command::Events(args) => watch::watch(&client, &output, args).await.map(|()| ExitCode::SUCCESS),
        Command::Top(command) => top::run(&client, &output, command).await,
        Command::Check { .. } => raft::check(&client, &output).await,
        Command::Doctor => doctor::run(&client, &output).await,
        Command::Debug(command) => bundle::run(&client, command).await,
        Command::Node(command) => node::run(&client, &output, command).await,
        Command::Template(command) => template::run(&client, &output, command).await,
        Command::Sandbox(command) => sandbox::run(&client, &output, command).await,
        Command::Completions { .. } | Command::Version | Command::Context(_) => Ok(ExitCode::SUCCESS),
    }
}
