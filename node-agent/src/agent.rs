//! Puts the parts together: takes over what is here, serves, and keeps a session until it is told to stop.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use warren_proto::units::{Gpus as WholeGpus, Resources};
use warren_proto::v1;

use crate::capacity;
use crate::changes::Changes;
use crate::clock;
use crate::config::Config;
use crate::data_plane::{self, Authority};
use crate::drivers::{Built, Drivers};
use crate::fence::Fence;
use crate::gpu::{self, Gpus};
use crate::http;
use crate::incarnation;
use crate::journal::Journal;
use crate::ledger::LedgerFile;
use crate::metrics;
use crate::session::{Connections, Membership, NodeFacts, Parts, Session};
use crate::storage;
use crate::supervisor::Supervisor;
use crate::templates::TemplateStore;
use crate::templates::fetch::Fetcher;

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    pub data_plane: SocketAddr,
    pub http: SocketAddr,
    pub supervisor: Supervisor,
    pub membership: Membership,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
    _lock: DataDir,
}

/// The data directory, held by this process alone.
#[derive(Debug)]
pub struct DataDir {
    pub path: PathBuf,
    _lock: File,
}

impl DataDir {
    pub fn hold(path: &Path) -> anyhow::Result<Self> {
        storage::create_private_directory(path).with_context(|| format!("create data_dir {}", path.display()))?;
        let lock = File::create(path.join("lock")).context("open the lock of data_dir")?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::WouldBlock => {
                anyhow::bail!("another agent runs on data_dir {}", path.display())
            }
            Err(error) => Err(error).context("lock data_dir"),
        }
    }
}

impl Agent {
    /// Starts everything; returns once it serves. `built` is what the configuration names.
    pub async fn start(config: Config, data_dir: DataDir, built: Built) -> anyhow::Result<Self> {
        let Built { drivers, gpus, .. } = built;
        let metrics = metrics::install()?;
        let tls = config.client_tls().context("TLS")?;
        let listener = bind("listen", config.listen).await?;
        let http_listener = bind("http_listen", config.http_listen).await?;
        let data_plane_address = listener.local_addr()?;
        let http_address = http_listener.local_addr()?;
        let advertised = config.advertise.clone().unwrap_or_else(|| data_plane_address.to_string());

        let changes = Changes::default();
        let store = TemplateStore::open(&data_dir.path, changes.clone())?;
        let fetcher = Fetcher { store: store.clone(), tls: tls.clone(), own_address: advertised.clone() };
        let path = data_dir.path.clone();
        let journal = tokio::task::spawn_blocking(move || Journal::open(&path)).await??;
        let fence = raise_fence(&config, &data_dir, &drivers).await?;
        let supervisor = Supervisor::adopt(drivers.clone(), fetcher, journal, changes, fence.clone()).await?;
        let ledger_file = LedgerFile::new(&data_dir.path);
        let membership = Membership::new(ledger_file.read()?);

        let stop = CancellationToken::new();
        let authority = Authority::new(config.node_id.clone(), membership.clone());
        let routes =
            data_plane::routes(supervisor.clone(), store, authority, config.insecure_registries.clone(), stop.clone())
                .await?;
        let pages = http::router(supervisor.clone(), membership.clone(), metrics);
        let facts = facts(&config, &data_dir, advertised, &drivers, &gpus, fence.clone())?;
        let session = Session::new(Parts {
            facts,
            supervisor: supervisor.clone(),
            membership: membership.clone(),
            ledger_file,
            connections: Connections::new(tls),
            schedulers: config.schedulers.clone(),
            counters: Arc::default(),
        });

        let mut tasks = JoinSet::new();
        for (listener, routes) in [(listener, routes), (http_listener, Routes::from(pages))] {
            let (tls, stop) = (config.tls.clone(), stop.clone());
            tasks.spawn(async move { Ok(data_plane::serve(listener, routes, &tls, stop).await?) });
        }
        if let Some(fence) = fence {
            let until = stop.clone();
            tasks.spawn(async move {
                fence.keep(until).await;
                Ok(())
            });
        }
        let until = stop.clone();
        tasks.spawn(async move {
            session.run(until).await;
            Ok(())
        });
        tracing::info!(node = %config.node_id, data_plane = %data_plane_address, http = %http_address, "serving");
        Ok(Self {
            data_plane: data_plane_address,
            http: http_address,
            supervisor,
            membership,
            stop,
            tasks,
            _lock: data_dir,
        })
    }

    /// Waits until a part ends by itself, which none should.
    pub async fn failed(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => error.into(),
            Some(Ok(Ok(()))) | None => anyhow::anyhow!("a part of the agent ended"),
        }
    }

    /// Closes session and servers. Sandboxes run on.
    pub async fn stop(mut self) {
        self.stop.cancel();
        self.supervisor.stop().await;
        while let Some(ended) = self.tasks.join_next().await {
            if let Ok(Err(error)) = ended {
                tracing::warn!(%error, "a part ended badly");
            }
        }
    }
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{key}: listen on {address}"))
}

/// `None` where a driver has nothing that could be frozen as a whole.
async fn raise_fence(config: &Config, data_dir: &DataDir, drivers: &Drivers) -> anyhow::Result<Option<Fence>> {
    let Some(switches) = drivers.switches() else {
        tracing::warn!(?drivers, "no fence: a driver cannot freeze its sandboxes as a whole");
        return Ok(None);
    };
    let fence = Fence::open(&data_dir.path, switches, config.fence.clone()).context("prepare the fence")?;
    fence.raise().await;
    Ok(Some(fence))
}

fn facts(
    config: &Config,
    data_dir: &DataDir,
    advertised: String,
    drivers: &Drivers,
    gpus: &Gpus,
    fence: Option<Fence>,
) -> anyhow::Result<NodeFacts> {
    let host = capacity::after_reserve(capacity::of_host(&config.data_dir).context("read the host's capacity")?);
    let capacity = Resources {
        cpu: config.cpu.unwrap_or(host.cpu),
        memory: config.memory.unwrap_or(host.memory),
        disk: config.disk.unwrap_or(host.disk),
        gpus: WholeGpus(gpus.devices().count() as u64),
    };
    Ok(NodeFacts {
        name: config.node_id.name(),
        incarnation: incarnation::next(&data_dir.path, clock::unix_now_ms()).context("name this process")?,
        data_plane_address: advertised,
        data_plane_tls: config.serves_tls(),
        capacity: wire_resources(capacity),
        labels: config.labels.clone(),
        drivers: drivers.names(),
        fence,
        gpus: gpus.devices().map(wire_device).collect(),
    })
}

fn wire_device(device: &gpu::Device) -> v1::GpuDevice {
    v1::GpuDevice {
        uuid: device.uuid.clone(),
        model: device.model.clone(),
        memory_bytes: i64::try_from(device.memory.0).unwrap_or(i64::MAX),
        enforced: device.sharing == gpu::Sharing::Enforced,
    }
}

pub(crate) fn wire_resources(resources: Resources) -> v1::Resources {
    let wire = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    v1::Resources {
        cpu_milli: wire(resources.cpu.0),
        memory_bytes: wire(resources.memory.0),
        disk_bytes: wire(resources.disk.0),
        pids: 0,
        gpus: wire(resources.gpus.0),
    }
}
