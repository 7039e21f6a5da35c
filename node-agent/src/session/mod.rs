//! The node's session with the leader: registers, renews the lease, takes assignments, reports what the node holds.
//!
//! ```text
//!  next address ─▶ Hello ─▶ Welcome ─▶ live: renew · assignments ▼ · observations ▲ ─▶ stream breaks ─▶ pause ─▶ next address
//!                    └ NOT_LEADER: the leader it names, at once    └ LEDGER_MISMATCH: say so once, try again slowly
//! ```
//! Nothing here touches a sandbox: a lapse of the lease is logged and shown, and the sandboxes run on. Children:
//! `membership` (what the rest of the agent may know), `lease`, `candidates`, `connections`, `counters`, `live` (one stream),
//! `wire`.

mod candidates;
mod connections;
mod counters;
mod lease;
mod live;
mod membership;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge};
use rand::Rng;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;
use warren_proto::error;
use warren_proto::v1::{self, ErrorReason};

pub use candidates::Candidates;
pub use connections::Connections;
pub use counters::{Counters, Counts};
pub use membership::Membership;
pub use wire::count_by_phase;

use crate::clock::BootInstant;
use crate::fence::Fence;
use crate::ledger::LedgerFile;
use crate::metrics::{SESSION_ATTEMPTS, SESSION_FOREIGN_LEDGER, SESSION_UP};
use crate::supervisor::Supervisor;

/// Longest pause after the first fruitless round; doubles up to the last. A new leader is elected within a second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// 10,000 agents that try every 5 s, jittered, cost a recovering leader 2,000 small calls a second.
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// All agents that lost their leader come back within this. Shorter would be a stampede of 10,000; longer, and what is created
/// meanwhile would start noticeably later.
const MAX_SPREAD: Duration = Duration::from_secs(1);
/// Between attempts that only an operator can make succeed.
const SLOW_PAUSE: Duration = Duration::from_secs(30);

/// What the node says of itself.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    /// `nodes/{node}`.
    pub name: String,
    pub incarnation: Uuid,
    pub data_plane_address: String,
    pub data_plane_tls: bool,
    pub capacity: v1::Resources,
    pub labels: BTreeMap<String, String>,
    pub drivers: Vec<String>,
    /// `None`: the drivers have nothing to fence.
    pub fence: Option<Fence>,
    /// By uuid.
    pub gpus: Vec<v1::GpuDevice>,
}

/// Keeps a session with whoever leads.
#[derive(Debug)]
pub struct Session {
    facts: NodeFacts,
    supervisor: Supervisor,
    membership: Membership,
    ledger_file: LedgerFile,
    connections: Connections,
    candidates: Candidates,
    counters: Arc<Counters>,
}

/// What a session works with.
#[derive(Debug)]
pub struct Parts {
    pub facts: NodeFacts,
    pub supervisor: Supervisor,
    pub membership: Membership,
    pub ledger_file: LedgerFile,
    pub connections: Connections,
    /// Not empty.
    pub schedulers: Vec<String>,
    /// Several sessions may share them.
    pub counters: Arc<Counters>,
}

/// How an attempt ended.
#[derive(Debug)]
enum End {
    /// Another replica leads.
    Redirect(String),
    /// The session was live, and its leader does not lead any more; the new one, if it was named.
    Deposed(Option<String>),
    /// The schedulers serve this ledger, and the node belongs to another.
    ForeignLedger(String),
    /// A newer agent of the same node has the session.
    Superseded,
    /// It never came to a Welcome.
    Refused(String),
    /// It was live, and broke.
    Broken(String),
    Stopped,
}

