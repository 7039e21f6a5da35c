//! `raft` and `check`: what each replica has, and whether they agree.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use futures::future::join_all;
use tonic::Status;
use tonic::transport::Channel;
use warren_proto::v1::{CheckStateRequest, CheckStateResponse, GetReplicaStatusRequest, GetReplicaStatusResponse};

use crate::client::{Client, cluster, within};
use crate::failure::{Failure, in_full};
use crate::output::{Format, Output, write};
use crate::status::cluster_status;
use crate::table::Table;

/// How long a replica may take to answer for itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it may take to check a whole state.
const CHECK_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub enum RaftCommand {
    /// Term, log and checkpoint of each replica
    Status,
    /// Compare the hashes of the replicas' states; exit code 1 where they differ
    Hash,
}

/// One replica's address, and what it answered.
pub struct Answer<T> {
    pub address: String,
    pub said: Result<T, Status>,
}

/// What each member says of itself.
pub async fn replicas(client: &Client) -> Result<Vec<Answer<GetReplicaStatusResponse>>, Failure> {
    ask_each(client, PATIENCE, |channel| async move {
        cluster(channel).get_replica_status(within(GetReplicaStatusRequest {})).await
    })
    .await
}

async fn ask_each<T, F>(
    client: &Client,
    patience: Duration,
    ask: impl Fn(Channel) -> F,
) -> Result<Vec<Answer<T>>, Failure>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let members = cluster_status(client, client.deadline()).await?.members;
    let asking = members.into_iter().map(|member| {
        let channel = client.channel(&member.api_address);
        let asked = channel.map(&ask);
        async move {
            let said = match asked {
                Ok(asked) => tokio::time::timeout(patience, asked)
                    .await
                    .unwrap_or_else(|_elapsed| Err(Status::unavailable("no answer")))
                    .map(tonic::Response::into_inner),
                Err(failure) => Err(Status::unavailable(failure.to_string())),
            };
            Answer { address: member.api_address, said }
        }
    });
    Ok(join_all(asking).await)
}

pub async fn run(client: &Client, output: &Output, command: RaftCommand) -> Result<ExitCode, Failure> {
    let answers = replicas(client).await?;
    match command {
        RaftCommand::Status => status(output, &answers),
        RaftCommand::Hash => hash(output, &answers),
    }
}

fn status(output: &Output, answers: &[Answer<GetReplicaStatusResponse>]) -> Result<ExitCode, Failure> {
    if output.format != Format::Table {
        let shown = answers.iter().filter_map(|answer| answer.said.as_ref().ok());
        let shown = shown.map(|own| output.json("warren.v1.GetReplicaStatusResponse", own));
        output.document(&shown.collect::<Result<Vec<_>, _>>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "REPLICA",
        "API",
        "LEADER",
        "TERM",
        "LOG",
        "APPLIED",
        "CHECKPOINT",
        "SYNCS",
        "DISK",
        "LEVELS",
        "VERSION",
    ]);
    for Answer { address, said } in answers {
        match said {
            Ok(own) => table.push(vec![
                own.replica_id.to_string(),
                address.clone(),
                own.leader_id.to_string(),
                own.term.to_string(),
                own.last_log_index.to_string(),
                own.applied_index.to_string(),
                own.checkpoint_index.to_string(),
                own.sync_count.to_string(),
                format!("{} %", own.disk_used_percent),
                format!("up to {}", own.max_level),
                own.version.clone(),
            ]),
            Err(status) => table.push(vec!["-".to_owned(), address.clone(), in_full(status)]),
        }
    }
    write(&table.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// Hashes by index, then by replica.
fn by_index(answers: &[Answer<GetReplicaStatusResponse>]) -> BTreeMap<u64, BTreeMap<u64, String>> {
    let mut all: BTreeMap<u64, BTreeMap<u64, String>> = BTreeMap::new();
    for own in answers.iter().filter_map(|answer| answer.said.as_ref().ok()) {
        for hash in &own.hashes {
            all.entry(hash.index).or_default().insert(own.replica_id, hash.hash.clone());
        }
    }
    all
}

/// The indexes at which two replicas have different hashes, and the newest at which most can be compared.
pub fn compare(answers: &[Answer<GetReplicaStatusResponse>]) -> (Vec<u64>, Option<(u64, usize)>) {
    let all = by_index(answers);
    let differ = |hashes: &BTreeMap<u64, String>| hashes.values().collect::<BTreeSet<_>>().len() > 1;
    let wrong = all.iter().filter(|(_, hashes)| differ(hashes)).map(|(index, _)| *index).collect();
    let best = all.iter().map(|(index, hashes)| (hashes.len(), *index)).max();
    (wrong, best.map(|(count, index)| (index, count)))
}

fn hash(output: &Output, answers: &[Answer<GetReplicaStatusResponse>]) -> Result<ExitCode, Failure> {
    let (wrong, best) = compare(answers);
    let all = by_index(answers);
    let index = wrong.last().copied().or(best.map(|(index, _)| index)).unwrap_or(0);
    let hashes = all.get(&index).cloned().unwrap_or_default();
    if output.format == Format::Table {
        let mut table = Table::new(&["REPLICA", "INDEX", "HASH"]);
        for (replica, hash) in &hashes {
            table.push(vec![replica.to_string(), index.to_string(), hash.clone()]);
        }
        write(&table.to_string())?;
    } else {
        output.document(&serde_json::json!({ "index": index, "hashes": hashes, "equal": wrong.is_empty() }))?;
    }
    if wrong.is_empty() {
        eprintln!("equal on {} of {} replicas", hashes.len(), answers.len());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("DIFFERENT at {} indexes: keep every data directory, stop placement, and report this", wrong.len());
    Ok(ExitCode::from(1))
}

/// The rules over every replica's state.
pub async fn check(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let answers = checks(client).await?;
    let mut broken = false;
    for Answer { address, said } in &answers {
        match said {
            Ok(said) if output.format != Format::Table => output.line("warren.v1.CheckStateResponse", said)?,
            Ok(said) if said.violations.is_empty() => {
                write(&format!("{address}: all rules hold at revision {}\n", said.revision))?;
            }
            Ok(said) => {
                let list: String = said.violations.iter().map(|wrong| format!("  {wrong}\n")).collect();
                write(&format!(
                    "{address}: {} violations at revision {}\n{list}",
                    said.violations.len(),
                    said.revision
                ))?;
            }
            Err(status) => eprintln!("{address}: {}", in_full(status)),
        }
        broken |= said.as_ref().is_ok_and(|said| !said.violations.is_empty());
    }
    Ok(if broken { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

pub async fn checks(client: &Client) -> Result<Vec<Answer<CheckStateResponse>>, Failure> {
    ask_each(client, CHECK_PATIENCE, |channel| async move {
        cluster(channel).check_state(tonic::Request::new(CheckStateRequest {})).await
    })
    .await
}
