//! Hosts that run sandboxes: what they have, what they hold, and whether they are heard of.
//!
//! ```text
//!            lapse             silent for longer
//!   Ready ───────────▶ Suspect ─────────────────▶ Down ──forget──▶ gone
//!     ▲                   │                         │
//!     └────── heard of ───┴─────────────────────────┘
//! ```
//!
//! A node's `assigned` is what the sandboxes whose lives hold it ask for, and what is left over of those that were moved away
//! while it was down: that counts until the node says that it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warren_proto::ids::{Digest, Epoch, Generation, NodeId, SandboxName};
use warren_proto::units::Resources;

use super::command::{LogTime, Observation, Phase};
use super::gpu::{self, GpuDevice, GpuHolds, GpuUse};
use super::level::Level;
use super::outcome::{Rejected, Reply};
use super::{Context, State, region, sandbox};

/// Most nodes of a region (section 2 of the design), with as many again to spare.
pub const MAX_NODES: u64 = 20_000;

/// Most orphans that are kept of a node: enough to see that something is wrong.
pub const MAX_ORPHANS: usize = 1_000;

/// Most labels that operators set on a node.
pub const MAX_LABELS: usize = 64;

/// No log entry moves a generation by as much: at 48 KiB an entry names a few thousand sandboxes at most.
const GENERATIONS_PER_ENTRY: u64 = 1 << 20;

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
    /// A fence lives there: sandboxes freeze at the lapse of the lease, whatever becomes of the agent.
    pub fence: bool,
    /// By uuid; empty where the agent only counts them.
    pub gpus: Vec<GpuDevice>,
}

/// Whether a node is heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condition {
    Ready,
    /// Its lease lapsed: nothing is placed on it.
    Suspect,
    /// Silent for so long that what freezes on isolation is frozen, and may be placed elsewhere.
    Down,
}

impl Condition {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Suspect => "SUSPECT",
            Self::Down => "DOWN",
        }
    }
}

/// What a sandbox holds of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holding {
    pub resources: Resources,
    pub gpus: GpuHolds,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    pub report: NodeReport,
    pub registered: LogTime,
    pub condition: Condition,
    /// Since when it is in this condition.
    pub since: LogTime,
    /// When it last became suspect.
    pub suspected: LogTime,
    /// Nothing more is placed on it.
    pub cordoned: bool,
    /// Operators'; they win over those that the agent reports.
    pub labels: BTreeMap<String, String>,
    /// Version of its assignment: the sandboxes whose lives hold it, and what it is to remove.
    pub generation: Generation,
    /// What those hold.
    pub assigned: Resources,
    /// Of its devices.
    pub gpu_use: GpuUse,
    /// It came back with less than it holds; it takes nothing until what it holds fits again.
    pub shrunk: bool,
    pub sandboxes: imbl::OrdSet<SandboxName>,
    /// Instances that it is to remove although no sandbox's life holds it: of sandboxes that were moved away, with what they
    /// hold, and orphans that an operator wants gone.
    pub leftovers: BTreeMap<(SandboxName, Epoch), Holding>,
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

    /// Its lease has not lapsed.
    pub fn is_ready(&self) -> bool {
        self.condition == Condition::Ready
    }

    /// Its labels: what the agent reports, with the operators' over it.
    pub fn all_labels(&self) -> BTreeMap<String, String> {
        let mut all = self.report.labels.clone();
        all.extend(self.labels.iter().map(|(key, value)| (key.clone(), value.clone())));
        all
    }

    /// Whether it still holds an instance of this sandbox that the ledger does not count as the sandbox.
    pub fn has_other_instance_of(&self, name: &SandboxName) -> bool {
        self.leftovers.keys().any(|(leftover, _)| leftover == name)
            || self.orphans.iter().any(|(orphan, _)| orphan == name)
    }

    fn changed(&mut self, context: &Context) {
        self.generation = self.generation.next();
        self.revision = context.index;
    }
}

