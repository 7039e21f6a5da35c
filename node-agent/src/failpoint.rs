//! Points at which a test has the process killed, as `kill -9` at that very step would.
//!
//! `WARREN_FAILPOINT=<point>` in the environment of an agent names the point; its shims get it too. Only debug builds look:
//! in a release build a point is nothing.

use std::ffi::OsString;

use rustix::process::{Signal, getpid, kill_process};

const VARIABLE: &str = "WARREN_FAILPOINT";

/// Steps of a start in the agent, in order.
pub const START: [&str; 7] = [
    "start.intended",
    "start.claimed",
    "start.prepared",
    "start.launched",
    "start.answered",
    "start.started",
    "start.noted",
];

/// Steps of a start in the shim, in order.
pub const SHIM: [&str; 7] =
    ["shim.entered", "shim.held", "shim.mounted", "shim.connected", "shim.ran", "shim.noted", "shim.answered"];

/// Steps of a removal, in order; all are the agent's.
pub const REMOVE: [&str; 7] = [
    "remove.unrecorded",
    "remove.killed",
    "remove.deleted",
    "remove.disconnected",
    "remove.ungrouped",
    "remove.removed",
    "remove.noted",
];

/// The process ends here if it was told to.
pub fn pass(point: &str) {
    if cfg!(debug_assertions) && std::env::var_os(VARIABLE).is_some_and(|named| named == point) {
        // Nobody can refuse a process its own end.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// What a shim must have in its environment to know its points.
pub fn inherited() -> Option<(&'static str, OsString)> {
    if cfg!(debug_assertions) { Some((VARIABLE, std::env::var_os(VARIABLE)?)) } else { None }
}
