//! What can be proposed to the ledger. A command carries its decision; `apply` verifies it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warren_proto::ids::{Digest, Epoch, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};

use super::gpu::GpuHolds;
use super::level::Level;
use super::node::{Condition, NodeReport};
use super::pairs::Pairs;
use super::sandbox::{Exit, PendingReason, SandboxSpec};
use super::settings::{Expiry, Settings};
use super::tenant::Quota;

/// Milliseconds since the Unix epoch, as the ledger counts them: set by commands, never read from a machine in `apply`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogTime(pub u64);

impl LogTime {
    /// This much later; the end of time stays.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// Identity of a ledger's history: 16 random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LedgerId(pub u128);

impl std::fmt::Display for LedgerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The scheduler itself: its controller and its sessions.
    System,
    /// A node agent.
    Node,
    /// May do everything, for every tenant.
    Operator,
    /// May act for its tenant.
    Tenant,
}

/// On whose behalf a command is proposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who it is, as authenticated: a certificate's subject, `local` on loopback, `controller`.
    pub principal: String,
    pub role: Role,
    /// The tenant that a `Role::Tenant` acts for.
    pub tenant: Option<TenantId>,
}

impl Caller {
    /// The scheduler's own.
    pub fn system(principal: &str) -> Self {
        Self { principal: principal.to_owned(), role: Role::System, tenant: None }
    }
}

/// A caller's id for one request (a UUIDv7) with the hash of what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestKey {
    pub id: u128,
    /// SHA-256 of the request without its id.
    pub payload: [u8; 32],
}

/// Where a sandbox goes, as decided outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Place(Spot),
    Queue(PendingReason),
}

/// A node, and those of its devices that the sandbox holds there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    pub node: NodeId,
    pub gpus: GpuHolds,
}

impl From<NodeId> for Spot {
    fn from(node: NodeId) -> Self {
        Self { node, gpus: GpuHolds::default() }
    }
}

/// One proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub caller: Caller,
    /// The proposer's clock. The ledger's only moves forward, and by a bounded step.
    pub time: LogTime,
    pub body: Body,
}

/// What a proposal wants. Values on disk: `raft/codec.rs` gives each its number, for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Gives a new ledger its identity. Rejected once it has one.
    OpenLedger {
        ledger_id: LedgerId,
    },
    /// Moves log time to the median of these clocks of a quorum, however far, if that is forward: it opens a term. Without
    /// clocks it is a tick: log time follows the proposer's clock by the usual bounded step.
    AdvanceTime {
        samples: Vec<LogTime>,
    },
    /// A replica announces itself.
    PutReplica {
        replica: ReplicaId,
        record: ReplicaRecord,
    },
    /// Raises the level of the rules by one, once every member supports it.
    SetLevel {
        level: Level,
    },
    /// An agent said hello.
    RegisterNode {
        node: NodeId,
        report: NodeReport,
    },
    /// Level 1: the node's lease lapsed (`false`) or was renewed after a lapse (`true`). Fenced by incarnation.
    SetNodeReachable {
        node: NodeId,
        incarnation: u128,
        reachable: bool,
    },
    /// The node's lease lapsed, or has been over for so long that it is down, or it is heard of again. Fenced by incarnation.
    SetNodeCondition {
        node: NodeId,
        incarnation: u128,
        to: Condition,
    },
    /// What operators want of a node; what is not named stays.
    SetNodePolicy {
        node: NodeId,
        cordoned: Option<bool>,
        set_labels: BTreeMap<String, String>,
        remove_labels: BTreeSet<String>,
    },
    /// Gives up a node that is not ready, and what it runs.
    ForgetNode {
        node: NodeId,
    },
    /// Has an orphan killed: nothing else does.
    StopOrphan {
        node: NodeId,
        sandbox: SandboxName,
        epoch: Epoch,
    },
    /// What an agent saw. Fenced by incarnation.
    Observe {
        node: NodeId,
        incarnation: u128,
        observation: Observation,
    },
    CreateTemplate {
        template: TemplateId,
        spec: TemplateSpec,
        request: Option<RequestKey>,
    },
    DeleteTemplate {
        template: TemplateId,
    },
    CreateSandbox {
        sandbox: SandboxName,
        spec: Arc<SandboxSpec>,
        decision: Decision,
        request: Option<RequestKey>,
    },
    /// Creates all of these, or none.
    CreateBatch {
        items: Vec<BatchItem>,
        request: Option<RequestKey>,
    },
    UpdateSandbox {
        sandbox: SandboxName,
        change: Change,
        /// Only if it was last changed there.
        if_revision: Option<u64>,
        request: Option<RequestKey>,
    },
    /// Takes a sandbox that freezes on isolation off a node that is down; `epoch` is the one that it has now.
    RequeueSandbox {
        sandbox: SandboxName,
        epoch: Epoch,
    },
    /// Places a pending sandbox; `epoch` is the one that it has now.
    PlaceSandbox {
        sandbox: SandboxName,
        epoch: Epoch,
        spot: Spot,
    },
    /// Says anew why a sandbox still waits.
    ExplainPending {
        sandbox: SandboxName,
        epoch: Epoch,
        reason: PendingReason,
    },
    DeleteSandbox {
        sandbox: SandboxName,
        request: Option<RequestKey>,
    },
    /// Forgets ended sandboxes whose retention is over.
    ForgetEnded {
        sandboxes: Vec<SandboxName>,
    },
    /// Ends those whose deadline or whose time in the queue is over.
    EndDue {
        sandboxes: Vec<SandboxName>,
    },
    /// Sets the quota of a tenant, or the default of those without one. `None`: takes it back.
    SetQuota {
        tenant: Option<TenantId>,
        quota: Option<Quota>,
    },
    /// What is `None` stays.
    SetPause {
        creates: Option<bool>,
        placement: Option<bool>,
        moves: Option<bool>,
    },
    /// The nodes that fell silent together are indeed down.
    ReleaseBrake,
}

