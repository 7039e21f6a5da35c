//! Many simulated agents in one process, to see what a leader bears.
//!
//! Each is a node of its own with the real session, supervisor and driver `sim`, but without disk, data plane and metrics
//! pages: what runs on it ends with the process. A few dozen share each connection, as nothing in a session depends on having
//! one to itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use warren_proto::client::ClientTls;
use warren_proto::ids::{Digest, IdError, NodeId};
use warren_proto::units::{Bytes, MilliCpu, Resources};

use crate::agent::wire_resources;
use crate::changes::Changes;
use crate::clock;
use crate::config::{Config, FleetArgs};
use crate::driver::Driver;
use crate::driver::sim::{SimConfig, SimDriver};
use crate::drivers::Drivers;
use crate::incarnation;
use crate::journal::Opened;
use crate::ledger::LedgerFile;
use crate::session::{Connections, Counters, Counts, Membership, NodeFacts, Parts, Session};
use crate::supervisor::{SuperviseError, Supervisor};
use crate::templates::TemplateStore;
use crate::templates::fetch::Fetcher;

/// Sessions on one connection: a server takes 200 streams at once (the default of hyper), and the next session of a node may
/// be opened before the last is closed.
const SESSIONS_PER_CONNECTION: usize = 90;

/// A data plane that nobody serves (discard, RFC 863).
const NO_DATA_PLANE: &str = "127.0.0.1:9";

/// Which agents.
#[derive(Debug, Clone)]
pub struct FleetConfig {
    pub count: usize,
    /// Node `n` is named `<prefix><n>`.
    pub prefix: String,
    pub schedulers: Vec<String>,
    pub tls: ClientTls,
    /// Of each node.
    pub capacity: Resources,
    pub labels: BTreeMap<String, String>,
    /// Templates that every node says it holds; any other it pretends to fetch.
    pub templates: Vec<Digest>,
    /// The agents start spread over this time.
    pub ramp: Duration,
    pub sandboxes: SimConfig,
}

impl FleetConfig {
    /// What the command line says. A fleet's node is as large as `--cpu-milli`, `--memory` and `--disk` say, or 64 vCPU with
    /// 256 GiB and 1 TiB.
    pub fn new(args: &FleetArgs, config: &Config) -> anyhow::Result<Self> {
        let seconds = |value: f64, flag| Duration::try_from_secs_f64(value).with_context(|| format!("--{flag}"));
        let templates = args.templates.iter().map(|text| Digest::parse(text));
        Ok(Self {
            count: args.count,
            prefix: args.node_prefix.clone(),
            schedulers: config.schedulers.clone(),
            tls: config.client_tls()?,
            capacity: Resources {
                cpu: config.cpu.unwrap_or(MilliCpu(64_000)),
                memory: config.memory.unwrap_or(Bytes(256 * Bytes::GIB)),
                disk: config.disk.unwrap_or(Bytes(1024 * Bytes::GIB)),
                ..Resources::default()
            },
            labels: config.labels.clone(),
            templates: templates.collect::<Result<_, _>>().context("--templates")?,
            ramp: seconds(args.ramp, "ramp")?,
            sandboxes: SimConfig { start_delay: Duration::from_millis(args.start_delay), ..SimConfig::default() },
        })
    }
}

/// Why a fleet cannot start.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("node prefix: {0}")]
    Name(#[from] IdError),
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    #[error("no scheduler is named")]
    NoScheduler,
}

/// Running agents.
#[derive(Debug)]
pub struct Fleet {
    nodes: Vec<Node>,
    counters: Arc<Counters>,
    stop: CancellationToken,
    sessions: JoinSet<()>,
}

#[derive(Debug)]
struct Node {
    supervisor: Supervisor,
    membership: Membership,
    driver: Arc<SimDriver>,
}

/// How a fleet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FleetCounts {
    pub agents: usize,
    /// Agents that have a session now.
    pub registered: usize,
    /// Sandboxes that run on all of them.
    pub running: usize,
    pub sessions: Counts,
}