pub(super) fn register(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    report: &NodeReport,
) -> Result<Reply, Rejected> {
    let now = state.log_time;
    let Some(node) = state.nodes.get_mut(id) else {
        return add(state, context, id, report);
    };
    let report = known(report, state.level);
    let node = Arc::make_mut(node);
    if report.incarnation < node.report.incarnation {
        return Err(Rejected::StaleIncarnation(id.clone()));
    }
    node.report = report;
    node.shrunk = !node.assigned.fits_in(node.report.capacity);
    // A hello is followed by all that the agent holds, orphans included.
    node.orphans.clear();
    node.registered = now;
    node.revision = context.index;
    turn(state, context, id, Condition::Ready);
    Ok(Reply::Done)
}

fn add(state: &mut State, context: &Context, id: &NodeId, report: &NodeReport) -> Result<Reply, Rejected> {
    if state.nodes.len() as u64 >= MAX_NODES {
        return Err(Rejected::LimitReached { what: "the table of nodes", limit: MAX_NODES });
    }
    let node = Node {
        id: id.clone(),
        report: known(report, state.level),
        registered: state.log_time,
        condition: Condition::Ready,
        since: state.log_time,
        suspected: LogTime::default(),
        cordoned: false,
        labels: BTreeMap::new(),
        generation: first_generation(state, context),
        assigned: Resources::default(),
        gpu_use: GpuUse::default(),
        shrunk: false,
        sandboxes: imbl::OrdSet::new(),
        leftovers: BTreeMap::new(),
        templates: BTreeSet::new(),
        orphans: BTreeSet::new(),
        revision: context.index,
    };
    state.nodes.insert(id.clone(), Arc::new(node));
    Ok(Reply::Done)
}

/// What a level knows of a report: the first has no names for devices.
fn known(report: &NodeReport, level: Level) -> NodeReport {
    let gpus = if level >= Level::SECOND { report.gpus.clone() } else { Vec::new() };
    NodeReport { gpus, ..report.clone() }
}

/// A node that was forgotten and returns goes on above every generation that its agent may have applied: below, what it is told
/// would count as old.
fn first_generation(state: &State, context: &Context) -> Generation {
    let past = if state.level >= Level::SECOND { context.index.saturating_mul(GENERATIONS_PER_ENTRY) } else { 0 };
    Generation(past).next()
}

/// The node, if the agent process that speaks is still the newest.
fn fenced<'a>(state: &'a mut State, id: &NodeId, incarnation: u128) -> Result<&'a mut Node, Rejected> {
    let node = get_mut(state, id)?;
    if node.report.incarnation != incarnation {
        return Err(Rejected::StaleIncarnation(id.clone()));
    }
    Ok(node)
}

fn get_mut<'a>(state: &'a mut State, id: &NodeId) -> Result<&'a mut Node, Rejected> {
    state.nodes.get_mut(id).map(Arc::make_mut).ok_or_else(|| Rejected::NodeNotFound(id.clone()))
}

/// Puts a node into a condition, with what follows for the brake and for those who watch its sandboxes.
fn turn(state: &mut State, context: &Context, id: &NodeId, to: Condition) {
    let now = state.log_time;
    let Some(node) = state.nodes.get_mut(id).filter(|node| node.condition != to) else { return };
    let node = Arc::make_mut(node);
    let from = std::mem::replace(&mut node.condition, to);
    node.since = now;
    node.revision = context.index;
    let before = node.suspected;
    if to == Condition::Suspect {
        node.suspected = now;
    }
    // What a sandbox shows changes only when its node goes down or returns from there; the rest must not flood watches.
    let shown =
        if from == Condition::Down || to == Condition::Down { node.sandboxes.clone() } else { Default::default() };
    match to {
        Condition::Suspect => {
            state.suspects.insert(id.clone());
            state.down.remove(id);
            region::lapse(state, id, before);
        }
        Condition::Ready => {
            state.suspects.remove(id);
            state.down.remove(id);
            region::settle(state, id, before);
        }
        Condition::Down => {
            state.suspects.remove(id);
            state.down.insert(id.clone());
        }
    }
    for name in &shown {
        sandbox::touch(state, context, name, from == Condition::Down);
    }
}

