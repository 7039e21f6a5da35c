//! PURE. The ledger's state, and `apply`, the only thing that changes it.
//!
//! `apply` is deterministic and total: no clock, randomness, IO, float or hash-map order, and no panic on any command that
//! can be decoded. A decision is made outside and verified here; what does not hold is rejected as a value.
//!
//! The maps are persistent: a clone of the whole state costs O(1), so readers, checkpoints and planning work on a clone
//! while `apply` goes on.

pub mod command;
pub mod event;
pub mod gpu;
pub mod index;
pub mod invariants;
pub mod level;
pub mod node;
pub mod outcome;
pub mod pairs;
pub mod region;
pub mod request;
pub mod sandbox;
pub mod settings;
pub mod template;
pub mod tenant;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use warren_proto::ids::{Epoch, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};

use command::{Body, Caller, Command, LedgerId, LogTime, ReplicaRecord, Role};
use event::EventRing;
use index::Indexes;
use level::Level;
use node::{Condition, Node};
use outcome::{Rejected, Reply};
use region::Region;
use request::{RequestTable, Scope};
use sandbox::Sandbox;
use template::Template;
use tenant::Tenant;

/// Furthest that one command moves log time, in ms (rule 14 of the design).
pub const MAX_TIME_STEP_MS: u64 = 60 * 1000;

/// The ledger at one index.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// `None` until the ledger is opened.
    pub ledger_id: Option<LedgerId>,
    /// Ledgers that this one was restored from, oldest first: what their agents run may be ours.
    pub predecessors: Vec<LedgerId>,
    pub level: Level,
    /// Index of the last entry that was applied: the revision.
    pub revision: u64,
    pub log_time: LogTime,
    /// Highest epoch of any sandbox that was forgotten. New ones begin here, so a name that is used again never meets what
    /// its earlier bearer left behind: tokens, journals, late observations.
    pub epoch_floor: Epoch,
    /// Placements get epochs above it: those below may have been given out by the ledger that this one was restored from.
    pub restored_floor: Epoch,
    /// Every replica that ever announced itself: an id is never used again.
    pub replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    /// The group, as the log has it.
    pub voters: BTreeSet<ReplicaId>,
    pub learners: BTreeSet<ReplicaId>,
    pub region: Region,
    pub nodes: OrdMap<NodeId, Arc<Node>>,
    /// Nodes that are [`Condition::Suspect`].
    pub suspects: OrdSet<NodeId>,
    /// Nodes that are [`Condition::Down`].
    pub down: OrdSet<NodeId>,
    pub templates: OrdMap<TemplateId, Arc<Template>>,
    pub tenants: OrdMap<TenantId, Tenant>,
    /// Changed through [`put_sandbox`](Self::put_sandbox), which keeps the indexes.
    pub sandboxes: OrdMap<SandboxName, Arc<Sandbox>>,
    pub requests: RequestTable,
    pub events: EventRing,
    pub indexes: Indexes,
}

/// What `apply` knows beside state and command.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub index: u64,
    pub caller: &'a Caller,
}

impl Context<'_> {
    /// Whose request ids count: a tenant's own, or those of operators.
    pub(crate) fn scope(&self, tenant: Option<&TenantId>) -> Scope {
        Scope { tenant: tenant.cloned().or_else(|| self.caller.tenant.clone()) }
    }
}

impl State {
    /// Applies one command of the log entry at `index`. Rejected commands change nothing but log time.
    pub fn apply(&mut self, index: u64, command: &Command) -> Result<Reply, Rejected> {
        self.revision = index;
        self.advance(command)?;
        let needed = command.body.level();
        if needed > self.level {
            return Err(Rejected::LevelTooLow { level: self.level, needed });
        }
        self.requests.expire(self.log_time);
        let context = Context { index, caller: &command.caller };
        self.apply_body(&context, &command.body)
    }

