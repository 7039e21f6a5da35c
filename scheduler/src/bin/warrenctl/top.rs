//! `top`: who uses most.

use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::Node;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, Output, Row, write};
use crate::table::Table;
use crate::{node, tenant};

/// Lines that are shown: a screen.
const SHOWN: usize = 30;

#[derive(Debug, Subcommand)]
pub enum TopCommand {
    /// The fullest nodes, by the dimension that each is fullest in
    Nodes,
    /// The tenants with most memory
    Tenants,
}

pub async fn run(client: &Client, output: &Output, command: TopCommand) -> Result<ExitCode, Failure> {
    match command {
        TopCommand::Nodes => {
            let mut nodes = node::all(client).await?;
            nodes.sort_by_key(|node| std::cmp::Reverse(fullness(node)));
            match output.format {
                Format::Table => show_nodes(&nodes)?,
                _ => show(output, nodes)?,
            }
        }
        TopCommand::Tenants => {
            let mut tenants = tenant::all(client).await?;
            tenants.sort_by_key(|tenant| std::cmp::Reverse(tenant.usage.unwrap_or_default().memory_bytes));
            show(output, tenants)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show<R: Row>(output: &Output, mut rows: Vec<R>) -> Result<(), Failure> {
    let all = rows.len();
    rows.truncate(SHOWN);
    output.list(&rows)?;
    if all > SHOWN {
        eprintln!("the first {SHOWN} of {all}");
    }
    Ok(())
}

/// As a list, and how full each is.
fn show_nodes(nodes: &[Node]) -> Result<(), Failure> {
    let mut table = Table::new(&["NODE", "STATE", "FULL", "OF", "SANDBOXES", "CPU", "MEMORY", "DISK"]);
    for node in nodes.iter().take(SHOWN) {
        let (thousandths, scarcest) = fullness(node);
        let [name, state, sandboxes, cpu, memory, disk, ..] = &node.cells()[..] else { continue };
        let full = format!("{}.{} %", thousandths / 10, thousandths % 10);
        let row = [name, state, &full, scarcest, sandboxes, cpu, memory, disk];
        table.push(row.map(|cell| cell.to_string()).to_vec());
    }
    write(&table.to_string())?;
    if nodes.len() > SHOWN {
        eprintln!("the first {SHOWN} of {}", nodes.len());
    }
    Ok(())
}

/// The share of its scarcest dimension, in thousandths, and which one that is.
fn fullness(node: &Node) -> (i64, &'static str) {
    let (used, all) = (node.assigned.unwrap_or_default(), node.capacity.unwrap_or_default());
    let share = |used: i64, all: i64| if all > 0 { used.saturating_mul(1000) / all } else { 0 };
    let shares = [
        (share(used.cpu_milli, all.cpu_milli), "cpu"),
        (share(used.memory_bytes, all.memory_bytes), "memory"),
        (share(used.disk_bytes, all.disk_bytes), "disk"),
    ];
    shares.into_iter().max().unwrap_or_default()
}