impl Session {
    pub fn new(parts: Parts) -> Self {
        let Parts { facts, supervisor, membership, ledger_file, connections, schedulers, counters } = parts;
        let candidates = Candidates::new(schedulers);
        Self { facts, supervisor, membership, ledger_file, connections, candidates, counters }
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let watch = tokio::spawn(lease::watch(self.membership.clone(), Arc::clone(&self.counters), stop.clone()));
        let mut rounds = 0;
        let mut said_foreign = false;
        loop {
            let address = self.candidates.next_address();
            let end = self.attempt(&address, &stop).await;
            counter!(SESSION_ATTEMPTS, "result" => end.label()).increment(1);
            gauge!(SESSION_FOREIGN_LEDGER).set(f64::from(u8::from(matches!(end, End::ForeignLedger(_)))));
            if matches!(end, End::Broken(_) | End::Deposed(_)) {
                rounds = 0;
            }
            let pause = match &end {
                End::Stopped => break,
                End::Redirect(leader) if self.candidates.redirect(leader) => Duration::ZERO,
                // All nodes lost this leader at once.
                End::Deposed(_) | End::Broken(_) => {
                    if let End::Deposed(Some(leader)) = &end {
                        self.candidates.redirect(leader);
                    }
                    spread(self.membership.lease_remaining(BootInstant::now()))
                }
                End::ForeignLedger(_) | End::Superseded => SLOW_PAUSE,
                // Another replica may do: one pause a round.
                End::Refused(_) if !self.candidates.round_is_over() => Duration::ZERO,
                _ => {
                    rounds += 1;
                    jittered_pause(rounds)
                }
            };
            self.say(&address, &end, pause, &mut said_foreign);
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(pause) => {}
            }
        }
        let _ = watch.await;
    }

    async fn attempt(&mut self, address: &str, stop: &CancellationToken) -> End {
        let channel = match self.connections.to(address) {
            Ok(channel) => channel,
            Err(error) => return End::Refused(error.to_string()),
        };
        let end = tokio::select! {
            () = stop.cancelled() => End::Stopped,
            end = self.live(channel, address) => end,
        };
        self.membership.unregister();
        gauge!(SESSION_UP).set(0.0);
        end
    }

    fn say(&self, address: &str, end: &End, pause: Duration, said_foreign: &mut bool) {
        match end {
            End::Redirect(leader) => tracing::debug!(address, leader, "another replica leads"),
            End::Deposed(leader) => tracing::info!(address, ?leader, ?pause, "the leader leads no more"),
            End::ForeignLedger(theirs) if !*said_foreign => {
                *said_foreign = true;
                let ours = self.membership.ledger_id();
                tracing::error!(
                    address,
                    ?ours,
                    theirs,
                    "the schedulers serve another ledger than this node's: its sandboxes are kept, and it stays unregistered until an operator settles it"
                );
            }
            End::ForeignLedger(_) => {}
            End::Superseded => {
                tracing::error!(address, node = %self.facts.name, "another agent serves this node: two run with one node id")
            }
            End::Refused(why) => tracing::info!(address, why, ?pause, "no session"),
            End::Broken(why) => tracing::warn!(address, why, ?pause, "session ended"),
            End::Stopped => {}
        }
    }
}

impl End {
    fn label(&self) -> &'static str {
        match self {
            Self::Redirect(_) => "redirected",
            Self::Deposed(_) => "deposed",
            Self::ForeignLedger(_) => "foreign_ledger",
            Self::Superseded => "superseded",
            Self::Refused(_) => "refused",
            Self::Broken(_) => "broken",
            Self::Stopped => "stopped",
        }
    }

    /// What a refusal means.
    fn of(status: &Status, live: bool) -> Self {
        match error::reason_of(status) {
            Some(ErrorReason::NotLeader) if live => Self::Deposed(error::metadata_of(status, "leader")),
            Some(ErrorReason::NotLeader) => match error::metadata_of(status, "leader") {
                Some(leader) => Self::Redirect(leader),
                None => Self::Refused(status.message().to_owned()),
            },
            Some(ErrorReason::LedgerMismatch) => {
                Self::ForeignLedger(error::metadata_of(status, "ledger_id").unwrap_or_default())
            }
            Some(ErrorReason::SessionSuperseded) => Self::Superseded,
            _ if live => Self::Broken(status.to_string()),
            _ => Self::Refused(status.to_string()),
        }
    }
}

/// After a live session ended, as all nodes' do at once in a failover: any time within half of what is left of the lease, so
/// that there is time for a second try.
fn spread(lease_left: Option<Duration>) -> Duration {
    let bound = lease_left.map_or(MAX_SPREAD, |left| (left / 2).clamp(FIRST_PAUSE, MAX_SPREAD));
    bound.mul_f64(rand::rng().random_range(0.0..=1.0))
}

/// Between a quarter of the bound and the bound, so that nodes that lost one leader do not come back as one.
fn jittered_pause(rounds: u32) -> Duration {
    let bound = LAST_PAUSE.min(FIRST_PAUSE.saturating_mul(1u32.checked_shl(rounds - 1).unwrap_or(u32::MAX)));
    bound.mul_f64(rand::rng().random_range(0.25..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        for rounds in 1..100 {
            let pause = jittered_pause(rounds);
            assert!(pause <= LAST_PAUSE && pause >= FIRST_PAUSE / 4, "{rounds}: {pause:?}");
        }
        assert!(jittered_pause(1) <= FIRST_PAUSE);
        assert!(jittered_pause(50) >= LAST_PAUSE / 4);
    }

    #[test]
    fn after_a_failover_nodes_spread_and_leave_time_for_a_second_try() {
        for lease_ms in [300, 2_000, 10_000, 60_000] {
            let left = Duration::from_millis(lease_ms);
            let pauses: Vec<Duration> = (0..200).map(|_| spread(Some(left))).collect();
            assert!(pauses.iter().all(|pause| *pause <= left / 2 && *pause <= MAX_SPREAD));
            let bound = MAX_SPREAD.min(left / 2);
            let early = pauses.iter().filter(|pause| **pause < bound / 2).count();
            assert!((40..160).contains(&early), "{lease_ms}: {early} of 200 in the first half");
        }
        assert!(spread(None) <= MAX_SPREAD);
    }
}
