//! `sandbox watch`: what happens to sandboxes, a line an event.

use std::ops::ControlFlow;

use clap::Args;
use warren_proto::v1::WatchSandboxesResponse;

use crate::client::Client;
use crate::failure::Failure;
use crate::follow::Follow;
use crate::names;
use crate::output::{Format, Output, write};
use crate::sandbox::{parent, state_word, why};
use crate::table::{bare, last_segment, or_dash};

const TYPE: &str = "warren.v1.WatchSandboxesResponse";

/// Columns of a table whose rows are not known when its first one is printed.
const WIDTHS: [usize; 4] = [8, 32, 12, 16];

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Only this sandbox: its id or full name
    name: Option<String>,
    /// Continue from here: a `watchToken` that a watch printed [default: begin with what there is]
    #[arg(long, default_value = "", hide_default_value = true)]
    token: String,
    /// Of all tenants
    #[arg(long, conflicts_with = "name")]
    all_tenants: bool,
}

/// Goes on until it is interrupted, its reader is gone, or no scheduler answers for as long as calls are tried.
pub async fn watch(client: &Client, output: &Output, args: WatchArgs) -> Result<(), Failure> {
    let only = args.name.map(|name| names::sandbox(&client.tenant, &name));
    let parent = match only.as_deref().and_then(|name| name.split_once("/sandboxes/")) {
        Some((tenant, _)) => tenant.to_owned(),
        None => parent(client, args.all_tenants),
    };
    if output.format == Format::Table {
        write(&row(["EVENT", "SANDBOX", "STATE", "NODE"].map(str::to_owned), "REASON"))?;
    }
    let follow = Follow { parent, token: args.token, deadline: None };
    let print = |event: &WatchSandboxesResponse| {
        let name = event.sandbox.as_ref().map(|sandbox| sandbox.name.as_str());
        // SYNCED is about no sandbox, and programs want to know of it.
        if only.is_none() || name.is_none() || name == only.as_deref() {
            show(output, event)?;
        }
        Ok(ControlFlow::Continue(()))
    };
    follow.each(client, print).await
}

fn show(output: &Output, event: &WatchSandboxesResponse) -> Result<(), Failure> {
    match (output.format, &event.sandbox) {
        (Format::Name, Some(sandbox)) => write(&format!("{}\n", sandbox.name)),
        (Format::Table, Some(sandbox)) => {
            let node = or_dash(last_segment(&sandbox.node));
            let cells =
                [bare(event.kind().as_str_name(), "KIND_"), last_segment(&sandbox.name), state_word(sandbox), node];
            write(&row(cells, &why(sandbox)))
        }
        (Format::Table | Format::Name, None) => Ok(()),
        (Format::Yaml, _) => write(&format!("---\n{}", output.text(&output.json(TYPE, event)?)?)),
        (Format::Json, _) => output.document(&output.json(TYPE, event)?),
        (Format::Jsonl, _) => output.line(TYPE, event),
    }
}

fn row(cells: [String; 4], last: &str) -> String {
    let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}   "));
    format!("{}\n", (padded.collect::<String>() + last).trim_end())
}
