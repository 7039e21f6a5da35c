//! What must hold in every committed state. Run by tests, the simulator and operators' checks, never by `apply`.

use std::collections::BTreeMap;

use imbl::OrdSet;
use warren_proto::ids::NodeId;
use warren_proto::units::Resources;

use super::State;
use super::sandbox::Life;

/// Everything that is wrong, in words; empty when all is well.
pub fn check(state: &State) -> Vec<String> {
    let mut wrong = Vec::new();
    check_nodes(state, &mut wrong);
    check_indexes(state, &mut wrong);
    check_counts(state, &mut wrong);
    wrong
}

/// Rule 1: no node is oversold, and what it is said to hold is what its sandboxes hold.
fn check_nodes(state: &State, wrong: &mut Vec<String>) {
    let mut held: BTreeMap<&NodeId, (Resources, OrdSet<_>)> = BTreeMap::new();
    for sandbox in state.sandboxes.values() {
        let Some(id) = sandbox.life.node() else { continue };
        let (sum, names) = held.entry(id).or_default();
        match sum.checked_add(sandbox.spec.resources) {
            Some(more) => *sum = more,
            None => wrong.push(format!("what node {id} holds overflows")),
        }
        names.insert(sandbox.name.clone());
    }
    for (id, node) in &state.nodes {
        let (sum, names) = held.remove(id).unwrap_or_default();
        if node.assigned != sum || node.sandboxes != names {
            wrong.push(format!("node {id} is said to hold {:?}, its sandboxes hold {sum:?}", node.assigned));
        }
        if !node.assigned.fits_in(node.report.capacity) {
            wrong.push(format!("node {id} is oversold: {:?} of {:?}", node.assigned, node.report.capacity));
        }
    }
    wrong.extend(held.keys().map(|id| format!("sandboxes hold node {id}, which is not registered")));
}

/// The indexes name exactly what they should.
fn check_indexes(state: &State, wrong: &mut Vec<String>) {
    let waits = |life: &Life| matches!(life, Life::Pending { .. });
    let pending: OrdSet<_> =
        state.sandboxes.values().filter(|s| waits(&s.life)).map(|s| (s.created, s.name.clone())).collect();
    if pending != state.pending {
        wrong.push("the index of pending sandboxes is wrong".to_owned());
    }
    let ended: OrdSet<_> =
        state.sandboxes.values().filter_map(|s| s.life.ended().map(|at| (at, s.name.clone()))).collect();
    if ended != state.ended {
        wrong.push("the index of ended sandboxes is wrong".to_owned());
    }
}

fn check_counts(state: &State, wrong: &mut Vec<String>) {
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    let mut templates: BTreeMap<_, u64> = BTreeMap::new();
    let mut tenants: BTreeMap<_, u64> = BTreeMap::new();
    for sandbox in state.sandboxes.values() {
        *kinds.entry(sandbox.life.kind()).or_default() += 1;
        *templates.entry(&sandbox.spec.template).or_default() += 1;
        *tenants.entry(&sandbox.name.tenant).or_default() += 1;
    }
    if state.counts.iter().any(|(kind, count)| kinds.remove(kind).unwrap_or(0) != *count) || !kinds.is_empty() {
        wrong.push("the counts of sandboxes by state are wrong".to_owned());
    }
    for (id, template) in &state.templates {
        if templates.remove(id).unwrap_or(0) != template.users {
            wrong.push(format!("template {id} counts its users wrongly"));
        }
    }
    wrong.extend(templates.keys().map(|id| format!("sandboxes use template {id}, which does not exist")));
    for (id, tenant) in &state.tenants {
        if tenants.remove(id).unwrap_or(0) != tenant.sandboxes {
            wrong.push(format!("tenant {id} counts its sandboxes wrongly"));
        }
    }
    wrong.extend(tenants.keys().map(|id| format!("sandboxes belong to tenant {id}, which has no record")));
}
