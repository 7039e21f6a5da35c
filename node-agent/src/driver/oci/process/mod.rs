//! Processes in an instance, as the agent starts and finds them: a shim each, which owns the process's streams and answers on
//! a socket in the process's directory.
//!
//! ```text
//!  agent ──socket──▶ shim exec ──▶ runtime exec ──▶ process
//! ```
//! Nothing is kept in memory: a later agent finds the directories, connects, and goes on. Children: `wire` and `files` are
//! what agent and shim share, `connection` speaks to a shim, `ended` reads what one left.

mod connection;
mod ended;
pub(crate) mod files;
pub(crate) mod wire;

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use futures::future::join_all;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, open, renameat_with};

use self::connection::Connection;
use self::ended::EndedOutput;
use self::files::{About, End};
use self::wire::{NotStarted, Up};
use super::record::Record;
use super::users::User;
use super::{OciDriver, config, host, io_error, launch, layout, runtime};
use crate::driver::{AttachFrom, Attachment, DriverError, ProcessInput, ProcessSpec, ProcessStatus, TerminalSize};

/// Processes that were started in an instance and run at once. What they start themselves is bounded by the sandbox's own
/// limit; each of these costs the host a shim.
const MAX_RUNNING: usize = 256;

/// Looks for a process that ends, or starts, just when it is looked for.
const LOOKS: u32 = 3;

/// The processes of one instance.
#[derive(Debug)]
pub struct Processes {
    instance: PathBuf,
}

impl Processes {
    pub fn new(instance: PathBuf) -> Self {
        Self { instance }
    }

    /// Starts one and attaches to it before it can write anything.
    pub async fn exec(
        &self,
        driver: &OciDriver,
        record: &Record,
        spec: &ProcessSpec,
    ) -> Result<Attachment, DriverError> {
        let first = Up::Attach(AttachFrom { offset: 0, lossless: true });
        match self.launch(driver, record, spec, &first).await? {
            Some((connection, status)) => Ok(connection.attachment(status)),
            None => Err(DriverError::ProcessExists { id: spec.id.clone() }),
        }
    }

    pub async fn start(
        &self,
        driver: &OciDriver,
        record: &Record,
        spec: &ProcessSpec,
    ) -> Result<ProcessStatus, DriverError> {
        for _ in 0..LOOKS {
            if let Some((_, status)) = self.launch(driver, record, spec, &Up::Query).await? {
                return Ok(status);
            }
            match About::read(&self.directory(&spec.id)) {
                Ok(about) if about.fingerprint == files::fingerprint(spec) => {}
                Ok(_) => return Err(DriverError::ProcessExists { id: spec.id.clone() }),
                // Its start failed meanwhile.
                Err(_) => continue,
            }
            match self.status(&spec.id).await {
                Err(DriverError::ProcessNotFound { .. }) => {}
                other => return other,
            }
        }
        Err(io_error(&format!("start process {}", spec.id))(ErrorKind::ResourceBusy.into()))
    }

    pub async fn list(&self) -> Result<Vec<ProcessStatus>, DriverError> {
        let names = self.names().map_err(io_error("list the processes"))?;
        let all = join_all(names.iter().map(|id| self.status(id))).await;
        let known = |status: Result<ProcessStatus, DriverError>| match status {
            Err(DriverError::ProcessNotFound { .. }) => None,
            other => Some(other),
        };
        all.into_iter().filter_map(known).collect()
    }

    pub async fn attach(&self, id: &str, from: AttachFrom) -> Result<Attachment, DriverError> {
        let attached = self.reach(id, &Up::Attach(from)).await?;
        Ok(match attached {
            Reached::Running(connection, status) => connection.attachment(status),
            Reached::Ended(end) => {
                let status = end.status.clone();
                let output = Box::new(EndedOutput::new(*end, from.offset));
                Attachment { status, output, input: Box::new(NoInput) }
            }
        })
    }

    pub async fn signal(&self, id: &str, signal: u8) -> Result<(), DriverError> {
        self.reach(id, &Up::Signal(signal)).await.map(drop)
    }

    pub async fn resize(&self, id: &str, size: TerminalSize) -> Result<(), DriverError> {
        self.reach(id, &Up::Resize(size)).await.map(drop)
    }

    /// Waits until it ended, or is not there.
    pub async fn ended(&self, id: &str) {
        if let Ok(Reached::Running(mut connection, _)) = self.reach(id, &Up::Watch).await {
            // Whatever comes, or fails to come, is the end.
            let _ = connection.next().await;
        }
    }

    async fn status(&self, id: &str) -> Result<ProcessStatus, DriverError> {
        Ok(match self.reach(id, &Up::Query).await? {
            Reached::Running(_, status) => status,
            Reached::Ended(end) => end.status,
        })
    }

