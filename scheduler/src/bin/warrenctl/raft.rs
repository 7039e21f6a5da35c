//! `raft` and `check`: what each replica has, whether they agree, and whether the rules hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Subcommand;
use warren_proto::v1::{CheckStateResponse, GetReplicaStatusResponse};
use warren_scheduler::raft::offline;
use warren_scheduler::state::invariants;
use warren_scheduler::state::level::Level;

use crate::client::Client;
use crate::failure::{Failure, in_full};
use crate::output::{Format, Output, write};
use crate::replicas::{Answer, Group, group};
use crate::table::{Table, none_or};

const REPLICA_TYPE: &str = "warren.v1.GetReplicaStatusResponse";
const CHECK_TYPE: &str = "warren.v1.CheckStateResponse";

/// How long an index is looked for at which all that answer have a hash, and the pause between two looks: replicas that are a
/// heartbeat apart, or catch up, have one soon.
const HASH_PATIENCE: Duration = Duration::from_secs(3);
const HASH_PAUSE: Duration = Duration::from_millis(300);

#[derive(Debug, Subcommand)]
pub enum RaftCommand {
    /// Term, log and checkpoint of each replica; exit code 5 where one does not answer or none leads
    Status,
    /// Compare the hashes of the replicas' states; exit code 1 where they differ, 5 where not all could be compared
    Hash,
}

pub async fn run(client: &Client, output: &Output, command: RaftCommand) -> Result<ExitCode, Failure> {
    let group = group(client).await?;
    match command {
        RaftCommand::Status => status(client, output, group).await,
        RaftCommand::Hash => hash(client, output, group).await,
    }
}

async fn status(client: &Client, output: &Output, group: Group) -> Result<ExitCode, Failure> {
    let answers = group.replicas(client).await;
    if output.format == Format::Table {
        write(&table(&answers))?;
    } else {
        let shown = answers.iter().map(|Answer { address, said }| match said {
            Ok(own) => serde_json::to_value(output.json(REPLICA_TYPE, own)?).map_err(crate::output::unwritable),
            Err(status) => Ok(serde_json::json!({ "address": address, "error": in_full(status) })),
        });
        output.document(&shown.collect::<Result<Vec<_>, Failure>>()?)?;
    }
    group.complete(&answers)?;
    Ok(ExitCode::SUCCESS)
}

