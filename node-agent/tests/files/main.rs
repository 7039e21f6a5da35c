//! Files and ports of real sandboxes through the data plane, whatever is inside.
//!
//! Needs root, a static busybox and runc or crun; what is missing is skipped aloud.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests bound how long they wait")]

mod attacks;
mod content;
mod lab;
mod ports;
#[path = "../support/mod.rs"]
mod support;
mod tree;
mod watch;
#[allow(dead_code, reason = "shared with the driver's tests")]
#[path = "../oci/world.rs"]
mod world;
