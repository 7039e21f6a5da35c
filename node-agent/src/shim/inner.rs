//! A process that the host does not see, since it runs on a kernel of its own (gVisor).
//!
//! What stands for it on the host only waits for it: a signal would end the waiting and nothing else. The runtime sends
//! signals, to the number that the process has inside.

use std::fs;
use std::process::Stdio;

use super::children::runtime;
use crate::driver::oci::record::Record;

/// Sends a signal to the process whose number inside the runtime wrote to `pid_file`. Whether it did: if not, it has ended, or with its
/// kernel.
pub fn signal(record: &Record, pid_file: &str, log: &str, signal: i32) -> bool {
    let Some(pid) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<u32>().ok()) else {
        return false;
    };
    let mut command = runtime(record, log);
    command.args(["kill", "--pid", &pid.to_string(), &record.container_id, &signal.to_string()]);
    // Where the shim's own streams lead is the client's business.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
