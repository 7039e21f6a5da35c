//! Warren's node agent: runs the sandboxes of one host and serves their data plane.
//!
//! The session brings the assignment; `reconcile` says what to do; the supervisor does it through a driver and reports. The
//! data plane serves clients that hold a sandbox's token. In reading order:

pub mod driver;
pub mod files;
pub mod shim;
pub mod sys;

pub mod assignment;
pub mod journal;
pub mod reconcile;
pub mod supervisor;
pub mod templates;

pub mod failpoint;
pub mod fence;
pub mod session;

pub mod data_plane;

pub mod agent;
pub mod capacity;
pub mod changes;
pub mod clean;
pub mod clock;
pub mod config;
pub mod drivers;
pub mod fleet;
pub mod gpu;
pub mod http;
pub mod incarnation;
pub mod ledger;
pub mod metrics;
pub mod network;
pub mod storage;
