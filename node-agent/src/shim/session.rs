//! A process that runs, and those attached to it: one loop over all of their descriptors.
//!
//! ```text
//!  attached ─input─▶ process ─output─▶ ring ─▶ attached
//!  runs ─▶ ended (its output is read to the end) ─▶ settled (`end` is written) ─▶ nobody is attached ─▶ gone
//! ```
//! Invariants: output is read only as far as every lossless attached one has room for it; `exited` is sent after all output
//! and after `end` is there; whoever finds neither socket nor `end` finds no process.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::attached::Attached;
use super::children::wait_for;
use super::output::{READ_SIZE, Sources};
use super::ring::Ring;
use super::{inner, reaper, tree};
use crate::clock::{self, BootInstant};
use crate::driver::oci::process::files::{self, About, End};
use crate::driver::oci::process::wire::Up;
use crate::driver::oci::record::Record;
use crate::driver::oci::{cgroup, layout};
use crate::driver::process::ProcessStatus;
use crate::sys;

/// Output that is held of a process: a screen or a test's log fits many times, and 1,024 processes fit a host's memory.
const RING: usize = 1 << 20;

/// Connections at once: clients, and an agent that watches or asks. More wait.
const MAX_ATTACHED: usize = 64;

/// After the process ended its output is at an end once nothing comes for so long: a child that it left behind may hold the
/// pipe open for ever.
const QUIET: Duration = Duration::from_millis(500);

/// Such a child may also go on writing for ever. What the process itself wrote was in the pipes when it ended, so no more is
/// read than they can hold (1 MiB each, pipe(7)), and waited for no longer than this. Waiting for clients does not count.
const MAX_AFTER_END: usize = 2 << 20;
const LINGER: Duration = Duration::from_secs(2);

/// What a start brings forth.
#[derive(Debug)]
pub struct Running {
    pub pid: Pid,
    pub process: OwnedFd,
    pub sources: Sources,
}

/// What the host knows of the process's instance.
#[derive(Debug)]
pub struct Host {
    pub record: Record,
    /// Kills for want of memory before it was started.
    pub killed_before: u64,
}

/// What is left to be read after the process ended.
#[derive(Debug)]
struct Rest {
    room: usize,
    quiet: Duration,
    linger: Duration,
}

/// The loop's state.
#[derive(Debug)]
pub struct Session {
    directory: PathBuf,
    listener: UnixListener,
    running: Running,
    host: Host,
    status: ProcessStatus,
    deadline: Option<BootInstant>,
    ring: Ring,
    attached: Vec<Attached>,
    /// Somebody attached once.
    was_attached: bool,
    /// Once it ended.
    rest: Option<Rest>,
    settled: bool,
    /// The instance is being removed, and waits for this process.
    removed: bool,
}

impl Session {
    pub fn new(
        directory: PathBuf,
        listener: UnixListener,
        about: &About,
        running: Running,
        host: Host,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let status = ProcessStatus {
            id: about.id.clone(),
            command: about.command.clone(),
            working_directory: about.working_directory.clone(),
            user: about.user.clone(),
            terminal: about.terminal.is_some(),
            kill_on_disconnect: about.kill_on_disconnect,
            timeout: about.timeout,
            started_ms: clock::unix_now_ms(),
            ended_ms: None,
            exit: None,
            timed_out: false,
            output_start: 0,
            output_end: 0,
            attached: false,
        };
        Ok(Self {
            directory,
            listener,
            running,
            host,
            status,
            deadline: about.timeout.map(|timeout| BootInstant::now().plus(timeout)),
            ring: Ring::new(RING),
            attached: Vec::new(),
            was_attached: false,
            rest: None,
            settled: false,
            removed: false,
        })
    }

    /// Serves until the process ended and nobody is attached any more.
    pub fn serve(mut self) -> io::Result<()> {
        // Who waits for the start is attached before any output is read.
        self.accept();
        loop {
            if self.settled && self.attached.is_empty() {
                break;
            }
            let ready = self.wait()?;
            self.hear(&ready.attached);
            if ready.connection {
                self.accept();
            }
            if ready.input {
                self.running.sources.write();
            }
            if ready.ended && self.rest.is_none() {
                self.end()?;
            }
            self.pass_deadline();
            self.read(&ready.outputs);
            self.settle();
            self.send();
            if self.removed {
                return Ok(());
            }
            self.kill_if_left();
        }
        // From here on `end` answers.
        let _ = fs::remove_file(self.directory.join(files::SOCKET));
        reaper::forget_oldest(Path::new(layout::EXEC));
        Ok(())
    }

