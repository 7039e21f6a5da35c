//! What becomes of a sandbox by the will of somebody: placed, changed, ended, taken off a node that is down.

use std::sync::Arc;

use warren_proto::ids::{Epoch, NodeId, SandboxName};

use super::create::occupy;
use super::{
    ENDED_RETENTION_MS, FailedKind, Life, PendingCode, PendingReason, Sandbox, forget, held, lost, pending, put, store,
    tell,
};
use crate::state::command::{Change, LogTime, RequestKey, Spot};
use crate::state::event::EventKind;
use crate::state::gpu::GpuHolds;
use crate::state::node::Condition;
use crate::state::outcome::{Rejected, Reply};
use crate::state::settings::{Expiry, Isolation, Restart, Settings};
use crate::state::{Context, State, node, tenant};

pub(in crate::state) fn place(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    epoch: Epoch,
    spot: &Spot,
) -> Result<Reply, Rejected> {
    let mut sandbox = waiting(state, name, epoch)?;
    if state.region.pauses.placement {
        return Err(Rejected::Paused("placement"));
    }
    let id = &spot.node;
    if !state.nodes.contains_key(id) {
        return Err(Rejected::NodeNotFound(id.clone()));
    }
    if !occupy(state, context, &mut sandbox, spot) {
        return Err(Rejected::DoesNotFit { sandbox: name.clone(), node: id.clone() });
    }
    Ok(Reply::Sandbox(store(state, context, sandbox, EventKind::Updated)))
}

pub(in crate::state) fn explain(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    epoch: Epoch,
    reason: &PendingReason,
) -> Result<Reply, Rejected> {
    let mut sandbox = waiting(state, name, epoch)?;
    if let Life::Pending { reason: old, .. } = &mut sandbox.life {
        *old = reason.clone();
    }
    Ok(Reply::Sandbox(store(state, context, sandbox, EventKind::Updated)))
}

/// A copy of the sandbox, if it waits at this epoch.
fn waiting(state: &State, name: &SandboxName, epoch: Epoch) -> Result<Sandbox, Rejected> {
    let sandbox = at_epoch(state, name, epoch)?;
    match sandbox.life {
        Life::Pending { .. } => Ok(Sandbox::clone(sandbox)),
        ref other => Err(Rejected::WrongState { sandbox: name.clone(), state: other.kind() }),
    }
}

fn at_epoch<'a>(state: &'a State, name: &SandboxName, epoch: Epoch) -> Result<&'a Arc<Sandbox>, Rejected> {
    let sandbox = get(state, name)?;
    if sandbox.epoch == epoch {
        Ok(sandbox)
    } else {
        Err(Rejected::StaleEpoch { sandbox: name.clone(), seen: sandbox.epoch, got: epoch })
    }
}

fn get<'a>(state: &'a State, name: &SandboxName) -> Result<&'a Arc<Sandbox>, Rejected> {
    state.sandboxes.get(name).ok_or_else(|| Rejected::SandboxNotFound(name.clone()))
}

pub(in crate::state) fn delete(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(Some(&name.tenant));
    if let Some(answer) = state.answered(&scope, request)? {
        return Ok(answer);
    }
    let reply = Reply::Sandbox(end(state, context, get(state, name)?.clone()));
    state.requests.remember(&scope, request, (state.log_time, state.level), &reply);
    Ok(reply)
}

/// Begins to delete it, or forgets it where no node holds anything of it.
fn end(state: &mut State, context: &Context, sandbox: Arc<Sandbox>) -> Arc<Sandbox> {
    match (&sandbox.life, sandbox.life.node().cloned()) {
        (Life::Stopping { .. }, _) => sandbox,
        (_, Some(id)) => {
            let mut sandbox = Sandbox::clone(&sandbox);
            sandbox.life = Life::Stopping { node: id.clone(), since: state.log_time };
            node::reassign(state, context, &id);
            store(state, context, sandbox, EventKind::Updated)
        }
        (_, None) => forget(state, context, &sandbox),
    }
}

/// Changes what may change.
pub(in crate::state) fn update(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    change: &Change,
    if_revision: Option<u64>,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(Some(&name.tenant));
    if let Some(answer) = state.answered(&scope, request)? {
        return Ok(answer);
    }
    let mut sandbox = Sandbox::clone(get(state, name)?);
    let had = sandbox.chosen_bytes();
    if if_revision.is_some_and(|wanted| wanted != sandbox.revision) {
        return Err(Rejected::Changed { sandbox: name.clone(), revision: sandbox.revision });
    }
    let mut settings = sandbox.settings().clone();
    apply_change(&mut settings, change, state.log_time);
    let reassigns = settings.egress != sandbox.settings().egress;
    sandbox.updated = (settings != sandbox.spec.settings).then(|| Arc::new(settings));
    tenant::admit_bytes(state, &name.tenant, had, sandbox.chosen_bytes())?;
    if let Some(id) = sandbox.life.node().filter(|_| reassigns).cloned() {
        node::reassign(state, context, &id);
    }
    let reply = Reply::Sandbox(store(state, context, sandbox, EventKind::Updated));
    state.requests.remember(&scope, request, (state.log_time, state.level), &reply);
    Ok(reply)
}

