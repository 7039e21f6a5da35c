//! Driver `oci`: an instance is a container of an OCI runtime's command line (runc, crun), in its own user namespace, over a
//! read-only base.
//!
//! ```text
//!  agent ──socket──▶ shim run ──▶ runtime run ──▶ main process      the shim is the parent once the runtime has left
//!    └────socket──▶ shim exec ──▶ runtime exec ──▶ process
//! ```
//!
//! Nothing is kept in memory that matters: directories, lifelines and control groups say what there is, so a new agent
//! process finds everything, and a crash at any step leaves something that [`Driver::list`] shows and [`Driver::remove`]
//! removes. In reading order: `layout` names, `record` files, `lifeline` who is alive, `ids` users, `config` and `seccomp`
//! what an instance may do, `cgroup`, `runtime`, `host`, `launch`, `process` and `users` what is executed later, `log` and `follow` what the main process wrote, `remove`.

pub(crate) mod cgroup;
mod config;
mod connection;
mod disk;
mod follow;
mod host;
pub(crate) mod ids;
mod inside;
pub(crate) mod kind;
mod launch;
pub(crate) mod layout;
pub(crate) mod lifeline;
pub(crate) mod log;
mod measure;
pub(crate) mod process;
pub(crate) mod record;
mod remove;
mod resize;
pub(crate) mod rootfs;
mod runtime;
mod seccomp;
mod usage;
pub(crate) mod users;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpStream;
use warren_proto::ids::NodeId;

use self::cgroup::Cgroups;
use self::connection::Connections;
use self::disk::Quota;
use self::ids::IdRanges;
use self::kind::Kind;
use self::layout::Layout;
use self::process::Processes;
use self::record::{Decided, ExitRecord, Record};
use self::runtime::{Offer, Runtime};
use super::stats::{Limits, Stats};
use super::{
    AttachFrom, Attachment, Driver, DriverError, Ended, InsideRoot, InstanceKey, InstanceSpec, LogQuery, LogStream,
    Presence, ProcessSpec, ProcessStatus, TerminalSize,
};
use crate::failpoint;
use crate::fence::Switch;
use crate::gpu::{Gpus, cdi};
use crate::network::NetworkStats;
use crate::network::egress::Egress;
use crate::network::inside::{Assigned, Paths};
use crate::network::range::Range;
use crate::shim::Report;

const NAME: &str = "oci";

/// Version 1 freezes in the background and tells nobody when it is done: looks at it, and the pause between them.
const FREEZE_LOOKS: u32 = 500;
const FREEZE_PAUSE: Duration = Duration::from_millis(10);

/// What a driver needs to know.
#[derive(Debug, Clone)]
pub struct OciConfig {
    /// Names or paths of OCI runtimes' command lines, the default first, with commas between them.
    pub runtime: String,
    /// The agent's directory; the driver's is `oci` in it.
    pub data_dir: PathBuf,
    pub node_id: NodeId,
    /// Program that runs [`crate::shim::run`] when its first argument is `shim`.
    pub shim_exe: PathBuf,
    /// What [`InstanceSpec::gpus`] may name.
    pub gpus: Arc<Gpus>,
    pub network: NetworkOptions,
}

/// How the sandboxes' network is made.
#[derive(Debug, Clone)]
pub struct NetworkOptions {
    /// Addresses that the agents of this host share out among themselves.
    pub range: Range,
    /// Who answers names; empty: the host's resolvers.
    pub upstreams: Vec<std::net::SocketAddr>,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        Self { range: Range::DEFAULT, upstreams: Vec::new() }
    }
}

/// Runs instances as containers.
#[derive(Debug)]
pub struct OciDriver {
    runtime: Runtime,
    layout: Layout,
    cgroups: Cgroups,
    /// Of the fenced instances' group.
    switch: Switch,
    ids: IdRanges,
    quota: Quota,
    shim_exe: PathBuf,
    gpus: Arc<Gpus>,
    network: Connections,
}

