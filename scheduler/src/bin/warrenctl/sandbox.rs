//! `sandbox`: its subcommands, and how a sandbox is shown.

use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{GetSandboxRequest, ListSandboxesRequest, Sandbox};

use crate::client::{Client, PAGE_SIZE, sandboxes, within};
use crate::create::{CreateArgs, create};
use crate::delete::{DeleteArgs, delete};
use crate::exec::{ExecArgs, exec};
use crate::failure::Failure;
use crate::names;
use crate::output::{Output, Row};
use crate::table::{age, bare, bytes, cpu, details, joined, last_segment, or_dash};
use crate::watch::{WatchArgs, watch};

#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Create sandboxes
    Create(CreateArgs),
    /// List the sandboxes of the tenant
    List {
        /// Of all tenants
        #[arg(long)]
        all_tenants: bool,
    },
    /// Show one sandbox
    Show {
        /// Id or full name
        name: String,
    },
    /// Show what happens to sandboxes, as it happens
    Watch(WatchArgs),
    /// Execute a command in a sandbox, and exit as it did
    Exec(ExecArgs),
    /// Delete sandboxes
    Delete(DeleteArgs),
}

pub async fn run(client: &Client, output: &Output, command: SandboxCommand) -> Result<ExitCode, Failure> {
    match command {
        SandboxCommand::Create(args) => create(client, output, args).await?,
        SandboxCommand::List { all_tenants } => output.list(&list(client, &parent(client, all_tenants)).await?)?,
        SandboxCommand::Show { name } => {
            let sandbox = get(client, &names::sandbox(&client.tenant, &name)).await?;
            output.one(&sandbox, || sandbox_details(&sandbox))?;
        }
        SandboxCommand::Watch(args) => watch(client, output, args).await?,
        SandboxCommand::Exec(args) => return exec(client, args).await,
        SandboxCommand::Delete(args) => delete(client, output, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What lists and watches are of.
pub fn parent(client: &Client, all_tenants: bool) -> String {
    if all_tenants { "tenants/-".to_owned() } else { format!("tenants/{}", client.tenant) }
}

async fn get(client: &Client, name: &str) -> Result<Sandbox, Failure> {
    let get = |c| {
        let request = within(GetSandboxRequest { name: name.to_owned() });
        async move { sandboxes(c).get_sandbox(request).await }
    };
    client.call(get).await
}

/// Every sandbox, page by page.
pub async fn list(client: &Client, parent: &str) -> Result<Vec<Sandbox>, Failure> {
    let mut request = ListSandboxesRequest {
        parent: parent.to_owned(),
        page_size: PAGE_SIZE,
        page_token: String::new(),
        ..Default::default()
    };
    let mut all = Vec::new();
    loop {
        let list = |c| {
            let request = within(request.clone());
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

fn sandbox_details(sandbox: &Sandbox) -> String {
    let resources = sandbox.resources.unwrap_or_default();
    let reason = sandbox.reason.as_ref().map(|reason| format!("{}: {}", reason.code, reason.message));
    let exit = sandbox.exit_status.map(|exit| {
        let signal = if exit.signal == 0 { String::new() } else { format!(", signal {}", exit.signal) };
        let oom = if exit.oom_killed { ", out of memory" } else { "" };
        format!("code {}{signal}{oom}", exit.code)
    });
    let ago = |time: Option<&_>| time.map(|time| format!("{} ago", age(Some(time)))).unwrap_or_default();
    details(&[
        ("Name", sandbox.name.clone()),
        ("State", state_word(sandbox)),
        ("Reason", reason.unwrap_or_default()),
        ("Node", or_dash(sandbox.node.clone())),
        ("Epoch", sandbox.epoch.to_string()),
        ("Template", sandbox.template.clone()),
        ("Command", sandbox.command.join(" ")),
        ("Working directory", sandbox.working_directory.clone()),
        ("Environment", joined(&sandbox.environment)),
        ("Labels", joined(&sandbox.labels)),
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
