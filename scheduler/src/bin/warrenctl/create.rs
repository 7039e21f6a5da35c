//! `sandbox create`: one, or many at once; acknowledged ones are never lost sight of.

use std::time::Duration;

use clap::Args;
use futures::stream::{self, StreamExt};
use warren_proto::v1::batch_create_result::Result as ItemResult;
use warren_proto::v1::{
    BatchCreateSandboxesRequest, CreateSandboxRequest, OnIsolation, Resources, RestartPolicy, Sandbox,
};

use crate::client::{Client, request_id, sandboxes, within};
use crate::failure::Failure;
use crate::follow::{Follow, Goal, Outcome, Wait, plight};
use crate::names;
use crate::output::{Format, Output, Row};
use crate::sandbox::parent;
use crate::settings::{self, Deadline, Isolation, Restart};

/// Changes under way at once: enough to fill the schedulers' batches, few enough to leave room for other callers.
pub const PARALLEL: usize = 32;

/// Longest that `--wait` waits when it does not say.
pub const DEFAULT_WAIT: &str = "60s";

/// Most that one command creates.
const MAX_COUNT: i64 = 100_000;

/// Most sandboxes that a timed-out wait names.
const MAX_NAMED: usize = 10;

/// What a sandbox is given and how it behaves.
#[derive(Debug, Args)]
pub struct SpecArgs {
    /// vCPU, such as 0.25 [default: 0.25]
    #[arg(long, value_parser = names::cpu, default_value = "0", hide_default_value = true)]
    cpu: i64,
    /// Memory, such as 256MiB [default: 256MiB]
    #[arg(long, value_parser = names::size, default_value = "0", hide_default_value = true)]
    memory: i64,
    /// Writable disk, such as 1GiB [default: 1GiB]
    #[arg(long, value_parser = names::size, default_value = "0", hide_default_value = true)]
    disk: i64,
    /// Most processes and threads [default: 256]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pids: i64,
    /// Environment, added to the template's
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    env: Vec<(String, String)>,
    /// Label
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    label: Vec<(String, String)>,
    /// Annotation
    #[arg(long, value_name = "KEY=VALUE", value_parser = names::pair)]
    annotation: Vec<(String, String)>,
    /// Variable whose value nobody sees: NAME=VALUE, or NAME to take it from this environment
    #[arg(long, value_name = "NAME[=VALUE]")]
    secret: Vec<String>,
    /// GPU devices
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    gpus: i64,
    /// What it may reach: `none`, `public`, or destinations separated by commas [default: none]
    #[arg(long, value_name = "WHAT")]
    egress: Option<String>,
    /// Whether it is started again when its main process ends
    #[arg(long, value_enum)]
    restart: Option<Restart>,
    /// What happens when its node is silent for longer than its lease
    #[arg(long, value_enum)]
    on_isolation: Option<Isolation>,
    #[command(flatten)]
    deadline: Deadline,
    /// How long it may wait for a node
    #[arg(long, value_parser = names::duration)]
    queue_timeout: Option<Duration>,
    /// 0 to 100; the higher is placed first
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    priority: i32,
    /// Working directory [default: the template's]
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    workdir: String,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Id of the sandbox, or the beginning of ids with --count [default: the server's choice]
    #[arg(long)]
    id: Option<String>,
    /// Template to start from
    #[arg(long, short)]
    template: String,
    #[command(flatten)]
    spec: SpecArgs,
    /// UUIDv7 that makes a later run of this same command safe [default: a new one]
    #[arg(long, value_name = "UUID", conflicts_with = "count")]
    request_id: Option<String>,
    /// How many; their ids are ID-1, ID-2, ...
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=MAX_COUNT))]
    count: Option<i64>,
    /// Create all of them or none: at most 1,000
    #[arg(long, requires = "count")]
    all_or_nothing: bool,
    /// Wait until they run
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = DEFAULT_WAIT,
          value_parser = names::duration)]
    wait: Option<Duration>,
    /// Main process [default: the template's]
    #[arg(last = true)]
    command: Vec<String>,
}

