//! The process between the agent and a sandbox's process: it becomes the parent, so it alone can learn how that process
//! ended, and it outlives the agent.
//!
//! ```text
//! shim run  DIRECTORY FD             one for each instance: mounts, starts, drains the output, writes `exit.json`
//! shim exec DIRECTORY ID FD [SOCKET] one for each execution: starts, passes signals on, reports
//! ```
//!
//! FD is a socket to the agent: [`Report`]s go out as lines of JSON; to an execution's shim each byte that comes in is a
//! signal to pass on, and end of file (the agent dropped the execution, or died) kills the process.
//!
//! Invariants: the agent's death ends no instance and ends every execution. What a shim started and cannot report on does
//! not stay. The mounts of an instance are in the shim's own mount namespace, so none outlives a crash. No tokio: there are
//! hundreds of shims.

mod children;
mod execution;
mod inner;
mod instance;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use rustix::process::{getpid, set_child_subreaper, setsid};
use serde::{Deserialize, Serialize};

use crate::driver::oci::record::Record;
use crate::driver::oci::{layout, lifeline};
use crate::sys;

/// What a shim tells the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The process runs.
    Started,
    /// It does not; nothing of it is left.
    Failed { what: String, output: String },
    /// It ended. From an execution's shim only.
    Exited { code: i32, signal: i32, oom_killed: bool },
}

/// Runs a shim; `args` are those after `shim` on the command line.
pub fn run(args: &[String]) -> ExitCode {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", directory, fd] => enter(directory, fd).and_then(instance::run),
        ["exec", directory, id, fd] => enter(directory, fd).and_then(|shim| execution::run(shim, id, None)),
        ["exec", directory, id, fd, socket] => {
            enter(directory, fd).and_then(|shim| execution::run(shim, id, Some(socket)))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: shim run|exec DIRECTORY ...")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A shim that holds its instance's `busy` lifeline and stands in the instance's directory.
struct Shim {
    _busy: File,
    agent: UnixStream,
    record: Record,
}

fn enter(directory: &str, fd: &str) -> io::Result<Shim> {
    let number = fd.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "FD is not a number"))?;
    let mut agent = UnixStream::from(sys::take_inherited(number)?);
    match prepare(directory) {
        Ok((busy, record)) => Ok(Shim { _busy: busy, agent, record }),
        Err(e) => {
            report(&mut agent, &failed("prepare the shim", &e));
            Err(e)
        }
    }
}

fn prepare(directory: &str) -> io::Result<(File, Record)> {
    setsid()?;
    set_child_subreaper(Some(getpid()))?;
    std::env::set_current_dir(directory)?;
    let busy = lifeline::hold(Path::new(layout::BUSY))?;
    // After the lifeline is held: removal takes the record away before it looks for holders, so either it sees us or we see
    // that it began.
    let record = Record::read(Path::new("."))?;
    Ok((busy, record))
}

fn failed(what: &str, error: &io::Error) -> Report {
    Report::Failed { what: what.to_owned(), output: error.to_string() }
}

/// Tells the agent. That it is gone is no failure: instances outlive it.
fn report(agent: &mut UnixStream, report: &Report) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let _ = agent.write_all(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_command_is_refused() {
        assert_eq!(run(&["dance".to_owned()]), ExitCode::FAILURE);
    }
}
