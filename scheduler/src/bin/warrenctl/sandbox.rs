//! `sandbox`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use futures::stream::{self, StreamExt};
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{
    CreateSandboxRequest, DeleteSandboxRequest, GetSandboxRequest, ListSandboxesRequest, Resources, Sandbox,
    SandboxState, WatchSandboxesRequest, WatchSandboxesResponse,
};

use crate::client::{Client, request_id, sandboxes, within};
use crate::exec::{ExecArgs, exec};
use crate::failure::Failure;
use crate::names;
use crate::output::{Format, Output, Row, write};
use crate::table::{Table, age, bare, bytes, cpu, details, last_segment, or_dash};

/// Creates and deletes under way at once.
const PARALLEL: usize = 16;

/// Longest that `--wait` waits when it does not say.
const DEFAULT_WAIT: &str = "60s";

const WATCH_TYPE: &str = "warren.v1.WatchSandboxesResponse";

#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Creates sandboxes
    Create(CreateArgs),
    /// All sandboxes of the tenant
    List {
        /// Of all tenants
        #[arg(long)]
        all_tenants: bool,
    },
    /// One sandbox
    Show { name: String },
    /// What happens to sandboxes, as it happens
    Watch {
        /// Only this sandbox
        name: Option<String>,
        /// Continue from here
        #[arg(long, default_value = "")]
        token: String,
        /// Of all tenants
        #[arg(long)]
        all_tenants: bool,
    },
    /// Executes a command in a sandbox and exits as it did
    Exec(ExecArgs),
    /// Deletes sandboxes
    Delete {
        names: Vec<String>,
        /// Every sandbox of the tenant
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Wait until nothing is left of them
        #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = DEFAULT_WAIT, value_parser = names::duration)]
        wait: Option<Duration>,
    },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Id of the sandbox, or the beginning of ids with --count [default: the server's choice]
    #[arg(long)]
    id: Option<String>,
    #[arg(long, short)]
    template: String,
    /// vCPU, such as 0.25
    #[arg(long, value_parser = names::cpu, default_value = "0")]
    cpu: i64,
    /// Memory, such as 256MiB
    #[arg(long, value_parser = names::size, default_value = "0")]
    memory: i64,
    /// Writable disk, such as 1GiB
    #[arg(long, value_parser = names::size, default_value = "0")]
    disk: i64,
    /// Most processes and threads
    #[arg(long, default_value_t = 0)]
    pids: i64,
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    env: Vec<(String, String)>,
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    label: Vec<(String, String)>,
    #[arg(long, value_name = "DIR", default_value = "")]
    workdir: String,
    /// UUIDv7 that makes a retry safe [default: a new one]
    #[arg(long, value_name = "UUID", conflicts_with = "count")]
    request_id: Option<String>,
    /// How many; their ids are ID-1, ID-2, ...
    #[arg(long, value_name = "N")]
    count: Option<u32>,
    /// Wait until they run
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = DEFAULT_WAIT, value_parser = names::duration)]
    wait: Option<Duration>,
    /// Main process [default: the template's]
    #[arg(last = true)]
    command: Vec<String>,
}

