//! Leads while this replica does: opens the term, then turns changes and lapsed leases into commands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::metrics::counter;
use futures::future::join_all;
use tokio::sync::watch;
use tracing::{info, warn};

use super::log_clock::LogClock;
use super::{ControlError, Controller, IDLE_PASS, group, lock};
use crate::clock;
use crate::metrics::names;
use crate::plan;
use crate::plan::liveness::{BRAKED_PAUSE, Step, Verdict};
use crate::plan::moves::Searched;
use crate::plan::pending::Cursor;
use crate::raft::Leadership;
use crate::state::State;
use crate::state::command::{Body, Caller, LedgerId, LogTime};
use crate::state::outcome::Rejected;

/// How long freezing may take on a host, beyond the end of its lease.
const FREEZE_BUDGET: Duration = Duration::from_secs(1);

/// Clocks run 1 % apart at most (section 6 of the design: lease × 1.01).
const CLOCK_DRIFT: f64 = 1.01;

/// Shortest time between passes that a failed proposal waits before trying again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Between two passes over queues that are longer than one pass looks at: creates have their turn.
const NEXT_PASS_PAUSE: Duration = Duration::from_millis(20);

/// Runs for as long as the replica does.
pub(super) async fn run(controller: Controller) {
    let mut leadership = controller.replica().leadership();
    loop {
        let leads = matches!(*leadership.borrow_and_update(), Leadership::Leader { .. });
        if leads {
            lead(&controller, &mut leadership).await;
            lock(&controller.0.view).drop_overlay();
            lock(&controller.0.liveness).end_term();
            *lock(&controller.0.log_clock) = None;
        } else if leadership.changed().await.is_err() {
            return;
        }
    }
}

/// One term, until leadership changes.
async fn lead(controller: &Controller, leadership: &mut watch::Receiver<Leadership>) {
    info!("leads");
    let term = async {
        while let Err(error) = open_term(controller).await {
            warn!(%error, "open term");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        plan_forever(controller).await;
    };
    tokio::select! {
        () = term => {}
        _ = leadership.changed() => info!("no longer leads"),
    }
}

/// What must stand in the ledger before anything is planned. Every node is given a whole lease.
async fn open_term(controller: &Controller) -> Result<(), ControlError> {
    set_clock(controller).await?;
    if controller.replica().state().ledger_id.is_none() {
        let ledger_id = LedgerId(rand::random());
        match propose(controller, Body::OpenLedger { ledger_id }).await {
            Ok(()) | Err(ControlError::Rejected(Rejected::LedgerOpen)) => {}
            Err(error) => return Err(error),
        }
    }
    // Before the first token is signed: an agent must be able to know its key.
    group::announce_leader(controller).await?;
    let state = controller.replica().state();
    let until = clock::monotonic() + controller.lease().mul_f64(CLOCK_DRIFT) + FREEZE_BUDGET;
    let grace = controller.lease().mul_f64(CLOCK_DRIFT) + FREEZE_BUDGET;
    let nodes = state.nodes.values().map(|node| (node.id.clone(), node.condition));
    lock(&controller.0.liveness).begin_term(nodes, until, grace);
    Ok(())
}

/// Sets log time to the median of a quorum's clocks; from then on it follows this machine's monotonic clock.
async fn set_clock(controller: &Controller) -> Result<(), ControlError> {
    let samples = controller.replica().read_clocks(clock::log_time()).await?;
    propose(controller, Body::AdvanceTime { samples }).await?;
    let at = controller.replica().state().log_time;
    *lock(&controller.0.log_clock) = Some(LogClock::starting(at, clock::monotonic()));
    Ok(())
}

async fn propose(controller: &Controller, body: Body) -> Result<(), ControlError> {
    controller.propose(Caller::system("controller"), body).await.map(drop)
}

/// What the planners remember from pass to pass within a term; without it they only take longer.
#[derive(Debug, Default)]
struct Memory {
    searched: Searched,
    cursor: Cursor,
    /// The queues were not looked through to their end.
    more: bool,
}

async fn plan_forever(controller: &Controller) {
    let mut states = controller.replica().watch_state();
    let mut memory = Memory::default();
    loop {
        let state = states.borrow_and_update().clone();
        let all_well = pass(controller, &state, &mut memory).await;
        if !all_well {
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        let more = memory.more.then(|| clock::monotonic() + NEXT_PASS_PAUSE);
        let wake_at = more.into_iter().chain([next_wake(controller, &state)]).min().unwrap_or_else(clock::monotonic);
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(wake_at.into()) => {}
        }
    }
}

fn next_wake(controller: &Controller, state: &State) -> Instant {
    let now = clock::monotonic();
    let log_now = controller.log_now(state);
    let due = plan::due::next(state, log_now).map(|at| now + Duration::from_millis(at.0.saturating_sub(log_now.0)));
    let judged = lock(&controller.0.liveness).next_deadline();
    [due, judged].into_iter().flatten().fold(now + IDLE_PASS, Instant::min)
}

/// Plans once and proposes everything planned; whether all of it was committed (a rejection is an answer too).
async fn pass(controller: &Controller, state: &Arc<State>, memory: &mut Memory) -> bool {
    let now = controller.log_now(state);
    if plan::tick::needs_quorum(state, now)
        && let Err(error) = set_clock(controller).await
    {
        warn!(%error, "set log time by a quorum's clocks");
        return false;
    }
    let verdicts = lock(&controller.0.liveness).judge(clock::monotonic(), plan::MAX_COMMANDS);
    let judged = judge(controller, state, &verdicts);
    let rest = settle(controller, state, now, memory);
    let (judged, rest) = tokio::join!(judged, rest);
    judged && rest
}

/// Proposes what follows from verdicts, and tells liveness what came of them.
async fn judge(controller: &Controller, state: &State, verdicts: &[Verdict]) -> bool {
    let proposals = verdicts.iter().map(|verdict| async move {
        let result = match plan::liveness::decide(state, verdict) {
            Step::Wait => {
                lock(&controller.0.liveness).settled(verdict, false, clock::monotonic() + BRAKED_PAUSE);
                return true;
            }
            Step::Propose(body) => {
                counter!(names::LAPSES, "then" => verdict.condition.name().to_lowercase()).increment(1);
                warn!(node = %verdict.node, condition = verdict.condition.name(), "not heard of");
                propose(controller, *body).await
            }
            Step::Nothing => Ok(()),
        };
        let now = clock::monotonic();
        let stands = plan::liveness::stands(&controller.replica().state(), verdict);
        let again = if result.is_err() { now + BRAKED_PAUSE } else { now };
        lock(&controller.0.liveness).settled(verdict, stands, again);
        !matches!(result, Err(ControlError::Propose(_)))
    });
    join_all(proposals).await.into_iter().all(|well| well)
}

/// Proposes everything that follows from state alone.
async fn settle(controller: &Controller, state: &Arc<State>, now: LogTime, memory: &mut Memory) -> bool {
    let mut bodies = plan::from_state(state, now, &mut memory.searched);
    let placements = {
        let mut view = lock(&controller.0.view);
        view.sync(&controller.replica().state());
        plan::pending::plan(state, &mut view, now, &mut memory.cursor)
    };
    memory.more = placements.more;
    bodies.extend(placements.commands);
    let results = join_all(bodies.into_iter().map(|body| propose(controller, body))).await;
    let mut view = lock(&controller.0.view);
    view.sync(&controller.replica().state());
    placements.reserved.iter().for_each(|reservation| view.release(reservation));
    results.iter().all(|result| !matches!(result, Err(ControlError::Propose(_))))
}
