//! `sandbox`: its subcommands, and how a sandbox is shown.

use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{EgressMode, GetSandboxRequest, ListSandboxesRequest, Sandbox, SandboxState};

use crate::client::{Client, PAGE_SIZE, sandboxes};
use crate::create::{CreateArgs, create};
use crate::delete::{DeleteArgs, delete};
use crate::failure::Failure;
use crate::inside::{
    self, AttachArgs, CatArgs, CpArgs, ExecArgs, ForwardArgs, KillArgs, LogsArgs, LsArgs, MkdirArgs, MvArgs, PsArgs,
    RmArgs, RunArgs, StatsArgs,
};
use crate::names;
use crate::output::{Output, Row};
use crate::settings;
use crate::table::{age, bare, bytes, cpu, details, joined, last_segment, or_dash};
use crate::update::{UpdateArgs, WaitArgs, update, wait};
use crate::watch::{WatchArgs, watch};

#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Create sandboxes
    Create(Box<CreateArgs>),
    /// List the sandboxes of the tenant
    List {
        /// Of all tenants
        #[arg(long)]
        all_tenants: bool,
        #[command(flatten)]
        filter: FilterArgs,
    },
    /// Show one sandbox
    Show {
        /// Id or full name
        name: String,
    },
    /// Change labels, annotations, deadline, egress or priority
    Update(UpdateArgs),
    /// Wait until a sandbox is in a state
    Wait(WaitArgs),
    /// Show what happens to sandboxes, as it happens
    Watch(WatchArgs),
    /// Execute a command in a sandbox of its own, and exit as it did
    Run(Box<RunArgs>),
    /// Execute a command in a sandbox, and exit as it did
    Exec(ExecArgs),
    /// List the processes that were started in a sandbox
    Ps(PsArgs),
    /// Take up the streams of a process, and exit as it does
    Attach(AttachArgs),
    /// Send a signal to processes
    Kill(KillArgs),
    /// Copy files and directories into a sandbox and out of one
    Cp(CpArgs),
    /// List a directory in a sandbox
    Ls(LsArgs),
    /// Write a file in a sandbox to standard output
    Cat(CatArgs),
    /// Make a directory in a sandbox
    Mkdir(MkdirArgs),
    /// Move or rename a file in a sandbox
    Mv(MvArgs),
    /// Remove a file or directory in a sandbox
    Rm(RmArgs),
    /// Show what a sandbox's main process wrote
    Logs(LogsArgs),
    /// Forward ports of this machine to ports in a sandbox
    Forward(ForwardArgs),
    /// Show what sandboxes use
    Stats(StatsArgs),
    /// Delete sandboxes
    Delete(DeleteArgs),
}

