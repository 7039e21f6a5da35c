//! How an agent runs sandboxes: the one seam between Warren and a runtime.
//!
//! A driver knows runtimes and the host; it knows nothing of sessions, leases or assignments. It keeps what it needs to find
//! its sandboxes again on disk or in the runtime, so a new agent process sees through [`Driver::list`] what an earlier one
//! left behind: sandboxes do not stop when the agent does.

pub mod oci;
pub mod process;
pub mod sim;
pub mod stats;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use warren_proto::ids::{Epoch, SandboxName};
use warren_proto::units::Resources;

pub use self::process::{
    AttachFrom, Attachment, Event, ExecSpec, ProcessInput, ProcessOutput, ProcessSpec, ProcessStatus, Stream,
    TerminalSize,
};
use self::stats::{Limits, Stats};
use crate::fence::Switch;
use crate::gpu::{GpuError, Grant};
use crate::network::NetworkStats;
use crate::network::egress::Egress;

/// One placement of a sandbox: what a driver's objects are named after.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceKey {
    pub sandbox: SandboxName,
    pub epoch: Epoch,
}

/// Everything that a driver needs to start an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceSpec {
    pub key: InstanceKey,
    pub resources: Resources,
    /// Which of the driver's runtimes; `None`: its first.
    pub runtime: Option<String>,
    /// Most processes and threads.
    pub pids: u64,
    /// Directory with the template's unpacked root file system, owned by root, shared and never written.
    pub base: PathBuf,
    /// Main process; empty: one that waits and reaps.
    pub command: Vec<String>,
    /// Sorted by key, no key twice.
    pub environment: Vec<(String, String)>,
    /// Absolute path inside.
    pub working_directory: String,
    /// Belongs to the group that [`Driver::switch`] freezes as a whole.
    pub fenced: bool,
    /// What it may reach.
    pub egress: Egress,
    /// Devices to inject.
    pub gpus: Vec<Grant>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exit {
    /// 128 + signal where a signal ended it.
    pub code: i32,
    /// 0 where none did.
    pub signal: i32,
    pub oom_killed: bool,
}

/// How a main process ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ended {
    pub exit: Exit,
    /// Last 4 KiB that it wrote to stdout and stderr.
    pub output_tail: Vec<u8>,
}

/// What the host holds of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    Running,
    Frozen,
    /// Its main process ended; its disk is still there.
    Ended(Ended),
    /// Begun and not finished, or broken: only [`Driver::remove`] makes sense.
    Remnant,
}

/// Which part of a main process's output is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogQuery {
    /// From which byte on.
    pub offset: u64,
    /// Only what was written at this time, in milliseconds since the Unix epoch, or later.
    pub since_ms: Option<i64>,
    /// Only so many lines from the end.
    pub tail_lines: Option<usize>,
    /// Go on with what is written from now on, until the main process ends.
    pub follow: bool,
}

/// A piece of a main process's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEvent {
    Entry {
        offset: u64,
        /// When it was read from the process.
        unix_ms: i64,
        stream: Stream,
        data: Vec<u8>,
    },
    /// Bytes `from` to `to` (exclusive) are no longer held.
    Dropped { from: u64, to: u64 },
}

/// A log that is being read.
#[async_trait]
pub trait LogStream: Send {
    /// The next piece; `None`: that was all.
    async fn next(&mut self) -> Result<Option<LogEvent>, DriverError>;
}

/// The file system of a running instance, as its processes see it, and as whom to enter it.
#[derive(Debug)]
pub struct InsideRoot {
    /// Its root directory, opened for nothing but to resolve paths below it.
    pub directory: OwnedFd,
    /// User namespace that maps its users.
    pub users: OwnedFd,
    /// The host's id of user 0 inside.
    pub first_id: u32,
    /// Program that runs [`crate::files::helper::run`] when its first argument is `files`.
    pub program: PathBuf,
}

/// Why a driver could not do something.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("{0:?} is not on this node")]
    NotFound(InstanceKey),
    #[error("{key:?} is not running")]
    NotRunning { key: InstanceKey },
    #[error("`{command}` was not found or cannot be executed in the sandbox")]
    CommandNotFound { command: String },
    #[error("nothing listens on port {0} in the sandbox")]
    PortClosed(u16),
    #[error("the sandbox has no user `{user}` in its /etc/passwd")]
    UserNotFound { user: String },
    #[error("the sandbox has no process `{id}`, or it ended so long ago that it is forgotten")]
    ProcessNotFound { id: String },
    #[error("the sandbox has another process `{id}`")]
    ProcessExists { id: String },
    #[error("{limit} processes that were started run in the sandbox: no more may")]
    TooManyProcesses { limit: usize },
    #[error("driver `{driver}` cannot {what}")]
    Unsupported { driver: &'static str, what: &'static str },
    /// The runtime said no; `output` is what it printed.
    #[error("{what}: {output}")]
    Runtime { what: String, output: String },
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Nothing that this sandbox did: another node may have room.
    #[error(
        "the node's own disk is full: {} has {free_bytes} bytes free and keeps {reserve_bytes} for the agent; start it on \
         another node, or free some",
        directory.display()
    )]
    HostDiskFull { directory: PathBuf, free_bytes: u64, reserve_bytes: u64 },
    #[error(
        "{key:?} uses more memory than {limit} bytes, and cannot give it back: nothing was changed; try again when it uses less"
    )]
    MemoryInUse { key: InstanceKey, limit: u64 },
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
}

