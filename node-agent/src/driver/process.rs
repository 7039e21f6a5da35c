//! Processes in an instance beside its main one, as drivers and the data plane speak of them.
//!
//! A process outlives who started it. Its output is numbered: offsets count the bytes of stdout and stderr together, in the
//! order in which they were read. Whoever is attached takes it from an offset on; what is no longer held is announced.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{DriverError, Exit};

/// What to execute.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Program, looked up in the instance's PATH, and its arguments.
    pub command: Vec<String>,
    /// Added to the instance's.
    pub environment: Vec<(String, String)>,
    /// Absolute path; the instance's when `None`.
    pub working_directory: Option<String>,
    /// `uid`, `uid:gid` or a name of the instance's /etc/passwd; root when empty.
    pub user: String,
    /// Give it a terminal.
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

/// One process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Unique in the instance: `a-z`, `0-9` and `-`, at most 63 of them.
    pub id: String,
    pub exec: ExecSpec,
    /// Kill it when the last that was attached to it is gone; until one attached it runs.
    pub kill_on_disconnect: bool,
    /// Its standard input is empty.
    pub no_stdin: bool,
    /// How long it may run before it is killed with all that it started.
    pub timeout: Option<Duration>,
}

/// How a process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    pub id: String,
    pub command: Vec<String>,
    pub working_directory: String,
    /// As it was asked for.
    pub user: String,
    pub terminal: bool,
    pub kill_on_disconnect: bool,
    pub timeout: Option<Duration>,
    /// Milliseconds since the Unix epoch.
    pub started_ms: i64,
    pub ended_ms: Option<i64>,
    /// `None` while it runs.
    pub exit: Option<Exit>,
    pub timed_out: bool,
    /// Of the oldest byte of output that is held, and of the next to come.
    pub output_start: u64,
    pub output_end: u64,
    pub attached: bool,
}

/// Where output came from; a terminal's is all `Stdout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// How to attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AttachFrom {
    pub offset: u64,
    /// The process waits for this one rather than have output dropped.
    pub lossless: bool,
}

/// What an attached one gets, in order; `Exited` last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Output {
        offset: u64,
        stream: Stream,
        data: Vec<u8>,
    },
    /// Bytes `from` to `to` (exclusive) are no longer held.
    Dropped {
        from: u64,
        to: u64,
    },
    Exited(Box<ProcessStatus>),
}

/// The output of a process. Cancel safe: what `next` did not return it returns next time.
#[async_trait]
pub trait ProcessOutput: Send {
    async fn next(&mut self) -> Result<Event, DriverError>;
}

/// The input of a process. Dropping it closes nothing.
#[async_trait]
pub trait ProcessInput: Send {
    /// Waits while the process does not read. What a process that ended cannot take is dropped.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// End of file. Without effect with a terminal.
    async fn close(&mut self) -> io::Result<()>;
}

/// A hold on a process. It is let go of when both halves are dropped.
#[allow(missing_debug_implementations)]
pub struct Attachment {
    /// As it was when this began.
    pub status: ProcessStatus,
    pub output: Box<dyn ProcessOutput>,
    pub input: Box<dyn ProcessInput>,
}
