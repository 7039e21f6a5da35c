//! Logs as they are asked for: what lies there, and what is written from then on until the main process ended.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::log::LogReader;
use super::{io_error, layout, lifeline};
use crate::driver::{DriverError, LogEvent, LogQuery, LogStream};
use crate::sys;

/// A log that is being read.
#[derive(Debug)]
pub struct Logs {
    reader: LogReader,
    alive: PathBuf,
    /// Tells when something is written; `None`: nobody waits for that.
    changes: Option<AsyncFd<OwnedFd>>,
}

impl Logs {
    pub fn open(instance: &Path, query: &LogQuery) -> Result<Self, DriverError> {
        let directory = instance.join(layout::LOGS);
        // Before anything is read: what is written afterwards is told.
        let changes = match query.follow {
            true => Some(watch(&directory).map_err(io_error("watch the log"))?),
            false => None,
        };
        let reader = LogReader::new(directory, query).map_err(io_error("read the log"))?;
        Ok(Self { reader, alive: instance.join(layout::ALIVE), changes })
    }

    async fn changed(&self) -> std::io::Result<()> {
        let Some(changes) = &self.changes else { return Ok(()) };
        let told = async {
            let mut ready = changes.readable().await?;
            // Which file it was does not matter.
            while rustix::io::read(changes.get_ref(), &mut [0u8; 4096]).is_ok() {}
            ready.clear_ready();
            Ok(())
        };
        tokio::select! {
            told = told => told,
            ended = lifeline::released(&self.alive) => ended,
        }
    }
}

fn watch(directory: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, directory, WatchFlags::MODIFY | WatchFlags::CREATE)?;
    sys::watch(changes, Interest::READABLE)
}

#[async_trait]
impl LogStream for Logs {
    async fn next(&mut self) -> Result<Option<LogEvent>, DriverError> {
        let failed = |source| DriverError::Io { what: "read the log".to_owned(), source };
        loop {
            // Before the last look: what it wrote until its end lies there.
            let ended = self.changes.is_none() || !lifeline::is_held(&self.alive).map_err(failed)?;
            if let Some(event) = self.reader.next().map_err(failed)? {
                return Ok(Some(event));
            }
            if ended {
                return Ok(None);
            }
            self.changed().await.map_err(failed)?;
        }
    }
}
