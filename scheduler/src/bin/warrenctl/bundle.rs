//! `debug bundle`: everything that helps to understand a region, in one file, and nothing that must not leave it.
//!
//! Left out: environments, secrets, command lines and outputs of sandboxes, annotations, tokens, keys.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;
use warren_proto::v1::{GetDebugInfoRequest, ListSandboxesRequest, Sandbox};

use crate::client::{Client, PAGE_SIZE, cluster, sandboxes, within};
use crate::failure::{Failure, in_full};
use crate::output::{Format, Output};
use crate::raft::{checks, replicas};
use crate::status::cluster_status;
use crate::{node, tenant};

/// Pages of sandboxes in a bundle: the newest would be better, but the first are enough to see what they look like.
const MAX_PAGES: usize = 10;

const LEFT_OUT: &str = "\
Left out of this bundle: environments, secrets, command lines, annotations and outputs of sandboxes; tokens; keys.
";

#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Write status, nodes, tenants, sandboxes, checks, configuration and metrics into a .tar.gz, without secrets
    Bundle {
        /// Where to
        file: PathBuf,
    },
}

pub async fn run(client: &Client, command: DebugCommand) -> Result<ExitCode, Failure> {
    let DebugCommand::Bundle { file } = command;
    let mut bundle = Bundle::new(&file)?;
    bundle.add("README.txt", LEFT_OUT)?;
    bundle.document("region.json", "GetClusterStatusResponse", &cluster_status(client, client.deadline()).await?)?;
    for answer in replicas(client).await? {
        let name = format!("replicas/{}.json", answer.address.replace([':', '/'], "_"));
        match answer.said {
            Ok(own) => bundle.document(&name, "GetReplicaStatusResponse", &own)?,
            Err(status) => bundle.add(&name, &in_full(&status))?,
        }
        debug_info(client, &mut bundle, &answer.address).await?;
    }
    bundle.list("nodes.jsonl", "Node", &node::all(client).await?)?;
    bundle.list("tenants.jsonl", "Tenant", &tenant::all(client).await?)?;
    bundle.list("sandboxes.jsonl", "Sandbox", &redacted_sandboxes(client).await?)?;
    for answer in checks(client).await? {
        let name = format!("checks/{}.json", answer.address.replace([':', '/'], "_"));
        match answer.said {
            Ok(said) => bundle.document(&name, "CheckStateResponse", &said)?,
            Err(status) => bundle.add(&name, &in_full(&status))?,
        }
    }
    bundle.finish()?;
    eprint!("{}: {LEFT_OUT}", file.display());
    Ok(ExitCode::SUCCESS)
}

async fn debug_info(client: &Client, bundle: &mut Bundle, address: &str) -> Result<(), Failure> {
    let mut replica = cluster(client.channel(address)?);
    let name = address.replace([':', '/'], "_");
    match replica.get_debug_info(within(GetDebugInfoRequest {})).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            let config: String = answer.config.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
            bundle.add(&format!("config/{name}.txt"), &config)?;
            bundle.add(&format!("metrics/{name}.txt"), &answer.metrics)
        }
        Err(status) => bundle.add(&format!("config/{name}.txt"), &in_full(&status)),
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
            let request = within(request.clone());
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
    output: Output,
}

impl Bundle {
    fn new(file: &Path) -> Result<Self, Failure> {
        let file = File::create(file).map_err(Failure::io("make the bundle"))?;
        let archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        Ok(Self { archive, output: Output::new(Format::Json) })
    }

    fn add(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_cksum();
        self.archive.append_data(&mut header, name, text.as_bytes()).map_err(Failure::io("write the bundle"))
    }

    fn document(&mut self, name: &str, kind: &str, message: &impl Message) -> Result<(), Failure> {
        let text = self.output.text(&self.output.json(&format!("warren.v1.{kind}"), message)?)?;
        self.add(name, &text)
    }

    fn list<M: Message>(&mut self, name: &str, kind: &str, messages: &[M]) -> Result<(), Failure> {
        let mut text = String::new();
        for message in messages {
            let json = self.output.json(&format!("warren.v1.{kind}"), message)?;
            text += &(serde_json::to_string(&json).map_err(|e| Failure::Failed(e.to_string()))? + "\n");
        }
        self.add(name, &text)
    }

    fn finish(self) -> Result<(), Failure> {
        let gzip = self.archive.into_inner().map_err(Failure::io("write the bundle"))?;
        let file = gzip.finish().map_err(Failure::io("write the bundle"))?;
        file.sync_all().map_err(Failure::io("sync the bundle"))
    }
}