impl FleetCounts {
    /// Sessions beyond the first of each agent.
    pub fn reconnects(&self) -> u64 {
        self.sessions.sessions.saturating_sub(self.agents as u64)
    }

    fn to_json(self) -> serde_json::Value {
        serde_json::json!({
            "agents": self.agents,
            "registered": self.registered,
            "running": self.running,
            "renewals_granted": self.sessions.granted,
            "renewals_late": self.sessions.late,
            "lapses": self.sessions.lapses,
            "reconnects": self.reconnects(),
        })
    }
}

impl Fleet {
    /// Starts the agents; they register over the time of the ramp.
    pub async fn start(config: FleetConfig) -> Result<Self, FleetError> {
        if config.schedulers.is_empty() {
            return Err(FleetError::NoScheduler);
        }
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        let mut fleet = Self { nodes: Vec::new(), counters, stop, sessions: JoinSet::new() };
        let mut connections = Connections::new(config.tls.clone());
        for number in 0..config.count {
            if number > 0 && number % SESSIONS_PER_CONNECTION == 0 {
                connections = Connections::new(config.tls.clone());
            }
            let wait = config.ramp.mul_f64(number as f64 / config.count as f64);
            fleet.add(&config, number, connections.clone(), wait).await?;
        }
        Ok(fleet)
    }

    async fn add(
        &mut self,
        config: &FleetConfig,
        number: usize,
        connections: Connections,
        wait: Duration,
    ) -> Result<(), FleetError> {
        let id = NodeId::parse(&format!("{}{number}", config.prefix))?;
        let changes = Changes::default();
        let driver = Arc::new(SimDriver::new(config.sandboxes.clone()));
        let drivers = Drivers::new(vec![Arc::clone(&driver) as Arc<dyn Driver>]).expect("there is one");
        let store = TemplateStore::simulated(config.templates.iter().copied(), changes.clone());
        let fetcher = Fetcher { store, tls: ClientTls::default(), own_address: NO_DATA_PLANE.to_owned() };
        let supervisor = Supervisor::adopt(drivers.clone(), fetcher, Opened::nothing(), changes, None).await?;
        let membership = Membership::new(None);
        let session = Session::new(Parts {
            facts: NodeFacts {
                gpus: Vec::new(),
                name: id.name(),
                incarnation: incarnation::unremembered(clock::unix_now_ms()),
                data_plane_address: NO_DATA_PLANE.to_owned(),
                data_plane_tls: false,
                capacity: wire_resources(config.capacity),
                labels: config.labels.clone(),
                drivers: drivers.names(),
                fence: None,
            },
            supervisor: supervisor.clone(),
            membership: membership.clone(),
            ledger_file: LedgerFile::default(),
            connections,
            schedulers: config.schedulers.clone(),
            counters: Arc::clone(&self.counters),
        });
        let stop = self.stop.clone();
        self.sessions.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            session.run(stop).await;
        });
        self.nodes.push(Node { supervisor, membership, driver });
        Ok(())
    }

    pub fn counts(&self) -> FleetCounts {
        FleetCounts {
            agents: self.nodes.len(),
            registered: self.nodes.iter().filter(|node| node.membership.is_registered()).count(),
            running: self.nodes.iter().map(|node| node.driver.count()).sum(),
            sessions: self.counters.read(),
        }
    }

    /// Prints a line of JSON at each interval until `stop` ends, and a last one.
    pub async fn report(&self, interval: Duration, stop: impl Future<Output = ()>) {
        let print = || println!("{}", self.counts().to_json());
        let every = async {
            loop {
                tokio::time::sleep(interval).await;
                print();
            }
        };
        tokio::select! {
            () = every => {}
            () = stop => print(),
        }
    }

    /// Ends all agents, and what ran on them.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while self.sessions.join_next().await.is_some() {}
        for node in &self.nodes {
            node.supervisor.stop().await;
        }
    }
}
