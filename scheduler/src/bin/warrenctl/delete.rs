//! `sandbox delete`: some, or all of a tenant; with `--wait` until nothing is left of them.

use std::time::Duration;

use clap::Args;
use futures::stream::{self, StreamExt};
use warren_proto::v1::{DeleteSandboxRequest, Sandbox};

use crate::client::{Client, request_id, sandboxes, within};
use crate::create::{DEFAULT_WAIT, PARALLEL, all_of, with_plights};
use crate::failure::Failure;
use crate::follow::{Follow, Goal, Wait};
use crate::names;
use crate::output::{Format, Output, Row, write};
use crate::sandbox::{list, parent};
use crate::table::{Table, last_segment};

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Ids or full names
    #[arg(required_unless_present = "all")]
    names: Vec<String>,
    /// Every sandbox of the tenant
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// It is fine if there is none
    #[arg(long)]
    allow_missing: bool,
    /// Wait until nothing is left of them
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = DEFAULT_WAIT,
          value_parser = names::duration)]
    wait: Option<Duration>,
}

pub async fn delete(client: &Client, output: &Output, args: DeleteArgs) -> Result<(), Failure> {
    let targets = targets(client, &args).await?;
    let follow = match args.wait {
        Some(wait) => Some(Follow::from_now(client, common_parent(&targets), wait).await?),
        None => None,
    };
    let mut gone = Gone { output, waits: args.wait.is_some(), kept: Vec::new() };
    let mut failures = Vec::new();
    let mut wait = Wait::new(Goal::Gone);
    let allow_missing = args.all || args.allow_missing;
    let requests =
        targets.into_iter().map(|name| DeleteSandboxRequest { name, allow_missing, request_id: request_id() });
    let mut deleting = stream::iter(requests.map(|r| delete_one(client, r))).buffer_unordered(PARALLEL);
    while let Some(result) = deleting.next().await {
        match result {
            // There was none.
            Ok(sandbox) if sandbox.name.is_empty() => {}
            Ok(sandbox) if follow.is_some() => drop(wait.add(sandbox.name.clone(), sandbox)),
            Ok(sandbox) => gone.add(sandbox)?,
            Err(failure) => failures.push(failure),
        }
    }
    if let Some(follow) = follow {
        let waited = wait.all(client, follow, |sandbox, _reached| gone.add(sandbox));
        if let Err(failure) = waited.await {
            failures.push(with_plights(failure, &wait));
        }
    }
    gone.finish()?;
    all_of(failures, "not every sandbox was deleted")
}

async fn targets(client: &Client, args: &DeleteArgs) -> Result<Vec<String>, Failure> {
    if args.all {
        let all = list(client, &parent(client, false)).await?;
        return Ok(all.into_iter().map(|sandbox| sandbox.name).collect());
    }
    let mut targets: Vec<String> = args.names.iter().map(|name| names::sandbox(&client.tenant, name)).collect();
    targets.sort();
    targets.dedup();
    Ok(targets)
}

/// The tenant of all of them, or all tenants where they are of several.
fn common_parent(targets: &[String]) -> String {
    let tenant = |name: &String| name.split('/').take(2).collect::<Vec<_>>().join("/");
    let first = targets.first().map(tenant).unwrap_or_else(|| "tenants/-".to_owned());
    if targets.iter().all(|name| tenant(name) == first) { first } else { "tenants/-".to_owned() }
}

pub async fn delete_one(client: &Client, request: DeleteSandboxRequest) -> Result<Sandbox, Failure> {
    let delete = |c| {
        let request = within(request.clone());
        async move { sandboxes(c).delete_sandbox(request).await }
    };
    client.call(delete).await
}

/// What was deleted: names and lines at once, tables and documents at the end.
struct Gone<'a> {
    output: &'a Output,
    waits: bool,
    kept: Vec<Sandbox>,
}

impl Gone<'_> {
    fn add(&mut self, sandbox: Sandbox) -> Result<(), Failure> {
        match self.output.format {
            Format::Name => self.output.list(&[sandbox]),
            Format::Jsonl => self.output.line(Sandbox::TYPE, &sandbox),
            _ => {
                self.kept.push(sandbox);
                Ok(())
            }
        }
    }

    fn finish(mut self) -> Result<(), Failure> {
        self.kept.sort_by(|a, b| names::natural(&a.name).cmp(&names::natural(&b.name)));
        match self.output.format {
            Format::Name | Format::Jsonl => Ok(()),
            Format::Json | Format::Yaml => self.output.list(&self.kept),
            Format::Table if self.kept.is_empty() => Ok(()),
            Format::Table => {
                let mut table = Table::new(&["SANDBOX", "STATE"]);
                let state = if self.waits { "deleted" } else { "deleting" };
                self.kept.iter().for_each(|sandbox| table.push(vec![last_segment(&sandbox.name), state.to_owned()]));
                write(&table.to_string())
            }
        }
    }
}
