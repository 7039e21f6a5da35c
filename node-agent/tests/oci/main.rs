//! The driver `oci` against real runtimes: what a sandbox may do, how its end is known, and that nothing is left.
//!
//! Needs root, a static busybox (Debian: `busybox-static`) and runc or crun; what is missing is skipped aloud.

#![allow(clippy::disallowed_methods, reason = "tests bound how long they wait")]

mod crash;
mod disk;
mod escapes;
mod exec;
mod fenced;
mod gpus;
mod lifecycle;
mod limits;
mod logs;
mod many;
mod network;
mod process;
mod runtimes;
mod usage;
mod world;
