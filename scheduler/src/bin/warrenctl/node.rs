//! `node`.

use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{
    CordonNodeRequest, ForgetNodeRequest, GetNodeRequest, ListNodesRequest, Node, NodeGpu, SetNodeLabelsRequest,
    StopOrphanRequest, UncordonNodeRequest,
};

use crate::client::{Client, PAGE_SIZE, nodes, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Format, Output, Row, write};
use crate::table::{Table, age, bare, bytes, cpu, details, joined, last_segment, of, or_dash};
use crate::terminal::confirm;

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes
    List,
    /// Show one node
    Show {
        /// Id or full name
        node: String,
    },
    /// Place nothing more on a node
    Cordon {
        /// Id or full name
        node: String,
    },
    /// Place on it again
    Uncordon {
        /// Id or full name
        node: String,
    },
    /// Set labels, or take them away with `KEY-`
    Label {
        /// Id or full name
        node: String,
        /// `KEY=VALUE` or `KEY-`
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// Give up a node that is not ready: what it ran is lost, or starts elsewhere where its restart policy says so
    Forget {
        /// Id or full name
        node: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// List what nodes run and the ledger does not know
    Orphans,
    /// Kill an orphan
    StopOrphan {
        /// Id or full name of its node
        node: String,
        /// As `node orphans` shows it: `{sandbox}@{epoch}`
        orphan: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

pub async fn run(client: &Client, output: &Output, command: NodeCommand) -> Result<ExitCode, Failure> {
    match command {
        NodeCommand::List => output.list(&all(client).await?)?,
        NodeCommand::Show { node } => {
            let name = names::in_collection("nodes", &node);
            let get = |c| {
                let request = client.reading(GetNodeRequest { name: name.clone() });
                async move { nodes(c).get_node(request).await }
            };
            let node = client.call(get).await?;
            output.one(&node, || node_details(&node))?;
        }
        NodeCommand::Orphans => orphans(client, output).await?,
        change => {
            if let Some(node) = operate(client, change).await? {
                output.one(&node, || node_details(&node))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Changes a node, and answers it if it is still there.
async fn operate(client: &Client, command: NodeCommand) -> Result<Option<Node>, Failure> {
    let full = |node: &str| names::in_collection("nodes", node);
    let node = match command {
        NodeCommand::Cordon { node } => {
            let request = CordonNodeRequest { name: full(&node) };
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { nodes(c).cordon_node(r).await }
                })
                .await?
        }
        NodeCommand::Uncordon { node } => {
            let request = UncordonNodeRequest { name: full(&node) };
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { nodes(c).uncordon_node(r).await }
                })
                .await?
        }
        NodeCommand::Label { node, labels } => {
            let set = labels.iter().filter_map(|label| label.split_once('='));
            let remove = labels.iter().filter(|label| !label.contains('=')).filter_map(|label| label.strip_suffix('-'));
            let request = SetNodeLabelsRequest {
                name: full(&node),
                set: set.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
                remove: remove.map(str::to_owned).collect(),
            };
            if request.set.len() + request.remove.len() != labels.len() {
                return Err(Failure::Usage("a label is KEY=VALUE, or KEY- to take it away".to_owned()));
            }
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { nodes(c).set_node_labels(r).await }
                })
                .await?
        }
        NodeCommand::StopOrphan { node, orphan, yes } => {
            let parsed = orphan.rsplit_once('@').and_then(|(name, epoch)| Some((name, epoch.parse().ok()?)));
            let (sandbox, epoch) = parsed.ok_or_else(|| {
                Failure::Usage(format!("`{orphan}`: expected {{sandbox}}@{{epoch}}, as `node orphans` shows it"))
            })?;
            confirm(&format!("{orphan} on {node} is killed, with all that is in it"), yes)?;
            let request =
                StopOrphanRequest { name: full(&node), sandbox: names::sandbox(&client.tenant, sandbox), epoch };
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { nodes(c).stop_orphan(r).await }
                })
                .await?
        }
        NodeCommand::Forget { node, yes } => {
            confirm(&format!("{node} is given up, and what it runs with it"), yes)?;
            let request = ForgetNodeRequest { name: full(&node) };
            client
                .call(|c| {
                    let r = within(request.clone());
                    async move { nodes(c).forget_node(r).await }
                })
                .await?;
            eprintln!("{node} is forgotten; if it returns it is a new node, and what it still runs are orphans");
            return Ok(None);
        }
        NodeCommand::List | NodeCommand::Show { .. } | NodeCommand::Orphans => return Ok(None),
    };
    Ok(Some(node))
}

async fn orphans(client: &Client, output: &Output) -> Result<(), Failure> {
    let nodes = all(client).await?;
    let found = nodes.iter().flat_map(|node| node.orphans.iter().map(|orphan| (last_segment(&node.name), orphan)));
    if output.format != Format::Table {
        let shown = found.map(|(node, orphan)| serde_json::json!({ "node": node, "orphan": orphan }));
        return output.document(&shown.collect::<Vec<_>>());
    }
    let mut table = Table::new(&["NODE", "ORPHAN"]);
    found.for_each(|(node, orphan)| table.push(vec![node, orphan.clone()]));
    write(&table.to_string())
}

pub async fn all(client: &Client) -> Result<Vec<Node>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = client.reading(ListNodesRequest { page_size: PAGE_SIZE, page_token: page_token.clone() });
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
            state_words(self),
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

/// As kubectl has it: `READY,CORDONED`.
fn state_words(node: &Node) -> String {
    let state = bare(node.state().as_str_name(), "NODE_STATE_");
    if node.cordoned { format!("{state},CORDONED") } else { state }
}

/// `GPU-1 (A100, 40 GiB, held)`.
fn gpu(gpu: &NodeGpu) -> String {
    let held = match gpu.held_milli {
        0 => "free".to_owned(),
        1000 => "held".to_owned(),
        some => format!("{some}/1000 held"),
    };
    format!("{} ({}, {}, {held})", gpu.uuid, gpu.model, bytes(gpu.memory_bytes))
}

fn node_details(node: &Node) -> String {
    let (used, all) = (node.assigned.unwrap_or_default(), node.capacity.unwrap_or_default());
    let usage = |show: fn(i64) -> String, used: i64, all: i64| {
        format!("{}, {} free", of(show(used), show(all)), show(all.saturating_sub(used)))
    };
    details(&[
        ("Name", node.name.clone()),
        ("State", format!("{} for {}", state_words(node), age(node.state_time.as_ref()))),
        ("Fence", if node.fence { "yes" } else { "no" }.to_owned()),
        ("Address", node.address.clone()),
        ("Agent", node.agent_version.clone()),
        ("Drivers", node.drivers.join(", ")),
        ("Labels", or_dash(joined(&node.labels))),
        ("Sandboxes", node.sandbox_count.to_string()),
        ("CPU", usage(cpu, used.cpu_milli, all.cpu_milli)),
        ("Memory", usage(bytes, used.memory_bytes, all.memory_bytes)),
        ("Disk", usage(bytes, used.disk_bytes, all.disk_bytes)),
        ("GPUs", or_dash(node.gpus.iter().map(gpu).collect::<Vec<_>>().join(", "))),
        ("Generation", node.generation.to_string()),
        ("Templates", or_dash(node.template_digests.join(", "))),
        ("Orphans", node.orphans.join(", ")),
        ("Left over", node.leftovers.join(", ")),
        ("Registered", format!("{} ago", age(node.register_time.as_ref()))),
    ])
}
