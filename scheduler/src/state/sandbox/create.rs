//! New sandboxes, one or many, and their way onto a node.

use std::sync::Arc;

use warren_proto::ids::SandboxName;

use super::{Life, MAX_SANDBOXES, PendingCode, Sandbox, SandboxSpec, pending, store};
use crate::state::command::{BatchItem, Decision, RequestKey, Spot};
use crate::state::event::EventKind;
use crate::state::gpu::GpuHolds;
use crate::state::level::Level;
use crate::state::node::Holding;
use crate::state::outcome::{Rejected, Reply};
use crate::state::settings::Isolation;
use crate::state::{Context, State, node, template, tenant};

pub(in crate::state) fn create(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    spec: &Arc<SandboxSpec>,
    decision: &Decision,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(Some(&name.tenant));
    if let Some(answer) = state.answered(&scope, request)? {
        return Ok(answer);
    }
    let reply = Reply::Sandbox(create_one(state, context, name, spec, decision)?);
    state.requests.remember(&scope, request, (state.log_time, state.level), &reply);
    Ok(reply)
}

/// All of them, or none: it is done on a copy, which costs next to nothing.
pub(in crate::state) fn create_batch(
    state: &mut State,
    context: &Context,
    items: &[BatchItem],
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(items.first().map(|item| &item.sandbox.tenant));
    if let Some(answer) = state.answered(&scope, request)? {
        return Ok(answer);
    }
    let mut after = state.clone();
    for (index, item) in items.iter().enumerate() {
        create_one(&mut after, context, &item.sandbox, &item.spec, &item.decision)
            .map_err(|reason| Rejected::Batch { item: index, reason: Box::new(reason) })?;
    }
    *state = after;
    let reply = Reply::Batch(items.iter().map(|item| item.sandbox.clone()).collect());
    state.requests.remember(&scope, request, (state.log_time, state.level), &reply);
    Ok(reply)
}

fn create_one(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    spec: &Arc<SandboxSpec>,
    decision: &Decision,
) -> Result<Arc<Sandbox>, Rejected> {
    if let Some(existing) = state.sandboxes.get(name) {
        let same = *existing.spec == **spec;
        return if same { Ok(existing.clone()) } else { Err(Rejected::SandboxExists(name.clone())) };
    }
    if state.region.pauses.creates {
        return Err(Rejected::Paused("creates"));
    }
    if !state.templates.contains_key(&spec.template) {
        return Err(Rejected::TemplateNotFound(spec.template.clone()));
    }
    if state.sandboxes.len() as u64 >= MAX_SANDBOXES {
        return Err(Rejected::LimitReached { what: "the table of sandboxes", limit: MAX_SANDBOXES });
    }
    if state.level >= Level::SECOND {
        tenant::admit_bytes(state, &name.tenant, 0, spec.bytes())?;
    }
    tenant::admit(state, name, spec.resources)?;
    let name = &tenant::shared_name(state, name);
    template::count_user(state, &spec.template, 1);
    let mut sandbox = Sandbox {
        name: name.clone(),
        spec: spec.clone(),
        life: pending(
            state,
            PendingCode::Conflict,
            "the chosen node was taken by another sandbox meanwhile; it is being placed again",
        ),
        epoch: state.epoch_floor,
        updated: None,
        failed_starts: 0,
        restarts: 0,
        gpus: GpuHolds::default(),
        avoid: None,
        created: state.log_time,
        revision: context.index,
    };
    match decision {
        Decision::Place(_) if state.region.pauses.placement => {
            sandbox.life = pending(state, PendingCode::Paused, "placement is paused in this region");
        }
        Decision::Place(spot) => {
            let _placed_or_queued = occupy(state, context, &mut sandbox, spot);
        }
        Decision::Queue(reason) => {
            sandbox.life = pending(state, reason.code, &reason.message);
        }
    }
    Ok(store(state, context, sandbox, EventKind::Created))
}

/// Puts a pending sandbox on a node, under its next epoch, if the node is ready for it and has room.
pub(super) fn occupy(state: &mut State, context: &Context, sandbox: &mut Sandbox, spot: &Spot) -> bool {
    let Spot { node: id, gpus } = spot;
    let Some(node) = state.nodes.get(id) else { return false };
    let unfenced = sandbox.spec.isolation == Isolation::Freeze && !node.report.fence;
    if !node.is_ready() || node.cordoned || unfenced {
        return false;
    }
    let wanted = Holding { resources: sandbox.spec.resources, gpus: gpus.clone() };
    if !node::hold(state, context, id, &sandbox.name, &wanted) {
        return false;
    }
    sandbox.gpus = wanted.gpus;
    sandbox.epoch = sandbox.epoch.max(state.restored_floor).next();
    sandbox.life = Life::Starting { node: id.clone(), since: state.log_time };
    true
}
