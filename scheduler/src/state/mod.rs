//! PURE. The ledger's state, and `apply`, the only thing that changes it.
//!
//! `apply` is deterministic and total: no clock, randomness, IO, float or hash-map order, and no panic on any command that
//! can be decoded. A decision is made outside and verified here; what does not hold is rejected as a value.
//!
//! The maps are persistent: a clone of the whole state costs O(1), so readers, checkpoints and planning work on a clone
//! while `apply` goes on.

pub mod command;
pub mod event;
pub mod invariants;
pub mod node;
pub mod outcome;
pub mod request;
pub mod sandbox;
pub mod template;
pub mod tenant;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use warren_proto::ids::{Epoch, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};

use command::{Body, Caller, Command, LedgerId, LogTime, Role};
use event::EventRing;
use node::Node;
use outcome::{Rejected, Reply};
use request::{RequestTable, Scope};
use sandbox::{Life, Sandbox};
use template::Template;
use tenant::Tenant;

/// Furthest that one command moves log time, in ms (rule 14 of the design).
pub const MAX_TIME_STEP_MS: u64 = 60 * 1000;

/// What every replica knows of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaRecord {
    pub api_address: String,
    /// Public half (Ed25519) of the key that it signs data plane tokens with.
    pub token_key: [u8; 32],
}

/// The ledger at one index.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// `None` until the ledger is opened.
    pub ledger_id: Option<LedgerId>,
    /// Index of the last entry that was applied: the revision.
    pub revision: u64,
    pub log_time: LogTime,
    /// Highest epoch of any sandbox that was forgotten. New ones begin here, so a name that is used again never meets what
    /// its earlier bearer left behind: tokens, journals, late observations.
    pub epoch_floor: Epoch,
    pub replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    pub nodes: OrdMap<NodeId, Arc<Node>>,
    pub templates: OrdMap<TemplateId, Arc<Template>>,
    pub tenants: OrdMap<TenantId, Tenant>,
    /// Changed through [`put_sandbox`](Self::put_sandbox), which keeps the indexes.
    pub sandboxes: OrdMap<SandboxName, Arc<Sandbox>>,
    pub requests: RequestTable,
    pub events: EventRing,
    /// Pending sandboxes, oldest first.
    pub pending: OrdSet<(LogTime, SandboxName)>,
    /// Sandboxes that ended and hold no node, oldest first.
    pub ended: OrdSet<(LogTime, SandboxName)>,
    /// Sandboxes by [`Life::kind`].
    pub counts: BTreeMap<&'static str, u64>,
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
        self.advance(command);
        self.requests.expire(self.log_time);
        let context = Context { index, caller: &command.caller };
        let context = &context;
        match &command.body {
            Body::OpenLedger { ledger_id } => self.open(*ledger_id),
            Body::AdvanceTime { .. } => Ok(Reply::Done),
            Body::PutReplica { replica, api_address, token_key } => {
                let record = ReplicaRecord { api_address: api_address.clone(), token_key: *token_key };
                self.replicas.insert(*replica, record);
                Ok(Reply::Done)
            }
            Body::RegisterNode { node, report } => node::register(self, context, node, report),
            Body::SetNodeReachable { node, incarnation, reachable } => {
                node::set_reachable(self, context, node, *incarnation, *reachable)
            }
            Body::Observe { node, incarnation, observation } => {
                node::observe(self, context, node, *incarnation, observation)
            }
            Body::CreateTemplate { template, spec, request } => {
                template::create(self, context, template, spec, request.as_ref())
            }
            Body::DeleteTemplate { template } => template::delete(self, template),
            Body::CreateSandbox { sandbox, spec, decision, request } => {
                sandbox::create(self, context, sandbox, spec, decision, request.as_ref())
            }
            Body::PlaceSandbox { sandbox, epoch, node } => sandbox::place(self, context, sandbox, *epoch, node),
            Body::ExplainPending { sandbox, epoch, reason } => sandbox::explain(self, context, sandbox, *epoch, reason),
            Body::DeleteSandbox { sandbox, request } => sandbox::delete(self, context, sandbox, request.as_ref()),
            Body::ForgetEnded { sandboxes } => sandbox::forget_ended(self, context, sandboxes),
        }
    }

    /// Moves log time: forward only, and by a bounded step but for [`Body::AdvanceTime`].
    fn advance(&mut self, command: &Command) {
        let to = match &command.body {
            Body::AdvanceTime { samples } if !samples.is_empty() => median(samples),
            _ => command.time.min(self.log_time.plus_ms(MAX_TIME_STEP_MS)),
        };
        self.log_time = self.log_time.max(to);
    }

    fn open(&mut self, ledger_id: LedgerId) -> Result<Reply, Rejected> {
        if self.ledger_id.is_some() {
            return Err(Rejected::LedgerOpen);
        }
        self.ledger_id = Some(ledger_id);
        Ok(Reply::Done)
    }

    /// Writes a sandbox and its index entries; its name, creation and epoch are the caller's care. Used by `apply`, and
    /// to rebuild a state from a checkpoint.
    pub fn put_sandbox(&mut self, sandbox: Arc<Sandbox>) {
        self.remove_sandbox(&sandbox.name);
        let name = sandbox.name.clone();
        if matches!(sandbox.life, Life::Pending { .. }) {
            self.pending.insert((sandbox.created, name.clone()));
        }
        if let Some(at) = sandbox.life.ended() {
            self.ended.insert((at, name.clone()));
        }
        let count = self.counts.entry(sandbox.life.kind()).or_default();
        *count = count.saturating_add(1);
        self.sandboxes.insert(name, sandbox);
    }

    fn remove_sandbox(&mut self, name: &SandboxName) {
        let Some(old) = self.sandboxes.remove(name) else { return };
        if matches!(old.life, Life::Pending { .. }) {
            self.pending.remove(&(old.created, name.clone()));
        }
        if let Some(at) = old.life.ended() {
            self.ended.remove(&(at, name.clone()));
        }
        if let Some(count) = self.counts.get_mut(old.life.kind()) {
            *count = count.saturating_sub(1);
        }
    }

    /// Whether the sandbox's node is out of reach: it may run, but nobody can tell.
    pub fn is_unreachable(&self, sandbox: &Sandbox) -> bool {
        matches!(sandbox.life, Life::Running { .. })
            && sandbox.life.node().and_then(|id| self.nodes.get(id)).is_some_and(|node| !node.reachable)
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