/// Nobody has heard of any node yet, as in a ledger that was just restored: each that was ready is suspect. That so many are at
/// once is no reason to believe that they died, so they count as lapses.
pub(crate) fn suspect_all(state: &mut State) {
    let ready: Vec<Arc<Node>> = state.nodes.values().filter(|node| node.is_ready()).cloned().collect();
    let (condition, since) = (Condition::Suspect, state.log_time);
    for node in ready {
        state.put_node(Arc::new(Node { condition, since, suspected: since, ..Node::clone(&node) }));
        region::lapse(state, &node.id, node.suspected);
    }
}

/// Level 1 knows two conditions only, and no brake.
pub(super) fn set_reachable(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    incarnation: u128,
    reachable: bool,
) -> Result<Reply, Rejected> {
    fenced(state, id, incarnation)?;
    turn(state, context, id, if reachable { Condition::Ready } else { Condition::Down });
    Ok(Reply::Done)
}

pub(super) fn set_condition(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    incarnation: u128,
    to: Condition,
) -> Result<Reply, Rejected> {
    let from = fenced(state, id, incarnation)?.condition;
    match (from, to) {
        (Condition::Ready, Condition::Down) | (Condition::Down, Condition::Suspect) => {
            return Err(Rejected::NodeCondition { node: id.clone(), condition: from.name() });
        }
        _ => region::check_brake(state, to)?,
    }
    turn(state, context, id, to);
    Ok(Reply::Done)
}

pub(super) fn set_policy(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    cordoned: Option<bool>,
    set: &BTreeMap<String, String>,
    remove: &BTreeSet<String>,
) -> Result<Reply, Rejected> {
    let node = get_mut(state, id)?;
    let mut labels = node.labels.clone();
    labels.retain(|key, _| !remove.contains(key));
    labels.extend(set.iter().map(|(key, value)| (key.clone(), value.clone())));
    if labels.len() > MAX_LABELS {
        return Err(Rejected::LimitReached { what: "the labels of the node", limit: MAX_LABELS as u64 });
    }
    node.labels = labels;
    node.cordoned = cordoned.unwrap_or(node.cordoned);
    node.revision = context.index;
    Ok(Reply::Done)
}

/// Gives up a node that is down: until then its agent may hold a lease, or its fence be about to freeze. If it returns it is a new one, and what it still runs are orphans.
pub(super) fn forget(state: &mut State, context: &Context, id: &NodeId) -> Result<Reply, Rejected> {
    let node = get_mut(state, id)?;
    if node.condition != Condition::Down {
        return Err(Rejected::NodeCondition { node: id.clone(), condition: node.condition.name() });
    }
    let (names, since) = (node.sandboxes.clone(), node.suspected);
    for name in &names {
        sandbox::give_up(state, context, name, id);
    }
    state.nodes.remove(id);
    state.suspects.remove(id);
    state.down.remove(id);
    region::settle(state, id, since);
    Ok(Reply::Done)
}

pub(super) fn stop_orphan(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    name: &SandboxName,
    epoch: Epoch,
) -> Result<Reply, Rejected> {
    let node = get_mut(state, id)?;
    let key = (name.clone(), epoch);
    if !node.orphans.remove(&key) {
        let known = node.leftovers.contains_key(&key);
        let missing = || Rejected::OrphanNotFound { node: id.clone(), sandbox: name.clone(), epoch };
        return if known { Ok(Reply::Done) } else { Err(missing()) };
    }
    node.leftovers.insert(key, Holding::default());
    node.changed(context);
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
    if let Some(templates) = &observation.templates {
        node.templates = templates.clone();
    }
    node.revision = context.index;
    for seen in &observation.sandboxes {
        let key = (seen.sandbox.clone(), seen.epoch);
        match seen.phase {
            Phase::Orphan => note_orphan(state, id, key),
            Phase::Removed | Phase::Failed { .. } if clear(state, context, id, &key) => {}
            _ => sandbox::observe(state, context, id, seen),
        }
    }
    Ok(Reply::Done)
}

