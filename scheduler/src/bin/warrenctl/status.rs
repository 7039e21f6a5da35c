//! `status`: the region at a glance, with or without a leader.

use std::process::ExitCode;

use serde::Serialize;
use warren_proto::v1::{GetClusterStatusResponse, GetReplicaStatusResponse, Member, MemberRole};

use crate::client::Client;
use crate::failure::{Failure, in_full};
use crate::json::Json;
use crate::output::{Format, Output, Row, write};
use crate::replicas::{Answer, group};
use crate::table::{Table, bare, bytes, cpu, details, none_or, of};

const CLUSTER_TYPE: &str = "warren.v1.GetClusterStatusResponse";
const REPLICA_TYPE: &str = "warren.v1.GetReplicaStatusResponse";

/// The region at a glance; without a leader, what each replica says of itself (exit code 5).
pub async fn status(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let group = group(client).await?;
    let answers = match &group.leader {
        Ok(_) => Vec::new(),
        Err(_) => group.replicas(client).await,
    };
    match group.leader {
        Ok(status) => {
            match output.format {
                Format::Table => write(&overview(&status))?,
                Format::Name => write(&format!("{}\n", status.ledger_id))?,
                _ => output.document(&output.json(CLUSTER_TYPE, &status)?)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(leaderless) => {
            partial(output, &answers)?;
            Err(leaderless.into())
        }
    }
}

fn overview(status: &GetClusterStatusResponse) -> String {
    let (used, all) = (status.assigned.unwrap_or_default(), status.capacity.unwrap_or_default());
    let held = status.sandbox_counts.iter().filter(|count| count.count > 0);
    let counts: Vec<String> = held.map(|count| format!("{} {}", count.count, count.state.to_lowercase())).collect();
    let reachable = status.members.iter().filter(|member| member.reachable).count();
    let summary = details(&[
        ("Ledger", status.ledger_id.clone()),
        ("Leader", format!("replica {}, term {}, revision {}", status.leader_id, status.term, status.revision)),
        ("Replicas", format!("{reachable} of {} reachable", status.members.len())),
        ("Nodes", format!("{} of {} ready", status.ready_node_count, status.node_count)),
        ("Sandboxes", if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }),
        ("CPU", of(cpu(used.cpu_milli), cpu(all.cpu_milli))),
        ("Memory", of(bytes(used.memory_bytes), bytes(all.memory_bytes))),
        ("Disk", of(bytes(used.disk_bytes), bytes(all.disk_bytes))),
        ("Attention", attention(status)),
    ]);
    format!("{summary}\n{}", members(status))
}

/// What an operator should know at a glance; empty when there is nothing.
pub fn attention(status: &GetClusterStatusResponse) -> String {
    let pauses = status.pauses.unwrap_or_default();
    let mut said = Vec::new();
    let paused = [("creates", pauses.creates), ("placement", pauses.placement), ("moves", pauses.moves)];
    said.extend(paused.iter().filter(|(_, paused)| *paused).map(|(what, _)| format!("{what} paused")));
    if let Some(brake) = &status.brake {
        said.push(format!("brake: {} nodes silent, {} believed", brake.lapsed, brake.allowed));
    }
    if status.hold_until.is_some() {
        said.push("the clock was set: deadlines wait".to_owned());
    }
    said.join("; ")
}

impl Row for Member {
    const TYPE: &'static str = "warren.v1.Member";
    const HEADERS: &'static [&'static str] = &["REPLICA", "ROLE", "API", "PEER", "MATCHED", "REACHABLE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.replica_id.to_string(),
            bare(self.role().as_str_name(), "MEMBER_ROLE_"),
            self.api_address.clone(),
            self.peer_address.clone(),
            self.matched_index.to_string(),
            if self.reachable { "yes" } else { "no" }.to_owned(),
        ]
    }

    fn resource_name(&self) -> String {
        self.replica_id.to_string()
    }
}

/// The members, with how many log entries each lacks that the leader has.
pub fn members(status: &GetClusterStatusResponse) -> String {
    let leader = status.members.iter().find(|member| member.role() == MemberRole::Leader);
    let last = leader.map_or(status.revision, |leader| leader.matched_index);
    let mut table = Table::new(&["REPLICA", "ROLE", "API", "PEER", "MATCHED", "REACHABLE", "LAG"]);
    for member in &status.members {
        let mut cells = member.cells();
        cells.push(last.saturating_sub(member.matched_index).to_string());
        table.push(cells);
    }
    table.to_string()
}

/// What each replica says of itself.
fn partial(output: &Output, answers: &[Answer<GetReplicaStatusResponse>]) -> Result<(), Failure> {
    match output.format {
        Format::Table => write(&replicas(answers)),
        Format::Name => Ok(()),
        _ => {
            let replicas = answers.iter().map(|answer| shown(answer, output)).collect::<Result<_, _>>()?;
            output.document(&Partial { replicas })
        }
    }
}

/// What stands for the status when none leads.
#[derive(Serialize)]
struct Partial {
    replicas: Vec<Replica>,
}

#[derive(Serialize)]
struct Replica {
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

fn shown(answer: &Answer<GetReplicaStatusResponse>, output: &Output) -> Result<Replica, Failure> {
    let endpoint = answer.address.clone();
    Ok(match &answer.said {
        Ok(own) => Replica { endpoint, status: Some(output.json(REPLICA_TYPE, own)?), error: None },
        Err(status) => Replica { endpoint, status: None, error: Some(in_full(status)) },
    })
}

fn replicas(answers: &[Answer<GetReplicaStatusResponse>]) -> String {
    let mut table = Table::new(&["ENDPOINT", "REPLICA", "LEADER", "TERM", "APPLIED", "VERSION", "PROBLEM"]);
    for answer in answers {
        let mut cells = vec![answer.address.clone()];
        match &answer.said {
            Ok(own) => {
                let numbers = [own.replica_id.to_string(), none_or(own.leader_id), own.term.to_string()];
                cells.extend(numbers);
                cells.extend([own.applied_index.to_string(), own.version.clone()]);
            }
            Err(status) => {
                cells.extend(["-"; 5].map(str::to_owned));
                cells.push(in_full(status));
            }
        }
        table.push(cells);
    }
    table.to_string()
}
