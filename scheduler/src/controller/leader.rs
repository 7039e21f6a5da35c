//! Leads while this replica does: opens the term, then turns changes and lapsed leases into commands.

use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{ControlError, Controller, lock};
use crate::clock;
use crate::plan;
use crate::raft::Leadership;
use crate::state::State;
use crate::state::command::{Body, Caller, LedgerId};
use crate::state::outcome::Rejected;
use std::sync::Arc;

/// How much longer than a lease a new leader waits before it judges: clocks run 1 % apart at most (section 6 of the
/// design: lease × 1.01), and freezing takes a while.
const FREEZE_BUDGET: Duration = Duration::from_secs(1);

/// How often the leader looks for what is due although nothing changed.
const IDLE_PASS: Duration = Duration::from_secs(10);

/// Shortest time between passes that a failed proposal waits before trying again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Runs for as long as the replica does.
pub(super) async fn run(controller: Controller) {
    let mut leadership = controller.replica().leadership();
    loop {
        let leads = matches!(*leadership.borrow_and_update(), Leadership::Leader { .. });
        if leads {
            lead(&controller, &mut leadership).await;
            lock(&controller.0.view).drop_overlay();
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
    propose(controller, Body::AdvanceTime { samples: vec![clock::log_time()] }).await?;
    let state = controller.replica().state();
    if state.ledger_id.is_none() {
        let ledger_id = LedgerId(rand::random());
        match propose(controller, Body::OpenLedger { ledger_id }).await {
            Ok(()) | Err(ControlError::Rejected(Rejected::LedgerOpen)) => {}
            Err(error) => return Err(error),
        }
    }
    announce(controller, &state).await?;
    let wait = controller.lease().mul_f64(1.01) + FREEZE_BUDGET;
    let nodes =
        controller.replica().state().nodes.values().filter(|n| n.reachable).map(|n| n.id.clone()).collect::<Vec<_>>();
    lock(&controller.0.liveness).begin_term(nodes.into_iter(), clock::monotonic() + wait);
    Ok(())
}

/// Puts this replica's address and token key into the ledger, where they differ from what stands there.
async fn announce(controller: &Controller, state: &State) -> Result<(), ControlError> {
    let replica = controller.replica().id();
    let api_address = controller.0.config.api_advertise.clone();
    let token_key = controller.signer().public_key();
    let known = state.replicas.get(&replica);
    if known.is_some_and(|known| known.api_address == api_address && known.token_key == token_key) {
        return Ok(());
    }
    propose(controller, Body::PutReplica { replica, api_address, token_key }).await
}

async fn propose(controller: &Controller, body: Body) -> Result<(), ControlError> {
    controller.propose(Caller::system("controller"), body).await.map(drop)
}

async fn plan_forever(controller: &Controller) {
    let mut states = controller.replica().watch_state();
    loop {
        let state = states.borrow_and_update().clone();
        let all_well = pass(controller, &state).await;
        if !all_well {
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        let wake_at = next_wake(controller);
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(wake_at.into()) => {}
        }
    }
}

fn next_wake(controller: &Controller) -> Instant {
    let idle = clock::monotonic() + IDLE_PASS;
    lock(&controller.0.liveness).next_deadline().map_or(idle, |deadline| deadline.min(idle))
}

/// Plans once and proposes everything planned; whether all of it was committed (a rejection is an answer too).
async fn pass(controller: &Controller, state: &Arc<State>) -> bool {
    let now = clock::log_time();
    let lapsed = lock(&controller.0.liveness).take_lapsed(clock::monotonic(), plan::MAX_COMMANDS);
    let mut bodies: Vec<Body> = lapsed
        .iter()
        .filter_map(|id| state.nodes.get(id))
        .filter(|node| node.reachable)
        .map(|node| {
            warn!(node = %node.id, "lease lapsed");
            Body::SetNodeReachable { node: node.id.clone(), incarnation: node.report.incarnation, reachable: false }
        })
        .collect();
    bodies.extend(plan::ended::plan(state, now));
    let placements = {
        let mut view = lock(&controller.0.view);
        view.sync(&state.nodes);
        plan::pending::plan(state, &mut view)
    };
    let reserved = reservations(state, &placements);
    bodies.extend(placements);
    let results = join_all(bodies.into_iter().map(|body| propose(controller, body))).await;
    release(controller, &reserved);
    let all_well = results.iter().all(|result| !matches!(result, Err(ControlError::Propose(_))));
    if !all_well {
        let again = clock::monotonic();
        let mut liveness = lock(&controller.0.liveness);
        lapsed.iter().for_each(|node| liveness.renew(node, again));
    }
    all_well
}

type Reservation = (warren_proto::ids::NodeId, warren_proto::units::Resources);

fn reservations(state: &State, placements: &[Body]) -> Vec<Reservation> {
    let held = |body: &Body| match body {
        Body::PlaceSandbox { sandbox, node, .. } => Some((node.clone(), state.sandboxes.get(sandbox)?.spec.resources)),
        _ => None,
    };
    placements.iter().filter_map(held).collect()
}

fn release(controller: &Controller, reserved: &[Reservation]) {
    let state = controller.replica().state();
    let mut view = lock(&controller.0.view);
    view.sync(&state.nodes);
    for (node, resources) in reserved {
        view.release(node, *resources);
    }
}
