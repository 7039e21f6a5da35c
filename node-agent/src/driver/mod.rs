//! How an agent runs sandboxes: the one seam between Warren and a runtime.
//!
//! A driver knows runtimes and the host; it knows nothing of sessions, leases or assignments. It keeps what it needs to find
//! its sandboxes again on disk or in the runtime, so a new agent process sees through [`Driver::list`] what an earlier one
//! left behind: sandboxes do not stop when the agent does.

pub mod oci;
pub mod sim;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use warren_proto::ids::{Epoch, SandboxName};
use warren_proto::units::Resources;

use crate::fence::Switch;
use crate::gpu::{GpuError, Grant};

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
    /// Devices to inject.
    pub gpus: Vec<Grant>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

/// One process to execute in a running instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSpec {
    /// Program, looked up in the instance's PATH, and its arguments.
    pub command: Vec<String>,
    /// Added to the instance's.
    pub environment: Vec<(String, String)>,
    /// Absolute path; the instance's when `None`.
    pub working_directory: Option<String>,
    /// Numeric user and group inside.
    pub user: (u32, u32),
    /// Give it a terminal.
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

/// A process executing in an instance. Dropping `control` kills it.
#[allow(missing_debug_implementations)]
pub struct Execution {
    /// Dropping it is end of file for the process (with a terminal: it hangs up only when `control` goes too).
    pub stdin: Box<dyn AsyncWrite + Send + Unpin>,
    /// With a terminal: all output.
    pub stdout: Box<dyn AsyncRead + Send + Unpin>,
    /// `None` with a terminal.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    pub control: Box<dyn ExecControl>,
}

/// Steers an executing process.
#[async_trait]
pub trait ExecControl: Send + Sync {
    /// Waits until the process ended. May be called again, with the same answer.
    async fn wait(&self) -> Result<Exit, DriverError>;
    /// Sends a signal to the process; without effect once it ended.
    async fn signal(&self, signal: i32) -> Result<(), DriverError>;
    /// Without effect where there is no terminal.
    async fn resize(&self, size: TerminalSize) -> Result<(), DriverError>;
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

    /// Executes one process in a running instance.
    async fn exec(&self, key: &InstanceKey, spec: &ExecSpec) -> Result<Execution, DriverError>;

    /// The file system of a running instance. Fails for one that is frozen: nothing may change in it.
    async fn root(&self, _: &InstanceKey) -> Result<InsideRoot, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "open the files of a sandbox" })
    }

    /// Connects to what listens on a port of a running instance: at its loopback, or its own address.
    async fn connect(&self, _: &InstanceKey, _: u16) -> Result<TcpStream, DriverError> {
        Err(DriverError::Unsupported { driver: self.name(), what: "connect to ports of a sandbox" })
    }
}
