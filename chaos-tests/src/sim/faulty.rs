//! The real `apply` and the real checkpoint, each behind a thin wrapper that can plant a bug.

use std::sync::Arc;

use warren_proto::ids::Epoch;
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_scheduler::raft::testing::written_and_read;
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Command, Decision};
use warren_scheduler::state::request::RequestTable;
use warren_scheduler::state::sandbox::Sandbox;

use super::bug::Bug;
use super::log::Outcome;

/// Applies one command, with the planted bug's change around it.
pub fn apply(state: &mut State, index: u64, command: &Command, bug: Option<Bug>) -> Outcome {
    match bug {
        Some(Bug::NoFitCheck) => without_fit_check(state, index, command),
        Some(Bug::EpochNotBumped) => without_new_epoch(state, index, command),
        _ => state.apply(index, command),
    }
}

/// Every node looks endless while the command is applied.
fn without_fit_check(state: &mut State, index: u64, command: &Command) -> Outcome {
    let placed = match &command.body {
        Body::CreateSandbox { decision: Decision::Place(node), .. } | Body::PlaceSandbox { node, .. } => node,
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
    let Body::PlaceSandbox { sandbox: name, epoch, node } = &command.body else { return state.apply(index, command) };
    let before = state.sandboxes.get(name).cloned();
    let Some(before) = before.filter(|sandbox| sandbox.epoch == *epoch && epoch.0 > 0) else {
        return state.apply(index, command);
    };
    let older = Epoch(epoch.0 - 1);
    state.put_sandbox(Arc::new(Sandbox { epoch: older, ..Sandbox::clone(&before) }));
    let body = Body::PlaceSandbox { sandbox: name.clone(), epoch: older, node: node.clone() };
    let outcome = state.apply(index, &Command { body, ..command.clone() });
    if outcome.is_err() {
        state.put_sandbox(before);
    }
    outcome
}

/// What is read back of a checkpoint of `state`.
pub fn checkpoint(state: &State, bug: Option<Bug>) -> State {
    let mut read = written_and_read(state).expect("what was written is read");
    if bug == Some(Bug::RequestsNotInCheckpoint) {
        read.requests = RequestTable::default();
    }
    read
}
