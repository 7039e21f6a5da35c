//! What every shim does with its children: the runtime's command line, waiting, killing what is left.

use std::fs::{self, File};
use std::io::{self, Read};
use std::process::Command;

use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, waitpid};

use crate::driver::Exit;
use crate::driver::oci::record::Record;
use crate::sys;

/// Most of a runtime's complaint that is passed on.
const MAX_COMPLAINT: u64 = 4096;
/// Rounds of killing what a failed start left: each kills all children there are, and children of those come to us.
const MAX_REAP_ROUNDS: u32 = 64;

/// The runtime's command line up to the global options. It dies with the shim.
pub fn runtime(record: &Record, log: &str) -> Command {
    let mut command = Command::new(&record.runtime);
    command.arg("--root").arg(&record.runtime_root).args(["--log", log]).args(record.kind.arguments());
    sys::die_with_starter(&mut command);
    command
}

pub fn read_pid(path: &str) -> io::Result<Pid> {
    let text = fs::read_to_string(path)?;
    let raw = text.trim().parse().ok().and_then(Pid::from_raw);
    raw.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("`{text}` is not a pid")))
}

/// What lies in the pipe now: something that was left may still hold its other end.
pub fn read_available(output: io::PipeReader) -> Vec<u8> {
    let mut bytes = Vec::new();
    if rustix::fs::fcntl_setfl(&output, rustix::fs::OFlags::NONBLOCK).is_ok() {
        // It ends with "would block" at the latest; what came before is there.
        let _ = output.take(MAX_COMPLAINT).read_to_end(&mut bytes);
    }
    bytes
}

/// What the runtime said, in its log or on its standard error.
pub fn complaint(log: &str, printed: &[u8]) -> String {
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

pub fn wait_for(pid: Pid) -> io::Result<Exit> {
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
pub fn kill_children() {
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