    /// How much output may be read now.
    fn room(&self) -> usize {
        let needed = self.attached.iter().filter_map(Attached::needs).min();
        let room = needed.map_or(READ_SIZE, |needed| self.ring.room(needed));
        self.rest.as_ref().map_or(room, |rest| room.min(rest.room))
    }

    fn wait(&mut self) -> io::Result<Ready> {
        let end = self.settled.then_some(&self.status);
        let mut fds = vec![
            PollFd::new(&self.listener, flags(self.attached.len() < MAX_ATTACHED, PollFlags::IN)),
            PollFd::new(&self.running.process, flags(self.rest.is_none(), PollFlags::IN)),
        ];
        let reads = self.room() > 0;
        let takes = self.running.sources.has_room();
        for one in &self.attached {
            let wanted = flags(takes || !one.is_attached(), PollFlags::IN)
                | flags(one.is_behind(&self.ring, end), PollFlags::OUT);
            fds.push(PollFd::new(one.stream(), wanted));
        }
        let outputs_at = fds.len();
        if reads {
            fds.extend(self.running.sources.outputs().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        }
        let outputs_end = fds.len();
        if let Some(stdin) = self.running.sources.thirsty() {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::OUT));
        }
        let begun = BootInstant::now();
        let patience = self.patience(begun, reads).and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut fds, patience.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let ready = Ready {
            connection: happened[0],
            ended: happened[1],
            attached: happened[2..outputs_at].to_vec(),
            outputs: happened[outputs_at..outputs_end].to_vec(),
            input: happened[outputs_end..].contains(&true),
        };
        if let Some(rest) = self.rest.as_mut().filter(|_| reads) {
            rest.pass(BootInstant::now().since(begun), ready.outputs.contains(&true));
        }
        Ok(ready)
    }

    /// How long to wait at most.
    fn patience(&self, now: BootInstant, reads: bool) -> Option<Duration> {
        match &self.rest {
            Some(rest) => (reads && !self.settled).then(|| rest.quiet.min(rest.linger)),
            None => self.deadline.map(|deadline| deadline.since(now)),
        }
    }

    fn accept(&mut self) {
        while self.attached.len() < MAX_ATTACHED {
            let Ok((stream, _)) = self.listener.accept() else { break };
            self.attached.extend(Attached::new(stream));
        }
        // What they came for lies there already, as a rule.
        self.hear(&vec![true; self.attached.len()]);
    }

    /// Takes what came in from those marked.
    fn hear(&mut self, marked: &[bool]) {
        let mut index = 0;
        for marked in marked {
            if *marked && self.hear_one(index).is_err() {
                self.attached.remove(index);
            } else {
                index += 1;
            }
        }
    }

    fn hear_one(&mut self, index: usize) -> Result<(), ()> {
        if !self.running.sources.has_room() && self.attached[index].is_attached() {
            // It only sends input; that it is gone shows when it is sent to, or as a hang-up.
            return hung_up(&self.attached[index]);
        }
        for up in self.attached[index].receive()? {
            self.update_status();
            let one = &mut self.attached[index];
            match up {
                Up::Attach(from) => {
                    self.was_attached = true;
                    self.status.attached = true;
                    one.attach(from, &self.status);
                }
                Up::Query => one.answer(&self.status),
                Up::Watch => one.watch(&self.status),
                Up::Stdin(bytes) => self.running.sources.give(&bytes),
                Up::CloseStdin => self.running.sources.close_input(),
                Up::Resize(size) => {
                    // A terminal that hung up has no size.
                    let _ = self.running.sources.resize(size);
                    self.attached[index].answer(&self.status);
                }
                Up::Signal(signal) => {
                    self.signal(i32::from(signal));
                    self.attached[index].answer(&self.status);
                }
            }
        }
        Ok(())
    }

    fn signal(&self, signal: i32) {
        if self.rest.is_none() && !self.running.sources.signal_foreground(signal) && !self.signal_inside(signal) {
            // It may just have ended.
            let _ = sys::signal_process(self.running.process.as_fd(), signal);
        }
    }

    /// Where the host sees only who waits for the process, the runtime signals it; `false`: the host sees it, or it must go
    /// and the runtime could not.
    fn signal_inside(&self, signal: i32) -> bool {
        let Host { record, .. } = &self.host;
        let path = |name: &str| self.directory.join(name).to_string_lossy().into_owned();
        record.kind.hides_processes()
            && (inner::signal(record, &path(files::INNER_PID), &path(files::LOG), signal) || signal != libc::SIGKILL)
    }

    fn update_status(&mut self) {
        self.status.output_start = self.ring.start();
        self.status.output_end = self.ring.end();
        self.status.attached = self.attached.iter().any(Attached::is_attached);
    }

    /// Notes how the process ended.
    fn end(&mut self) -> io::Result<()> {
        let Host { record, killed_before } = &self.host;
        let seen = wait_for(self.running.pid)?;
        self.status.exit = Some(record.kind.exit(seen, cgroup::oom_kills(&record.oom_file) > *killed_before));
        self.status.ended_ms = Some(clock::unix_now_ms());
        self.rest = Some(Rest { room: MAX_AFTER_END, quiet: QUIET, linger: LINGER });
        Ok(())
    }

    fn pass_deadline(&mut self) {
        if self.rest.is_none() && self.deadline.is_some_and(|deadline| deadline <= BootInstant::now()) {
            self.deadline = None;
            self.status.timed_out = true;
            self.kill();
        }
    }

    fn kill_if_left(&mut self) {
        let left = self.was_attached && !self.attached.iter().any(Attached::is_attached);
        if left && self.status.kill_on_disconnect && self.rest.is_none() {
            self.was_attached = false;
            self.kill();
        }
    }

    fn kill(&self) {
        if !self.signal_inside(libc::SIGKILL) {
            tree::kill(self.running.pid);
        }
    }

    fn read(&mut self, marked: &[bool]) {
        let mut index = 0;
        for marked in marked {
            let room = self.room();
            match marked.then(|| self.running.sources.read(index, room)) {
                Some(None) => {}
                Some(Some((stream, data))) => {
                    let length = data.len();
                    self.ring.push(stream, data);
                    if let Some(rest) = &mut self.rest {
                        rest.room -= length.min(rest.room);
                    }
                    index += 1;
                }
                None => index += 1,
            }
        }
    }

    /// Writes down the end once all output was read.
    fn settle(&mut self) {
        let Some(rest) = self.rest.as_ref().filter(|_| !self.settled) else { return };
        if self.running.sources.outputs_open() > 0 && !rest.is_over() {
            return;
        }
        self.running.sources.close_outputs();
        self.update_status();
        let status = ProcessStatus { attached: false, ..self.status.clone() };
        self.removed = !Path::new(layout::RECORD).exists();
        if !self.removed && End::write(&self.directory, &status, self.ring.pieces(), self.ring.bytes()).is_err() {
            // As on a full disk: how it ended is worth more than what it wrote.
            let status = ProcessStatus { output_start: self.ring.end(), ..status };
            let _ = End::write(&self.directory, &status, Vec::new(), (&[], &[]));
        }
        self.settled = true;
    }

    fn send(&mut self) {
        let end = self.settled.then_some(&self.status);
        let ring = &self.ring;
        self.attached.retain_mut(|one| one.send(ring, end).is_ok());
    }
}

impl Rest {
    fn pass(&mut self, waited: Duration, came: bool) {
        self.linger = self.linger.saturating_sub(waited);
        self.quiet = if came { QUIET } else { self.quiet.saturating_sub(waited) };
    }

    fn is_over(&self) -> bool {
        self.room == 0 || self.quiet.is_zero() || self.linger.is_zero()
    }
}

/// What `wait` found.
#[derive(Debug)]
struct Ready {
    connection: bool,
    ended: bool,
    input: bool,
    attached: Vec<bool>,
    outputs: Vec<bool>,
}

fn flags(wanted: bool, flags: PollFlags) -> PollFlags {
    if wanted { flags } else { PollFlags::empty() }
}

fn hung_up(one: &Attached) -> Result<(), ()> {
    let mut fds = [PollFd::new(one.stream(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut fds, Some(&now)) {
        Ok(1..) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => Err(()),
        _ => Ok(()),
    }
}