impl SpecArgs {
    /// Of a template, with a main process; the template's own where `command` is empty.
    pub fn sandbox(&self, template: &str, command: &[String]) -> Result<Sandbox, Failure> {
        let (ttl, deadline) = self.deadline.wire();
        let secrets = self.secret.iter().map(|text| settings::secret(text));
        Ok(Sandbox {
            template: names::in_collection("templates", template),
            command: command.to_vec(),
            environment: self.env.iter().cloned().collect(),
            labels: self.label.iter().cloned().collect(),
            working_directory: self.workdir.clone(),
            resources: Some(Resources {
                cpu_milli: self.cpu,
                memory_bytes: self.memory,
                disk_bytes: self.disk,
                pids: self.pids,
                gpus: self.gpus,
            }),
            annotations: self.annotation.iter().cloned().collect(),
            secret_environment: secrets.collect::<Result<_, _>>()?,
            egress: self.egress.as_deref().map(settings::egress),
            restart_policy: self.restart.map_or(0, |policy| RestartPolicy::from(policy).into()),
            on_isolation: self.on_isolation.map_or(0, |policy| OnIsolation::from(policy).into()),
            ttl,
            deadline,
            queue_timeout: self.queue_timeout.and_then(|time| time.try_into().ok()),
            priority: self.priority,
            ..Sandbox::default()
        })
    }
}

impl CreateArgs {
    fn ids(&self) -> Vec<String> {
        match (self.count, &self.id) {
            (None, id) => vec![id.clone().unwrap_or_default()],
            (Some(count), Some(prefix)) => (1..=count).map(|n| format!("{prefix}-{n}")).collect(),
            (Some(count), None) => (1..=count).map(|_| String::new()).collect(),
        }
    }

    fn requests(&self, parent: &str) -> Result<Vec<CreateSandboxRequest>, Failure> {
        let sandbox = self.spec.sandbox(&self.template, &self.command)?;
        let request = |sandbox_id| CreateSandboxRequest {
            parent: parent.to_owned(),
            sandbox_id,
            sandbox: Some(sandbox.clone()),
            request_id: self.request_id.clone().unwrap_or_else(request_id),
        };
        Ok(self.ids().into_iter().map(request).collect())
    }
}

pub async fn create(client: &Client, output: &Output, args: CreateArgs) -> Result<(), Failure> {
    let parent = parent(client, false);
    let follow = match args.wait {
        Some(wait) => Some(Follow::from_now(client, parent.clone(), wait).await?),
        None => None,
    };
    let mut printer = Printer { output, single: args.count.is_none(), kept: Vec::new() };
    let mut failures = Vec::new();
    let mut wait = Wait::new(Goal::Running);
    let requests = args.requests(&parent)?;
    let mut creating = if args.all_or_nothing {
        stream::iter(create_all(client, &parent, requests).await?.into_iter().map(Ok)).boxed_local()
    } else {
        stream::iter(requests.into_iter().map(|r| create_one(client, r))).buffer_unordered(PARALLEL).boxed_local()
    };
    while let Some(result) = creating.next().await {
        let sandbox = match result {
            Ok(sandbox) => sandbox,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        printer.acknowledged(&sandbox)?;
        match follow.is_some().then(|| wait.add(sandbox.name.clone(), sandbox.clone())) {
            Some(None) => {}
            Some(Some(outcome)) => failures.extend(ended(&mut printer, sandbox, outcome)?),
            None => printer.settled(sandbox)?,
        }
    }
    if let Some(follow) = follow {
        let waited = wait.all(client, follow, |sandbox, outcome| {
            failures.extend(ended(&mut printer, sandbox, outcome)?);
            Ok(())
        });
        if let Err(failure) = waited.await {
            failures.push(with_plights(failure, &wait));
        }
        wait.left().try_for_each(|sandbox| printer.settled(sandbox.clone()))?;
    }
    printer.finish()?;
    all_of(failures, "not every sandbox was created as asked")
}

fn ended(printer: &mut Printer, sandbox: Sandbox, outcome: Outcome) -> Result<Option<Failure>, Failure> {
    let failure = match outcome {
        Outcome::Reached => None,
        Outcome::Never(why) => Some(Failure::Failed(format!("{} {why}", sandbox.name))),
    };
    printer.settled(sandbox)?;
    Ok(failure)
}

/// One failure as it is; of several each is told, and the first gives the exit code.
pub fn all_of(mut failures: Vec<Failure>, what: &str) -> Result<(), Failure> {
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        _ => {
            failures.iter().for_each(Failure::tell);
            Err(Failure::Several { what: what.to_owned(), code: failures[0].exit_code() })
        }
    }
}