/// Runs sandboxes. All methods may be called at once for different instances; for one instance `start`, `freeze`, `thaw`
/// and `remove` come from one task only, one at a time.
#[async_trait]
pub trait Driver: Send + Sync {
    /// As in configuration and assignments: `oci`, `sim`.
    fn name(&self) -> &'static str;

    /// Runtimes to choose from, the default first, as [`InstanceSpec::runtime`] names them. An assignment asks for one as
    /// `<driver>/<runtime>`.
    fn runtimes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Starts an instance and returns once its main process runs. After an error nothing of it is left.
    async fn start(&self, spec: &InstanceSpec) -> Result<(), DriverError>;

    /// Waits until the main process ended, also one that an earlier agent started.
    async fn wait(&self, key: &InstanceKey) -> Result<Ended, DriverError>;

    /// Stops every process of the instance from running, without ending it. Idempotent.
    async fn freeze(&self, key: &InstanceKey) -> Result<(), DriverError>;

    /// The opposite. Idempotent.
    async fn thaw(&self, key: &InstanceKey) -> Result<(), DriverError>;

    /// Ends every process of the instance and removes all that the host holds of it: processes, mounts, cgroups, files.
    /// Idempotent: removing what is not there succeeds.
    async fn remove(&self, key: &InstanceKey) -> Result<(), DriverError>;

    /// Everything of this driver's that the host holds, whoever started it.
    async fn list(&self) -> Result<Vec<(InstanceKey, Presence)>, DriverError>;

    /// What freezes all fenced instances as a whole, those that are just being started too; `None`: this driver fences none.
    fn switch(&self) -> Option<Switch> {
        None
    }

    /// Whether an instance that is here belongs to the group of [`Driver::switch`].
    fn is_fenced(&self, _: &InstanceKey) -> bool {
        false
    }

    /// What an instance that is here may reach; `None`: this driver does not know, or cannot change it.
    fn egress(&self, _: &InstanceKey) -> Option<Egress> {
        None
    }

    /// Changes what a running or frozen instance may reach. Connections that may go on do, others end. Idempotent.
    async fn set_egress(&self, _: &InstanceKey, _: &Egress) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "change what a sandbox may reach" })
    }

    /// What went through a running or frozen instance's network.
    async fn network_stats(&self, _: &InstanceKey) -> Result<NetworkStats, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "count packets" })
    }

    /// Starts a process in a running instance and attaches to it, lossless, before it can write anything.
    async fn exec(&self, _: &InstanceKey, _: &ProcessSpec) -> Result<Attachment, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Starts a process that runs on with nobody attached. The same again answers the process as it is by then.
    async fn start_process(&self, _: &InstanceKey, _: &ProcessSpec) -> Result<ProcessStatus, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Those that run, whoever started them, and those that ended and are remembered; in no order.
    async fn processes(&self, _: &InstanceKey) -> Result<Vec<ProcessStatus>, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Attaches to a process that runs or is remembered.
    async fn attach(&self, _: &InstanceKey, _: &str, _: AttachFrom) -> Result<Attachment, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Sends a signal, 1 to 64; without effect once the process ended.
    async fn signal_process(&self, _: &InstanceKey, _: &str, _: u8) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Changes the size of a process's terminal; without effect where it has none or ended.
    async fn resize_process(&self, _: &InstanceKey, _: &str, _: TerminalSize) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "execute processes" })
    }

    /// Waits until a process ended, or is not there at all.
    async fn process_ended(&self, _: &InstanceKey, _: &str) {}

    /// What the main process wrote, also after it ended.
    async fn logs(&self, _: &InstanceKey, _: &LogQuery) -> Result<Box<dyn LogStream>, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "keep logs" })
    }

    /// What a running instance uses. Networks count elsewhere.
    async fn stats(&self, _: &InstanceKey) -> Result<Stats, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "tell what a sandbox uses" })
    }

    /// Changes the limits of a running instance in place. Fails, and changes nothing, where less memory is asked for than is in
    /// use.
    async fn resize(&self, _: &InstanceKey, _: &Limits) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "change the limits of a running sandbox" })
    }

    /// The file system of a running instance. Fails for one that is frozen: nothing may change in it.
    async fn root(&self, _: &InstanceKey) -> Result<InsideRoot, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "open the files of a sandbox" })
    }

    /// Connects to what listens on a port of a running instance: at its loopback, or its own address.
    async fn connect(&self, _: &InstanceKey, _: u16) -> Result<TcpStream, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "connect to ports of a sandbox" })
    }
}
