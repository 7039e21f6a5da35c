//! `server`: the group of replicas, and backups of the ledger.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{BackupRequest, JoinReplicaRequest, RemoveReplicaRequest, TransferLeadershipRequest};

use crate::client::{Client, cluster, within};
use crate::failure::Failure;
use crate::output::{Format, Output, write};
use crate::replicas::{cluster_status, votes};
use crate::status::members;
use crate::table::bytes;
use crate::terminal::confirm;

const OFFLINE: &str = "\
To restore a backup or to recover from a lost quorum, run the scheduler itself on its data directory while it does not serve:
  warren-scheduler [its flags] restore FILE      a new ledger of one replica out of a backup, in an empty directory
  warren-scheduler [its flags] recover-quorum    a new ledger out of the one replica that is left
A replica that starts with `--join HOST:PORT` joins by itself.";

#[derive(Debug, Subcommand)]
#[command(after_help = OFFLINE)]
pub enum ServerCommand {
    /// List the replicas, their roles, and how far behind they are
    Members,
    /// Add a replica that was started without `--join`
    Join {
        /// Its id, never used before
        id: u64,
        /// `host:port` that the other replicas reach it by
        #[arg(long)]
        peer: String,
        /// `host:port` of its API
        #[arg(long)]
        api: String,
        /// Keep it as a learner that replaces a voter which is dead for too long
        #[arg(long)]
        standby: bool,
    },
    /// Take a replica out of the group; its id is never used again
    Leave {
        /// Its id
        id: u64,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Make another voter the leader
    TransferLeader {
        /// Its id [default: the one that is furthest]
        id: Option<u64>,
    },
    /// Whether the group is well; exit code 1 when it is not
    Health,
    /// Write a backup of the whole ledger
    Backup {
        /// Where to
        file: PathBuf,
        /// Replace a file that is there
        #[arg(long)]
        force: bool,
    },
}

pub async fn run(client: &Client, output: &Output, command: ServerCommand) -> Result<ExitCode, Failure> {
    match command {
        ServerCommand::Members => {
            let status = cluster_status(client, client.deadline()).await?;
            match output.format {
                Format::Table => write(&members(&status))?,
                _ => output.list(&status.members)?,
            }
        }
        ServerCommand::Join { id, peer, api, standby } => {
            let request =
                JoinReplicaRequest { replica_id: id, api_address: api, peer_address: peer, standby, itself: false };
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { cluster(c).join_replica(r).await }
                })
                .await?;
            eprintln!("replica {id} is a learner; `warrenctl server members` shows when it votes");
        }
        ServerCommand::Leave { id, yes } => {
            confirm(&format!("replica {id} leaves the group for good"), yes)?;
            let request = RemoveReplicaRequest { replica_id: id };
            client.call(|c| async move { cluster(c).remove_replica(within(request)).await }).await?;
            eprintln!("replica {id} is out of the group; its process can be stopped and its data removed");
        }
        ServerCommand::TransferLeader { id } => {
            let request = TransferLeadershipRequest { replica_id: id.unwrap_or(0) };
            let done = client.call(|c| async move { cluster(c).transfer_leadership(within(request)).await }).await?;
            eprintln!("replica {} leads", done.leader_id);
        }
        ServerCommand::Health => return health(client, output).await,
        ServerCommand::Backup { file, force } => backup(client, &file, force).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A quorum and one more: the group survives the loss of any one replica.
async fn health(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let status = cluster_status(client, client.deadline()).await?;
    let voters = status.members.iter().filter(|member| votes(member)).count();
    let heard = status.members.iter().filter(|member| votes(member) && member.reachable).count();
    let spare = heard.saturating_sub(voters / 2 + 1);
    if output.format == Format::Table {
        let verdict = if spare > 0 { "healthy" } else { "NOT HEALTHY" };
        write(&format!("{verdict}: {heard} of {voters} voters are heard of, {spare} may fail\n"))?;
    } else {
        output.list(&status.members)?;
    }
    Ok(if spare > 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Under another name first: a backup is whole or not there.
async fn backup(client: &Client, file: &Path, force: bool) -> Result<(), Failure> {
    if file.exists() && !force {
        return Err(Failure::Usage(format!("{} exists: choose another name, or --force", file.display())));
    }
    let temporary = file.with_extension("part");
    let begin = |c| async move { cluster(c).backup(tonic::Request::new(BackupRequest {})).await };
    let mut stream = client.call(begin).await?;
    let mut out = File::create(&temporary).map_err(Failure::io("make the backup's file"))?;
    let bar = indicatif::ProgressBar::new(0);
    let (mut written, mut revision) = (0i64, 0);
    let mut size = 0;
    while let Some(message) = stream.message().await? {
        (size, revision) = (message.size_bytes, message.revision);
        bar.set_length(u64::try_from(size).unwrap_or(0));
        out.write_all(&message.chunk).map_err(Failure::io("write the backup"))?;
        bar.inc(message.chunk.len() as u64);
        written += i64::try_from(message.chunk.len()).unwrap_or(0);
    }
    bar.finish_and_clear();
    if written != size || size == 0 {
        let _gone = fs::remove_file(&temporary);
        return Err(Failure::Failed(format!("{written} of {size} bytes arrived: try again")));
    }
    out.sync_all().map_err(Failure::io("sync the backup"))?;
    fs::rename(&temporary, file).map_err(Failure::io("rename the backup"))?;
    eprintln!("{}: {} up to revision {revision}", file.display(), bytes(size));
    Ok(())
}
