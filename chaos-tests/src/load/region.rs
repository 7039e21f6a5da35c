//! A region of real schedulers and simulated nodes, for measurements.
//!
//! Nodes offer far more than there is, so that creating never ends; their sandboxes exist in memory alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tempfile::TempDir;
use tokio::time::Instant;
use tonic::transport::Channel;
use warren_proto::client::{ClientTls, channel};
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::{CreateTemplateRequest, ListSandboxesRequest, Template};

use super::probe::Server;
use super::{Place, network};
use crate::client::{Client, TENANT};
use crate::cluster::TEMPLATE;
use crate::cluster::binaries::Binaries;
use crate::cluster::process::Process;

/// Syncs of the log since the scheduler began, on its metrics page.
const SYNCS: &str = "warren_raft_log_syncs_total";

/// Group of the first scheduler, the next is one more: the packet filter of a partition tells them apart by it.
pub const FIRST_GROUP: u32 = 47_101;

/// Where schedulers hear each other, at each one's own address.
pub const PEER_PORT: u16 = 7071;

/// Largest page of a list.
const PAGE_SIZE: i32 = 1000;
const MAX_PAGE_BYTES: usize = 64 << 20;

/// Nodes of the fleet are called so, and a number.
const NODE_PREFIX: &str = "sim-";

/// How fast a fleet registers: each node is a commit, and an operator's hosts do not start in one second either.
const NODES_A_SECOND: f64 = 500.0;

/// How long a fleet may take beside that.
const FLEET_PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a region is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    pub schedulers: usize,
    pub nodes: usize,
    /// What each node offers, in vCPU; memory and disk in proportion.
    pub node_cpus: u64,
    /// More flags.
    pub scheduler_flags: Vec<String>,
    pub fleet_flags: Vec<String>,
}

/// What the fleet says of itself.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct Counts {
    pub registered: usize,
    pub running: usize,
    pub renewals_late: u64,
    pub lapses: u64,
    pub reconnects: u64,
}

/// Its processes. Dropping it kills them.
#[derive(Debug)]
pub struct Region {
    /// Removed with the region.
    directory: TempDir,
    network: String,
    schedulers: Vec<Process>,
    fleet: Option<Process>,
}

impl Region {
    /// Starts everything and waits until it is ready and has a template.
    pub async fn start(place: &Place, shape: &Shape) -> anyhow::Result<Self> {
        let binaries = Binaries::find()?;
        let directory = place.directory()?;
        let network = network();
        let mut region = Self { directory, network, schedulers: Vec::new(), fleet: None };
        let root = region.directory.path().to_owned();
        region.schedulers = (0..shape.schedulers).map(|at| region.scheduler(at, shape, &root, &binaries)).collect();
        for process in &mut region.schedulers {
            process.start()?;
        }
        for process in &mut region.schedulers {
            process.await_ready().await?;
        }
        if shape.nodes > 0 {
            let mut fleet = region.fleet(shape, &root, &binaries);
            fleet.start()?;
            region.fleet = Some(fleet);
            region.all_nodes_ready(shape.nodes).await?;
            region.record_template().await?;
        }
        Ok(region)
    }

    fn scheduler(&self, at: usize, shape: &Shape, root: &Path, binaries: &Binaries) -> Process {
        let members: Vec<String> = (0..shape.schedulers)
            .map(|at| format!("{}={}/{}", at + 1, self.address(at, PEER_PORT), self.address(at, 7070)))
            .collect();
        let name = format!("scheduler-{}", at + 1);
        let http = self.address(at, 7072);
        let mut arguments = flags(&[
            ("replica-id", (at + 1).to_string()),
            ("data-dir", root.join(&name).display().to_string()),
            ("api-listen", self.address(at, 7070)),
            ("peer-listen", self.address(at, PEER_PORT)),
            ("http-listen", http.clone()),
            ("initial-members", members.join(",")),
            ("log-level", "warn".to_owned()),
        ]);
        arguments.extend(shape.scheduler_flags.iter().cloned());
        let group = FIRST_GROUP + u32::try_from(at).unwrap_or(0);
        let log = root.join(format!("{name}.log"));
        Process::new(name, binaries.scheduler.clone(), arguments, http, log).in_group(group)
    }

    fn fleet(&self, shape: &Shape, root: &Path, binaries: &Binaries) -> Process {
        let mut arguments = vec!["fleet".to_owned()];
        arguments.extend(flags(&[
            ("count", shape.nodes.to_string()),
            ("node-prefix", NODE_PREFIX.to_owned()),
            ("templates", template_digest()),
            ("ramp", (shape.nodes as f64 / NODES_A_SECOND).to_string()),
            ("report", "1".to_owned()),
            ("schedulers", self.endpoints().join(",")),
            ("cpu-milli", (shape.node_cpus * 1000).to_string()),
            ("memory", format!("{}GiB", shape.node_cpus)),
            ("disk", format!("{}GiB", shape.node_cpus * 2)),
            ("log-level", "error".to_owned()),
        ]));
        arguments.extend(shape.fleet_flags.iter().cloned());
        let log = root.join("fleet.log");
        Process::new("fleet".to_owned(), binaries.agent.clone(), arguments, String::new(), log)
    }

