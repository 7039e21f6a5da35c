//! What becomes of a sandbox by what its node saw.

use warren_proto::ids::NodeId;

use super::{
    Ending, Exit, FailedKind, Life, MAX_START_ATTEMPTS, PendingCode, Sandbox, backing_off, forget, held, lost, store,
};
use crate::state::command::{Observed, Phase};
use crate::state::event::EventKind;
use crate::state::gpu::GpuHolds;
use crate::state::{Context, State, node};

/// What a node saw of a sandbox that it holds in the ledger too; anything else is out of date and changes nothing.
pub(in crate::state) fn observe(state: &mut State, context: &Context, id: &NodeId, seen: &Observed) {
    let Some(sandbox) = held(state, id, &seen.sandbox).filter(|s| s.epoch == seen.epoch) else { return };
    match &seen.phase {
        Phase::Starting | Phase::Orphan => {}
        Phase::Running => observe_running(state, context, sandbox, id),
        Phase::Exited { exit, output_tail } => observe_exit(state, context, sandbox, id, *exit, output_tail),
        Phase::Failed { code, message } => observe_failure(state, context, sandbox, id, code, message),
        Phase::Removed => observe_removed(state, context, sandbox, id),
    }
}

fn observe_running(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId) {
    if matches!(sandbox.life, Life::Starting { .. }) {
        sandbox.life = Life::Running { node: id.clone(), since: state.log_time };
        sandbox.avoid = None;
        sandbox.failed_starts = 0;
        store(state, context, sandbox, EventKind::Updated);
    }
}

fn observe_exit(
    state: &mut State,
    context: &Context,
    mut sandbox: Sandbox,
    id: &NodeId,
    exit: Exit,
    output_tail: &[u8],
) {
    let started = match &sandbox.life {
        Life::Starting { .. } => None,
        Life::Running { since, .. } => Some(*since),
        _ => return,
    };
    let ending = Ending { exit, at: state.log_time, started, output_tail: output_tail.to_vec() };
    sandbox.life = Life::Stopped { node: Some(id.clone()), ending: Box::new(ending) };
    node::reassign(state, context, id);
    store(state, context, sandbox, EventKind::Updated);
}

fn observe_failure(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId, code: &str, message: &str) {
    if !matches!(sandbox.life, Life::Starting { .. } | Life::Running { .. }) {
        return observe_removed(state, context, sandbox, id);
    }
    node::release(state, context, id, &sandbox.name, &sandbox.holding());
    sandbox.gpus = GpuHolds::default();
    sandbox.failed_starts = sandbox.failed_starts.saturating_add(1);
    sandbox.avoid = Some(id.clone());
    let may_retry = matches!(sandbox.life, Life::Starting { .. }) && sandbox.failed_starts < MAX_START_ATTEMPTS;
    sandbox.life = if may_retry {
        let message = format!("start {} failed on node {id}: {message}", sandbox.failed_starts);
        backing_off(state, PendingCode::StartFailed, message, sandbox.failed_starts)
    } else {
        let message = format!("on node {id}: {message}");
        Life::Failed { kind: FailedKind::Failed, code: code.into(), message: message.into(), at: state.log_time }
    };
    store(state, context, sandbox, EventKind::Updated);
}

fn observe_removed(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId) {
    node::release(state, context, id, &sandbox.name, &sandbox.holding());
    sandbox.gpus = GpuHolds::default();
    match &mut sandbox.life {
        Life::Stopping { .. } => {
            forget(state, context, &sandbox);
            return;
        }
        Life::Stopped { ending, .. } if sandbox.spec.restart.after(&ending.exit) => {
            let message = format!("its main process ended with exit code {}; it is started again", ending.exit.code);
            sandbox.restarts = sandbox.restarts.saturating_add(1);
            sandbox.life = backing_off(state, PendingCode::Restarting, message, sandbox.restarts);
        }
        Life::Stopped { node, .. } => *node = None,
        _ => {
            let message = format!("node {id} no longer has it, and nobody asked it to remove it");
            sandbox.life = lost(state, "LOST", message);
        }
    }
    store(state, context, sandbox, EventKind::Updated);
}