    fn apply_body(&mut self, context: &Context, body: &Body) -> Result<Reply, Rejected> {
        match body {
            Body::OpenLedger { ledger_id } => self.open(*ledger_id),
            Body::AdvanceTime { .. } => Ok(Reply::Done),
            Body::PutReplica { replica, record } => self.put_replica(*replica, record),
            Body::SetLevel { level } => level::set(self, *level),
            Body::RegisterNode { node, report } => node::register(self, context, node, report),
            Body::SetNodeReachable { node, incarnation, reachable } => {
                node::set_reachable(self, context, node, *incarnation, *reachable)
            }
            Body::SetNodeCondition { node, incarnation, to } => {
                node::set_condition(self, context, node, *incarnation, *to)
            }
            Body::SetNodePolicy { node, cordoned, set_labels, remove_labels } => {
                node::set_policy(self, context, node, *cordoned, set_labels, remove_labels)
            }
            Body::ForgetNode { node } => node::forget(self, context, node),
            Body::StopOrphan { node, sandbox, epoch } => node::stop_orphan(self, context, node, sandbox, *epoch),
            Body::Observe { node, incarnation, observation } => {
                node::observe(self, context, node, *incarnation, observation)
            }
            Body::CreateTemplate { template, spec, request } => {
                template::create(self, context, template, spec, request.as_ref())
            }
            Body::DeleteTemplate { template } => template::delete(self, template),
            Body::SetQuota { tenant, quota } => tenant::set_quota(self, tenant.as_ref(), *quota),
            Body::SetPause { creates, placement, moves } => {
                self.region.pause(*creates, *placement, *moves);
                Ok(Reply::Done)
            }
            Body::ReleaseBrake => region::release_brake(self),
            Body::CreateSandbox { .. }
            | Body::CreateBatch { .. }
            | Body::UpdateSandbox { .. }
            | Body::RequeueSandbox { .. }
            | Body::PlaceSandbox { .. }
            | Body::ExplainPending { .. }
            | Body::DeleteSandbox { .. }
            | Body::ForgetEnded { .. }
            | Body::EndDue { .. } => self.apply_to_sandbox(context, body),
        }
    }

    fn apply_to_sandbox(&mut self, context: &Context, body: &Body) -> Result<Reply, Rejected> {
        match body {
            Body::CreateSandbox { sandbox, spec, decision, request } => {
                sandbox::create(self, context, sandbox, spec, decision, request.as_ref())
            }
            Body::CreateBatch { items, request } => sandbox::create_batch(self, context, items, request.as_ref()),
            Body::UpdateSandbox { sandbox, change, if_revision, request } => {
                sandbox::update(self, context, sandbox, change, *if_revision, request.as_ref())
            }
            Body::RequeueSandbox { sandbox, epoch } => sandbox::requeue(self, context, sandbox, *epoch),
            Body::PlaceSandbox { sandbox, epoch, spot } => sandbox::place(self, context, sandbox, *epoch, spot),
            Body::ExplainPending { sandbox, epoch, reason } => sandbox::explain(self, context, sandbox, *epoch, reason),
            Body::DeleteSandbox { sandbox, request } => sandbox::delete(self, context, sandbox, request.as_ref()),
            Body::ForgetEnded { sandboxes } => sandbox::forget_ended(self, context, sandboxes),
            Body::EndDue { sandboxes } => sandbox::end_due(self, context, sandboxes),
            // Those of `apply_body`.
            Body::OpenLedger { .. }
            | Body::AdvanceTime { .. }
            | Body::PutReplica { .. }
            | Body::SetLevel { .. }
            | Body::RegisterNode { .. }
            | Body::SetNodeReachable { .. }
            | Body::SetNodeCondition { .. }
            | Body::SetNodePolicy { .. }
            | Body::ForgetNode { .. }
            | Body::StopOrphan { .. }
            | Body::Observe { .. }
            | Body::CreateTemplate { .. }
            | Body::DeleteTemplate { .. }
            | Body::SetQuota { .. }
            | Body::SetPause { .. }
            | Body::ReleaseBrake => Ok(Reply::Done),
        }
    }