fn table(answers: &[Answer<GetReplicaStatusResponse>]) -> String {
    let mut table = Table::new(&[
        "REPLICA",
        "API",
        "LEADER",
        "TERM",
        "LOG",
        "APPLIED",
        "CHECKPOINT",
        "PURGED",
        "SYNCS",
        "DISK",
        "LEVELS",
        "VERSION",
        "PROBLEM",
    ]);
    for Answer { address, said } in answers {
        let mut row = vec!["-".to_owned(), address.clone()];
        match said {
            Ok(own) => {
                row[0] = own.replica_id.to_string();
                row.extend([
                    none_or(own.leader_id),
                    own.term.to_string(),
                    own.last_log_index.to_string(),
                    own.applied_index.to_string(),
                    own.checkpoint_index.to_string(),
                    own.purged_index.to_string(),
                    own.sync_count.to_string(),
                    format!("{} %", own.disk_used_percent),
                    format!("up to {}", own.max_level),
                    own.version.clone(),
                ]);
            }
            Err(status) => {
                row.extend(["-"; 10].map(str::to_owned));
                row.push(in_full(status));
            }
        }
        table.push(row);
    }
    table.to_string()
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
pub struct Comparison {
    pub wrong: Vec<u64>,
    pub index: u64,
    /// By replica, at `index`.
    pub hashes: BTreeMap<u64, String>,
    /// Replicas that answered.
    pub answered: usize,
}

impl Comparison {
    fn of(answers: &[Answer<GetReplicaStatusResponse>]) -> Self {
        let all = by_index(answers);
        let differ = |hashes: &BTreeMap<u64, String>| hashes.values().collect::<BTreeSet<_>>().len() > 1;
        let wrong: Vec<u64> = all.iter().filter(|(_, hashes)| differ(hashes)).map(|(index, _)| *index).collect();
        let best = all.iter().map(|(index, hashes)| (hashes.len(), *index)).max().map(|(_, index)| index);
        let index = wrong.last().copied().or(best).unwrap_or(0);
        let hashes = all.get(&index).cloned().unwrap_or_default();
        let answered = answers.iter().filter(|answer| answer.said.is_ok()).count();
        Self { wrong, index, hashes, answered }
    }

    /// Whether all that answered were compared with each other.
    pub fn is_whole(&self) -> bool {
        self.answered > 0 && self.hashes.len() == self.answered
    }
}

/// Compares what replicas have, and looks again until all that answer can be compared.
pub async fn compare(client: &Client, group: &Group) -> (Vec<Answer<GetReplicaStatusResponse>>, Comparison) {
    let until = client.deadline().min(Instant::now() + HASH_PATIENCE);
    loop {
        let answers = group.replicas(client).await;
        let compared = Comparison::of(&answers);
        let settled = compared.is_whole() || !compared.wrong.is_empty() || compared.answered == 0;
        if settled || Instant::now() >= until {
            return (answers, compared);
        }
        tokio::time::sleep(HASH_PAUSE).await;
    }
}

async fn hash(client: &Client, output: &Output, group: Group) -> Result<ExitCode, Failure> {
    let (answers, compared) = compare(client, &group).await;
    let Comparison { wrong, index, hashes, .. } = &compared;
    if output.format == Format::Table {
        let mut table = Table::new(&["REPLICA", "INDEX", "HASH"]);
        for (replica, hash) in hashes {
            table.push(vec![replica.to_string(), index.to_string(), hash.clone()]);
        }
        write(&table.to_string())?;
    } else {
        let unreached = answers.iter().filter(|answer| answer.said.is_err()).map(|answer| &answer.address);
        output.document(&serde_json::json!({
            "index": index,
            "hashes": hashes,
            "equal": wrong.is_empty() && compared.is_whole(),
            "replicas": answers.len(),
            "unreached": unreached.collect::<Vec<_>>(),
        }))?;
    }
    if !wrong.is_empty() {
        eprintln!("DIFFERENT at {} indexes: keep every data directory, stop placement, and report this", wrong.len());
        return Ok(ExitCode::from(1));
    }
    let (count, all) = (hashes.len(), answers.len());
    if count > 1 || all == 1 {
        eprintln!("equal on {count} of {all} replicas");
    }
    group.complete(&answers)?;
    if compared.is_whole() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::TimedOut(format!(
        "only {count} of {all} replicas could be compared: each keeps its hashes of every 256th index, and some have no index in \
         common; `warrenctl raft status` shows who is behind, try again when it has caught up"
    )))
}

/// The rules over every replica's state; exit code 1 where one is broken, 5 where not every replica was checked.
pub async fn check(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let group = group(client).await?;
    let answers = group.checks(client).await;
    let mut broken = false;
    for Answer { address, said } in &answers {
        match said {
            Ok(said) => broken |= !tell_checked(output, address, said)?,
            Err(status) => eprintln!("{address}: NOT CHECKED: {}", in_full(status)),
        }
    }
    if broken {
        return Ok(ExitCode::from(1));
    }
    group.complete(&answers)?;
    Ok(ExitCode::SUCCESS)
}

/// The rules over the state in a backup, or in a checkpoint out of a replica's directory: no region is asked.
pub fn check_file(output: &Output, file: &Path) -> Result<ExitCode, Failure> {
    let state = offline::read_backup(file).map_err(|error| Failure::Failed(error.to_string()))?;
    if state.level > Level::MAX {
        return Err(Failure::Failed(format!(
            "{} follows the rules of level {}, and this build knows them up to level {}: use the warrenctl of the build that wrote it",
            file.display(),
            state.level.0,
            Level::MAX.0
        )));
    }
    let said = CheckStateResponse { revision: state.revision, violations: invariants::check(&state) };
    let holds = tell_checked(output, &file.display().to_string(), &said)?;
    let ledger = state.ledger_id.map_or_else(|| "no ledger yet".to_owned(), |id| format!("ledger {id}"));
    eprintln!("{ledger}, level {}: {} nodes, {} sandboxes", state.level.0, state.nodes.len(), state.sandboxes.len());
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Whether all is well.
fn tell_checked(output: &Output, whose: &str, said: &CheckStateResponse) -> Result<bool, Failure> {
    let holds = said.violations.is_empty();
    if output.format != Format::Table {
        output.line(CHECK_TYPE, said)?;
    } else if holds {
        write(&format!("{whose}: all rules hold at revision {}\n", said.revision))?;
    } else {
        let list: String = said.violations.iter().map(|wrong| format!("  {wrong}\n")).collect();
        write(&format!("{whose}: {} violations at revision {}\n{list}", said.violations.len(), said.revision))?;
    }
    Ok(holds)
}
