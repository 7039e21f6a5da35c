//! The fence's process: sleeps until the channel's moment, freezes, and sleeps until it is told to look again.
//!
//! One thread, no async runtime. Everything that it needs later is opened and mapped before it says that it is ready, its
//! memory is locked, it goes before every ordinary process, and the kernel never picks it when memory runs out; what the host
//! does not allow of that is said and done without. A host that slept through the lease finds the timer over when it wakes:
//! it counts on the boot-time clock.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::setsid;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};

use super::channel::Channel;
use super::switch::Switch;
use super::{ALIVE, CHANNEL, END, LOCK, STATUS, WAKE};
use crate::clock::BootInstant;
use crate::driver::oci::cgroup::Cgroups;
use crate::driver::oci::lifeline;
use crate::sys;

/// Looks at a group that was told to freeze and has not yet.
const FREEZING_PAUSE: Duration = Duration::from_millis(5);
/// Tries of a switch that cannot be thrown: its group is gone, or its host is in trouble.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);
/// How often a fence that holds things frozen looks whether its directory is still there; without it nobody will come.
const FORSAKEN_PAUSE: Duration = Duration::from_secs(5);
/// Above ordinary processes, below what drivers of the host's own devices use.
const PRIORITY: i32 = 20;
/// Never picked when memory runs out.
const OOM_EXEMPT: &str = "-1000";

/// What a fence says of itself once it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Identity of its program's file: the fence of another build is replaced.
    pub program: String,
    pub switches: Vec<String>,
    /// Protections that this host did not allow.
    pub lacking: Vec<String>,
}

/// Runs a fence; `arguments` are its directory and its switches. Says `ready`, or what is wrong, on stdout.
pub fn run(arguments: &[String]) -> ExitCode {
    let result = Guard::begin(arguments).and_then(Guard::stand);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

struct Guard {
    channel: Channel,
    switches: Vec<Switch>,
    wake: File,
    timer: OwnedFd,
    _alive: File,
    _lock: File,
}

/// What woke the fence.
enum Woken {
    Time,
    End,
}

impl Guard {
    fn begin(arguments: &[String]) -> io::Result<Self> {
        let usage = || io::Error::new(io::ErrorKind::InvalidInput, "usage: warren-fence DIRECTORY SWITCH...");
        let (directory, switches) = arguments.split_first().ok_or_else(usage)?;
        let switches =
            switches.iter().map(|text| Switch::parse(text).ok_or_else(usage)).collect::<io::Result<Vec<_>>>()?;
        std::env::set_current_dir(directory)?;
        let lock = File::options().create(true).truncate(false).write(true).open(LOCK)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        // Out of the agent's session and process group: what ends those does not end it.
        let _ = setsid();
        let lacking = protect();
        let wake = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(WAKE)?;
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let mut channel = std::env::current_dir()?;
        channel.push(CHANNEL);
        let guard = Self {
            channel: Channel::open_to_read(&channel)?,
            switches,
            wake,
            timer,
            _alive: lifeline::hold(Path::new(ALIVE))?,
            _lock: lock,
        };
        guard.tell(lacking)?;
        Ok(guard)
    }

    fn tell(&self, lacking: Vec<String>) -> io::Result<()> {
        let switches = self.switches.iter().map(Switch::to_argument).collect();
        let status = Status { program: identity(Path::new("/proc/self/exe"))?, switches, lacking };
        let temporary = format!("{STATUS}.tmp");
        fs::write(&temporary, serde_json::to_vec(&status)?)?;
        fs::rename(&temporary, STATUS)
    }

    /// Guards until it is told to end, or its directory is gone.
    fn stand(mut self) -> io::Result<()> {
        let mut next = look(&self.channel, &self.switches, BootInstant::now());
        println!("ready");
        // Whoever started it reads to the end.
        sys::drop_stdio()?;
        loop {
            self.arm(next)?;
            match self.sleep()? {
                Woken::End => return Ok(()),
                Woken::Time => {}
            }
            if !self.channel.is_in_place() {
                return Ok(());
            }
            next = look(&self.channel, &self.switches, BootInstant::now());
        }
    }

    fn arm(&self, at: BootInstant) -> io::Result<()> {
        let (seconds, nanoseconds) = (at.0.as_secs().max(1), at.0.subsec_nanos());
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX), tv_nsec: nanoseconds.into() };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value: value })?;
        Ok(())
    }

    fn sleep(&mut self) -> io::Result<Woken> {
        let mut fds = [PollFd::new(&self.timer, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // How often it went off does not matter; reading makes it quiet.
        let _ = rustix::io::read(self.timer.as_fd(), &mut [0; 8]);
        let mut bytes = [0; 64];
        match self.wake.read(&mut bytes) {
            Ok(count) if bytes[..count].contains(&END) => Ok(Woken::End),
            _ => Ok(Woken::Time),
        }
    }
}

/// Throws the switches as the channel says for `now`; answers when to look again.
pub(super) fn look(channel: &Channel, switches: &[Switch], now: BootInstant) -> BootInstant {
    let until = channel.read();
    let frozen = until <= now;
    let mut next = if frozen { now.plus(FORSAKEN_PAUSE) } else { until };
    for switch in switches {
        if !frozen && !switch.is_frozen() {
            continue;
        }
        match switch.set(frozen) {
            Ok(true) => {}
            Ok(false) => next = next.min(now.plus(FREEZING_PAUSE)),
            Err(_) => next = next.min(now.plus(REFUSED_PAUSE)),
        }
    }
    next
}

/// A file's identity, which a new build's file does not share.
pub(super) fn identity(program: &Path) -> io::Result<String> {
    let metadata = fs::metadata(program)?;
    Ok(format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// Takes what protection the host gives; answers what it does not.
fn protect() -> Vec<String> {
    let mut lacking = Vec::new();
    let mut take = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            lacking.push(format!("{what}: {error}"));
        }
    };
    take("a life outside the agent's control group", leave_groups());
    take("exempt from the out-of-memory killer", write_own("oom_score_adj", OOM_EXEMPT));
    take("real-time scheduling", sys::schedule_realtime(PRIORITY));
    take("locked memory", mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).map_err(Into::into));
    lacking
}

/// Moves to the root group of each hierarchy where it is in another: a service manager kills a service's whole group, and the
/// fence must not run short of what the agent's group may use.
fn leave_groups() -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    if own.lines().all(|line| line.ends_with(":/")) {
        return Ok(());
    }
    Cgroups::discover()?.move_to_root(std::process::id())
}

fn write_own(file: &str, text: &str) -> io::Result<()> {
    File::options().write(true).open(Path::new("/proc/self").join(file))?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::Kind;

    #[test]
    fn the_group_runs_before_the_moment_and_not_from_it_on() {
        let directory = tempfile::tempdir().expect("directory");
        let mut channel = Channel::open(&directory.path().join("channel")).expect("channel");
        let switches = [Switch { kind: Kind::Plain, path: directory.path().join("switch") }];
        let at = |seconds| BootInstant(Duration::from_secs(seconds));
        let frozen = || switches[0].is_frozen();
        look(&channel, &switches, at(1));
        assert!(frozen(), "nobody ever said that it may run");
        channel.write(at(10)).expect("write");
        assert_eq!(look(&channel, &switches, at(9)), at(10));
        assert!(!frozen());
        assert!(look(&channel, &switches, at(10)) > at(10));
        assert!(frozen());
        channel.write(at(8)).expect("a late write of a moment that is over");
        look(&channel, &switches, at(10));
        assert!(frozen());
        channel.write(at(20)).expect("write");
        look(&channel, &switches, at(11));
        assert!(!frozen());
    }
}
