//! `debug bundle`: everything that helps to understand a region, in one file, and nothing that must not leave it.
//!
//! Left out: environments, secrets, command lines and outputs of sandboxes, annotations, tokens, keys.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;
use warren_proto::v1::{GetDebugInfoRequest, ListSandboxesRequest, Sandbox, Template};

use crate::client::{Client, PAGE_SIZE, cluster, sandboxes, within};
use crate::failure::{Failure, UNAVAILABLE, in_full};
use crate::output::{Format, Output};
use crate::replicas::{Answer, group};
use crate::{node, template, tenant};

/// Pages of sandboxes in a bundle: the newest would be better, but the first are enough to see what they look like.
const MAX_PAGES: usize = 10;

const LEFT_OUT: &str = "\
Left out of this bundle: environments, secrets, command lines, annotations and outputs of sandboxes; environments and command lines of templates; tokens; keys.
";

#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Write status, nodes, tenants, sandboxes, checks, configuration and metrics into a .tar.gz, without secrets; also without a
    /// leader. Exit code 5 where something could not be had
    Bundle {
        /// Where to
        file: PathBuf,
    },
}

/// Everything that can be had, with or without a leader; what could not be had is said in the bundle, and is exit code 5.
pub async fn run(client: &Client, command: DebugCommand) -> Result<ExitCode, Failure> {
    let DebugCommand::Bundle { file } = command;
    let group = group(client).await?;
    let mut bundle = Bundle::new(&file)?;
    bundle.add("README.txt", &about(client))?;
    let reading = match &group.leader {
        Ok(status) => {
            bundle.document("region.json", "GetClusterStatusResponse", status)?;
            None
        }
        Err(leaderless) => {
            bundle.miss("a leader", &leaderless.seen());
            Some(client.reading_stale())
        }
    };
    let reading = reading.as_ref().unwrap_or(client);
    for answer in group.replicas(client).await {
        bundle.answer("replicas", "GetReplicaStatusResponse", &answer)?;
        if answer.said.is_ok() {
            debug_info(client, &mut bundle, &answer.address).await?;
        }
    }
    bundle.fetched("nodes.jsonl", "Node", node::all(reading).await)?;
    bundle.fetched("templates.jsonl", "Template", redacted_templates(reading).await)?;
    bundle.fetched("tenants.jsonl", "Tenant", tenant::all(reading).await)?;
    bundle.fetched("sandboxes.jsonl", "Sandbox", redacted_sandboxes(reading).await)?;
    for answer in group.checks(client).await {
        bundle.answer("checks", "CheckStateResponse", &answer)?;
    }
    let missing = bundle.finish()?;
    eprint!("{}: {LEFT_OUT}", file.display());
    if missing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprint!("{}: could not be had, and is said in missing.txt:\n{missing}", file.display());
    Ok(ExitCode::from(UNAVAILABLE))
}

/// By what and whom the bundle was made, and what is not in it.
fn about(client: &Client) -> String {
    let endpoints: Vec<&str> = client.endpoints().map(|(address, _)| address).collect();
    format!("warrenctl {}, asking {}\n{LEFT_OUT}", env!("CARGO_PKG_VERSION"), endpoints.join(", "))
}

async fn redacted_templates(client: &Client) -> Result<Vec<Template>, Failure> {
    let mut templates = template::all(client).await?;
    for template in &mut templates {
        template.environment.clear();
        template.default_command.clear();
    }
    Ok(templates)
}

/// The name of a file about the replica at an address.
fn file_name(folder: &str, address: &str, ending: &str) -> String {
    format!("{folder}/{}.{ending}", address.replace([':', '/'], "_"))
}