impl OciDriver {
    /// Checks that the runtime runs, and prepares the host. Blocks; once, at start, in the async runtime's context.
    pub fn new(config: OciConfig) -> Result<Self, DriverError> {
        let OciConfig { runtime, data_dir, node_id, shim_exe, gpus, network } = config;
        if !rustix::process::geteuid().is_root() {
            return Err(io_error("run containers without being root")(io::ErrorKind::PermissionDenied.into()));
        }
        fs::create_dir_all(&data_dir).map_err(io_error("make the data directory"))?;
        let data_dir = data_dir.canonicalize().map_err(io_error("find the data directory"))?;
        let layout = Layout::new(&data_dir, &node_id);
        let runtime = Runtime::probe(&runtime, layout.runtime_root.clone())?;
        host::prepare(&layout).map_err(io_error("make the driver's directories"))?;
        if runtime.offers().iter().any(|offer| offer.kind == Kind::Crun) {
            host::mount_hugetlb().map_err(io_error("mount the hugetlb controller for crun"))?;
        }
        let cgroups = Cgroups::discover().map_err(io_error("find the control groups"))?;
        let switch = cgroups.make_switch(&layout.fenced_parent).map_err(io_error("make the fenced control group"))?;
        let (quota, why) = Quota::probe();
        if let Some(why) = why {
            tracing::warn!(%why, "disk sizes are not enforced: a sandbox can fill the node's disk");
        }
        let network = connection::open(&layout, network, &keys_in(&layout.instances)?);
        let ids = IdRanges::default();
        let driver = Self { runtime, layout, cgroups, switch, ids, quota, shim_exe, gpus, network };
        driver.adopt_ids()?;
        Ok(driver)
    }

    /// Removes everything of this driver on the host: instances, directories, control groups, mounts. The driver cannot be
    /// used afterwards.
    pub async fn clean(&self) -> Result<(), DriverError> {
        for key in self.keys()? {
            self.remove(&key).await?;
        }
        let cgroups = Cgroups::discover().map_err(io_error("find the control groups"))?;
        let mut strays = cgroups.children(&self.layout.cgroup_parent);
        strays.extend(cgroups.children(&self.layout.fenced_parent));
        strays.remove(layout::FENCED);
        strays.extend(self.runtime.containers().map_err(io_error("list what runtimes keep"))?);
        for id in strays {
            remove::remove_stray(self, &id).await?;
        }
        self.clean_network()?;
        let layout = self.layout.clone();
        blocking("put back the host", move || host::restore(&layout)).await
    }

    fn adopt_ids(&self) -> Result<(), DriverError> {
        for key in self.keys()? {
            if let Ok(record) = Record::read(&self.layout.instance(&key)) {
                self.ids.adopt(&record.container_id, record.first_id);
            }
        }
        Ok(())
    }

    fn keys(&self) -> Result<Vec<InstanceKey>, DriverError> {
        keys_in(&self.layout.instances)
    }

    /// Writes everything that the shim needs; the record last.
    fn prepare_instance(
        &self,
        spec: &InstanceSpec,
        offer: &Offer,
        first_id: u32,
        devices: &cdi::Edits,
        network: Option<Assigned>,
    ) -> io::Result<()> {
        let directory = self.layout.instance(&spec.key);
        for name in config::DIRECTORIES {
            fs::create_dir(directory.join(name))?;
        }
        let cgroup = self.layout.cgroup(&spec.key, spec.fenced);
        let rootfs = self.layout.rootfs.clone();
        let mut bundle = config::bundle(
            spec,
            &config::Host {
                first_id,
                open_files: host::open_files(),
                kind: offer.kind,
                unified_cgroups: self.cgroups.is_unified(),
                rootfs: rootfs.to_string_lossy().into_owned(),
                cgroup: cgroup.clone(),
                joins: network.is_some().then(|| Paths::new(&self.layout.short)),
            },
        );
        devices.apply(&mut bundle);
        fs::write(directory.join(layout::CONFIG), bundle.to_string())?;
        lifeline::create(&directory.join(layout::BUSY))?;
        lifeline::create(&directory.join(layout::ALIVE))?;
        let decided = Decided {
            first_id,
            runtime: offer.program.clone(),
            kind: offer.kind,
            runtime_root: self.runtime.root().to_owned(),
            rootfs,
            oom_file: self.cgroups.oom_file(&cgroup),
            network,
        };
        Record::new(spec, decided).write(&directory)
    }

