//! Keeps the group of replicas in order: every replica makes itself known to the ledger, and the leader makes voters of those
//! that have caught up, and replaces one that is dead for too long by a standby that is ready.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use warren_proto::ids::ReplicaId;

use super::{ControlError, Controller, lock};
use crate::clock;
use crate::raft::{AnnounceError, Leadership, MemberRole, MemberStatus, MembershipError};
use crate::state::command::{Body, Caller, ReplicaRecord};
use crate::state::level::Level;
use crate::state::outcome::Rejected;

/// How often members are looked at.
const EVERY: Duration = Duration::from_millis(500);

/// How often voters are asked how full their disks are: as often as they look themselves.
const DISKS_EVERY: Duration = Duration::from_secs(1);

/// Shortest time between two attempts to announce oneself.
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(300);

/// A learner this close behind has caught up: less than a second of a busy log.
const CAUGHT_UP: u64 = 1000;

fn own_record(controller: &Controller) -> ReplicaRecord {
    ReplicaRecord {
        api_address: controller.0.config.api_advertise.clone(),
        token_key: controller.signer().public_key(),
        disk: controller.replica().identity().disk,
        max_level: Level::MAX,
    }
}

/// The leader's own record, where it is not in the ledger yet.
pub(super) async fn announce_leader(controller: &Controller) -> Result<(), ControlError> {
    let (replica, record) = (controller.replica().id(), own_record(controller));
    if controller.replica().state().replicas.get(&replica) == Some(&record) {
        return Ok(());
    }
    controller.propose(Caller::system("controller"), Body::PutReplica { replica, record }).await.map(drop)
}

/// Puts this replica's address, key, disk and level into the ledger, whenever they differ from what stands there.
pub(super) async fn announce(controller: Controller) {
    let replica = controller.replica().clone();
    let mut states = replica.watch_state();
    let mut leadership = replica.leadership();
    let record = own_record(&controller);
    loop {
        let known = states.borrow_and_update().replicas.get(&replica.id()) == Some(&record);
        let leads = matches!(*leadership.borrow_and_update(), Leadership::Leader { .. });
        if !known {
            let told = if leads {
                announce_leader(&controller).await.map_err(|error| lost(&controller, &error))
            } else {
                replica.announce(&record).await
            };
            match told {
                Ok(()) => {}
                // It has forgotten what it promised, and must not go on.
                Err(lost @ AnnounceError::DiskLost(_)) => return replica.fail(lost.to_string()),
                Err(AnnounceError::NotTaken) => tokio::time::sleep(ANNOUNCE_PAUSE).await,
            }
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            changed = leadership.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(ANNOUNCE_PAUSE), if !known => {}
        }
    }
}

fn lost(controller: &Controller, error: &ControlError) -> AnnounceError {
    match error {
        ControlError::Rejected(Rejected::ReplicaDisk(_)) => AnnounceError::DiskLost(controller.replica().id()),
        _ => AnnounceError::NotTaken,
    }
}

/// Since when this leader has not heard from each voter.
type Silent = BTreeMap<ReplicaId, Instant>;

/// Looks after the members for as long as the replica lives; only a leader does anything.
pub(super) async fn tend(controller: Controller) {
    let mut silent = Silent::new();
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        tokio::select! {
            () = controller.stopping() => return,
            _ = ticks.tick() => {}
        }
        if !matches!(*controller.replica().leadership().borrow(), Leadership::Leader { .. }) {
            silent.clear();
            continue;
        }
        if let Err(error) = step(&controller, &mut silent).await {
            warn!(%error, "change the group");
        }
    }
}

/// Keeps what the leader knows of the other voters' disks.
pub(super) async fn follow_disks(controller: Controller) {
    let mut ticks = tokio::time::interval(DISKS_EVERY);
    loop {
        tokio::select! {
            () = controller.stopping() => return,
            _ = ticks.tick() => {}
        }
        let leads = matches!(*controller.replica().leadership().borrow(), Leadership::Leader { .. });
        let disks = if leads { controller.replica().read_disks().await } else { BTreeMap::new() };
        *lock(&controller.0.other_disks) = disks;
    }
}

async fn step(controller: &Controller, silent: &mut Silent) -> Result<(), MembershipError> {
    let members = controller.replica().members();
    if let Some(ready) = members.iter().find(|member| may_vote(controller, member)) {
        info!(replica = %ready.id, "has caught up and becomes a voter");
        return controller.replica().promote(ready.id).await;
    }
    let dead = note_silent(silent, &members, clock::monotonic(), controller.0.config.replica_grace);
    let standby = members.iter().find(|member| member.role == MemberRole::Standby && is_ready(controller, member));
    if let (Some(dead), Some(standby)) = (dead, standby) {
        warn!(dead = %dead, by = %standby.id, "a replica is dead for longer than its grace and is replaced");
        return controller.replica().replace(dead, standby.id).await;
    }
    Ok(())
}

/// A voter that has been silent for longer than `grace`.
fn note_silent(silent: &mut Silent, members: &[MemberStatus], now: Instant, grace: Duration) -> Option<ReplicaId> {
    silent.retain(|id, _| members.iter().any(|member| member.id == *id && !member.reachable));
    for member in members.iter().filter(|member| member.role == MemberRole::Follower && !member.reachable) {
        silent.entry(member.id).or_insert(now);
    }
    silent.iter().find(|(_, since)| now.saturating_duration_since(**since) >= grace).map(|(id, _)| *id)
}

fn may_vote(controller: &Controller, member: &MemberStatus) -> bool {
    member.role == MemberRole::Learner && is_ready(controller, member)
}

/// It is heard of, close behind, and has made itself known.
fn is_ready(controller: &Controller, member: &MemberStatus) -> bool {
    let last = controller.replica().status().last_log_index;
    let known = controller.replica().state().replicas.contains_key(&member.id);
    known && member.reachable && member.matched_index.saturating_add(CAUGHT_UP) >= last && member.matched_index > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, role: MemberRole, reachable: bool) -> MemberStatus {
        let (api_address, peer_address) = (String::new(), String::new());
        MemberStatus { id: ReplicaId(id), api_address, peer_address, role, matched_index: 1, reachable }
    }

    #[test]
    fn only_a_voter_that_is_silent_for_its_whole_grace_is_dead() {
        let (start, grace) = (clock::monotonic(), Duration::from_secs(10));
        let at = |s| start + Duration::from_secs(s);
        let mut silent = Silent::new();
        let group = |heard| {
            [
                member(1, MemberRole::Leader, true),
                member(2, MemberRole::Follower, heard),
                member(3, MemberRole::Learner, false),
            ]
        };
        assert_eq!(note_silent(&mut silent, &group(false), at(0), grace), None);
        assert_eq!(note_silent(&mut silent, &group(true), at(9), grace), None);
        assert_eq!(note_silent(&mut silent, &group(false), at(11), grace), None, "it was heard of in between");
        assert_eq!(note_silent(&mut silent, &group(false), at(21), grace), Some(ReplicaId(2)));
    }
}