    fn address(&self, at: usize, port: u16) -> String {
        format!("{}.{}:{port}", self.network, at + 1)
    }

    /// API addresses, by replica.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.schedulers.len().max(1)).map(|at| self.address(at, 7070)).collect()
    }

    /// Of a scheduler, without `:port`.
    pub fn host(&self, at: usize) -> String {
        format!("{}.{}", self.network, at + 1)
    }

    /// One that retries, at any replica.
    pub fn client(&self) -> anyhow::Result<Client> {
        Client::new(&self.endpoints())
    }

    /// The replica that leads now.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let status = self.client()?.cluster_status().await.context("ask for the leader")?;
        let at = usize::try_from(status.leader_id)?.checked_sub(1).context("no leader")?;
        ensure!(at < self.schedulers.len(), "replica {} leads and was never started", status.leader_id);
        Ok(at)
    }

    /// Names of all sandboxes, read at the leader.
    pub async fn names(&self) -> anyhow::Result<BTreeSet<String>> {
        let channel = channel(&self.address(self.leader().await?, 7070), &ClientTls::default())?;
        let mut service = SandboxServiceClient::new(channel).max_decoding_message_size(MAX_PAGE_BYTES);
        let mut names = BTreeSet::new();
        let mut page_token = String::new();
        loop {
            let parent = TENANT.to_owned();
            let request = ListSandboxesRequest { parent, page_size: PAGE_SIZE, page_token, ..Default::default() };
            let page = service.list_sandboxes(request).await?.into_inner();
            names.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.name));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(names);
            }
        }
    }

    /// Simulated nodes say that they hold it, and look at none.
    async fn record_template(&self) -> anyhow::Result<()> {
        let request = CreateTemplateRequest {
            template_id: TEMPLATE.to_owned(),
            template: Some(Template { digest: template_digest(), size_bytes: 1024, ..Template::default() }),
            request_id: Client::request_id(),
        };
        let channel = channel(&self.address(self.leader().await?, 7070), &ClientTls::default())?;
        TemplateServiceClient::new(channel).create_template(request).await.context("record the template")?;
        Ok(())
    }

    async fn all_nodes_ready(&self, count: usize) -> anyhow::Result<()> {
        let patience = FLEET_PATIENCE + Duration::from_secs_f64(2.0 * count as f64 / NODES_A_SECOND);
        let client = self.client()?;
        let begun = Instant::now();
        let mut ready = 0;
        while begun.elapsed() < patience {
            ready = usize::try_from(client.cluster_status().await?.ready_node_count).unwrap_or(0);
            if ready >= count {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        bail!("{ready} of {count} nodes are ready after {patience:?}\n{}", self.logs())
    }

    /// Connections of a client's own to one replica, which open now.
    pub fn channels(&self, at: usize, count: usize) -> anyhow::Result<Vec<Channel>> {
        let address = self.address(at, 7070);
        (0..count).map(|_| Ok(channel(&address, &ClientTls::default())?)).collect()
    }

    /// What to look at while it is measured.
    pub fn servers(&self) -> Vec<Server> {
        let schedulers = self.schedulers.iter().enumerate().map(|(at, process)| Server {
            name: process.name().to_owned(),
            process: process.id(),
            syncs: Some((self.address(at, 7072), SYNCS)),
        });
        let fleet = self.fleet.iter().map(|process| Server {
            name: process.name().to_owned(),
            process: process.id(),
            syncs: None,
        });
        schedulers.chain(fleet).collect()
    }

    /// As the fleet's last line says: it writes one a second.
    pub fn fleet_counts(&self) -> anyhow::Result<Counts> {
        let log = std::fs::read_to_string(self.directory.path().join("fleet.log")).context("read the fleet's log")?;
        // The last line may be half written.
        let line = log.lines().rev().find_map(|line| serde_json::from_str(line).ok());
        line.context("the fleet has said nothing yet")
    }

    pub fn scheduler_process(&mut self, at: usize) -> &mut Process {
        &mut self.schedulers[at]
    }

    /// Its data directory.
    pub fn scheduler_directory(&self, at: usize) -> PathBuf {
        self.directory.path().join(format!("scheduler-{}", at + 1))
    }

    /// Sends a signal to a scheduler.
    pub fn signal(&self, at: usize, signal: Signal) -> anyhow::Result<()> {
        self.schedulers[at].signal(signal)
    }

    /// The ends of all logs.
    pub fn logs(&self) -> String {
        self.schedulers.iter().chain(&self.fleet).map(Process::log_tail).collect()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for process in self.fleet.iter_mut().chain(&mut self.schedulers) {
            if let Err(error) = process.kill() {
                eprintln!("{error:#}");
            }
        }
    }
}

fn flags(pairs: &[(&str, String)]) -> Vec<String> {
    pairs.iter().flat_map(|(key, value)| [format!("--{key}"), value.clone()]).collect()
}

/// Of a template that nobody has.
fn template_digest() -> String {
    format!("sha256:{}", "ab".repeat(32))
}