fn apply_change(settings: &mut Settings, change: &Change, now: LogTime) {
    if let Some(labels) = &change.labels {
        settings.labels = labels.clone();
    }
    if let Some(annotations) = &change.annotations {
        settings.annotations = annotations.clone();
    }
    if let Some(expiry) = change.expiry {
        settings.expiry = match expiry {
            Expiry::After(ms) => Expiry::At(now.plus_ms(ms)),
            other => other,
        };
    }
    if let Some(egress) = &change.egress {
        settings.egress = egress.clone();
    }
    if let Some(priority) = change.priority {
        settings.priority = priority;
    }
}

/// Takes a sandbox that is frozen by now off a node that is down. Its instance is left over there.
pub(in crate::state) fn requeue(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    epoch: Epoch,
) -> Result<Reply, Rejected> {
    let mut sandbox = Sandbox::clone(at_epoch(state, name, epoch)?);
    if state.region.pauses.moves {
        return Err(Rejected::Paused("moves"));
    }
    let wrong = || Rejected::WrongState { sandbox: name.clone(), state: sandbox.life.kind() };
    let (Life::Starting { node: id, .. } | Life::Running { node: id, .. }) = sandbox.life.clone() else {
        return Err(wrong());
    };
    let down = state.nodes.get(&id).is_some_and(|node| node.condition == Condition::Down && node.report.fence);
    if !down || sandbox.spec.isolation != Isolation::Freeze {
        return Err(wrong());
    }
    node::leave_over(state, context, &id, (name.clone(), epoch), sandbox.holding());
    sandbox.gpus = GpuHolds::default();
    sandbox.life =
        pending(state, PendingCode::NodeDown, &format!("node {id} is down; it is frozen there, and placed elsewhere"));
    Ok(Reply::Sandbox(store(state, context, sandbox, EventKind::Updated)))
}

/// Its node is forgotten.
pub(in crate::state) fn give_up(state: &mut State, context: &Context, name: &SandboxName, id: &NodeId) {
    let Some(mut sandbox) = held(state, id, name) else { return };
    node::release(state, context, id, name, &sandbox.holding());
    sandbox.gpus = GpuHolds::default();
    let moves = sandbox.spec.restart != Restart::Never || sandbox.spec.isolation == Isolation::Freeze;
    match &mut sandbox.life {
        Life::Stopping { .. } => {
            forget(state, context, &sandbox);
            return;
        }
        Life::Stopped { node, .. } => *node = None,
        Life::Starting { .. } | Life::Running { .. } if moves => {
            sandbox.life =
                pending(state, PendingCode::NodeDown, &format!("node {id} was forgotten; it is placed elsewhere"));
        }
        _ => {
            let message = format!("node {id}, which ran it, was forgotten");
            sandbox.life = lost(state, "NODE_FORGOTTEN", message);
        }
    }
    store(state, context, sandbox, EventKind::Updated);
}

/// Ends those whose time is over; the others stay.
pub(in crate::state) fn end_due(
    state: &mut State,
    context: &Context,
    names: &[SandboxName],
) -> Result<Reply, Rejected> {
    let now = state.log_time;
    if now < state.region.hold_until {
        return Err(Rejected::Held { until: state.region.hold_until });
    }
    for name in names {
        let Some(sandbox) = state.sandboxes.get(name).cloned() else { continue };
        if sandbox.deadline().is_some_and(|at| at <= now) && sandbox.life.ended().is_none() {
            end(state, context, sandbox);
        } else if sandbox.queue_deadline().is_some_and(|at| at <= now) {
            cancel(state, context, &sandbox);
        }
    }
    Ok(Reply::Done)
}

fn cancel(state: &mut State, context: &Context, sandbox: &Sandbox) {
    let why = match &sandbox.life {
        Life::Pending { reason, .. } => reason.message.as_str(),
        _ => "",
    };
    let message = format!("its queue_timeout is over; it waited because: {why}");
    let life = Life::Failed {
        kind: FailedKind::Cancelled,
        code: "QUEUE_TIMEOUT".into(),
        message: message.into(),
        at: state.log_time,
    };
    store(state, context, Sandbox { life, ..sandbox.clone() }, EventKind::Updated);
}

/// A node's reachability changed: what the sandbox's state means to its watchers did too. `was_down`: until now.
pub(in crate::state) fn touch(state: &mut State, context: &Context, name: &SandboxName, was_down: bool) {
    if let Some(sandbox) = state.sandboxes.get(name) {
        let (sandbox, before) = put(state, context, Sandbox::clone(sandbox));
        tell(state, context, EventKind::Updated, sandbox, before, was_down);
    }
}

pub(in crate::state) fn forget_ended(
    state: &mut State,
    context: &Context,
    names: &[SandboxName],
) -> Result<Reply, Rejected> {
    if state.log_time < state.region.hold_until {
        return Err(Rejected::Held { until: state.region.hold_until });
    }
    for name in names {
        let Some(sandbox) = state.sandboxes.get(name).cloned() else { continue };
        let due = sandbox.life.ended().map(|at| at.plus_ms(ENDED_RETENTION_MS));
        if due.is_some_and(|due| due <= state.log_time) {
            forget(state, context, &sandbox);
        }
    }
    Ok(Reply::Done)
}
