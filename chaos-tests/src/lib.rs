//! Warren under test, seen from outside: clusters of real processes, clients that retry as clients should, and a look at
//! the host for what must not be left on it.
//!
//! In reading order: `cluster` (processes, faults), `client` (the API and the data plane), `image` (a small root file
//! system), `host` (leftovers), `load` (how fast, how long, how much), `sim` (a region in one process, from a seed). But for `sim`
//! nothing here knows the crates of the scheduler or the node agent.

pub mod client;
pub mod cluster;
pub mod host;
pub mod image;
pub mod load;
pub mod sim;