pub async fn run(client: &Client, output: &Output, command: SandboxCommand) -> Result<ExitCode, Failure> {
    match command {
        SandboxCommand::Create(args) => create(client, output, *args).await?,
        SandboxCommand::List { all_tenants, filter } => {
            output.list(&list_filtered(client, filter.request(&parent(client, all_tenants))).await?)?;
        }
        SandboxCommand::Update(args) => update(client, output, args).await?,
        SandboxCommand::Wait(args) => wait(client, output, args).await?,
        SandboxCommand::Show { name } => {
            let sandbox = get(client, &names::sandbox(&client.tenant, &name)).await?;
            output.one(&sandbox, || sandbox_details(&sandbox))?;
        }
        SandboxCommand::Watch(args) => watch(client, output, args).await?,
        SandboxCommand::Run(args) => return inside::run(client, *args).await,
        SandboxCommand::Exec(args) => return inside::exec(client, output, args).await,
        SandboxCommand::Ps(args) => inside::ps(client, output, args).await?,
        SandboxCommand::Attach(args) => return inside::attach(client, args).await,
        SandboxCommand::Kill(args) => inside::kill(client, args).await?,
        SandboxCommand::Cp(args) => inside::cp(client, args).await?,
        SandboxCommand::Ls(args) => inside::ls(client, output, args).await?,
        SandboxCommand::Cat(args) => inside::cat(client, args).await?,
        SandboxCommand::Mkdir(args) => inside::mkdir(client, args).await?,
        SandboxCommand::Mv(args) => inside::mv(client, args).await?,
        SandboxCommand::Rm(args) => inside::rm(client, args).await?,
        SandboxCommand::Logs(args) => return inside::logs(client, output, args).await,
        SandboxCommand::Forward(args) => inside::forward(client, args).await?,
        SandboxCommand::Stats(args) => inside::stats(client, output, args).await?,
        SandboxCommand::Delete(args) => delete(client, output, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Which of them.
#[derive(Debug, clap::Args)]
pub struct FilterArgs {
    /// Only those in these states
    #[arg(long, value_delimiter = ',', value_parser = settings::state)]
    state: Vec<SandboxState>,
    /// Only those that bear this label
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    label: Vec<(String, String)>,
    /// Only those on this node
    #[arg(long)]
    node: Option<String>,
}

impl FilterArgs {
    fn request(self, parent: &str) -> ListSandboxesRequest {
        ListSandboxesRequest {
            parent: parent.to_owned(),
            page_size: PAGE_SIZE,
            page_token: String::new(),
            states: self.state.into_iter().map(Into::into).collect(),
            labels: self.label.into_iter().collect(),
            node: self.node.map(|node| names::in_collection("nodes", &node)).unwrap_or_default(),
        }
    }
}

/// What lists and watches are of.
pub fn parent(client: &Client, all_tenants: bool) -> String {
    if all_tenants { "tenants/-".to_owned() } else { format!("tenants/{}", client.tenant) }
}

pub async fn get(client: &Client, name: &str) -> Result<Sandbox, Failure> {
    let get = |c| {
        let request = client.reading(GetSandboxRequest { name: name.to_owned() });
        async move { sandboxes(c).get_sandbox(request).await }
    };
    client.call(get).await
}

/// Every sandbox, page by page.
pub async fn list(client: &Client, parent: &str) -> Result<Vec<Sandbox>, Failure> {
    let parent = parent.to_owned();
    list_filtered(client, ListSandboxesRequest { parent, page_size: PAGE_SIZE, ..Default::default() }).await
}

async fn list_filtered(client: &Client, mut request: ListSandboxesRequest) -> Result<Vec<Sandbox>, Failure> {
    let mut all = Vec::new();
    loop {
        let list = |c| {
            let request = client.reading(request.clone());
            async move { sandboxes(c).list_sandboxes(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.sandboxes);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

impl Row for Sandbox {
    const TYPE: &'static str = "warren.v1.Sandbox";
    const HEADERS: &'static [&'static str] =
        &["SANDBOX", "STATE", "NODE", "TEMPLATE", "CPU", "MEMORY", "AGE", "REASON"];

    fn cells(&self) -> Vec<String> {
        let resources = self.resources.unwrap_or_default();
        vec![
            last_segment(&self.name),
            state_word(self),
            or_dash(last_segment(&self.node)),
            last_segment(&self.template),
            cpu(resources.cpu_milli),
            bytes(resources.memory_bytes),
            age(self.create_time.as_ref()),
            why(self),
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

pub fn state_word(sandbox: &Sandbox) -> String {
    bare(sandbox.state().as_str_name(), "SANDBOX_STATE_")
}

/// Why it is in its state, in a word or two.
pub fn why(sandbox: &Sandbox) -> String {
    match (&sandbox.reason, &sandbox.exit_status) {
        (Some(reason), _) => reason.code.clone(),
        (None, Some(exit)) if exit.oom_killed => "out of memory".to_owned(),
        (None, Some(exit)) => format!("exit {}", exit.code),
        (None, None) => String::new(),
    }
}

/// Nothing where it is not set.
fn policy(name: &str, prefix: &str, times: u32) -> String {
    let word = bare(name, prefix).to_lowercase().replace('_', "-");
    match (word.as_str(), times) {
        ("unspecified", _) => String::new(),
        (word, 0) => word.to_owned(),
        (word, times) => format!("{word}, {times} times so far"),
    }
}

fn egress(sandbox: &Sandbox) -> String {
    let Some(egress) = &sandbox.egress else { return String::new() };
    match egress.mode() {
        EgressMode::List => egress.allow.join(", "),
        mode => bare(mode.as_str_name(), "EGRESS_MODE_").to_lowercase(),
    }
}

pub fn sandbox_details(sandbox: &Sandbox) -> String {
    let resources = sandbox.resources.unwrap_or_default();
    let reason = sandbox.reason.as_ref().map(|reason| format!("{}: {}", reason.code, reason.message));
    let exit = sandbox.exit_status.map(|exit| {
        let signal = if exit.signal == 0 { String::new() } else { format!(", signal {}", exit.signal) };
        let oom = if exit.oom_killed { ", out of memory" } else { "" };
        format!("code {}{signal}{oom}", exit.code)
    });
    let queue = match sandbox.queue_position {
        0 => String::new(),
        place => format!("place {place} of its tenant"),
    };
    let ago = |time: Option<&_>| time.map(|time| format!("{} ago", age(Some(time)))).unwrap_or_default();
    details(&[
        ("Name", sandbox.name.clone()),
        ("State", state_word(sandbox)),
        ("Reason", reason.unwrap_or_default()),
        ("Queue", queue),
        ("Looked at", sandbox.retry_time.map(|at| format!("{at} at the latest")).unwrap_or_default()),
        ("Node", or_dash(sandbox.node.clone())),
        ("Epoch", sandbox.epoch.to_string()),
        ("GPUs", sandbox.gpu_uuids.join(", ")),
        ("Template", sandbox.template.clone()),
        ("Command", sandbox.command.join(" ")),
        ("Working directory", sandbox.working_directory.clone()),
        ("Environment", joined(&sandbox.environment)),
        ("Secrets", sandbox.secret_names.join(", ")),
        ("Labels", joined(&sandbox.labels)),
        ("Annotations", joined(&sandbox.annotations)),
        ("Egress", egress(sandbox)),
        ("Restart", policy(sandbox.restart_policy().as_str_name(), "RESTART_POLICY_", sandbox.restart_count)),
        ("On isolation", policy(sandbox.on_isolation().as_str_name(), "ON_ISOLATION_", 0)),
        ("Priority", if sandbox.priority == 0 { String::new() } else { sandbox.priority.to_string() }),
        ("Deadline", sandbox.deadline.map(|at| at.to_string()).unwrap_or_default()),
        ("CPU", cpu(resources.cpu_milli)),
        ("Memory", bytes(resources.memory_bytes)),
        ("Disk", bytes(resources.disk_bytes)),
        ("Processes", format!("at most {}", resources.pids)),
        ("Created", ago(sandbox.create_time.as_ref())),
        ("Started", ago(sandbox.start_time.as_ref())),
        ("Ended", ago(sandbox.end_time.as_ref())),
        ("Exit", exit.unwrap_or_default()),
        ("Output", String::from_utf8_lossy(&sandbox.output_tail).trim_end().to_owned()),
    ])
}
