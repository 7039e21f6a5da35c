//! A process's shim: starts it, then serves it until it ended and everyone attached has its output.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::attached::refuse_all;
use super::children::{complaint, kill_children, read_available, read_pid, runtime};
use super::output::Sources;
use super::session::{Host, Running, Session};
use super::terminal::{self, Console};
use super::{inherited, prepare};
use crate::driver::oci::cgroup;
use crate::driver::oci::layout;
use crate::driver::oci::process::files::{self, About};
use crate::driver::oci::process::wire::NotStarted;
use crate::driver::oci::record::Record;
use crate::sys;

/// Tries of a start that the runtime refuses for no lasting reason.
const ATTEMPTS: u32 = 3;

/// What crun 1.8 says when its helper process inside died before it executed anything: EPERM to about one first execution
/// in 40, the other to about one in 500 on a busy host. The next try works.
const PASSING: [&str; 2] = ["operation not permitted", "fail startup"];

/// Runs `shim exec`.
pub fn run(directory: &str, id: &str, fd: &str) -> io::Result<()> {
    let listener = UnixListener::from(inherited(fd)?);
    let here = Path::new(layout::EXEC).join(id);
    let started = prepare(directory).map_err(|e| not_started("prepare the shim", &e)).and_then(|(busy, record)| {
        let about = About::read(&here).map_err(|e| not_started("read what to start", &e))?;
        let killed_before = cgroup::oom_kills(&record.oom_file);
        let running = start(&record, &here, &about)?;
        Ok((busy, record, about, killed_before, running))
    });
    for name in [files::PROCESS, files::PID, files::LOG] {
        // Whatever is left goes with the instance.
        let _ = fs::remove_file(here.join(name));
    }
    let (_busy, record, about, killed_before, running) = match started {
        Ok(started) => started,
        Err(failure) => {
            kill_children();
            // Nobody is to find it any more before those who wait are told.
            let _ = fs::remove_dir_all(&here);
            refuse_all(&listener, &failure);
            return Err(io::Error::other("not started"));
        }
    };
    sys::drop_stdio()?;
    let host = Host { record, killed_before };
    Session::new(here, listener, &about, running, host)?.serve()
}

fn not_started(what: &str, error: &io::Error) -> NotStarted {
    NotStarted { what: what.to_owned(), output: error.to_string() }
}

fn start(record: &Record, here: &Path, about: &About) -> Result<Running, NotStarted> {
    let mut attempt = 1;
    loop {
        match start_once(record, here, about) {
            Err(failure) if attempt < ATTEMPTS && is_passing(&failure.output) => {
                kill_children();
                attempt += 1;
            }
            other => return other,
        }
    }
}

fn is_passing(output: &str) -> bool {
    let output = output.to_lowercase();
    PASSING.iter().any(|complaint| output.contains(complaint))
}

fn start_once(record: &Record, here: &Path, about: &About) -> Result<Running, NotStarted> {
    let step = |what: &'static str| move |e: io::Error| not_started(what, &e);
    let (pid_file, log) = (text(&here.join(files::PID)), text(&here.join(files::LOG)));
    let mut command = runtime(record, &log);
    command.args(["exec", "--detach", "--process", &text(&here.join(files::PROCESS)), "--pid-file", &pid_file]);
    // Left by an attempt that failed.
    let _ = fs::remove_file(&log);
    let console = match about.terminal {
        Some(_) => Some(Console::listen(here.join(files::TTY)).map_err(step("open a console socket"))?),
        None => None,
    };
    if console.is_some() {
        command.args(["--console-socket", &text(&here.join(files::TTY))]);
    }
    if record.kind.hides_processes() {
        command.args(["--internal-pid-file", &text(&here.join(files::INNER_PID))]);
    }
    command.arg(&record.container_id);
    // Pipes, also where a terminal takes their place: crun gives what it finds here to the sandbox's root user, and a
    // device would be the host's.
    let (stdin, input) = io::pipe().map_err(step("make a pipe"))?;
    let (stdout, output) = io::pipe().map_err(step("make a pipe"))?;
    let (stderr, errors) = io::pipe().map_err(step("make a pipe"))?;
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(output)).stderr(Stdio::from(errors));
    let status = command.status().map_err(step("run the runtime"))?;
    // It holds the other ends of the pipes.
    drop(command);
    if !status.success() {
        let output = complaint(&log, &read_available(stderr));
        return Err(NotStarted { what: format!("{} exec: {status}", record.runtime), output });
    }
    let pid = read_pid(&pid_file).map_err(step("read the process's pid"))?;
    let process = open(pid).map_err(step("open the process"))?;
    let terminal = match (console, about.terminal) {
        (Some(console), Some(size)) => {
            let terminal = console.receive().map_err(step("receive the terminal"))?;
            // It may look before the runtime set the size, and is told by SIGWINCH then.
            terminal::resize(&terminal, size).map_err(step("set the terminal's size"))?;
            Some(terminal)
        }
        _ => None,
    };
    let sources = match terminal {
        Some(terminal) => Sources::terminal(terminal),
        None => Sources::pipes((!about.no_stdin).then(|| input.into()), stdout.into(), stderr.into()),
    };
    Ok(Running { pid, process, sources: sources.map_err(step("prepare the streams"))? })
}

/// It is our child, so the number is its until we wait.
fn open(pid: Pid) -> io::Result<OwnedFd> {
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