    fn directory(&self, id: &str) -> PathBuf {
        self.instance.join(layout::EXEC).join(id)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.instance.join(layout::EXEC)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| !name.starts_with('.')).collect())
    }

    /// What is there of a process: `end` where it ended, or who answers on its socket.
    async fn reach(&self, id: &str, first: &Up) -> Result<Reached, DriverError> {
        let directory = self.directory(id);
        let not_found = || DriverError::ProcessNotFound { id: id.to_owned() };
        for _ in 0..LOOKS {
            match End::open(&directory) {
                Ok(Some(end)) => return Ok(Reached::Ended(Box::new(end))),
                Ok(None) => {}
                // Torn, as after the host went down.
                Err(_) => return Err(not_found()),
            }
            let answered = async {
                let mut connection = Connection::open(&directory, first).await?;
                let status = connection.status().await?;
                io::Result::Ok((connection, status))
            };
            match answered.await {
                Ok((connection, Ok(status))) => return Ok(Reached::Running(connection, status)),
                // It did not start.
                Ok((_, Err(_))) => return Err(not_found()),
                Err(_) if !directory.exists() => return Err(not_found()),
                // It may just have ended; if not, its shim died.
                Err(_) => {}
            }
        }
        Err(not_found())
    }

    /// Starts a shim for a process and asks it with `first`; `None`: the id is taken.
    async fn launch(
        &self,
        driver: &OciDriver,
        record: &Record,
        spec: &ProcessSpec,
        first: &Up,
    ) -> Result<Option<(Connection, ProcessStatus)>, DriverError> {
        if self.count_running().map_err(io_error("count the processes"))? >= MAX_RUNNING {
            return Err(DriverError::TooManyProcesses { limit: MAX_RUNNING });
        }
        let user = User::resolve(&spec.exec.user, &self.instance, record)?;
        let process = config::exec_process(record, &spec.exec, &user, host::open_files()).to_string();
        let working_directory = spec.exec.working_directory.as_ref().unwrap_or(&record.working_directory);
        let about = About::new(spec, working_directory.clone());
        let claimed = self.claim(&about, &process).map_err(io_error("write the process's files"))?;
        let Some(listener) = claimed else { return Ok(None) };
        let directory = self.directory(&spec.id);
        let what = || format!("execute in {}", record.sandbox);
        // Connected before the shim runs, so that it is served first.
        let mut connection = Connection::open(&directory, first).await.map_err(io_error(&what()))?;
        let slot = driver.runtime().slot().await;
        let shim = launch::launch_process(driver.shim_exe(), &self.instance, &spec.id, listener);
        launch::reap(shim.map_err(io_error("start a shim"))?);
        let answer = tokio::time::timeout(launch::START_TIMEOUT, connection.status()).await;
        drop(slot);
        match answer.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(Ok(status)) => Ok(Some((connection, status))),
            Ok(Err(refused)) => Err(refusal(refused, spec)),
            Err(source) => Err(DriverError::Io { what: what(), source }),
        }
    }

    /// Those that have not ended.
    fn count_running(&self) -> io::Result<usize> {
        Ok(self.names()?.iter().filter(|id| !self.directory(id).join(files::END).exists()).count())
    }

    /// Makes the process's directory with all that its shim needs; `None`: it is there. What a crash left in the way, behind
    /// which nobody is, goes.
    fn claim(&self, about: &About, process: &str) -> io::Result<Option<OwnedFd>> {
        let made = self.instance.join(layout::EXEC).join(format!(".{}", uuid::Uuid::new_v4().simple()));
        let directory = self.directory(&about.id);
        let listener = prepare(&made, about, process);
        let claimed = listener.and_then(|listener| {
            for _ in 0..LOOKS {
                match renameat_with(CWD, &made, CWD, &directory, RenameFlags::NOREPLACE) {
                    Ok(()) => return Ok(Some(listener.into())),
                    Err(rustix::io::Errno::EXIST) if connection::is_abandoned(&directory) => {
                        fs::remove_dir_all(&directory)?;
                    }
                    Err(rustix::io::Errno::EXIST) => return Ok(None),
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(None)
        });
        if !matches!(claimed, Ok(Some(_))) {
            // It goes with the instance at the latest.
            let _ = fs::remove_dir_all(&made);
        }
        claimed
    }
}

fn prepare(directory: &Path, about: &About, process: &str) -> io::Result<UnixListener> {
    fs::create_dir(directory)?;
    about.write(directory)?;
    fs::write(directory.join(files::PROCESS), process)?;
    UnixListener::bind(socket_path(&open_directory(directory)?))
}

fn open_directory(directory: &Path) -> io::Result<OwnedFd> {
    Ok(open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A path to the socket in an open directory that is short enough for one: a socket's may have 107 characters only.
fn socket_path(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), files::SOCKET))
}

/// Where a process was found.
enum Reached {
    Running(Connection, ProcessStatus),
    Ended(Box<End>),
}

/// The error for a start that failed.
fn refusal(NotStarted { what, output }: NotStarted, spec: &ProcessSpec) -> DriverError {
    let output = runtime::last_lines(output.as_bytes());
    let command = spec.exec.command.first().cloned().unwrap_or_default();
    if runtime::says_command_not_found(&output, &command) {
        return DriverError::CommandNotFound { command };
    }
    DriverError::Runtime { what, output }
}

/// Of a process that ended.
struct NoInput;

#[async_trait::async_trait]
impl ProcessInput for NoInput {
    async fn write(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    async fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
}
