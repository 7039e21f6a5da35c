//! What `apply` answers. A rejection is a value that says what was seen and what was asked.

use std::sync::Arc;

use warren_proto::ids::{Epoch, NodeId, ReplicaId, SandboxName, TemplateId};

use super::command::LogTime;
use super::level::Level;
use super::sandbox::Sandbox;
use super::template::Template;

/// What a command that was accepted answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// The sandbox as the command left it.
    Sandbox(Arc<Sandbox>),
    Template(Arc<Template>),
    /// The sandboxes of a batch.
    Batch(Vec<SandboxName>),
    /// Of a request that came again, where what it made or changed is gone by now: what happened the first time.
    Gone(Kept),
}

/// What the table of answers keeps of an answer: what was made or changed, but not what that was. A whole sandbox, with a
/// specification of up to 16 KiB, would be held for ten minutes, however soon it is deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub what: Subject,
    /// Tells it from a later one of the same name.
    pub created: LogTime,
    /// Ledger index of the change.
    pub revision: u64,
}

/// What a request was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    Sandbox(SandboxName),
    Template(TemplateId),
}

/// Why a command was rejected. Nothing changed but log time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("the ledger is open already")]
    LedgerOpen,
    #[error("{0} exists and is a different sandbox")]
    SandboxExists(SandboxName),
    #[error("there is no {0}")]
    SandboxNotFound(SandboxName),
    #[error("there is no node {0}")]
    NodeNotFound(NodeId),
    #[error("there is no template {0}")]
    TemplateNotFound(TemplateId),
    #[error("template {0} exists with another digest or other defaults")]
    TemplateExists(TemplateId),
    #[error("template {template} is used by {sandboxes} sandboxes: delete them first")]
    TemplateInUse { template: TemplateId, sandboxes: u64 },
    #[error("{sandbox} is at epoch {seen}, not {got}")]
    StaleEpoch { sandbox: SandboxName, seen: Epoch, got: Epoch },
    #[error("node {0} has a newer agent process than the one that said this")]
    StaleIncarnation(NodeId),
    #[error("{sandbox} is {state}")]
    WrongState { sandbox: SandboxName, state: &'static str },
    #[error("{sandbox} does not fit on node {node}")]
    DoesNotFit { sandbox: SandboxName, node: NodeId },
    #[error("the request_id was used with another payload: make a new one for a new request")]
    RequestIdReused,
    #[error(
        "the request_id is older than ten minutes: its answer is no longer kept; look whether the first attempt took effect"
    )]
    RequestIdExpired,
    #[error("the request_id lies more than {ahead_ms} ms ahead of the ledger's clock: check this host's clock")]
    RequestIdFromFuture { ahead_ms: u64 },
    #[error("the table of request_ids is full: retry later")]
    RequestTableFull,
    #[error("{what} is full: at most {limit}")]
    LimitReached { what: &'static str, limit: u64 },
    #[error(
        "the ledger follows level {level} of its rules; this needs level {needed}, which not every replica supports yet"
    )]
    LevelTooLow { level: Level, needed: Level },
    #[error("the ledger is at level {level} and its replicas support {supported}: it cannot be set to {wanted}")]
    LevelNotSupported { wanted: Level, level: Level, supported: Level },
    #[error("the proposer's clock is {by_ms} ms ahead of the ledger's: a quorum's clocks must settle it first")]
    TimeStep { by_ms: u64 },
    #[error("{samples} clocks are not a quorum of {voters} replicas")]
    TooFewClocks { samples: usize, voters: usize },
    #[error(
        "replica {0} is known with another data directory: it lost what it had promised, so it must join again under a new id"
    )]
    ReplicaDisk(ReplicaId),
    #[error("the tenant has {used} of {limit} {dimension}")]
    QuotaExceeded { dimension: &'static str, used: u64, limit: u64 },
    #[error("the tenant may create {per_minute} sandboxes a minute")]
    CreateRate { per_minute: u64, retry_after_ms: u64 },
    #[error("an operator paused {0} in this region")]
    Paused(&'static str),
    #[error("{sandbox} changed meanwhile: it is at revision {revision}")]
    Changed { sandbox: SandboxName, revision: u64 },
    #[error("item {item} of the batch: {reason}")]
    Batch { item: usize, reason: Box<Rejected> },
    #[error("node {node} is {condition}")]
    NodeCondition { node: NodeId, condition: &'static str },
    #[error(
        "{lapsed} nodes fell silent within a minute, {believed} are believed: none is declared down until they return or an operator releases the brake"
    )]
    Braked { lapsed: u64, believed: u64 },
    #[error("node {node} reports no orphan {sandbox} at epoch {epoch}")]
    OrphanNotFound { node: NodeId, sandbox: SandboxName, epoch: Epoch },
    #[error("the clock was set by more than a minute: nothing ends by its deadline before {}", .until.0)]
    Held { until: LogTime },
}
