//! Votes, entries and membership: openraft's types and their own bytes.

use std::collections::{BTreeMap, BTreeSet};

use openraft::EntryPayload;
use openraft::impls::leader_id_std::LeaderId;
use prost::Message;
use warren_proto::v1 as pb;
use warren_proto::v1::stored_entry::Payload;

use super::{CodecError, VERSION, check_version, require};
use crate::raft::types::{Batch, Entry, LogId, Member, Membership, StoredMembership, Vote};

pub fn log_id_to(from: &LogId) -> pb::StoredLogId {
    pb::StoredLogId { term: from.leader_id.term, index: from.index }
}

pub fn log_id_from(from: &pb::StoredLogId) -> LogId {
    LogId::new_term_index(from.term, from.index)
}

pub fn vote_to(from: &Vote) -> pb::StoredVote {
    pb::StoredVote {
        version: VERSION,
        term: from.leader_id.term,
        voted_for: from.leader_id.voted_for,
        committed: from.committed,
    }
}

pub fn vote_from(from: &pb::StoredVote) -> Result<Vote, CodecError> {
    check_version(from.version, "vote")?;
    Ok(Vote { leader_id: LeaderId { term: from.term, voted_for: from.voted_for }, committed: from.committed })
}

pub fn membership_to(log_id: Option<&LogId>, from: &Membership) -> pb::StoredMembership {
    let voters = |set: &BTreeSet<u64>| pb::StoredVoters { replica_ids: set.iter().copied().collect() };
    pb::StoredMembership {
        configurations: from.get_joint_config().iter().map(voters).collect(),
        members: from
            .nodes()
            .map(|(id, member)| pb::StoredMember {
                replica_id: *id,
                peer_address: member.peer_address.clone(),
                api_address: member.api_address.clone(),
                standby: member.standby,
            })
            .collect(),
        log_id: log_id.map(log_id_to),
    }
}

pub fn membership_from(from: &pb::StoredMembership) -> Result<StoredMembership, CodecError> {
    let log_id = from.log_id.as_ref().map(log_id_from);
    if from.configurations.is_empty() && from.members.is_empty() {
        return Ok(StoredMembership::new(log_id, Membership::default()));
    }
    let configurations = from.configurations.iter().map(|c| c.replica_ids.iter().copied().collect()).collect();
    let members: BTreeMap<u64, Member> = from
        .members
        .iter()
        .map(|member| {
            let (peer_address, api_address) = (member.peer_address.clone(), member.api_address.clone());
            (member.replica_id, Member { peer_address, api_address, standby: member.standby })
        })
        .collect();
    let membership =
        Membership::new(configurations, members).map_err(|_| CodecError::Malformed { field: "membership" })?;
    Ok(StoredMembership::new(log_id, membership))
}

pub fn entry_to(from: &Entry) -> pb::StoredEntry {
    let payload = match &from.payload {
        EntryPayload::Blank => Payload::Blank(pb::StoredBlank {}),
        EntryPayload::Normal(batch) => {
            Payload::Batch(pb::StoredBatch { commands: batch.commands.iter().map(Into::into).collect() })
        }
        EntryPayload::Membership(membership) => Payload::Membership(membership_to(None, membership)),
    };
    pb::StoredEntry { version: VERSION, log_id: Some(log_id_to(&from.log_id)), payload: Some(payload) }
}

pub fn entry_from(from: pb::StoredEntry) -> Result<Entry, CodecError> {
    check_version(from.version, "entry")?;
    let log_id = log_id_from(&require(from.log_id, "entry.log_id")?);
    let payload = match require(from.payload, "entry.payload")? {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Batch(batch) => {
            let commands = batch.commands.into_iter().map(TryInto::try_into).collect::<Result<Vec<_>, _>>()?;
            EntryPayload::Normal(Batch { commands: commands.into() })
        }
        Payload::Membership(membership) => EntryPayload::Membership(membership_from(&membership)?.membership().clone()),
    };
    Ok(Entry { log_id, payload })
}

pub fn decode_entry(bytes: &[u8]) -> Result<Entry, CodecError> {
    entry_from(pb::StoredEntry::decode(bytes)?)
}
