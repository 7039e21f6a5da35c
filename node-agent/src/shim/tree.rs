//! Kills a process with all that it started, as far as the kernel tells who that is: its descendants, every process of its
//! session, and of the session that its shim made, in which it is where the runtime made none. One that made a session of its
//! own and whose parent has ended is the sandbox's, not the process's.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;

use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

use crate::sys;

/// Looks: each stops what it finds, so that nothing new is started, until it finds nothing new.
const MAX_LOOKS: u32 = 16;

/// Kills `leader`, a child that was not waited for, and all that it started.
pub fn kill(leader: Pid) {
    let leader = leader.as_raw_nonzero().get();
    let mut all = BTreeMap::new();
    for _ in 0..MAX_LOOKS {
        let found = members(leader);
        let new: Vec<(i32, Stat)> = found.into_iter().filter(|(pid, _)| !all.contains_key(pid)).collect();
        if new.is_empty() {
            break;
        }
        new.iter().for_each(|(pid, seen)| signal(*pid, seen, libc::SIGSTOP));
        all.extend(new);
    }
    all.iter().for_each(|(pid, seen)| signal(*pid, seen, libc::SIGKILL));
}

/// Signals a process that was seen, if it is still the same.
fn signal(pid: i32, seen: &Stat, signal: i32) {
    let Some(number) = Pid::from_raw(pid) else { return };
    // Opened before it is looked at again; it may be gone.
    if let Ok(process) = pidfd_open(number, PidfdFlags::empty())
        && stat(pid).is_some_and(|now| now.started == seen.started)
    {
        let _ = sys::signal_process(process.as_fd(), signal);
    }
}

fn members(leader: i32) -> BTreeMap<i32, Stat> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut others: Vec<(i32, Stat)> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect();
    let own = getpid().as_raw_nonzero().get();
    let mut found = BTreeMap::new();
    loop {
        let belongs = |(pid, stat): &mut (i32, Stat)| {
            let session = stat.session == leader || stat.session == own;
            *pid != own && (*pid == leader || session || found.contains_key(&stat.parent))
        };
        let more: Vec<(i32, Stat)> = others.extract_if(.., belongs).collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

#[derive(Debug)]
struct Stat {
    parent: i32,
    session: i32,
    /// In the kernel's ticks: with the pid it names a process for good.
    started: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    // One that ended is nobody's to signal; its parent waits for it.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(15)?.parse().ok()?;
    Some(Stat { parent, session, started })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn grandchildren_go_too() {
        let script = "(sleep 300; :) & setsid sleep 301 & wait";
        let mut child = Command::new("sh").args(["-c", script]).spawn().expect("starts");
        let pid = Pid::from_child(&child);
        while members(pid.as_raw_nonzero().get()).len() < 4 {
            std::thread::yield_now();
        }
        let all = members(pid.as_raw_nonzero().get());
        kill(pid);
        child.wait().expect("waits");
        let alive = |(pid, seen): (&i32, &Stat)| stat(*pid).is_some_and(|now| now.started == seen.started);
        // The kernel takes a moment over it.
        while all.iter().any(alive) {
            std::thread::yield_now();
        }
    }
}
