//! `status`: the region at a glance, with or without a leader.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde::Serialize;
use tonic::Status;
use warren_proto::v1::{
    GetClusterStatusRequest, GetClusterStatusResponse, GetReplicaStatusRequest, GetReplicaStatusResponse, Member,
    MemberRole,
};

use crate::client::{Client, cluster, within};
use crate::failure::{Failure, UNAVAILABLE, in_full};
use crate::json::Json;
use crate::output::{Format, Output, Row, write};
use crate::table::{Table, bare, bytes, cpu, details, of};

const CLUSTER_TYPE: &str = "warren.v1.GetClusterStatusResponse";
const REPLICA_TYPE: &str = "warren.v1.GetReplicaStatusResponse";

/// How long `status` looks for a leader: a few elections. Who asks how things are does not want to wait for them to be well.
const LEADER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a replica may take to say how it is.
const REPLICA_PATIENCE: Duration = Duration::from_secs(2);

/// The region at a glance; without a leader, what each replica says of itself (exit code 5).
pub async fn status(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    match cluster_status(client, Instant::now() + client.timeout.min(LEADER_PATIENCE)).await {
        Ok(status) => {
            match output.format {
                Format::Table => write(&overview(&status))?,
                Format::Name => write(&format!("{}\n", status.ledger_id))?,
                _ => output.document(&output.json(CLUSTER_TYPE, &status)?)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) if failure.exit_code() == UNAVAILABLE => {
            partial(client, output).await?;
            Err(failure)
        }
        Err(failure) => Err(failure),
    }
}

pub async fn cluster_status(client: &Client, deadline: Instant) -> Result<GetClusterStatusResponse, Failure> {
    let get = |c| async move { cluster(c).get_cluster_status(within(GetClusterStatusRequest {})).await };
    client.call_until(deadline, get).await
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

/// One endpoint, and what its replica says of itself.
struct Answer<'a> {
    endpoint: &'a str,
    own: Result<GetReplicaStatusResponse, Status>,
}

/// What each endpoint's replica says of itself.
async fn partial(client: &Client, output: &Output) -> Result<(), Failure> {
    let answers = join_all(client.endpoints().map(|(endpoint, channel)| async move {
        let mut replica = cluster(channel);
        let asking = replica.get_replica_status(within(GetReplicaStatusRequest {}));
        let asked = tokio::time::timeout(REPLICA_PATIENCE, asking).await;
        let own =
            asked.unwrap_or_else(|_elapsed| Err(Status::unavailable("no answer"))).map(|answer| answer.into_inner());
        Answer { endpoint, own }
    }))
    .await;
    match output.format {
        Format::Table => write(&replicas(&answers)),
        Format::Name => Ok(()),
        _ => {
            let replicas = answers.iter().map(|answer| answer.shown(output)).collect::<Result<_, _>>()?;
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

impl Answer<'_> {
    fn shown(&self, output: &Output) -> Result<Replica, Failure> {
        let endpoint = self.endpoint.to_owned();
        Ok(match &self.own {
            Ok(own) => Replica { endpoint, status: Some(output.json(REPLICA_TYPE, own)?), error: None },
            Err(status) => Replica { endpoint, status: None, error: Some(in_full(status)) },
        })
    }
}

fn replicas(answers: &[Answer<'_>]) -> String {
    let mut table = Table::new(&["ENDPOINT", "REPLICA", "LEADER", "TERM", "APPLIED", "VERSION", "PROBLEM"]);
    for answer in answers {
        let mut cells = vec![answer.endpoint.to_owned()];
        match &answer.own {
            Ok(own) => {
                let leader = if own.leader_id == 0 { "none".to_owned() } else { own.leader_id.to_string() };
                let numbers = [own.replica_id.to_string(), leader, own.term.to_string(), own.applied_index.to_string()];
                cells.extend(numbers);
                cells.push(own.version.clone());
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