async fn debug_info(client: &Client, bundle: &mut Bundle, address: &str) -> Result<(), Failure> {
    let mut replica = cluster(client.channel(address)?);
    match replica.get_debug_info(within(GetDebugInfoRequest {})).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            let config: String = answer.config.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
            bundle.add(&file_name("config", address, "txt"), &config)?;
            bundle.add(&file_name("metrics", address, "txt"), &answer.metrics)
        }
        Err(status) => {
            bundle.miss(&format!("configuration and metrics of {address}"), &in_full(&status));
            Ok(())
        }
    }
}

async fn redacted_sandboxes(client: &Client) -> Result<Vec<Sandbox>, Failure> {
    let mut request = ListSandboxesRequest {
        parent: "tenants/-".to_owned(),
        page_size: PAGE_SIZE,
        ..ListSandboxesRequest::default()
    };
    let mut all = Vec::new();
    for _ in 0..MAX_PAGES {
        let list = |c| {
            let request = client.reading(request.clone());
            async move { sandboxes(c).list_sandboxes(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.sandboxes.into_iter().map(redacted));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    Ok(all)
}

fn redacted(mut sandbox: Sandbox) -> Sandbox {
    sandbox.environment.clear();
    sandbox.secret_environment.clear();
    sandbox.secret_names.clear();
    sandbox.command.clear();
    sandbox.annotations.clear();
    sandbox.output_tail.clear();
    sandbox
}

struct Bundle {
    archive: tar::Builder<GzEncoder<File>>,
    /// When, in seconds since 1970.
    made: u64,
    /// What could not be had, a line each.
    missing: String,
    output: Output,
}

impl Bundle {
    fn new(file: &Path) -> Result<Self, Failure> {
        let file = File::create(file).map_err(Failure::io(format!("make {}", file.display())))?;
        let archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        let made = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Ok(Self { archive, made, missing: String::new(), output: Output::new(Format::Json) })
    }

    fn add(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.made);
        header.set_cksum();
        self.archive.append_data(&mut header, name, text.as_bytes()).map_err(Failure::io("write the bundle"))
    }

    fn document(&mut self, name: &str, kind: &str, message: &impl Message) -> Result<(), Failure> {
        let text = self.output.text(&self.output.json(&format!("warren.v1.{kind}"), message)?)?;
        self.add(name, &text)
    }

    fn miss(&mut self, what: &str, why: &str) {
        self.missing += &format!("{what}: {why}\n");
    }

    /// What one replica answered.
    fn answer<M: Message>(&mut self, folder: &str, kind: &str, answer: &Answer<M>) -> Result<(), Failure> {
        match &answer.said {
            Ok(said) => self.document(&file_name(folder, &answer.address, "json"), kind, said),
            Err(status) => {
                self.miss(&format!("{folder} of {}", answer.address), &in_full(status));
                Ok(())
            }
        }
    }

    /// A list, unless it could not be had.
    fn fetched<M: Message>(&mut self, name: &str, kind: &str, list: Result<Vec<M>, Failure>) -> Result<(), Failure> {
        match list {
            Ok(messages) => self.list(name, kind, &messages),
            Err(failure) => {
                self.miss(name, &failure.to_string());
                Ok(())
            }
        }
    }

    fn list<M: Message>(&mut self, name: &str, kind: &str, messages: &[M]) -> Result<(), Failure> {
        let mut text = String::new();
        for message in messages {
            let json = self.output.json(&format!("warren.v1.{kind}"), message)?;
            text += &(serde_json::to_string(&json).map_err(|e| Failure::Failed(e.to_string()))? + "\n");
        }
        self.add(name, &text)
    }

    /// Ends the file, and answers what is missing in it.
    fn finish(mut self) -> Result<String, Failure> {
        let missing = std::mem::take(&mut self.missing);
        if !missing.is_empty() {
            self.add("missing.txt", &missing)?;
        }
        let gzip = self.archive.into_inner().map_err(Failure::io("write the bundle"))?;
        let file = gzip.finish().map_err(Failure::io("write the bundle"))?;
        file.sync_all().map_err(Failure::io("sync the bundle"))?;
        Ok(missing)
    }
}
