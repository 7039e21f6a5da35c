//! Warren's node agent: runs a host's sandboxes and serves their data plane.

pub mod driver;
pub mod shim;
pub mod sys;
