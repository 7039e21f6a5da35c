//! An execution's shim: starts the process, passes signals on, reports how it ended.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::children::{complaint, kill_children, read_pid, runtime, wait_for};
use super::{Report, Shim, failed, inner, report};
use crate::driver::Exit;
use crate::driver::oci::record::Record;
use crate::driver::oci::{cgroup, layout};
use crate::sys;

pub fn run(mut shim: Shim, id: &str, console: Option<&str>) -> io::Result<()> {
    let steering = Arc::new(Mutex::new(Steering::Starting));
    let listener = shim.agent.try_clone()?;
    std::thread::Builder::new().stack_size(64 << 10).spawn({
        let steering = Arc::clone(&steering);
        move || steer(listener, &steering)
    })?;
    let killed_before = cgroup::oom_kills(&shim.record.oom_file);
    let started = start_execution(&shim.record, id, console);
    for kind in ["json", "pid", "log"] {
        // Whatever is left goes with the instance.
        let _ = fs::remove_file(exec_file(id, kind));
    }
    let (pid, pidfd) = match started {
        Ok(started) => started,
        Err(failure) => {
            kill_children();
            report(&mut shim.agent, &failure);
            return Err(io::Error::other("not started"));
        }
    };
    sys::drop_stdio()?;
    let inside = shim.record.kind.hides_processes().then(|| (shim.record.clone(), id.to_owned()));
    Steering::begin(&steering, Target { process: pidfd, inside });
    report(&mut shim.agent, &Report::Started);
    let seen = wait_for(pid)?;
    let oom_killed = cgroup::oom_kills(&shim.record.oom_file) > killed_before;
    let Exit { code, signal, oom_killed } = shim.record.kind.exit(seen, oom_killed);
    report(&mut shim.agent, &Report::Exited { code, signal, oom_killed });
    for kind in ["inner", "log"] {
        let _ = fs::remove_file(exec_file(id, kind));
    }
    Ok(())
}

fn exec_file(id: &str, kind: &str) -> String {
    format!("{}/{id}.{kind}", layout::EXEC)
}

fn start_execution(record: &Record, id: &str, console: Option<&str>) -> Result<(Pid, OwnedFd), Report> {
    let log = exec_file(id, "log");
    let mut command = runtime(record, &log);
    command.args(["exec", "--detach", "--process", &exec_file(id, "json"), "--pid-file", &exec_file(id, "pid")]);
    if let Some(socket) = console {
        command.args(["--console-socket", socket]);
    }
    if record.kind.hides_processes() {
        command.args(["--internal-pid-file", &exec_file(id, "inner")]);
    }
    command.arg(&record.container_id);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => {
            let what = format!("{} exec: {status}", record.runtime);
            return Err(Report::Failed { what, output: complaint(&log, &[]) });
        }
        Err(e) => return Err(failed("run the runtime", &e)),
    }
    let pid = read_pid(&exec_file(id, "pid")).map_err(|e| failed("read the process's pid", &e))?;
    // It is our child, so the number is its until we wait.
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed("open the process", &e.into()))?;
    Ok((pid, pidfd))
}

/// A process that runs.
struct Target {
    process: OwnedFd,
    /// What its number inside is found with, where the host does not see it.
    inside: Option<(Record, String)>,
}

impl Target {
    fn signal(&self, signal: i32) {
        if let Some((record, id)) = &self.inside
            && (inner::signal(record, &exec_file(id, "inner"), &exec_file(id, "log"), signal)
                || signal != libc::SIGKILL)
        {
            return;
        }
        // It may have ended.
        let _ = sys::signal_process(self.process.as_fd(), signal);
    }
}

/// How far an execution is, for the thread that listens to the agent.
enum Steering {
    Starting,
    /// The agent let go before there was anything to kill.
    LetGo,
    Running(Box<Target>),
}

impl Steering {
    fn begin(this: &Mutex<Self>, target: Target) {
        let mut state = this.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, Self::LetGo) {
            target.signal(libc::SIGKILL);
        }
        *state = Self::Running(Box::new(target));
    }

    fn pass_on(this: &Mutex<Self>, signal: i32) {
        let mut state = this.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            Self::Running(target) => target.signal(signal),
            Self::Starting if signal == libc::SIGKILL => *state = Self::LetGo,
            // The agent knows of no process yet that it could mean.
            Self::Starting | Self::LetGo => {}
        }
    }
}

fn steer(mut agent: UnixStream, steering: &Mutex<Steering>) {
    let mut byte = [0u8];
    while let Ok(1) = agent.read(&mut byte) {
        Steering::pass_on(steering, i32::from(byte[0]));
    }
    Steering::pass_on(steering, libc::SIGKILL);
}
