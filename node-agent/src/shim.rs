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

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper, setsid, waitpid,
};
use serde::{Deserialize, Serialize};

use crate::driver::Exit;
use crate::driver::oci::record::{ExitRecord, Record};
use crate::driver::oci::{cgroup, ids, layout, lifeline};
use crate::sys;

/// How much of a main process's output is kept: what `Ended` promises.
const OUTPUT_TAIL: usize = 4096;
/// How much is read at a time.
const READ_SIZE: usize = 16 << 10;
/// Most of a runtime's complaint that is passed on.
const MAX_COMPLAINT: u64 = 4096;
/// Rounds of killing what a failed start left: each kills all children there are, and children of those come to us.
const MAX_REAP_ROUNDS: u32 = 64;

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
        ["run", directory, fd] => enter(directory, fd).and_then(run_instance),
        ["exec", directory, id, fd] => enter(directory, fd).and_then(|shim| execute(shim, id, None)),
        ["exec", directory, id, fd, socket] => enter(directory, fd).and_then(|shim| execute(shim, id, Some(socket))),
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

fn run_instance(mut shim: Shim) -> io::Result<()> {
    let (output, main) = match start_instance(&shim.record) {
        Ok(started) => started,
        Err(failure) => {
            kill_children();
            report(&mut shim.agent, &failure);
            return Err(io::Error::other("not started"));
        }
    };
    report(&mut shim.agent, &Report::Started);
    drop(shim.agent);
    sys::drop_stdio()?;
    let tail = drain(output.main)?;
    let mut exit = wait_for(main)?;
    exit.oom_killed = exit.code != 0 && cgroup::oom_kills(&shim.record.oom_file) > 0;
    ExitRecord::new(exit, tail).write(Path::new("."))?;
    drop(output.alive);
    Ok(())
}

struct Held {
    main: io::PipeReader,
    alive: File,
}

fn start_instance(record: &Record) -> Result<(Held, Pid), Report> {
    let step = |what: &'static str| move |e: io::Error| failed(what, &e);
    let alive = lifeline::hold(Path::new(layout::ALIVE)).map_err(step("hold the lifeline"))?;
    if !Path::new(layout::RECORD).exists() {
        return Err(failed("start", &io::ErrorKind::NotFound.into()));
    }
    mount_rootfs(record)?;
    let (main, writer) = io::pipe().map_err(step("make a pipe"))?;
    let mut command = runtime(record, "runtime.log");
    command.args(["run", "--detach", "--bundle", ".", "--pid-file", "main.pid", &record.container_id]);
    // An empty pipe, not /dev/null: crun gives what it finds here to the sandbox's root user, and that one is the host's.
    let (empty, _) = io::pipe().map_err(step("make a pipe"))?;
    command.stdin(empty).stderr(writer.try_clone().map_err(step("copy a pipe"))?).stdout(writer);
    let status = command.status();
    // It holds the writing end of the pipe.
    drop(command);
    let failure = |what: String, output: String| Report::Failed { what, output };
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            kill_children();
            let printed = read_available(main);
            return Err(failure(format!("{} run: {status}", record.runtime), complaint("runtime.log", &printed)));
        }
        Err(e) => return Err(failure(format!("run `{}`", record.runtime), e.to_string())),
    }
    let pid = read_pid("main.pid").map_err(step("read the main process's pid"))?;
    fs::write(layout::STARTED, pid.to_string()).map_err(step("write down the main process's pid"))?;
    Ok((Held { main, alive }, pid))
}

/// Mounts the instance's root file system: its own upper directory over the shared base, whose files it sees as its own
/// users'. Only here: the mount namespace is new, and nothing mounted in it is seen outside.
fn mount_rootfs(record: &Record) -> Result<(), Report> {
    let step = |what: &'static str| move |e: rustix::io::Errno| failed(what, &e.into());
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| failed("make a mount namespace", &e.into()))?;
    // What the host unmounts goes here too, so that no shim keeps a disk busy; nothing goes the other way.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("cut off mounts"))?;
    let users = sys::user_namespace(record.first_id, ids::RANGE).map_err(|e| failed("make a user namespace", &e))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let base = open_tree(CWD, &record.base, flags).map_err(step("open the template's root file system"))?;
    sys::set_id_map(base.as_fd(), users.as_fd()).map_err(|e| failed("shift the ids of the template's files", &e))?;
    move_mount(base, "", CWD, layout::LOWER, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step("mount the template's root file system"))?;
    // Relative paths: a `:` or `,` in an absolute one would need escaping.
    let layers = c"lowerdir=lower,upperdir=upper,workdir=work";
    mount("overlay", &record.rootfs, "overlay", MountFlags::empty(), layers).map_err(step("mount the overlay"))?;
    // The overlay has its own hold on it.
    unmount(layout::LOWER, UnmountFlags::DETACH).map_err(step("unmount the lower layer"))
}