impl Row for Sandbox {
    const TYPE: &'static str = "warren.v1.Sandbox";
    const HEADERS: &'static [&'static str] =
        &["SANDBOX", "STATE", "NODE", "TEMPLATE", "CPU", "MEMORY", "AGE", "REASON"];

    fn cells(&self) -> Vec<String> {
        let resources = self.resources.unwrap_or_default();
        let reason = match (&self.reason, &self.exit_status) {
            (Some(reason), _) => reason.code.clone(),
            (None, Some(exit)) => format!("exit {}", exit.code),
            (None, None) => String::new(),
        };
        vec![
            last_segment(&self.name),
            bare(self.state().as_str_name(), "SANDBOX_STATE_"),
            or_dash(last_segment(&self.node)),
            last_segment(&self.template),
            cpu(resources.cpu_milli),
            bytes(resources.memory_bytes),
            age(self.create_time.as_ref()),
            reason,
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

pub async fn run(client: &Client, output: &Output, command: SandboxCommand) -> Result<ExitCode, Failure> {
    match command {
        SandboxCommand::Create(args) => create(client, output, args).await?,
        SandboxCommand::List { all_tenants } => output.list(&list(client, all_tenants).await?.0)?,
        SandboxCommand::Show { name } => {
            let sandbox = get(client, &names::sandbox(&client.tenant, &name)).await?;
            output.one(&sandbox, || sandbox_details(&sandbox))?;
        }
        SandboxCommand::Watch { name, token, all_tenants } => watch(client, output, name, token, all_tenants).await?,
        SandboxCommand::Exec(args) => return exec(client, args).await,
        SandboxCommand::Delete { names, all, wait } => delete(client, output, names, all, wait).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn parent(client: &Client, all_tenants: bool) -> String {
    if all_tenants { "tenants/-".to_owned() } else { format!("tenants/{}", client.tenant) }
}

async fn get(client: &Client, name: &str) -> Result<Sandbox, Failure> {
    client
        .call(|c| {
            let request = within(GetSandboxRequest { name: name.to_owned() });
            async move { sandboxes(c).get_sandbox(request).await }
        })
        .await
}

/// Every sandbox, and where a watch continues from the first page.
async fn list(client: &Client, all_tenants: bool) -> Result<(Vec<Sandbox>, String), Failure> {
    let mut request =
        ListSandboxesRequest { parent: parent(client, all_tenants), page_size: 1000, page_token: String::new() };
    let mut all = Vec::new();
    let mut watch_token = None;
    loop {
        let page = client
            .call(|c| {
                let request = within(request.clone());
                async move { sandboxes(c).list_sandboxes(request).await }
            })
            .await?;
        all.extend(page.sandboxes);
        watch_token.get_or_insert(page.watch_token);
        if page.next_page_token.is_empty() {
            return Ok((all, watch_token.unwrap_or_default()));
        }
        request.page_token = page.next_page_token;
    }
}

fn sandbox_details(sandbox: &Sandbox) -> String {
    let resources = sandbox.resources.unwrap_or_default();
    let reason = sandbox.reason.as_ref().map(|reason| format!("{}: {}", reason.code, reason.message));
    let exit = sandbox.exit_status.map(|exit| {
        let oom = if exit.oom_killed { ", out of memory" } else { "" };
        format!("code {}, signal {}{oom}", exit.code, exit.signal)
    });
    let labels: Vec<String> = sandbox.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    details(&[
        ("Name", sandbox.name.clone()),
        ("State", bare(sandbox.state().as_str_name(), "SANDBOX_STATE_")),
        ("Reason", reason.unwrap_or_default()),
        ("Node", or_dash(sandbox.node.clone())),
        ("Epoch", sandbox.epoch.to_string()),
        ("Template", sandbox.template.clone()),
        ("Command", or_dash(sandbox.command.join(" "))),
        ("CPU", cpu(resources.cpu_milli)),
        ("Memory", bytes(resources.memory_bytes)),
        ("Disk", bytes(resources.disk_bytes)),
        ("Processes", resources.pids.to_string()),
        ("Labels", labels.join(", ")),
        ("Created", format!("{} ago", age(sandbox.create_time.as_ref()))),
        ("Exit", exit.unwrap_or_default()),
        ("Output", String::from_utf8_lossy(&sandbox.output_tail).into_owned()),
    ])
}

async fn create(client: &Client, output: &Output, args: CreateArgs) -> Result<(), Failure> {
    let sandbox = Sandbox {
        template: names::in_collection("templates", &args.template),
        command: args.command,
        environment: args.env.into_iter().collect(),
        labels: args.label.into_iter().collect(),
        working_directory: args.workdir,
        resources: Some(Resources {
            cpu_milli: args.cpu,
            memory_bytes: args.memory,
            disk_bytes: args.disk,
            pids: args.pids,
        }),
        ..Sandbox::default()
    };
    let ids: Vec<String> = match (args.count, args.id) {
        (None, id) => vec![id.unwrap_or_default()],
        (Some(count), Some(prefix)) => (1..=count).map(|n| format!("{prefix}-{n}")).collect(),
        (Some(count), None) => vec![String::new(); count as usize],
    };
    let deadline = Instant::now() + args.wait.unwrap_or_default();
    let mut created = Vec::new();
    let mut creating = stream::iter(ids.into_iter().map(|id| {
        let request_id = args.request_id.clone().unwrap_or_else(request_id);
        let request = CreateSandboxRequest {
            parent: parent(client, false),
            sandbox_id: id,
            sandbox: Some(sandbox.clone()),
            request_id,
        };
        create_one(client, request)
    }))
    .buffer_unordered(PARALLEL);
    while let Some(result) = creating.next().await {
        let sandbox = result?;
        // A name is printed as soon as it is acknowledged: whoever reads it may rely on it.
        if output.format == Format::Name {
            write(&format!("{}\n", sandbox.name))?;
        }
        created.push(sandbox);
    }
    if args.wait.is_some() {
        created = await_running(client, created, deadline).await?;
    }
    created.sort_by(|a, b| a.name.cmp(&b.name));
    match (output.format, created.as_slice()) {
        (Format::Name, _) => Ok(()),
        (Format::Json | Format::Yaml, [only]) if args.count.is_none() => output.one(only, String::new),
        _ => output.list(&created),
    }
}

async fn create_one(client: &Client, request: CreateSandboxRequest) -> Result<Sandbox, Failure> {
    client
        .call(|c| {
            let request = within(request.clone());
            async move { sandboxes(c).create_sandbox(request).await }
        })
        .await
}

/// Waits until each runs; fails when one ended or failed instead, or time is up.
async fn await_running(client: &Client, created: Vec<Sandbox>, deadline: Instant) -> Result<Vec<Sandbox>, Failure> {
    let mut waiting: BTreeSet<String> = created.iter().map(|sandbox| sandbox.name.clone()).collect();
    let mut latest: BTreeMap<String, Sandbox> = created.into_iter().map(|s| (s.name.clone(), s)).collect();
    let mut failed = Vec::new();
    follow(client, String::new(), parent(client, false), deadline, |event| {
        let Some(sandbox) = event.sandbox.as_ref().filter(|s| waiting.contains(&s.name)) else { return Ok(true) };
        match (event.kind(), sandbox.state()) {
            (Kind::Deleted, _) | (_, SandboxState::Failed | SandboxState::Stopped | SandboxState::Stopping) => {
                let state = bare(sandbox.state().as_str_name(), "SANDBOX_STATE_");
                let reason = sandbox.reason.as_ref().map(|r| r.message.clone()).unwrap_or_default();
                failed.push(format!("{} is {state}: {reason}", sandbox.name));
                waiting.remove(&sandbox.name);
            }
            (_, SandboxState::Running) => drop(waiting.remove(&sandbox.name)),
            _ => {}
        }
        latest.insert(sandbox.name.clone(), sandbox.clone());
        Ok(!waiting.is_empty())
    })
    .await
    .map_err(|failure| with_states(failure, &latest))?;
    if failed.is_empty() { Ok(latest.into_values().collect()) } else { Err(Failure::Failed(failed.join("\n"))) }
}

/// A time-out says what each sandbox that was waited for is doing.
fn with_states(failure: Failure, latest: &BTreeMap<String, Sandbox>) -> Failure {
    let Failure::TimedOut(what) = failure else { return failure };
    let waits = latest.values().filter(|sandbox| sandbox.state() != SandboxState::Running).take(10);
    let states: Vec<String> = waits
        .map(|s| {
            let reason = s.reason.as_ref().map(|r| r.message.clone()).unwrap_or_default();
            format!("{} is {} {reason}", s.name, bare(s.state().as_str_name(), "SANDBOX_STATE_"))
        })
        .collect();
    Failure::TimedOut(format!("{what}\n{}", states.join("\n")))
}

/// Follows a watch over breaks, until `seen` says that it is done or time is up.
async fn follow(
    client: &Client,
    mut token: String,
    parent: String,
    deadline: Instant,
    mut seen: impl FnMut(&WatchSandboxesResponse) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let timed_out = || Failure::TimedOut("timed out".to_owned());
    loop {
        let request = WatchSandboxesRequest { parent: parent.clone(), watch_token: token.clone() };
        let begin = |c| {
            let request = request.clone();
            async move { sandboxes(c).watch_sandboxes(request).await }
        };
        let mut events = client.call_until(deadline, begin).await?;
        loop {
            let next = tokio::time::timeout_at(deadline.into(), events.message()).await;
            match next.map_err(|_elapsed| timed_out())? {
                Ok(Some(event)) => {
                    // While the current ones are still coming, the token would leave some of them out.
                    if event.kind() != Kind::Current {
                        token.clone_from(&event.watch_token);
                    }
                    if !seen(&event)? {
                        return Ok(());
                    }
                }
                // It broke: go on from the token, elsewhere.
                Ok(None) | Err(_) => break,
            }
        }
        if Instant::now() >= deadline {
            return Err(timed_out());
        }
    }
}

async fn watch(
    client: &Client,
    output: &Output,
    name: Option<String>,
    token: String,
    all_tenants: bool,
) -> Result<(), Failure> {
    /// As good as for ever.
    const A_YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    let only = name.map(|name| names::sandbox(&client.tenant, &name));
    let deadline = Instant::now() + A_YEAR;
    follow(client, token, parent(client, all_tenants), deadline, |event| {
        let Some(sandbox) = &event.sandbox else { return Ok(true) };
        if only.as_ref().is_none_or(|only| *only == sandbox.name) {
            match output.format {
                Format::Name => write(&format!("{}\n", sandbox.name))?,
                Format::Table => {
                    let kind = bare(event.kind().as_str_name(), "KIND_").to_lowercase();
                    let mut row = vec![format!("{kind:<8}")];
                    row.extend(sandbox.cells().into_iter().take(4));
                    let widths = [8, 28, 12, 12, 12];
                    let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
                    write(&format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end()))?;
                }
                _ => output.line(WATCH_TYPE, event)?,
            }
        }
        Ok(true)
    })
    .await
}

async fn delete(
    client: &Client,
    output: &Output,
    given: Vec<String>,
    all: bool,
    wait: Option<Duration>,
) -> Result<(), Failure> {
    let (listed, token) = list(client, false).await?;
    let targets: Vec<String> = if all {
        listed.into_iter().map(|sandbox| sandbox.name).collect()
    } else {
        names::at_least_one(&given, "sandbox, or give --all")?;
        given.iter().map(|name| names::sandbox(&client.tenant, name)).collect()
    };
    let deadline = Instant::now() + wait.unwrap_or_default();
    let mut deleting = stream::iter(targets.iter().map(|name| {
        let request = DeleteSandboxRequest { name: name.clone(), allow_missing: all, request_id: request_id() };
        delete_one(client, request)
    }))
    .buffer_unordered(PARALLEL);
    let mut first_failure = None;
    let mut waiting: BTreeSet<String> = BTreeSet::new();
    while let Some((name, result)) = deleting.next().await {
        match result {
            // One that was on no node is gone already.
            Ok(sandbox) if sandbox.state() == SandboxState::Stopping => drop(waiting.insert(name)),
            Ok(_) => {}
            Err(failure) => {
                eprintln!("error: {name}: {failure}");
                first_failure.get_or_insert(failure);
            }
        }
    }
    if wait.is_some() && !waiting.is_empty() {
        follow(client, token, parent(client, false), deadline, |event| {
            if event.kind() == Kind::Deleted
                && let Some(sandbox) = &event.sandbox
            {
                waiting.remove(&sandbox.name);
            }
            Ok(!waiting.is_empty())
        })
        .await?;
    }
    if let Some(failure) = first_failure {
        return Err(failure);
    }
    match output.format {
        Format::Name => write(&targets.iter().map(|name| format!("{name}\n")).collect::<String>()),
        Format::Table => {
            let mut table = Table::new(&["SANDBOX", "STATE"]);
            let state = if wait.is_some() { "deleted" } else { "deleting" };
            targets.iter().for_each(|name| table.push(vec![last_segment(name), state.to_owned()]));
            write(&table.to_string())
        }
        _ => output.document(&serde_json::json!(targets)),
    }
}

async fn delete_one(client: &Client, request: DeleteSandboxRequest) -> (String, Result<Sandbox, Failure>) {
    let result = client
        .call(|c| {
            let request = within(request.clone());
            async move { sandboxes(c).delete_sandbox(request).await }
        })
        .await;
    (request.name, result)
}
