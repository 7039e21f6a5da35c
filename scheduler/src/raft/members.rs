//! Who is in the group: joining, leaving, transferring leadership, clocks of the members.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use openraft::ChangeMembers;
use openraft::errors::{ClientWriteError, RaftError};
use tonic::{Code, Request};
use warren_proto::client::{self, ClientTls};
use warren_proto::ids::ReplicaId;
use warren_proto::v1 as pb;
use warren_proto::v1::raft_service_client::RaftServiceClient;

use super::codec::command::{disk, put_replica_to};
use super::replica::{LeaderInfo, ProposeError, Replica, StartError};
use super::types::{Member, TypeConfig};
use crate::state::command::{LogTime, ReplicaRecord};

/// How long a member may take to say what its clock reads, or to take an announcement.
const PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a change of members may take: two entries through a quorum.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a transfer of leadership may take: an election.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a new leader is asked to take the one before it out, and the time between: its first entry's way through a quorum,
/// many times over.
const REMOVE_TRIES: usize = 20;
const REMOVE_PAUSE: Duration = Duration::from_millis(100);

/// Why the group cannot be changed in this way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error("there is no replica {0} in the group")]
    NotMember(ReplicaId),
    #[error("replica id {0} was used before: an id is never used again, choose another")]
    UsedId(ReplicaId),
    #[error("replica {0} is in the group with other addresses: remove it first")]
    OtherAddresses(ReplicaId),
    #[error("without replica {removed} the voters that are heard of are no quorum: {left} of {voters}")]
    NoQuorumLeft { removed: ReplicaId, left: usize, voters: usize },
    #[error("replica {0} is the only voter")]
    OnlyVoter(ReplicaId),
    #[error("replica {0} is no voter")]
    NotVoter(ReplicaId),
    #[error("replica {0} did not take over leadership in time; the one that led may lead on")]
    NotTaken(ReplicaId),
    #[error("{}", StartError::DiskLost(*.0))]
    DiskLost(ReplicaId),
    #[error(
        "replica {removed} has handed leadership over to replica {leader}, which did not take it out: {why}; try again"
    )]
    NotTakenOut { removed: ReplicaId, leader: ReplicaId, why: String },
    #[error("another change of the group is under way, or the log refused this one: {0}")]
    Refused(String),
}

/// Why a replica is not made known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnounceError {
    #[error("no leader took the announcement")]
    NotTaken,
    /// The ledger knows this replica with another disk.
    #[error("{}", StartError::DiskLost(*.0))]
    DiskLost(ReplicaId),
}

impl Replica {
    /// The wall clocks of a quorum of voters, this one's (`own`) among them.
    pub async fn read_clocks(&self, own: LogTime) -> Result<Vec<LogTime>, ProposeError> {
        let (voters, addresses) = self.voters();
        let others = addresses.iter().filter(|(id, _)| **id != self.id().0).map(|(_, member)| self.read_clock(member));
        let mut samples: Vec<LogTime> = join_all(others).await.into_iter().flatten().collect();
        if voters.contains(&self.id().0) {
            samples.push(own);
        }
        let quorum = samples.len().saturating_mul(2) > voters.len();
        if quorum { Ok(samples) } else { Err(ProposeError::NotLeader { leader: None }) }
    }

    async fn read_clock(&self, member: &Member) -> Option<LogTime> {
        Some(LogTime(self.ask(member).await?.time_ms))
    }

    async fn ask(&self, member: &Member) -> Option<pb::ReadClockResponse> {
        let mut client = self.peer(member)?;
        let asked = client.read_clock(self.origin().call(within(pb::ReadClockRequest {})));
        let answer = tokio::time::timeout(PEER_TIMEOUT, asked).await.ok()?.ok()?;
        self.origin().check_ledger(answer.metadata()).ok()?;
        Some(answer.into_inner())
    }

