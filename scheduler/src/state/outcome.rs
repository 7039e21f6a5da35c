//! What `apply` answers. A rejection is a value that says what was seen and what was asked.

use std::sync::Arc;

use warren_proto::ids::{Epoch, NodeId, SandboxName, TemplateId};

use super::sandbox::Sandbox;
use super::template::Template;

/// What a command that was accepted answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// The sandbox as the command left it.
    Sandbox(Arc<Sandbox>),
    Template(Arc<Template>),
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
}
