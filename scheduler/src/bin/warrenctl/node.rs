//! `node`.

use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{GetNodeRequest, ListNodesRequest, Node};

use crate::client::{Client, PAGE_SIZE, nodes, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Output, Row};
use crate::table::{age, bare, bytes, cpu, details, joined, last_segment, of, or_dash};

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes
    List,
    /// Show one node
    Show {
        /// Id or full name
        node: String,
    },
}

pub async fn run(client: &Client, output: &Output, command: NodeCommand) -> Result<ExitCode, Failure> {
    match command {
        NodeCommand::List => output.list(&all(client).await?)?,
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

async fn all(client: &Client) -> Result<Vec<Node>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = within(ListNodesRequest { page_size: PAGE_SIZE, page_token: page_token.clone() });
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

fn node_details(node: &Node) -> String {
    let (used, all) = (node.assigned.unwrap_or_default(), node.capacity.unwrap_or_default());
    let usage = |show: fn(i64) -> String, used: i64, all: i64| {
        format!("{}, {} free", of(show(used), show(all)), show(all.saturating_sub(used)))
    };
    details(&[
        ("Name", node.name.clone()),
        ("State", bare(node.state().as_str_name(), "NODE_STATE_")),
        ("Address", node.address.clone()),
        ("Agent", node.agent_version.clone()),
        ("Drivers", node.drivers.join(", ")),
        ("Labels", or_dash(joined(&node.labels))),
        ("Sandboxes", node.sandbox_count.to_string()),
        ("CPU", usage(cpu, used.cpu_milli, all.cpu_milli)),
        ("Memory", usage(bytes, used.memory_bytes, all.memory_bytes)),
        ("Disk", usage(bytes, used.disk_bytes, all.disk_bytes)),
        ("Generation", node.generation.to_string()),
        ("Templates", or_dash(node.template_digests.join(", "))),
        ("Orphans", node.orphans.join(", ")),
        ("Registered", format!("{} ago", age(node.register_time.as_ref()))),
    ])
}