/// What every replica knows of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaRecord {
    pub api_address: String,
    /// Public half (Ed25519) of the key that it signs data plane tokens with.
    pub token_key: [u8; 32],
    /// Made with its data directory: another one means that the disk was lost. 0: not told.
    pub disk: u128,
    /// Highest level that its build supports.
    pub max_level: Level,
}

/// One sandbox of a batch. Equal specs are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchItem {
    pub sandbox: SandboxName,
    pub spec: Arc<SandboxSpec>,
    pub decision: Decision,
}

/// What an update replaces; `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    pub labels: Option<Pairs>,
    pub annotations: Option<Pairs>,
    /// [`Expiry::After`] counts from the update.
    pub expiry: Option<Expiry>,
    pub egress: Option<super::settings::Egress>,
    pub priority: Option<u8>,
}

impl Change {
    /// Takes what is named out of `from`.
    pub fn of(from: Settings, labels: bool, annotations: bool, expiry: bool, egress: bool, priority: bool) -> Self {
        Self {
            labels: labels.then_some(from.labels),
            annotations: annotations.then_some(from.annotations),
            expiry: expiry.then_some(from.expiry),
            egress: egress.then_some(from.egress),
            priority: priority.then_some(from.priority),
        }
    }
}

impl Body {
    /// The first level at which this may be committed.
    pub fn level(&self) -> Level {
        match self {
            Self::CreateSandbox { spec, .. } => spec.level(),
            Self::Observe { observation, .. } if observation.templates.is_none() => Level::SECOND,
            Self::SetLevel { .. }
            | Self::OpenLedger { .. }
            | Self::AdvanceTime { .. }
            | Self::PutReplica { .. }
            | Self::RegisterNode { .. }
            | Self::SetNodeReachable { .. }
            | Self::Observe { .. }
            | Self::CreateTemplate { .. }
            | Self::DeleteTemplate { .. }
            | Self::PlaceSandbox { .. }
            | Self::ExplainPending { .. }
            | Self::DeleteSandbox { .. }
            | Self::ForgetEnded { .. } => Level::FIRST,
            Self::SetNodeCondition { .. }
            | Self::SetNodePolicy { .. }
            | Self::ForgetNode { .. }
            | Self::StopOrphan { .. }
            | Self::CreateBatch { .. }
            | Self::UpdateSandbox { .. }
            | Self::RequeueSandbox { .. }
            | Self::EndDue { .. }
            | Self::SetQuota { .. }
            | Self::SetPause { .. }
            | Self::ReleaseBrake => Level::SECOND,
        }
    }
}

/// What a template is, as its creator says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateSpec {
    pub digest: Digest,
    pub size_bytes: u64,
    pub default_command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub working_directory: String,
}

/// What a node reports. What it says nothing of is as it was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observation {
    pub sandboxes: Vec<Observed>,
    /// Every template that the node holds; `None`: as before.
    pub templates: Option<BTreeSet<Digest>>,
}

/// One sandbox on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub sandbox: SandboxName,
    pub epoch: Epoch,
    pub phase: Phase,
}

/// What an agent sees of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Running,
    /// Its main process ended.
    Exited {
        exit: Exit,
        output_tail: Vec<u8>,
    },
    /// It could not be started, and nothing of it is left.
    Failed {
        code: String,
        message: String,
    },
    /// Nothing of it is left.
    Removed,
    /// Runs, but no assignment names it: frozen.
    Orphan,
}
