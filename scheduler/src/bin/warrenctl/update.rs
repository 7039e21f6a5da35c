//! `sandbox update` and `sandbox wait`.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use prost_types::FieldMask;
use warren_proto::v1::{Sandbox, SandboxState, UpdateSandboxRequest, WaitSandboxRequest};

use crate::client::{Client, request_id, sandboxes, within};
use crate::failure::Failure;
use crate::names;
use crate::output::Output;
use crate::sandbox::{get, sandbox_details, state_word};
use crate::settings::{self, Deadline};

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Id or full name
    name: String,
    /// Set a label, or take it away with `KEY-`
    #[arg(long, short, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Set an annotation, or take it away with `KEY-`
    #[arg(long, value_name = "KEY=VALUE")]
    annotation: Vec<String>,
    #[command(flatten)]
    deadline: Deadline,
    /// What it may reach: `none`, `public`, or destinations separated by commas
    #[arg(long, value_name = "WHAT")]
    egress: Option<String>,
    /// 0 to 100; the higher is placed first
    #[arg(long)]
    priority: Option<i32>,
    /// Only if this is its latest etag
    #[arg(long, default_value = "", hide_default_value = true)]
    etag: String,
}

pub async fn update(client: &Client, output: &Output, args: UpdateArgs) -> Result<(), Failure> {
    let name = names::sandbox(&client.tenant, &args.name);
    let before = get(client, &name).await?;
    let mut sandbox = Sandbox { name, etag: args.etag, ..Sandbox::default() };
    let mut paths = Vec::new();
    if !args.label.is_empty() {
        sandbox.labels = changed(before.labels, &args.label)?;
        paths.push("labels");
    }
    if !args.annotation.is_empty() {
        sandbox.annotations = changed(before.annotations, &args.annotation)?;
        paths.push("annotations");
    }
    if args.deadline.is_some() {
        (sandbox.ttl, sandbox.deadline) = args.deadline.wire();
        paths.push("deadline");
    }
    if let Some(egress) = &args.egress {
        sandbox.egress = Some(settings::egress(egress));
        paths.push("egress");
    }
    if let Some(priority) = args.priority {
        sandbox.priority = priority;
        paths.push("priority");
    }
    if paths.is_empty() {
        return Err(Failure::Usage(
            "nothing to change: give --label, --annotation, --ttl, --egress or --priority".into(),
        ));
    }
    // What was read must be what is changed, or another's label would be lost.
    if sandbox.etag.is_empty() && !(args.label.is_empty() && args.annotation.is_empty()) {
        sandbox.etag = before.etag;
    }
    let update_mask = Some(FieldMask { paths: paths.into_iter().map(str::to_owned).collect() });
    let request = UpdateSandboxRequest { sandbox: Some(sandbox), update_mask, request_id: request_id() };
    let call = |c| {
        let request = within(request.clone());
        async move { sandboxes(c).update_sandbox(request).await }
    };
    let after = client.call(call).await?;
    output.one(&after, || sandbox_details(&after))
}

/// `KEY=VALUE` sets, `KEY-` takes away.
fn changed(mut pairs: BTreeMap<String, String>, changes: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    for change in changes {
        match (change.split_once('='), change.strip_suffix('-')) {
            (Some((key, value)), _) => drop(pairs.insert(key.to_owned(), value.to_owned())),
            (None, Some(key)) => drop(pairs.remove(key)),
            (None, None) => {
                return Err(Failure::Usage(format!("`{change}`: expected KEY=VALUE, or KEY- to take it away")));
            }
        }
    }
    Ok(pairs)
}

#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Id or full name
    name: String,
    /// States, any of which ends the wait, such as `running` or `stopped`
    #[arg(long = "for", value_delimiter = ',', default_value = "running", value_parser = settings::state)]
    states: Vec<SandboxState>,
    /// How long
    #[arg(long = "wait", value_parser = names::duration, default_value = "60s")]
    patience: Duration,
}

/// Longest that one call waits; a longer wait is several of them.
const ONE_CALL: Duration = Duration::from_secs(8);

pub async fn wait(client: &Client, output: &Output, args: WaitArgs) -> Result<(), Failure> {
    let name = names::sandbox(&client.tenant, &args.name);
    let until = std::time::Instant::now() + args.patience;
    // It must be answered before the call is given up.
    let one_call = ONE_CALL.min(client.timeout / 2);
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let request = WaitSandboxRequest {
            name: name.clone(),
            states: args.states.iter().map(|state| (*state).into()).collect(),
            timeout: left.min(one_call).max(Duration::from_millis(1)).try_into().ok(),
        };
        let call = |c| {
            let request = within(request.clone());
            async move { sandboxes(c).wait_sandbox(request).await }
        };
        let answer = client.call(call).await?;
        let sandbox = answer.sandbox.unwrap_or_default();
        if answer.reached {
            return output.one(&sandbox, || sandbox_details(&sandbox));
        }
        let ended = sandbox.end_time.is_some() && sandbox.node.is_empty();
        if ended {
            return Err(Failure::Failed(format!("{name} is {}: it will not come to that", state_word(&sandbox))));
        }
        if left <= one_call {
            let reason = sandbox.reason.clone().unwrap_or_default();
            let why =
                if reason.code.is_empty() { String::new() } else { format!(": {}: {}", reason.code, reason.message) };
            return Err(Failure::TimedOut(format!(
                "{name} is {} after {:?}{why}",
                state_word(&sandbox),
                args.patience
            )));
        }
    }
}
