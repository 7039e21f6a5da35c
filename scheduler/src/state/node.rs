//! Hosts that run sandboxes: what they have, what they hold, and whether they are heard of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warren_proto::ids::{Digest, Epoch, Generation, NodeId, SandboxName};
use warren_proto::units::Resources;

use super::command::{LogTime, Observation, Phase};
use super::outcome::{Rejected, Reply};
use super::{Context, State, sandbox};

/// Most nodes of a region (section 2 of the design), with as many again to spare.
pub const MAX_NODES: u64 = 20_000;

/// Most orphans that are kept of a node: enough to see that something is wrong.
pub const MAX_ORPHANS: usize = 1_000;

/// What an agent says of its host when it registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReport {
    /// UUIDv7 of the agent process.
    pub incarnation: u128,
    /// `host:port` of the data plane.
    pub address: String,
    pub tls: bool,
    /// After the host's reserve.
    pub capacity: Resources,
    pub labels: BTreeMap<String, String>,
    pub drivers: Vec<String>,
    pub agent_version: String,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    pub report: NodeReport,
    pub registered: LogTime,
    /// Its lease has not lapsed.
    pub reachable: bool,
    /// Version of its assignment: the sandboxes whose lives hold it.
    pub generation: Generation,
    /// What those sandboxes hold.
    pub assigned: Resources,
    pub sandboxes: imbl::OrdSet<SandboxName>,
    pub templates: BTreeSet<Digest>,
    /// What it runs that the ledger does not know.
    pub orphans: BTreeSet<(SandboxName, Epoch)>,
    pub revision: u64,
}

impl Node {
    /// What is not assigned.
    pub fn free(&self) -> Resources {
        self.report.capacity.saturating_sub(self.assigned)
    }
}

pub(super) fn register(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    report: &NodeReport,
) -> Result<Reply, Rejected> {
    match state.nodes.get_mut(id) {
        Some(node) => {
            let node = Arc::make_mut(node);
            if report.incarnation < node.report.incarnation {
                return Err(Rejected::StaleIncarnation(id.clone()));
            }
            node.report = report.clone();
            // A host that came back smaller than what it holds is full, not oversold.
            node.report.capacity = node.report.capacity.max(node.assigned);
            let was_reachable = std::mem::replace(&mut node.reachable, true);
            // A hello is followed by all that the agent holds, orphans included.
            node.orphans.clear();
            node.registered = state.log_time;
            node.revision = context.index;
            // Only a return changes what watchers see; a mere new session must not flood them.
            let returned = if was_reachable { imbl::OrdSet::new() } else { node.sandboxes.clone() };
            for name in &returned {
                sandbox::touch(state, context, name);
            }
        }
        None => {
            if state.nodes.len() as u64 >= MAX_NODES {
                return Err(Rejected::LimitReached { what: "the table of nodes", limit: MAX_NODES });
            }
            let node = Node {
                id: id.clone(),
                report: report.clone(),
                registered: state.log_time,
                reachable: true,
                generation: Generation(1),
                assigned: Resources::default(),
                sandboxes: imbl::OrdSet::new(),
                templates: BTreeSet::new(),
                orphans: BTreeSet::new(),
                revision: context.index,
            };
            state.nodes.insert(id.clone(), Arc::new(node));
        }
    }
    Ok(Reply::Done)
}

/// The node, if the agent process that speaks is still the newest.
fn fenced<'a>(state: &'a mut State, id: &NodeId, incarnation: u128) -> Result<&'a mut Node, Rejected> {
    let node = state.nodes.get_mut(id).ok_or_else(|| Rejected::NodeNotFound(id.clone()))?;
    if node.report.incarnation != incarnation {
        return Err(Rejected::StaleIncarnation(id.clone()));
    }
    Ok(Arc::make_mut(node))
}

pub(super) fn set_reachable(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    incarnation: u128,
    reachable: bool,
) -> Result<Reply, Rejected> {
    let node = fenced(state, id, incarnation)?;
    if node.reachable != reachable {
        node.reachable = reachable;
        node.revision = context.index;
        let sandboxes = node.sandboxes.clone();
        for name in &sandboxes {
            sandbox::touch(state, context, name);
        }
    }
    Ok(Reply::Done)
}

pub(super) fn observe(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    incarnation: u128,
    observation: &Observation,
) -> Result<Reply, Rejected> {
    let node = fenced(state, id, incarnation)?;
    node.templates = observation.templates.clone();
    node.revision = context.index;
    for seen in &observation.sandboxes {
        if seen.phase == Phase::Orphan {
            note_orphan(state, id, &seen.sandbox, seen.epoch);
        } else {
            sandbox::observe(state, context, id, seen);
        }
    }
    Ok(Reply::Done)
}

fn note_orphan(state: &mut State, id: &NodeId, sandbox: &SandboxName, epoch: Epoch) {
    if let Some(node) = state.nodes.get_mut(id)
        && node.orphans.len() < MAX_ORPHANS
    {
        Arc::make_mut(node).orphans.insert((sandbox.clone(), epoch));
    }
}

/// Lets `sandbox` hold `resources` of a node from now on. `false`, and no change, where it does not fit.
pub(super) fn hold(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    name: &SandboxName,
    resources: Resources,
) -> bool {
    let Some(node) = state.nodes.get_mut(id) else { return false };
    match node.assigned.checked_add(resources) {
        Some(assigned) if assigned.fits_in(node.report.capacity) => {
            let node = Arc::make_mut(node);
            node.assigned = assigned;
            node.sandboxes.insert(name.clone());
            node.generation = node.generation.next();
            node.revision = context.index;
            true
        }
        _ => false,
    }
}

/// The opposite of [`hold`].
pub(super) fn release(state: &mut State, context: &Context, id: &NodeId, name: &SandboxName, resources: Resources) {
    if let Some(node) = state.nodes.get_mut(id) {
        let node = Arc::make_mut(node);
        if node.sandboxes.remove(name).is_some() {
            node.assigned = node.assigned.saturating_sub(resources);
        }
        node.generation = node.generation.next();
        node.revision = context.index;
    }
}

/// What the node should do with one of its sandboxes changed.
pub(super) fn reassign(state: &mut State, context: &Context, id: &NodeId) {
    if let Some(node) = state.nodes.get_mut(id) {
        let node = Arc::make_mut(node);
        node.generation = node.generation.next();
        node.revision = context.index;
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A reachable, empty node.
    pub(crate) fn node(id: &str, capacity: Resources) -> Node {
        Node {
            id: NodeId::parse(id).unwrap(),
            report: report(1, capacity),
            registered: LogTime(0),
            reachable: true,
            generation: Generation(1),
            assigned: Resources::default(),
            sandboxes: imbl::OrdSet::new(),
            templates: BTreeSet::new(),
            orphans: BTreeSet::new(),
            revision: 1,
        }
    }

    pub(crate) fn report(incarnation: u128, capacity: Resources) -> NodeReport {
        NodeReport {
            incarnation,
            address: "127.0.0.1:1".into(),
            tls: false,
            capacity,
            labels: BTreeMap::new(),
            drivers: vec!["oci".into()],
            agent_version: "0.1.0".into(),
        }
    }
}