    /// The specification with the environment of its devices, and what they change in the bundle.
    async fn with_devices(&self, spec: &InstanceSpec) -> Result<(InstanceSpec, cdi::Edits), DriverError> {
        let mut spec = spec.clone();
        if spec.gpus.is_empty() {
            return Ok((spec, cdi::Edits::default()));
        }
        let (gpus, grants) = (Arc::clone(&self.gpus), spec.gpus.clone());
        let injected = tokio::task::spawn_blocking(move || gpus.edits(&grants)).await;
        let edits = injected.map_err(io::Error::other).map_err(io_error("read CDI specifications"))??;
        for entry in &edits.environment {
            if let Some((key, value)) = entry.split_once('=') {
                spec.environment.retain(|(other, _)| other != key);
                spec.environment.push((key.to_owned(), value.to_owned()));
            }
        }
        spec.environment.sort_unstable();
        Ok((spec, edits))
    }

    async fn launch(&self, spec: &InstanceSpec) -> Result<(), DriverError> {
        let what = || format!("start {}", spec.key.sandbox);
        let offer = self.runtime.offer(spec.runtime.as_deref()).ok_or_else(|| DriverError::Runtime {
            what: what(),
            output: format!("runtime {:?} is not offered here, only {:?}", spec.runtime, self.runtimes()),
        })?;
        let first_id = self.ids.take(&layout::container_id(&spec.key)).ok_or_else(|| DriverError::Runtime {
            what: what(),
            output: "every range of user ids is taken".to_owned(),
        })?;
        let directory = self.layout.instance(&spec.key);
        let make_disk = async {
            match self.quota {
                Quota::Image => disk::make(&directory, spec.resources.disk.0).await,
                _ => Ok(()),
            }
        };
        let (disk, network) = tokio::join!(make_disk, self.connect(spec, offer.kind));
        disk?;
        let network = network?;
        let (spec, devices) = self.with_devices(spec).await?;
        let spec = &spec;
        self.prepare_instance(spec, offer, first_id, &devices, network)
            .map_err(io_error("write the instance's files"))?;
        failpoint::pass("start.prepared");
        let _slot = self.runtime.slot().await;
        let mut shim = launch::launch(&self.shim_exe, &directory).map_err(io_error("start a shim"))?;
        failpoint::pass("start.launched");
        let first = shim.reports.first().await;
        failpoint::pass("start.answered");
        launch::reap(shim.child);
        match first {
            Ok(Report::Started) => Ok(()),
            Ok(Report::Failed { what, output }) => Err(refused(spec, what, &output)),
            Err(source) => Err(DriverError::Io { what: what(), source }),
        }
    }

    /// What is there of an instance whose directory exists.
    fn presence(&self, key: &InstanceKey) -> Presence {
        let directory = self.layout.instance(key);
        if !directory.join(layout::RECORD).exists() {
            return Presence::Remnant;
        }
        match ExitRecord::read(&directory) {
            Ok(Some(exit)) => return Presence::Ended(exit.into()),
            Ok(None) => {}
            Err(_) => return Presence::Remnant,
        }
        let alive = lifeline::is_held(&directory.join(layout::ALIVE)).unwrap_or(false);
        if !alive || !directory.join(layout::STARTED).exists() {
            // It may have ended since we looked.
            return match ExitRecord::read(&directory) {
                Ok(Some(exit)) => Presence::Ended(exit.into()),
                _ => Presence::Remnant,
            };
        }
        match self.cgroups.is_told_to_freeze(&self.cgroup(key)) {
            true => Presence::Frozen,
            false => Presence::Running,
        }
    }

    /// The instance's record, where it runs, frozen or not.
    fn running(&self, key: &InstanceKey) -> Result<(Record, Presence), DriverError> {
        let directory = self.layout.instance(key);
        if !directory.exists() {
            return Err(DriverError::NotFound(key.clone()));
        }
        match self.presence(key) {
            presence @ (Presence::Running | Presence::Frozen) => {
                Ok((Record::read(&directory).map_err(io_error("read the record"))?, presence))
            }
            Presence::Ended(_) | Presence::Remnant => Err(DriverError::NotRunning { key: key.clone() }),
        }
    }