    /// How full the disks of the other voters are, in percent: of those that are heard of, and say it.
    pub async fn read_disks(&self) -> BTreeMap<ReplicaId, u64> {
        let (_, addresses) = self.voters();
        let heard: BTreeSet<u64> = self.members().iter().filter(|m| m.reachable).map(|m| m.id.0).collect();
        let others = addresses.iter().filter(|(id, _)| **id != self.id().0 && heard.contains(id));
        let asked = others.map(async |(id, member)| {
            let percent = self.ask(member).await?.disk_used_percent;
            (percent > 0).then_some((ReplicaId(*id), u64::from(percent)))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    fn peer(&self, member: &Member) -> Option<RaftServiceClient<tonic::transport::Channel>> {
        client::channel(&member.peer_address, self.tls()).ok().map(RaftServiceClient::new)
    }

    fn voters(&self) -> (BTreeSet<u64>, BTreeMap<u64, Member>) {
        let metrics = self.metrics();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let members = membership.nodes().filter(|(id, _)| voters.contains(id));
        let members = members.map(|(id, member)| (*id, member.clone())).collect();
        (voters, members)
    }

    /// Tells the leader about this replica; it puts that into the ledger.
    pub async fn announce(&self, record: &ReplicaRecord) -> Result<(), AnnounceError> {
        let metrics = self.metrics();
        let leader = metrics.current_leader.filter(|id| *id != self.id().0);
        let member = leader.and_then(|id| metrics.membership_config.membership().get_node(&id).cloned());
        let mut client = member.and_then(|member| self.peer(&member)).ok_or(AnnounceError::NotTaken)?;
        let replica = Some(put_replica_to(self.id(), record));
        match client.announce(self.origin().call(within(pb::AnnounceRequest { replica }))).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::DataLoss => Err(AnnounceError::DiskLost(self.id())),
            Err(status) => {
                tracing::debug!(%status, "announce");
                Err(AnnounceError::NotTaken)
            }
        }
    }

    /// Adds a replica as a learner. The same again changes nothing. `itself`: the replica asks, and knows of no group that it is
    /// in; one that the ledger knows by its disk has forgotten that.
    pub async fn join(&self, id: ReplicaId, member: Member, itself: bool) -> Result<(), MembershipError> {
        let metrics = self.metrics();
        let announced = self.state().replicas.get(&id).is_some_and(|record| record.disk != 0);
        let is_member = metrics.membership_config.membership().get_node(&id.0).is_some();
        if itself && announced && is_member {
            return Err(MembershipError::DiskLost(id));
        }
        if let Some(known) = metrics.membership_config.membership().get_node(&id.0) {
            return if *known == member { Ok(()) } else { Err(MembershipError::OtherAddresses(id)) };
        }
        if self.state().replicas.contains_key(&id) {
            return Err(MembershipError::UsedId(id));
        }
        self.change(ChangeMembers::AddNodes(BTreeMap::from([(id.0, member)])), true).await
    }

    /// Makes a learner a voter.
    pub async fn promote(&self, id: ReplicaId) -> Result<(), MembershipError> {
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id.0])), true).await
    }

    /// Puts a learner in the place of a voter, which leaves the group.
    pub async fn replace(&self, dead: ReplicaId, by: ReplicaId) -> Result<(), MembershipError> {
        let (mut voters, _) = self.voters();
        voters.remove(&dead.0);
        voters.insert(by.0);
        self.change(ChangeMembers::ReplaceAllVoters(voters), false).await
    }

    /// Takes a replica out of the group, if those that stay and are heard of are a quorum. One that leads hands that over first,
    /// and the new leader takes it out: nobody waits for an election.
    pub async fn remove(&self, id: ReplicaId) -> Result<(), MembershipError> {
        let members = self.members();
        if !members.iter().any(|member| member.id == id) {
            return Err(MembershipError::NotMember(id));
        }
        let (voters, _) = self.voters();
        if !voters.contains(&id.0) {
            return self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id.0])), false).await;
        }
        let voters_left = voters.len().saturating_sub(1);
        if voters_left == 0 {
            return Err(MembershipError::OnlyVoter(id));
        }
        let heard = members.iter().filter(|m| m.id != id && m.reachable && voters.contains(&m.id.0)).count();
        if heard.saturating_mul(2) <= voters_left {
            return Err(MembershipError::NoQuorumLeft { removed: id, left: heard, voters: voters_left });
        }
        if id == self.id() {
            return self.hand_over_and_leave().await;
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id.0])), false).await
    }

    async fn hand_over_and_leave(&self) -> Result<(), MembershipError> {
        let leader = self.transfer_leadership(None).await?;
        let not_out = |why: String| MembershipError::NotTakenOut { removed: self.id(), leader, why };
        let member = self.metrics().membership_config.membership().get_node(&leader.0).cloned();
        let client = member.and_then(|member| self.peer(&member));
        let mut client = client.ok_or_else(|| not_out("its address is unknown".to_owned()))?;
        let mut refusal = String::new();
        for _ in 0..REMOVE_TRIES {
            let mut request = Request::new(pb::RemoveRequest { replica_id: self.id().0 });
            request.set_timeout(CHANGE_TIMEOUT);
            match client.remove(self.origin().call(request)).await {
                Ok(_) => return Ok(()),
                Err(status) => refusal = status.message().to_owned(),
            }
            // A leader changes no members before the first entry of its term is committed.
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
        Err(not_out(refusal))
    }

    /// Makes another voter the leader: `to`, or the one that is furthest. Answers who leads then.
    pub async fn transfer_leadership(&self, to: Option<ReplicaId>) -> Result<ReplicaId, MembershipError> {
        let (voters, _) = self.voters();
        let mut others = self.members();
        others.retain(|member| member.id != self.id() && voters.contains(&member.id.0));
        let target = match to {
            Some(id) if id == self.id() => return Ok(id),
            Some(id) if others.iter().any(|member| member.id == id) => id,
            Some(id) => return Err(MembershipError::NotVoter(id)),
            None => {
                let furthest = others.iter().filter(|m| m.reachable).max_by_key(|m| m.matched_index);
                furthest.ok_or(MembershipError::OnlyVoter(self.id()))?.id
            }
        };
        let stopped = |_| MembershipError::Propose(ProposeError::Stopped);
        self.raft().trigger().transfer_leader(target.0).await.map_err(stopped)?;
        let mut leadership = self.leadership();
        let taken = leadership.wait_for(|now| now.leader_id() == Some(target));
        match tokio::time::timeout(TRANSFER_TIMEOUT, taken).await {
            Ok(Ok(_)) => Ok(target),
            Ok(Err(_)) | Err(_) => Err(MembershipError::NotTaken(target)),
        }
    }

    async fn change(&self, change: ChangeMembers<u64, Member>, retain: bool) -> Result<(), MembershipError> {
        let changing = self.raft().change_membership(change, retain);
        match tokio::time::timeout(CHANGE_TIMEOUT, changing).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(refused(error)),
            Err(_elapsed) => Err(ProposeError::OutcomeUnknown.into()),
        }
    }
}

fn refused(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> MembershipError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            ProposeError::NotLeader { leader: LeaderInfo::new(forward.leader_id, forward.leader_node.as_ref()) }.into()
        }
        RaftError::APIError(other) => MembershipError::Refused(other.to_string()),
        RaftError::Fatal(_) => ProposeError::Stopped.into(),
    }
}

fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(PEER_TIMEOUT);
    request
}

/// What a member knows of a replica's disk: 0 where it never announced itself, `None` where the member does not answer.
pub(super) async fn identify(member: &Member, id: ReplicaId, tls: &ClientTls) -> Option<u128> {
    let channel = client::channel(&member.peer_address, tls).ok()?;
    let request = within(pb::IdentifyRequest { replica_id: id.0 });
    let mut client = RaftServiceClient::new(channel);
    // Also while it connects: members that start together take connections before they serve them.
    let answer = tokio::time::timeout(PEER_TIMEOUT, client.identify(request)).await.ok()?.ok()?;
    disk(&answer.into_inner().disk_id).ok()
}
