//! `status`, `server`, `node`.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;
use warren_proto::v1::{
    GetClusterStatusRequest, GetClusterStatusResponse, GetNodeRequest, GetReplicaStatusRequest,
    GetReplicaStatusResponse, ListNodesRequest, Member, Node, Resources,
};

use crate::client::{Client, cluster, nodes, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Format, Output, Row, write};
use crate::table::{age, bare, bytes, cpu, details, last_segment, of, or_dash};

const CLUSTER_TYPE: &str = "warren.v1.GetClusterStatusResponse";
const REPLICA_TYPE: &str = "warren.v1.GetReplicaStatusResponse";

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// The replicas, their roles, and how far behind they are
    Members,
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// All nodes
    List,
    /// One node
    Show { node: String },
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

impl Row for Node {
    const TYPE: &'static str = "warren.v1.Node";
    const HEADERS: &'static [&'static str] = &["NODE", "STATE", "SANDBOXES", "CPU", "MEMORY", "DISK", "ADDRESS", "AGE"];

    fn cells(&self) -> Vec<String> {
        let (used, all) = (self.assigned.unwrap_or_default(), self.capacity.unwrap_or_default());
        vec![
            last_segment(&self.name),
            bare(self.state().as_str_name(), "NODE_STATE_"),
            self.sandbox_count.to_string(),
            of(cpu(used.cpu_milli), cpu(all.cpu_milli)),
            of(bytes(used.memory_bytes), bytes(all.memory_bytes)),
            of(bytes(used.disk_bytes), bytes(all.disk_bytes)),
            self.address.clone(),
            age(self.register_time.as_ref()),
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

/// The region at a glance; without a leader, what each replica says of itself (exit code 5).
pub async fn status(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let asking =
        client.call(|c| async move { cluster(c).get_cluster_status(within(GetClusterStatusRequest {})).await });
    match asking.await {
        Ok(status) => {
            match output.format {
                Format::Table => write(&overview(&status))?,
                Format::Name => write(&format!("{}\n", status.ledger_id))?,
                _ => output.document(&output.json(CLUSTER_TYPE, &status)?)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) if failure.exit_code() == 5 => {
            eprintln!("warning: no leader answers: {failure}");
            partial(client, output).await?;
            Ok(ExitCode::from(5))
        }
        Err(failure) => Err(failure),
    }
}

fn overview(status: &GetClusterStatusResponse) -> String {
    let (used, all) = (status.assigned.unwrap_or_default(), status.capacity.unwrap_or_default());
    let counts: Vec<String> = status
        .sandbox_counts
        .iter()
        .filter(|count| count.count > 0)
        .map(|count| format!("{} {}", count.count, count.state.to_lowercase()))
        .collect();
    let reachable = status.members.iter().filter(|member| member.reachable).count();
    let usage = |used: String, all: String| of(used, all);
    details(&[
        ("Ledger", status.ledger_id.clone()),
        ("Replicas", format!("{reachable} of {} reachable", status.members.len())),
        ("Leader", format!("replica {}, term {}, revision {}", status.leader_id, status.term, status.revision)),
        ("Nodes", format!("{} of {} ready", status.ready_node_count, status.node_count)),
        ("Sandboxes", if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }),
        ("CPU", usage(cpu(used.cpu_milli), cpu(all.cpu_milli))),
        ("Memory", usage(bytes(used.memory_bytes), bytes(all.memory_bytes))),
        ("Disk", usage(bytes(used.disk_bytes), bytes(all.disk_bytes))),
    ])
}

/// What each endpoint's replica says of itself.
async fn partial(client: &Client, output: &Output) -> Result<(), Failure> {
    let mut shown = Vec::new();
    for (address, channel) in client.endpoints() {
        let answer = cluster(channel).get_replica_status(within(GetReplicaStatusRequest {})).await;
        match answer {
            Ok(response) => shown.push((address, Ok(response.into_inner()))),
            Err(status) => shown.push((address, Err(status.message().to_owned()))),
        }
    }
    if output.format == Format::Table {
        return shown.iter().try_for_each(|(address, answer)| write(&format!("{address}  {}\n", in_words(answer))));
    }
    let mut replicas = Vec::new();
    for (address, answer) in &shown {
        replicas.push(match answer {
            Ok(status) => json!({ "address": address, "status": output.json(REPLICA_TYPE, status)? }),
            Err(error) => json!({ "address": address, "error": error }),
        });
    }
    output.document(&json!({ "replicas": replicas }))
}

fn in_words(answer: &Result<GetReplicaStatusResponse, String>) -> String {
    match answer {
        Err(error) => format!("does not answer: {error}"),
        Ok(own) => {
            let leader = if own.leader_id == 0 { "none".to_owned() } else { own.leader_id.to_string() };
            format!("replica {}, leader {leader}, term {}, applied {}", own.replica_id, own.term, own.applied_index)
        }
    }
}

pub async fn server(client: &Client, output: &Output, command: ServerCommand) -> Result<ExitCode, Failure> {
    let ServerCommand::Members = command;
    let status =
        client.call(|c| async move { cluster(c).get_cluster_status(within(GetClusterStatusRequest {})).await }).await?;
    output.list(&status.members)?;
    Ok(ExitCode::SUCCESS)
}

pub async fn node(client: &Client, output: &Output, command: NodeCommand) -> Result<ExitCode, Failure> {
    match command {
        NodeCommand::List => output.list(&all_nodes(client).await?)?,
        NodeCommand::Show { node } => {
            let name = names::in_collection("nodes", &node);
            let get = |c| {
                let request = within(GetNodeRequest { name: name.clone() });
                async move { nodes(c).get_node(request).await }
            };
            let node = client.call(get).await?;
            output.one(&node, || node_details(&node))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn all_nodes(client: &Client) -> Result<Vec<Node>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = within(ListNodesRequest { page_size: 1000, page_token: page_token.clone() });
            async move { nodes(c).list_nodes(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.nodes);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

fn node_details(node: &Node) -> String {
    let (used, all) = (node.assigned.unwrap_or_default(), node.capacity.unwrap_or_default());
    let free = |all: i64, used: i64| all.saturating_sub(used).max(0);
    let left = Resources {
        cpu_milli: free(all.cpu_milli, used.cpu_milli),
        memory_bytes: free(all.memory_bytes, used.memory_bytes),
        ..Resources::default()
    };
    let labels: Vec<String> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    details(&[
        ("Name", node.name.clone()),
        ("State", bare(node.state().as_str_name(), "NODE_STATE_")),
        ("Address", node.address.clone()),
        ("Agent", node.agent_version.clone()),
        ("Drivers", node.drivers.join(", ")),
        ("Labels", or_dash(labels.join(", "))),
        ("Sandboxes", node.sandbox_count.to_string()),
        ("CPU", format!("{}, {} free", of(cpu(used.cpu_milli), cpu(all.cpu_milli)), cpu(left.cpu_milli))),
        (
            "Memory",
            format!("{}, {} free", of(bytes(used.memory_bytes), bytes(all.memory_bytes)), bytes(left.memory_bytes)),
        ),
        ("Disk", of(bytes(used.disk_bytes), bytes(all.disk_bytes))),
        ("Generation", node.generation.to_string()),
        ("Templates", or_dash(node.template_digests.join(", "))),
        ("Orphans", node.orphans.join(", ")),
        ("Registered", format!("{} ago", age(node.register_time.as_ref()))),
    ])
}