    /// The instance's record, where it runs and is not frozen, by itself or with its group.
    fn awake(&self, key: &InstanceKey) -> Result<Record, DriverError> {
        match self.running(key)? {
            (record, Presence::Running) if !(self.is_fenced(key) && self.switch.is_frozen()) => Ok(record),
            _ => Err(DriverError::NotRunning { key: key.clone() }),
        }
    }

    fn processes_of(&self, key: &InstanceKey) -> Processes {
        Processes::new(self.layout.instance(key))
    }

    /// The control group that a running instance has.
    fn cgroup(&self, key: &InstanceKey) -> String {
        self.layout.cgroup(key, self.is_fenced(key))
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn ids(&self) -> &IdRanges {
        &self.ids
    }

    fn shim_exe(&self) -> &Path {
        &self.shim_exe
    }
}

#[async_trait]
impl Driver for OciDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn runtimes(&self) -> Vec<String> {
        self.runtime.offers().iter().map(|offer| offer.name().to_owned()).collect()
    }

    async fn start(&self, spec: &InstanceSpec) -> Result<(), DriverError> {
        // Making the directory claims the name: what is there already is not touched.
        fs::create_dir(self.layout.instance(&spec.key)).map_err(io_error("make the instance's directory"))?;
        failpoint::pass("start.claimed");
        let started = self.launch(spec).await;
        if started.is_err()
            && let Err(error) = self.remove(&spec.key).await
        {
            tracing::warn!(instance = ?spec.key, %error, "cannot remove what a failed start left");
        }
        started
    }

    async fn wait(&self, key: &InstanceKey) -> Result<Ended, DriverError> {
        let directory = self.layout.instance(key);
        lifeline::released(&directory.join(layout::ALIVE)).await.map_err(io_error("wait for the shim"))?;
        match ExitRecord::read(&directory).map_err(io_error("read how the main process ended"))? {
            Some(exit) => Ok(exit.into()),
            None if !directory.exists() => Err(DriverError::NotFound(key.clone())),
            None => Err(DriverError::Runtime {
                what: format!("wait for {}", key.sandbox),
                output: "its shim ended without noting how the main process did".to_owned(),
            }),
        }
    }

    async fn freeze(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.running(key)?;
        let group = self.cgroup(key);
        // By hand: a runtime asks first whether the instance runs, and below a frozen parent it says no.
        self.cgroups.set_frozen(&group, true).map_err(io_error("freeze the control group"))?;
        for _ in 0..FREEZE_LOOKS {
            if self.cgroups.is_frozen(&group) {
                return Ok(());
            }
            tokio::time::sleep(FREEZE_PAUSE).await;
        }
        Err(runtime::timed_out(format!("freeze {}", key.sandbox)))
    }

    async fn thaw(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.running(key)?;
        self.cgroups.set_frozen(&self.cgroup(key), false).map_err(io_error("thaw the control group"))
    }

    async fn remove(&self, key: &InstanceKey) -> Result<(), DriverError> {
        remove::remove(self, key).await
    }

    async fn list(&self) -> Result<Vec<(InstanceKey, Presence)>, DriverError> {
        Ok(self.keys()?.into_iter().map(|key| (key.clone(), self.presence(&key))).collect())
    }

    async fn stats(&self, key: &InstanceKey) -> Result<Stats, DriverError> {
        let (record, _) = self.running(key)?;
        let (cgroups, group) = (self.cgroups.clone(), self.cgroup(key));
        let directory = self.layout.instance(key);
        let what = format!("read what {} uses", key.sandbox);
        blocking(&what, move || measure::stats(&cgroups, &group, &directory, &record)).await
    }