fn execute(mut shim: Shim, id: &str, console: Option<&str>) -> io::Result<()> {
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
    Steering::begin(&steering, pidfd);
    report(&mut shim.agent, &Report::Started);
    let Exit { code, signal, .. } = wait_for(pid)?;
    let oom_killed = code != 0 && cgroup::oom_kills(&shim.record.oom_file) > killed_before;
    report(&mut shim.agent, &Report::Exited { code, signal, oom_killed });
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
        command.args(["--tty", "--console-socket", socket]);
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

/// How far an execution is, for the thread that listens to the agent.
enum Steering {
    Starting,
    /// The agent let go before there was anything to kill.
    LetGo,
    Running(OwnedFd),
}

impl Steering {
    fn begin(this: &Mutex<Self>, pidfd: OwnedFd) {
        let mut state = this.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, Self::LetGo) {
            let _ = sys::signal_process(pidfd.as_fd(), libc::SIGKILL);
        }
        *state = Self::Running(pidfd);
    }

    fn pass_on(this: &Mutex<Self>, signal: i32) {
        let mut state = this.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            // It may have ended.
            Self::Running(pidfd) => drop(sys::signal_process(pidfd.as_fd(), signal)),
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

/// The runtime's command line up to the global options. It dies with the shim.
fn runtime(record: &Record, log: &str) -> Command {
    let mut command = Command::new(&record.runtime);
    command.arg("--root").arg(&record.runtime_root).args(["--log", log]);
    sys::die_with_starter(&mut command);
    command
}

fn read_pid(path: &str) -> io::Result<Pid> {
    let text = fs::read_to_string(path)?;
    let raw = text.trim().parse().ok().and_then(Pid::from_raw);
    raw.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("`{text}` is not a pid")))
}

/// Reads until every writer is gone and keeps the end.
fn drain(mut output: impl Read) -> io::Result<Vec<u8>> {
    let mut tail = VecDeque::with_capacity(OUTPUT_TAIL + READ_SIZE);
    let mut buffer = vec![0u8; READ_SIZE];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return Ok(tail.into()),
            Ok(count) => {
                tail.extend(&buffer[..count]);
                tail.drain(..tail.len().saturating_sub(OUTPUT_TAIL));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// What lies in the pipe now: something that was left may still hold its other end.
fn read_available(output: io::PipeReader) -> Vec<u8> {
    let mut bytes = Vec::new();
    if rustix::fs::fcntl_setfl(&output, rustix::fs::OFlags::NONBLOCK).is_ok() {
        // It ends with "would block" at the latest; what came before is there.
        let _ = output.take(MAX_COMPLAINT).read_to_end(&mut bytes);
    }
    bytes
}

/// What the runtime said, in its log or on its standard error.
fn complaint(log: &str, printed: &[u8]) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(log) {
        let _ = file.take(MAX_COMPLAINT).read_to_end(&mut bytes);
    }
    if !printed.is_empty() {
        bytes.push(b'\n');
        bytes.extend_from_slice(printed);
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

fn wait_for(pid: Pid) -> io::Result<Exit> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                let signal = status.terminating_signal().unwrap_or(0);
                let code = status.exit_status().unwrap_or(128 + signal);
                return Ok(Exit { code, signal, oom_killed: false });
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Kills and reaps every child, also those that came to this process when their parents ended.
fn kill_children() {
    let list = format!("/proc/self/task/{}/children", getpid());
    for _ in 0..MAX_REAP_ROUNDS {
        let children = fs::read_to_string(&list).unwrap_or_default();
        let pids: Vec<Pid> =
            children.split_whitespace().filter_map(|word| word.parse().ok().and_then(Pid::from_raw)).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            // Ours and not waited for: the number is still theirs.
            let _ = kill_process(pid, Signal::KILL);
            let _ = wait_for(pid);
        }
    }
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
    fn only_the_last_four_kib_of_output_are_kept() {
        let long: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        assert_eq!(drain(long.as_slice()).expect("reads"), long[long.len() - OUTPUT_TAIL..]);
        assert_eq!(drain(&b"short"[..]).expect("reads"), b"short");
    }

    #[test]
    fn an_unknown_command_is_refused() {
        assert_eq!(run(&["dance".to_owned()]), ExitCode::FAILURE);
    }
}