/// What the ledger knows of an instance wins over what an agent that has not heard of it yet calls an orphan.
fn note_orphan(state: &mut State, id: &NodeId, key: (SandboxName, Epoch)) {
    let held = |sandbox: &Arc<sandbox::Sandbox>| sandbox.epoch == key.1 && sandbox.life.node() == Some(id);
    let known = state.sandboxes.get(&key.0).is_some_and(held);
    if let Some(node) = state.nodes.get_mut(id)
        && !known
        && !node.leftovers.contains_key(&key)
        && node.orphans.len() < MAX_ORPHANS
    {
        Arc::make_mut(node).orphans.insert(key);
    }
}

/// Nothing is left of an orphan or a leftover. `false` where it was neither.
fn clear(state: &mut State, context: &Context, id: &NodeId, key: &(SandboxName, Epoch)) -> bool {
    let Some(node) = state.nodes.get_mut(id) else { return false };
    if !node.leftovers.contains_key(key) && !node.orphans.contains(key) {
        return false;
    }
    let node = Arc::make_mut(node);
    node.orphans.remove(key);
    if let Some(holding) = node.leftovers.remove(key) {
        drop_held(node, &holding);
        node.changed(context);
    }
    true
}

fn drop_held(node: &mut Node, holding: &Holding) {
    node.assigned = node.assigned.saturating_sub(holding.resources);
    node.gpu_use.remove(&holding.gpus);
    node.shrunk = node.shrunk && !node.assigned.fits_in(node.report.capacity);
}

/// Lets `sandbox` hold so much of a node from now on. `false`, and no change, where it does not fit.
pub(super) fn hold(state: &mut State, context: &Context, id: &NodeId, name: &SandboxName, wanted: &Holding) -> bool {
    let Some(node) = state.nodes.get_mut(id) else { return false };
    if node.has_other_instance_of(name) {
        return false;
    }
    if !gpu::fits(&node.report.gpus, &node.gpu_use, wanted.resources.gpus, &wanted.gpus) {
        return false;
    }
    match node.assigned.checked_add(wanted.resources) {
        Some(assigned) if assigned.fits_in(node.report.capacity) => {
            let node = Arc::make_mut(node);
            node.assigned = assigned;
            node.gpu_use.add(&wanted.gpus);
            node.sandboxes.insert(name.clone());
            node.changed(context);
            true
        }
        _ => false,
    }
}

/// The opposite of [`hold`].
pub(super) fn release(state: &mut State, context: &Context, id: &NodeId, name: &SandboxName, holding: &Holding) {
    if let Some(node) = state.nodes.get_mut(id) {
        let node = Arc::make_mut(node);
        if node.sandboxes.remove(name).is_some() {
            drop_held(node, holding);
        }
        node.changed(context);
    }
}

/// The sandbox is no longer the node's, but its instance is still there: it counts until the node says that it is gone.
pub(super) fn leave_over(
    state: &mut State,
    context: &Context,
    id: &NodeId,
    key: (SandboxName, Epoch),
    holding: Holding,
) {
    if let Some(node) = state.nodes.get_mut(id) {
        let node = Arc::make_mut(node);
        if node.sandboxes.remove(&key.0).is_some() {
            node.leftovers.insert(key, holding);
        }
        node.changed(context);
    }
}

/// What the node should do with one of its sandboxes changed.
pub(super) fn reassign(state: &mut State, context: &Context, id: &NodeId) {
    if let Some(node) = state.nodes.get_mut(id) {
        Arc::make_mut(node).changed(context);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A ready, empty node.
    pub(crate) fn node(id: &str, capacity: Resources) -> Node {
        let mut state = State::default();
        let caller = super::super::command::Caller::system("test");
        let context = Context { index: 1, caller: &caller };
        let id = NodeId::parse(id).unwrap();
        register(&mut state, &context, &id, &report(1, capacity)).unwrap();
        Node::clone(&state.nodes[&id])
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
            fence: true,
            gpus: Vec::new(),
        }
    }
}