    async fn resize(&self, key: &InstanceKey, limits: &Limits) -> Result<(), DriverError> {
        let (record, _) = self.running(key)?;
        let (cgroups, group, directory) = (self.cgroups.clone(), self.cgroup(key), self.layout.instance(key));
        let limits = *limits;
        let resized = blocking("change the limits", move || {
            let pids = limits.pids.max(1).saturating_add(record.kind.extra_pids());
            resize::apply(&cgroups, &group, &Limits { pids, ..limits })?;
            record.resized(&limits).write(&directory)
        });
        match resized.await {
            Err(DriverError::Io { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                Err(DriverError::MemoryInUse { key: key.clone(), limit: limits.memory.0 })
            }
            other => other,
        }
    }

    fn switch(&self) -> Option<Switch> {
        Some(self.switch.clone())
    }

    fn is_fenced(&self, key: &InstanceKey) -> bool {
        self.cgroups.exists(&self.layout.cgroup(key, true))
    }

    fn egress(&self, key: &InstanceKey) -> Option<Egress> {
        self.network.as_ref().ok()?.egress(&layout::container_id(key))
    }

    async fn set_egress(&self, key: &InstanceKey, egress: &Egress) -> Result<(), DriverError> {
        self.running(key)?;
        self.change_egress(key, egress).await
    }

    async fn network_stats(&self, key: &InstanceKey) -> Result<NetworkStats, DriverError> {
        self.running(key)?;
        self.traffic(key).await
    }

    // In a frozen one a process would freeze before it ran, and the runtime would wait for it.
    async fn exec(&self, key: &InstanceKey, spec: &ProcessSpec) -> Result<Attachment, DriverError> {
        let record = self.awake(key)?;
        self.processes_of(key).exec(self, &record, spec).await
    }

    async fn start_process(&self, key: &InstanceKey, spec: &ProcessSpec) -> Result<ProcessStatus, DriverError> {
        let record = self.awake(key)?;
        self.processes_of(key).start(self, &record, spec).await
    }

    async fn processes(&self, key: &InstanceKey) -> Result<Vec<ProcessStatus>, DriverError> {
        self.processes_of(key).list().await
    }

    async fn attach(&self, key: &InstanceKey, id: &str, from: AttachFrom) -> Result<Attachment, DriverError> {
        self.processes_of(key).attach(id, from).await
    }

    async fn signal_process(&self, key: &InstanceKey, id: &str, signal: u8) -> Result<(), DriverError> {
        self.processes_of(key).signal(id, signal).await
    }

    async fn resize_process(&self, key: &InstanceKey, id: &str, size: TerminalSize) -> Result<(), DriverError> {
        self.processes_of(key).resize(id, size).await
    }

    async fn logs(&self, key: &InstanceKey, query: &LogQuery) -> Result<Box<dyn LogStream>, DriverError> {
        let directory = self.layout.instance(key);
        if !directory.exists() {
            return Err(DriverError::NotFound(key.clone()));
        }
        Ok(Box::new(follow::Logs::open(&directory, query)?))
    }

    async fn process_ended(&self, key: &InstanceKey, id: &str) {
        self.processes_of(key).ended(id).await;
    }

    async fn root(&self, key: &InstanceKey) -> Result<InsideRoot, DriverError> {
        let record = self.awake(key)?;
        inside::check(record.kind, "open the files of a sandbox from outside with this runtime")?;
        inside::root(self, key, &record)
    }

    async fn connect(&self, key: &InstanceKey, port: u16) -> Result<TcpStream, DriverError> {
        let record = self.awake(key)?;
        inside::check(record.kind, "connect to ports of a sandbox with this runtime")?;
        inside::connect(self, key, port).await
    }
}

fn refused(spec: &InstanceSpec, what: String, output: &str) -> DriverError {
    let output = runtime::last_lines(output.as_bytes());
    match spec.command.first() {
        Some(command) if runtime::says_command_not_found(&output, command) => {
            DriverError::CommandNotFound { command: command.clone() }
        }
        _ => DriverError::Runtime { what, output },
    }
}

fn keys_in(instances: &Path) -> Result<Vec<InstanceKey>, DriverError> {
    Ok(names_in(instances)?.iter().filter_map(|name| layout::parse_directory_name(name)).collect())
}

fn names_in(directory: &Path) -> Result<Vec<String>, DriverError> {
    let entries = fs::read_dir(directory).map_err(io_error("list a directory"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Turns an IO error into the driver's.
fn io_error(what: &str) -> impl FnOnce(io::Error) -> DriverError {
    let what = what.to_owned();
    move |source| DriverError::Io { what, source }
}

/// Does blocking work where it disturbs nobody.
async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, DriverError> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other).and_then(|done| done).map_err(io_error(what))
}