    /// Moves log time: forward only, and by a bounded step, but for the clocks of a quorum.
    fn advance(&mut self, command: &Command) -> Result<(), Rejected> {
        let furthest = self.log_time.plus_ms(MAX_TIME_STEP_MS);
        match &command.body {
            Body::AdvanceTime { samples } if !samples.is_empty() => self.set_clock(samples)?,
            _ if self.level == Level::FIRST => self.log_time = self.log_time.max(command.time.min(furthest)),
            _ if command.time > furthest => {
                return Err(Rejected::TimeStep { by_ms: command.time.0.saturating_sub(self.log_time.0) });
            }
            _ => self.log_time = self.log_time.max(command.time),
        }
        Ok(())
    }

    /// To the median of a quorum's clocks. A jump fires no deadline: whatever is due waits.
    fn set_clock(&mut self, samples: &[LogTime]) -> Result<(), Rejected> {
        if self.level > Level::FIRST && samples.len().saturating_mul(2) <= self.voters.len() {
            return Err(Rejected::TooFewClocks { samples: samples.len(), voters: self.voters.len() });
        }
        let to = median(samples);
        let jumps = to > self.log_time.plus_ms(MAX_TIME_STEP_MS);
        if jumps && self.log_time > LogTime::default() && self.level > Level::FIRST {
            self.region.hold_until = to.plus_ms(region::HOLD_MS);
        }
        self.log_time = self.log_time.max(to);
        Ok(())
    }

    fn open(&mut self, ledger_id: LedgerId) -> Result<Reply, Rejected> {
        if self.ledger_id.is_some() {
            return Err(Rejected::LedgerOpen);
        }
        self.ledger_id = Some(ledger_id);
        Ok(Reply::Done)
    }

    /// A replica may change its address and key; another disk under the same id is another replica (it lost what it had
    /// promised), and is refused.
    fn put_replica(&mut self, id: ReplicaId, record: &ReplicaRecord) -> Result<Reply, Rejected> {
        let known = self.replicas.get(&id).map_or(0, |known| known.disk);
        if known != 0 && known != record.disk {
            return Err(Rejected::ReplicaDisk(id));
        }
        self.replicas.insert(id, record.clone());
        Ok(Reply::Done)
    }

    /// The log says who is in the group. Not a command: openraft has its own entries for it.
    pub fn set_members(&mut self, voters: BTreeSet<ReplicaId>, learners: BTreeSet<ReplicaId>) {
        self.voters = voters;
        self.learners = learners;
    }

    /// Writes a node, with its index entry. Used to rebuild a state from a checkpoint.
    pub fn put_node(&mut self, node: Arc<Node>) {
        match node.condition {
            Condition::Suspect => drop(self.suspects.insert(node.id.clone())),
            Condition::Down => drop(self.down.insert(node.id.clone())),
            Condition::Ready => {}
        }
        self.nodes.insert(node.id.clone(), node);
    }

    /// Writes a sandbox, with its index entries and its tenant's counts; its name, creation and epoch are the caller's care.
    /// Answers what stood there. Used by `apply`, and to rebuild a state from a checkpoint.
    pub fn put_sandbox(&mut self, sandbox: Arc<Sandbox>) -> Option<Arc<Sandbox>> {
        let before = self.sandboxes.insert(sandbox.name.clone(), sandbox.clone());
        self.indexes.change(before.as_deref(), Some(&sandbox));
        tenant::recount(self, before.as_deref(), Some(&sandbox));
        before
    }

    fn remove_sandbox(&mut self, name: &SandboxName) -> Option<Arc<Sandbox>> {
        let old = self.sandboxes.remove(name)?;
        self.indexes.change(Some(&old), None);
        tenant::recount(self, Some(&old), None);
        Some(old)
    }

    /// Whether the sandbox's node is down: what becomes of it there, nobody can tell.
    pub fn is_unreachable(&self, sandbox: &Sandbox) -> bool {
        sandbox.life.node().and_then(|id| self.nodes.get(id)).is_some_and(|node| node.condition == Condition::Down)
    }
}

impl Role {
    /// Whether a caller in this role may act for `tenant`.
    pub fn may_act_for(self, own: Option<&TenantId>, tenant: &TenantId) -> bool {
        match self {
            Self::System | Self::Operator => true,
            Self::Tenant => own == Some(tenant),
            Self::Node => false,
        }
    }
}

/// The lower median: with a majority of honest samples it lies within the honest ones.
fn median(samples: &[LogTime]) -> LogTime {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}
