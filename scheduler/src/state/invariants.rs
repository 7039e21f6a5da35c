//! What must hold in every committed state. Run by tests, the simulator and operators' checks, never by `apply`.

use std::collections::BTreeMap;

use imbl::OrdSet;
use warren_proto::ids::{Epoch, NodeId};
use warren_proto::units::Resources;

use super::gpu::{self, GpuUse};
use super::index::Indexes;
use super::node::{Condition, Node};
use super::tenant::Tenant;
use super::{State, tenant};

/// Everything that is wrong, in words; empty when all is well.
pub fn check(state: &State) -> Vec<String> {
    let mut wrong = Vec::new();
    check_nodes(state, &mut wrong);
    check_indexes(state, &mut wrong);
    check_counts(state, &mut wrong);
    check_lapses(state, &mut wrong);
    wrong
}

/// Rule 15: who counts as lapsed is silent, since when it says; so each counts once.
fn check_lapses(state: &State, wrong: &mut Vec<String>) {
    for (at, id) in &state.region.lapses {
        if !state.nodes.get(id).is_some_and(|node| !node.is_ready() && node.suspected == *at) {
            wrong.push(format!("{id} counts as lapsed at {}, and is not", at.0));
        }
    }
}

/// Rule 1: no node is oversold, and what it is said to hold is what its sandboxes hold and what is left over. A host that came
/// back smaller than what it holds is full: that is said of it, and is not a violation.
fn check_nodes(state: &State, wrong: &mut Vec<String>) {
    let mut held: BTreeMap<&NodeId, (Resources, GpuUse, OrdSet<_>)> = BTreeMap::new();
    for sandbox in state.sandboxes.values() {
        let Some(id) = sandbox.life.node() else {
            if !sandbox.gpus.is_empty() {
                wrong.push(format!("{} holds devices of no node", sandbox.name));
            }
            continue;
        };
        let (sum, gpus, names) = held.entry(id).or_default();
        *sum = sum.checked_add(sandbox.spec.resources).unwrap_or(*sum);
        gpus.add(&sandbox.gpus);
        names.insert(sandbox.name.clone());
    }
    for (id, node) in &state.nodes {
        let (sum, mut gpus, names) = held.remove(id).unwrap_or_default();
        let sum = node.leftovers.values().try_fold(sum, |sum, left| sum.checked_add(left.resources));
        node.leftovers.values().for_each(|left| gpus.add(&left.gpus));
        check_devices(node, &gpus, wrong);
        if Some(node.assigned) != sum || node.sandboxes != names {
            wrong.push(format!("node {id} is said to hold {:?}, its sandboxes hold {sum:?}", node.assigned));
        }
        if !node.shrunk && !node.assigned.fits_in(node.report.capacity) {
            wrong.push(format!("node {id} is oversold: {:?} of {:?}", node.assigned, node.report.capacity));
        }
        for (name, epoch) in node.leftovers.keys().chain(&node.orphans) {
            let lives = state.sandboxes.get(name).is_some_and(|s| s.epoch == *epoch && s.life.node() == Some(id));
            if lives {
                wrong.push(format!("node {id} is to remove {name} at epoch {epoch}, which lives there"));
            }
        }
        let (suspect, down) = (node.condition == Condition::Suspect, node.condition == Condition::Down);
        if state.suspects.contains(id) != suspect || state.down.contains(id) != down {
            wrong.push(format!("the index of silent nodes is wrong about {id}"));
        }
    }
    wrong.extend(held.keys().map(|id| format!("sandboxes hold node {id}, which is not registered")));
}

/// What is said to be held of its devices is; no more of one than there is.
fn check_devices(node: &Node, held: &GpuUse, wrong: &mut Vec<String>) {
    if node.gpu_use != *held {
        wrong.push(format!(
            "node {} is said to have {:?} of its devices held, and it is {held:?}",
            node.id, node.gpu_use
        ));
    }
    for (uuid, used) in held.iter() {
        let device = node.report.gpus.iter().find(|device| &*device.uuid == uuid);
        // One that is gone cannot be oversold.
        if used.milli > gpu::WHOLE || device.is_some_and(|device| used.memory > device.memory) {
            wrong.push(format!("device {uuid} of node {} is oversold: {used:?}", node.id));
        }
    }
}

/// The indexes are what they would be if they were made anew.
fn check_indexes(state: &State, wrong: &mut Vec<String>) {
    let mut anew = Indexes::default();
    state.sandboxes.values().for_each(|sandbox| anew.change(None, Some(sandbox)));
    let parts = [
        ("states", anew.kinds == state.indexes.kinds),
        ("labels", anew.labels == state.indexes.labels),
        ("queues", anew.queues == state.indexes.queues),
        ("due times", anew.due == state.indexes.due),
        ("waiting times", anew.backing_off == state.indexes.backing_off),
        ("ended sandboxes", anew.ended == state.indexes.ended),
        ("bytes", anew.chosen_bytes == state.indexes.chosen_bytes),
    ];
    wrong.extend(parts.iter().filter(|(_, right)| !right).map(|(what, _)| format!("the index of {what} is wrong")));
}

/// Templates count their users; tenants count what they have and stay within what any tenant may have.
fn check_counts(state: &State, wrong: &mut Vec<String>) {
    let mut templates: BTreeMap<_, u64> = BTreeMap::new();
    let mut anew = State::default();
    for sandbox in state.sandboxes.values() {
        *templates.entry(&sandbox.spec.template).or_default() += 1;
        tenant::recount(&mut anew, None, Some(sandbox));
        if sandbox.epoch > Epoch(u64::MAX / 2) {
            wrong.push(format!("{} has the epoch {}", sandbox.name, sandbox.epoch));
        }
    }
    for (id, template) in &state.templates {
        if templates.remove(id).unwrap_or(0) != template.users {
            wrong.push(format!("template {id} counts its users wrongly"));
        }
    }
    wrong.extend(templates.keys().map(|id| format!("sandboxes use template {id}, which does not exist")));
    for (id, tenant) in &state.tenants {
        let own = anew.tenants.remove(id).unwrap_or_default();
        let counts = |t: &Tenant| (t.sandboxes, t.live, t.used, t.pending, t.waiting, t.chosen_bytes);
        if counts(&own) != counts(tenant) {
            wrong.push(format!("tenant {id} counts {:?}, its sandboxes are {:?}", counts(tenant), counts(&own)));
        }
    }
    wrong.extend(anew.tenants.keys().map(|id| format!("sandboxes belong to tenant {id}, which has no record")));
}
