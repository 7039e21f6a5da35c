//! The replicated log: openraft over gRPC, its log on sled, its checkpoints in plain files.
//!
//! Nothing outside this module names openraft or sled. Others hold a [`Replica`]: they propose commands, read state, and
//! watch who leads.

mod batcher;
mod checkpoint;
mod codec;
mod confirm;
mod failure;
mod hash;
mod identity;
mod log_store;
mod members;
mod network;
pub mod offline;
mod origin;
mod proposer;
mod replica;
mod service;
mod state_machine;
mod types;

pub use checkpoint::{Backup, CheckpointError};
pub use hash::Hashes;
pub use identity::{Identity, IdentityError};
pub use log_store::{LogStore, OpenError};
pub use members::{AnnounceError, MembershipError};
pub use replica::{
    LeaderInfo, Leadership, MemberRole, MemberStatus, ProposeError, Replica, ReplicaConfig, ReplicaStatus, StartError,
};
pub use types::Member;

/// For tests of the store alone, from outside this crate.
#[doc(hidden)]
pub mod testing {
    pub use super::checkpoint::{CheckpointDirectory, written_and_read};
    pub use super::offline::renewed;
    pub use super::state_machine::StateMachine;
    pub use super::types::{Batch, Entry, LogId, TypeConfig, Vote};

    /// The hash of a state, kept as a replica keeps it.
    #[derive(Debug, Default)]
    pub struct StateHash(super::hash::Hasher);

    impl StateHash {
        /// Brings it up to date with `state`, by what changed since the last call.
        pub fn update(&mut self, state: &crate::state::State) -> u128 {
            self.0.update(state)
        }
    }

    /// A command as another replica has it, from its stored bytes.
    pub fn stored_and_read(
        command: &crate::state::command::Command,
    ) -> std::io::Result<crate::state::command::Command> {
        super::codec::command::stored_and_read(command).map_err(Into::into)
    }
}
