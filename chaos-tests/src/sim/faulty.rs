//! The real `apply` and the real checkpoint, each behind a thin wrapper that can plant a bug.

use std::sync::Arc;

use warren_proto::ids::Epoch;
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_scheduler::raft::testing::{stored_and_read, written_and_read};
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Command, Decision};
use warren_scheduler::state::outcome::Rejected;
use warren_scheduler::state::region;
use warren_scheduler::state::request::RequestTable;
use warren_scheduler::state::sandbox::Sandbox;

use super::bug::Bug;
use super::log::Outcome;

/// Applies one command, with the planted bug's change around it.
pub fn apply(state: &mut State, index: u64, command: &Command, bug: Option<Bug>) -> Outcome {
    match bug {
        Some(Bug::NoFitCheck) => without_fit_check(state, index, command),
        Some(Bug::EpochNotBumped) => without_new_epoch(state, index, command),
        Some(Bug::BrakeCountsSuspects) => with_forgetful_brake(state, index, command),
        Some(Bug::UpdateMadeTwice) => with_second_update(state, index, command),
        Some(Bug::HalfBatch) => with_half_batch(state, index, command),
        _ => state.apply(index, command),
    }
}

/// Every node looks endless while the command is applied.
fn without_fit_check(state: &mut State, index: u64, command: &Command) -> Outcome {
    let placed = match &command.body {
        Body::CreateSandbox { decision: Decision::Place(spot), .. } | Body::PlaceSandbox { spot, .. } => &spot.node,
        _ => return state.apply(index, command),
    };
    let Some(honest) = state.nodes.get(placed).map(|node| node.report.capacity) else {
        return state.apply(index, command);
    };
    let most = u64::MAX;
    let endless = Resources { cpu: MilliCpu(most), memory: Bytes(most), disk: Bytes(most), gpus: Gpus(most) };
    set_capacity(state, placed, endless);
    let outcome = state.apply(index, command);
    set_capacity(state, placed, honest);
    outcome
}

fn set_capacity(state: &mut State, node: &warren_proto::ids::NodeId, capacity: Resources) {
    if let Some(node) = state.nodes.get_mut(node) {
        Arc::make_mut(node).report.capacity = capacity;
    }
}

/// A sandbox that was placed before is placed under its old epoch again.
fn without_new_epoch(state: &mut State, index: u64, command: &Command) -> Outcome {
    let Body::PlaceSandbox { sandbox: name, epoch, spot } = &command.body else { return state.apply(index, command) };
    let before = state.sandboxes.get(name).cloned();
    let Some(before) = before.filter(|sandbox| sandbox.epoch == *epoch && epoch.0 > 0) else {
        return state.apply(index, command);
    };
    let older = Epoch(epoch.0 - 1);
    state.put_sandbox(Arc::new(Sandbox { epoch: older, ..Sandbox::clone(&before) }));
    let body = Body::PlaceSandbox { sandbox: name.clone(), epoch: older, spot: spot.clone() };
    let outcome = state.apply(index, &Command { body, ..command.clone() });
    if outcome.is_err() {
        state.put_sandbox(before);
    }
    outcome
}

/// Who is down already does not count, and who was counted is forgotten.
fn with_forgetful_brake(state: &mut State, index: u64, command: &Command) -> Outcome {
    let lapsed = state.region.lapses.len();
    let outcome = state.apply(index, command);
    let returned = state.region.lapses.len() < lapsed;
    if returned && state.suspects.len() as u64 <= region::believed(state) {
        state.region.brake_since = None;
        state.region.lapses = Default::default();
    }
    outcome
}

/// An update that was answered from the table of answers has its effect again.
fn with_second_update(state: &mut State, index: u64, command: &Command) -> Outcome {
    let events = state.events.len();
    let outcome = state.apply(index, command);
    if let (Body::UpdateSandbox { sandbox, change, .. }, Ok(_)) = (&command.body, &outcome)
        && state.events.len() == events
    {
        let (sandbox, change) = (sandbox.clone(), change.clone());
        let body = Body::UpdateSandbox { sandbox, change, if_revision: None, request: None };
        let _again = state.apply(index, &Command { body, ..command.clone() });
    }
    outcome
}

/// What comes before the one that cannot be created is.
fn with_half_batch(state: &mut State, index: u64, command: &Command) -> Outcome {
    let outcome = state.apply(index, command);
    if let (Body::CreateBatch { items, .. }, Err(Rejected::Batch { item, .. })) = (&command.body, &outcome)
        && *item > 0
    {
        let items = items.iter().take(*item).cloned().collect();
        return state.apply(index, &Command { body: Body::CreateBatch { items, request: None }, ..command.clone() });
    }
    outcome
}

/// What another replica reads of a command.
pub fn stored(command: &Command) -> Command {
    stored_and_read(command).expect("what was written is read")
}

/// What is read back of a checkpoint of `state`.
pub fn checkpoint(state: &State, bug: Option<Bug>) -> State {
    let mut read = written_and_read(state).expect("what was written is read");
    if bug == Some(Bug::RequestsNotInCheckpoint) {
        read.requests = RequestTable::default();
    }
    read
}
