//! The agent's side: publishes until when the group may run, and keeps a fence alive.
//!
//! A fence that an earlier agent started is taken over if it is the same build's and guards the same switches; else it is
//! ended and another one started. One that dies is replaced at once. Where none can be had the agent throws the switches
//! itself, which holds for as long as the agent runs, and says in its Hello that there is no fence.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{counter, gauge};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::channel::Channel;
use super::guard::{self, Status};
use super::{ALIVE, CHANNEL, END, LOOK, STATUS, Switch, WAKE};
use crate::clock::BootInstant;
use crate::driver::oci::lifeline;
use crate::metrics::{FENCE_STARTS, FENCE_UP};
use crate::storage;

/// Directory below the agent's.
const DIRECTORY: &str = "fence";
/// A fence opens a few files before it is ready.
const READY: Duration = Duration::from_secs(5);
/// A fence that was told to end does so at once.
const ENDING: Duration = Duration::from_secs(5);
/// Pause after a fence could not be started; doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(30);

/// The agent's hold on its fence. Clones share it.
#[derive(Debug, Clone)]
pub struct Fence(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    switches: Vec<Switch>,
    /// `None`: this installation has no fence.
    program: Option<PathBuf>,
    channel: Mutex<Channel>,
    wake: File,
    alive: watch::Sender<bool>,
    published: Notify,
}

impl Fence {
    /// Makes what agent and fence share. Nothing is started yet.
    pub fn open(data_dir: &Path, switches: Vec<Switch>, program: Option<PathBuf>) -> io::Result<Self> {
        let directory = data_dir.join(DIRECTORY);
        storage::create_private_directory(&directory)?;
        let directory = directory.canonicalize()?;
        for name in [WAKE, ALIVE] {
            match lifeline::create(&directory.join(name)) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let inner = Inner {
            channel: Mutex::new(Channel::open(&directory.join(CHANNEL))?),
            wake: open_wake(&directory)?,
            directory,
            switches,
            program,
            alive: watch::Sender::new(false),
            published: Notify::new(),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Whether a fence lives that guards every switch.
    pub fn is_alive(&self) -> bool {
        *self.0.alive.borrow()
    }

    /// Changes when a fence is there that was not, or the other way round.
    pub fn watch_alive(&self) -> watch::Receiver<bool> {
        self.0.alive.subscribe()
    }

    /// Until when the group may run, as it was last published, by whichever agent.
    pub fn published(&self) -> BootInstant {
        self.channel().read()
    }

    /// Lets the group run until `until`. An error: it may not, and the group freezes when the last moment is over.
    pub fn publish(&self, until: BootInstant) -> io::Result<()> {
        self.channel().write(until)?;
        self.0.published.notify_one();
        // A full FIFO has woken it already.
        let _ = (&self.0.wake).write(&[LOOK]);
        Ok(())
    }

    /// Takes over the fence that is here, or starts one. Where that fails it is said, and tried again by [`Self::keep`].
    pub async fn raise(&self) {
        match self.ensure().await {
            Ok(()) => self.set_alive(true),
            Err(error) => {
                self.set_alive(false);
                tracing::warn!(%error, "no fence: while the agent is dead or stopped, nothing is frozen when the lease lapses");
            }
        }
    }

    /// Keeps a fence alive until `stop`; the fence goes on.
    pub async fn keep(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep_for_ever() => {}
        }
    }

    async fn keep_for_ever(&self) {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.is_alive() {
                pause = FIRST_PAUSE;
                if let Err(error) = lifeline::released(&self.0.directory.join(ALIVE)).await {
                    tracing::error!(%error, "the fence cannot be watched");
                    self.set_alive(false);
                } else {
                    tracing::error!("the fence died; starting another");
                }
            } else {
                self.stand_in(pause).await;
                pause = LAST_PAUSE.min(pause * 2);
            }
            self.raise().await;
        }
    }

    /// Does the fence's work for a while; for ever where this installation has none.
    async fn stand_in(&self, pause: Duration) {
        let work = async {
            loop {
                let now = BootInstant::now();
                let next = guard::look(&self.channel(), &self.0.switches, now);
                tokio::select! {
                    () = sleep(next.since(now)) => {}
                    () = self.0.published.notified() => {}
                }
            }
        };
        if self.0.program.is_some() {
            let _ = timeout(pause, work).await;
        } else {
            work.await;
        }
    }

    async fn ensure(&self) -> io::Result<()> {
        let program = self.0.program.as_ref();
        let program = program
            .ok_or_else(|| io::Error::new(ErrorKind::NotFound, "no `warren-fence` beside the agent's program"))?;
        if lifeline::is_held(&self.0.directory.join(ALIVE))? {
            if self.status().is_some_and(|status| self.fits(&status, program)) {
                tracing::info!("took over the fence that was here");
                return Ok(());
            }
            tracing::info!("replacing the fence of another build");
            end_and_wait(&self.0.directory, &self.0.wake).await?;
        }
        self.spawn(program).await
    }

    async fn spawn(&self, program: &Path) -> io::Result<()> {
        counter!(FENCE_STARTS).increment(1);
        let mut command = Command::new(program);
        command.arg(&self.0.directory).args(self.0.switches.iter().map(Switch::to_argument));
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let said = timeout(READY, first_line(&mut child)).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                // One that is not ready may still become it, and would then be a second one.
                let _ = child.kill().await;
                return Err(error);
            }
        };
        // It is reaped when it dies while this agent lives; afterwards it is init's.
        tokio::spawn(async move { drop(child.wait().await) });
        if said != "ready" {
            return Err(io::Error::other(format!("`{}` says: {said}", program.display())));
        }
        let lacking = self.status().map(|status| status.lacking).unwrap_or_default();
        if lacking.is_empty() {
            tracing::info!("the fence stands");
        } else {
            tracing::warn!(lacking = lacking.join("; "), "the fence stands without all of its protection");
        }
        Ok(())
    }

    fn fits(&self, status: &Status, program: &Path) -> bool {
        let ours: Vec<String> = self.0.switches.iter().map(Switch::to_argument).collect();
        guard::identity(program).is_ok_and(|ours| ours == status.program) && status.switches == ours
    }

    fn status(&self) -> Option<Status> {
        serde_json::from_slice(&fs::read(self.0.directory.join(STATUS)).ok()?).ok()
    }

    fn set_alive(&self, alive: bool) {
        gauge!(FENCE_UP).set(f64::from(u8::from(alive)));
        self.0.alive.send_if_modified(|known| std::mem::replace(known, alive) != alive);
    }

    fn channel(&self) -> MutexGuard<'_, Channel> {
        self.0.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the fence of a data directory, if there is one, and removes what it shared with the agent.
pub async fn remove(data_dir: &Path) -> io::Result<()> {
    let directory = data_dir.join(DIRECTORY);
    if !directory.exists() {
        return Ok(());
    }
    if lifeline::is_held(&directory.join(ALIVE))? {
        end_and_wait(&directory, &open_wake(&directory)?).await?;
    }
    fs::remove_dir_all(&directory)
}

async fn end_and_wait(directory: &Path, mut wake: &File) -> io::Result<()> {
    wake.write_all(&[END])?;
    let alive = directory.join(ALIVE);
    timeout(ENDING, lifeline::released(&alive)).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

fn open_wake(directory: &Path) -> io::Result<File> {
    // For reading too: without a fence there is no reader, and writing must do no harm.
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(directory.join(WAKE))
}

async fn first_line(child: &mut Child) -> io::Result<String> {
    let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    line.ok_or_else(|| io::Error::other("it ended without a word"))
}
