//! openraft's types, made concrete for Warren.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use openraft::impls::leader_id_std;

use warren_proto::ids::ReplicaId;

use crate::state::command::Command;
use crate::state::outcome::{Rejected, Reply};

/// What a command's proposer is told.
pub type Outcome = Result<Reply, Rejected>;

/// What one log entry carries: commands of many proposers that were committed together. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub commands: Arc<[Command]>,
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands", self.commands.len())
    }
}

/// Where a replica is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// `host:port` for other replicas.
    pub peer_address: String,
    /// `host:port` of its API.
    pub api_address: String,
    /// Stays a learner until a voter must be replaced.
    pub standby: bool,
}

openraft::declare_raft_types!(
    /// Warren's choice of openraft's types.
    pub TypeConfig:
        D = Batch,
        R = Vec<Outcome>,
        NodeId = u64,
        Node = Member,
        LeaderId = leader_id_std::LeaderId<Self::Term, Self::NodeId>,
);

/// Voters and learners.
pub fn members(membership: &StoredMembership) -> (BTreeSet<ReplicaId>, BTreeSet<ReplicaId>) {
    let of = membership.membership();
    let voters: BTreeSet<ReplicaId> = of.voter_ids().map(ReplicaId).collect();
    let learners = of.nodes().map(|(id, _)| ReplicaId(*id)).filter(|id| !voters.contains(id)).collect();
    (voters, learners)
}

pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub type Membership = openraft::Membership<u64, Member>;
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub type CheckpointMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub type Raft = openraft::Raft<TypeConfig, super::state_machine::StateMachine>;
