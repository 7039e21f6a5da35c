//! What can be proposed to the ledger. A command carries its decision; `apply` verifies it.

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::{Digest, Epoch, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};

use super::node::NodeReport;
use super::sandbox::{Exit, PendingReason, SandboxSpec};

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
    Place(NodeId),
    Queue(PendingReason),
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
    /// Moves log time to the median of these clocks, however far, if that is forward: it opens a term. Without clocks it
    /// is a tick: log time follows the proposer's clock by the usual bounded step.
    AdvanceTime {
        samples: Vec<LogTime>,
    },
    /// Announces a replica's API address and the public half of its token key (Ed25519).
    PutReplica {
        replica: ReplicaId,
        api_address: String,
        token_key: [u8; 32],
    },
    /// An agent said hello.
    RegisterNode {
        node: NodeId,
        report: NodeReport,
    },
    /// The node's lease lapsed (`false`) or was renewed after a lapse (`true`). Fenced by incarnation.
    SetNodeReachable {
        node: NodeId,
        incarnation: u128,
        reachable: bool,
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
        spec: SandboxSpec,
        decision: Decision,
        request: Option<RequestKey>,
    },
    /// Places a pending sandbox; `epoch` is the one that it has now.
    PlaceSandbox {
        sandbox: SandboxName,
        epoch: Epoch,
        node: NodeId,
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
    /// Every template that the node holds.
    pub templates: BTreeSet<Digest>,
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
