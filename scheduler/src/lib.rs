//! Warren's scheduler: the replicated ledger and everything that decides by it.
//!
//! Modules stand in the order of who may use whom, from the pure to the loops that call them.

pub mod api;
pub mod clock;
pub mod config;
pub mod controller;
pub mod disk;
pub mod http;
pub mod join;
pub mod metrics;
pub mod placement;
pub mod plan;
pub mod raft;
pub mod secrets;
pub mod signer;
pub mod state;