pub async fn create_one(client: &Client, request: CreateSandboxRequest) -> Result<Sandbox, Failure> {
    let create = |c| {
        let request = within(request.clone());
        async move { sandboxes(c).create_sandbox(request).await }
    };
    client.call(create).await
}

/// One call for all of them; its retries share one request id.
async fn create_all(
    client: &Client,
    parent: &str,
    mut requests: Vec<CreateSandboxRequest>,
) -> Result<Vec<Sandbox>, Failure> {
    for request in &mut requests {
        // The batch's own count.
        request.request_id.clear();
    }
    let batch = BatchCreateSandboxesRequest {
        parent: parent.to_owned(),
        requests,
        all_or_nothing: true,
        request_id: request_id(),
    };
    let create = |c| {
        let request = within(batch.clone());
        async move { sandboxes(c).batch_create_sandboxes(request).await }
    };
    let made = client.call(create).await?.results.into_iter().filter_map(|result| result.result);
    Ok(made.filter_map(|result| if let ItemResult::Sandbox(sandbox) = result { Some(sandbox) } else { None }).collect())
}

/// A time-out says what those that were waited for are doing.
pub fn with_plights(failure: Failure, wait: &Wait) -> Failure {
    let Failure::TimedOut(what) = failure else { return failure };
    let lines: Vec<String> =
        wait.left().take(MAX_NAMED).map(|sandbox| format!("{} {}", sandbox.name, plight(sandbox))).collect();
    let more = match wait.left().count().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!("\n... and {more} more"),
    };
    Failure::TimedOut(format!("{what}: {}{more}", lines.join("\n")))
}

/// Prints each sandbox once: a name as soon as it is acknowledged, so that whoever reads it may rely on it; a line once
/// nothing is waited for any more; tables and documents at the end.
struct Printer<'a> {
    output: &'a Output,
    single: bool,
    kept: Vec<Sandbox>,
}

impl Printer<'_> {
    fn acknowledged(&self, sandbox: &Sandbox) -> Result<(), Failure> {
        if self.output.format == Format::Name { self.output.list(std::slice::from_ref(sandbox)) } else { Ok(()) }
    }

    fn settled(&mut self, sandbox: Sandbox) -> Result<(), Failure> {
        match self.output.format {
            Format::Name => {}
            Format::Jsonl => self.output.line(Sandbox::TYPE, &sandbox)?,
            _ => self.kept.push(sandbox),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Failure> {
        self.kept.sort_by(|a, b| names::natural(&a.name).cmp(&names::natural(&b.name)));
        match (self.output.format, self.kept.as_slice()) {
            (Format::Name | Format::Jsonl, _) => Ok(()),
            // What was not created is told as an error, not as an empty table.
            (Format::Table, []) => Ok(()),
            (Format::Json | Format::Yaml, []) if self.single => Ok(()),
            (Format::Json | Format::Yaml, [only]) if self.single => self.output.one(only, String::new),
            (_, kept) => self.output.list(kept),
        }
    }
}
