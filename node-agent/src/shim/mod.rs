//! The process between the agent and a sandbox's process: it becomes the parent, so it alone can learn how that process
//! ended, and it outlives the agent.
//!
//! ```text
//! shim run  DIRECTORY FD      one for each instance: mounts, starts, keeps the output, writes `exit.json`
//! shim exec DIRECTORY ID FD   one for each process: starts it, owns its pipes or terminal, serves whoever attaches
//! ```
//!
//! FD is, for an instance, a socket to the agent, over which one [`Report`] goes out as a line of JSON; for a process it is
//! the listening socket of its directory, see `driver/oci/process/wire.rs`.
//!
//! Invariants: the agent's death ends no instance, and no process but those that were asked to end with whoever is attached.
//! What a shim started and cannot report on does not stay. The mounts of an instance are in the shim's own mount namespace,
//! so none outlives a crash. No tokio: there are hundreds of shims.
//!
//! Children: `instance`; `process` with `terminal`, `session`, `attached`, `output`, `ring`, `tree`; `children` for both.

mod attached;
mod children;
mod inner;
mod instance;
mod output;
mod process;
mod reaper;
mod ring;
mod session;
mod terminal;
mod tree;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
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
}

/// Runs a shim; `args` are those after `shim` on the command line.
pub fn run(args: &[String]) -> ExitCode {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", directory, fd] => enter(directory, fd).and_then(instance::run),
        ["exec", directory, id, fd] => process::run(directory, id, fd),
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
    let mut agent = UnixStream::from(inherited(fd)?);
    match prepare(directory) {
        Ok((busy, record)) => Ok(Shim { _busy: busy, agent, record }),
        Err(e) => {
            report(&mut agent, &failed("prepare the shim", &e));
            Err(e)
        }
    }
}

fn inherited(fd: &str) -> io::Result<OwnedFd> {
    let number = fd.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "FD is not a number"))?;
    sys::take_inherited(number)
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
