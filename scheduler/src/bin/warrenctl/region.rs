//! `region`: pauses, the brake, the level of the rules.

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use warren_proto::v1::{ReleaseBrakeRequest, SetLevelRequest, SetPauseRequest};

use crate::client::{Client, cluster, within};
use crate::failure::Failure;
use crate::output::Output;
use crate::{replicas, status};

/// What can be paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// New sandboxes are refused
    Creates,
    /// New sandboxes wait
    Placement,
    /// Nothing is moved away from nodes that are down
    Moves,
}

#[derive(Debug, Subcommand)]
pub enum RegionCommand {
    /// The region at a glance
    Status,
    /// Pause parts of its work; survives leaders
    Pause {
        #[arg(required = true)]
        parts: Vec<Part>,
    },
    /// Resume what was paused
    Resume {
        #[arg(required = true)]
        parts: Vec<Part>,
    },
    /// Say that the nodes that fell silent together are indeed down
    ReleaseBrake,
    /// Show the level of the ledger's rules, or raise it by one
    Level {
        /// The next level
        #[arg(long, value_name = "N")]
        set: Option<u32>,
    },
}

pub async fn run(client: &Client, output: &Output, command: RegionCommand) -> Result<ExitCode, Failure> {
    match command {
        RegionCommand::Status => return status::status(client, output).await,
        RegionCommand::Pause { parts } => pause(client, &parts, true).await?,
        RegionCommand::Resume { parts } => pause(client, &parts, false).await?,
        RegionCommand::ReleaseBrake => {
            client.call(|c| async move { cluster(c).release_brake(within(ReleaseBrakeRequest {})).await }).await?;
            eprintln!("released: nodes that stay silent are declared down");
        }
        RegionCommand::Level { set: Some(level) } => {
            let request = SetLevelRequest { level };
            let done = client.call(|c| async move { cluster(c).set_level(within(request)).await }).await?;
            println!("{}", done.level);
        }
        RegionCommand::Level { set: None } => {
            println!("{}", replicas::cluster_status(client, client.deadline()).await?.level);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn pause(client: &Client, parts: &[Part], paused: bool) -> Result<(), Failure> {
    let wanted = |part| parts.contains(&part).then_some(paused);
    let request = SetPauseRequest {
        creates: wanted(Part::Creates),
        placement: wanted(Part::Placement),
        moves: wanted(Part::Moves),
    };
    let now = client.call(|c| async move { cluster(c).set_pause(within(request)).await }).await?;
    let now = now.pauses.unwrap_or_default();
    let all = [("creates", now.creates), ("placement", now.placement), ("moves", now.moves)];
    let paused: Vec<&str> = all.iter().filter(|(_, paused)| *paused).map(|(what, _)| *what).collect();
    eprintln!("paused now: {}", if paused.is_empty() { "nothing".to_owned() } else { paused.join(", ") });
    Ok(())
}
