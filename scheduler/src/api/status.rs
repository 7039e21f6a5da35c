//! The only place that makes a `tonic::Status`: what went wrong, in a code, a reason and words, with what a client needs to
//! decide whether to retry, fix or give up.

use std::time::Duration;

use tonic::{Code, Status};
use warren_proto::error::ErrorBuilder;
use warren_proto::ids::{NodeId, ReplicaId, SandboxName, TenantId};
use warren_proto::v1::{ErrorReason, ItemError};

use crate::controller::ControlError;
use crate::raft::{LeaderInfo, MembershipError, ProposeError};
use crate::state::outcome::Rejected;

/// When a retry is worth it after a failover: about an election.
pub const RETRY_AFTER_ELECTION: Duration = Duration::from_millis(250);

/// When a retry is worth it after an overload or a conflict.
const RETRY_SOON: Duration = Duration::from_millis(50);

/// When a retry is worth it while an operator has paused something, or must act.
const RETRY_AFTER_PAUSE: Duration = Duration::from_secs(5);

fn error(code: Code, reason: ErrorReason, message: impl ToString) -> ErrorBuilder {
    ErrorBuilder::new(code, reason, message.to_string())
}

pub fn invalid_field(field: &str, message: impl Into<String>) -> Status {
    ErrorBuilder::invalid_field(field, message).build()
}

pub fn invalid_page_token() -> Status {
    let message = "page_token: not one that this request's earlier page gave; begin again without it";
    error(Code::InvalidArgument, ErrorReason::InvalidPageToken, message).build()
}

pub fn control(failure: ControlError) -> Status {
    match failure {
        ControlError::Rejected(rejection) => rejected(&rejection),
        ControlError::Propose(failure) => propose(&failure),
        ControlError::GoingDown(node) => {
            error(Code::Unavailable, ErrorReason::NodeState, format!("node {node} is being declared down; try again"))
                .with("node", &node)
                .with("state", "SUSPECT")
                .retry_after(RETRY_SOON)
                .build()
        }
    }
}

pub fn propose(failure: &ProposeError) -> Status {
    match failure {
        ProposeError::NotLeader { .. } => no_leader(),
        ProposeError::OutcomeUnknown => outcome_unknown(),
        ProposeError::Overloaded => error(Code::ResourceExhausted, ErrorReason::Overloaded, failure)
            .with("table", "proposals")
            .retry_after(RETRY_SOON)
            .build(),
        ProposeError::TooLarge { limit, .. } => {
            error(Code::InvalidArgument, ErrorReason::InvalidField, failure).with("limit_bytes", limit).build()
        }
        ProposeError::Stopped => {
            error(Code::Unavailable, ErrorReason::NoLeader, failure).retry_after(RETRY_AFTER_ELECTION).build()
        }
    }
}

/// Nothing was done.
pub fn no_leader() -> Status {
    let message = "no leader is known now: nothing was done; retry";
    error(Code::Unavailable, ErrorReason::NoLeader, message).retry_after(RETRY_AFTER_ELECTION).build()
}

/// It may or may not have been done.
pub fn outcome_unknown() -> Status {
    let message = "leadership was lost meanwhile: it may or may not take effect; retry with the same request_id";
    error(Code::Unknown, ErrorReason::OutcomeUnknown, message).retry_after(RETRY_AFTER_ELECTION).build()
}

/// To agents: who leads instead.
pub fn not_leader(leader: Option<&LeaderInfo>) -> Status {
    let refusal = error(Code::Unavailable, ErrorReason::NotLeader, "this replica does not lead");
    match leader {
        Some(leader) => refusal.with("leader", &leader.api_address).build(),
        None => refusal.retry_after(RETRY_AFTER_ELECTION).build(),
    }
}

pub fn session_superseded(node: &NodeId) -> Status {
    let message = format!("a newer session of {node} took over");
    error(Code::Aborted, ErrorReason::SessionSuperseded, message).with("node", node).build()
}

pub fn ledger_mismatch(ours: &str, theirs: &str) -> Status {
    let message = format!("this is ledger {ours}, the agent belongs to ledger {theirs}");
    error(Code::FailedPrecondition, ErrorReason::LedgerMismatch, message).with("ledger_id", ours).build()
}

pub fn permission_denied(message: &str) -> Status {
    error(Code::PermissionDenied, ErrorReason::PermissionDenied, message).build()
}

pub fn sandbox_not_found(name: &SandboxName) -> Status {
    let message = format!("there is no {name}");
    error(Code::NotFound, ErrorReason::SandboxNotFound, message).with("sandbox", name).build()
}

pub fn template_not_found(name: impl ToString) -> Status {
    let message = format!("there is no templates/{}", name.to_string());
    error(Code::NotFound, ErrorReason::TemplateNotFound, message).with("template", name).build()
}

pub fn node_not_found(node: &NodeId) -> Status {
    let message = format!("there is no nodes/{node}");
    error(Code::NotFound, ErrorReason::NodeNotFound, message).with("node", node).build()
}

/// `soon`: the state will change by itself.
pub fn sandbox_state(name: &SandboxName, state: &str, soon: bool) -> Status {
    let message = format!("{name} is {state}, not RUNNING");
    let refusal =
        error(Code::FailedPrecondition, ErrorReason::SandboxState, message).with("sandbox", name).with("state", state);
    if soon { refusal.retry_after(RETRY_AFTER_ELECTION).build() } else { refusal.build() }
}

pub fn node_unreachable(name: &SandboxName, node: &NodeId) -> Status {
    let message = format!("{name} runs on node {node}, which has not renewed its lease");
    error(Code::Unavailable, ErrorReason::NodeUnreachable, message)
        .with("sandbox", name)
        .with("node", node)
        .retry_after(Duration::from_secs(1))
        .build()
}

pub fn compacted(message: impl ToString) -> Status {
    error(Code::OutOfRange, ErrorReason::Compacted, message).build()
}

pub fn no_node_available() -> Status {
    let message = "no node is reachable now: start a node agent, or wait for one to come back";
    error(Code::Unavailable, ErrorReason::NoNodeAvailable, message).retry_after(Duration::from_secs(1)).build()
}

pub fn bytes_not_held(digest: impl ToString) -> Status {
    let digest = digest.to_string();
    let message = format!("no reachable node holds {digest}: upload it first (BeginTemplateUpload)");
    error(Code::FailedPrecondition, ErrorReason::TemplateNotFound, message).with("digest", digest).build()
}

fn rejected(rejection: &Rejected) -> Status {
    use Code::{Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted};
    let because = |code, reason| error(code, reason, rejection);
    match rejection {
        Rejected::SandboxExists(name) => {
            because(AlreadyExists, ErrorReason::SandboxAlreadyExists).with("sandbox", name).build()
        }
        Rejected::SandboxNotFound(name) => {
            because(NotFound, ErrorReason::SandboxNotFound).with("sandbox", name).build()
        }
        Rejected::NodeNotFound(node) => because(NotFound, ErrorReason::NodeNotFound).with("node", node).build(),
        Rejected::TemplateNotFound(id) => because(NotFound, ErrorReason::TemplateNotFound).with("template", id).build(),
        Rejected::TemplateExists(id) => {
            because(AlreadyExists, ErrorReason::TemplateAlreadyExists).with("template", id).build()
        }
        Rejected::TemplateInUse { template, sandboxes } => because(FailedPrecondition, ErrorReason::TemplateInUse)
            .with("template", template)
            .with("sandboxes", sandboxes)
            .build(),
        Rejected::RequestIdReused => because(InvalidArgument, ErrorReason::RequestIdReused).build(),
        Rejected::RequestIdExpired => because(FailedPrecondition, ErrorReason::RequestIdExpired).build(),
        Rejected::RequestIdFromFuture { .. } => because(InvalidArgument, ErrorReason::InvalidField).build(),
        Rejected::RequestTableFull => {
            because(ResourceExhausted, ErrorReason::RequestTableFull).retry_after(Duration::from_secs(5)).build()
        }
        Rejected::LimitReached { what, limit } => {
            because(ResourceExhausted, ErrorReason::Overloaded).with("table", what).with("limit", limit).build()
        }
        Rejected::WrongState { sandbox, state } => {
            because(FailedPrecondition, ErrorReason::SandboxState).with("sandbox", sandbox).with("state", state).build()
        }
        Rejected::StaleIncarnation(node) => because(Aborted, ErrorReason::SessionSuperseded).with("node", node).build(),
        other => rejected_by_rule(other),
    }
}

/// Rejections that levels, quotas, pauses and conditions lead to.
fn rejected_by_rule(rejection: &Rejected) -> Status {
    use Code::{Aborted, FailedPrecondition, NotFound, ResourceExhausted, Unavailable};
    let because = |code, reason| error(code, reason, rejection);
    match rejection {
        Rejected::QuotaExceeded { dimension, used, limit } => because(ResourceExhausted, ErrorReason::QuotaExceeded)
            .with("dimension", dimension)
            .with("used", used)
            .with("limit", limit)
            .build(),
        Rejected::CreateRate { retry_after_ms, .. } => because(ResourceExhausted, ErrorReason::CreateRateExceeded)
            .retry_after(Duration::from_millis(*retry_after_ms))
            .build(),
        Rejected::Paused(what) => {
            because(Unavailable, ErrorReason::Paused).with("what", what).retry_after(RETRY_AFTER_PAUSE).build()
        }
        Rejected::Changed { revision, .. } => {
            because(Aborted, ErrorReason::EtagMismatch).with("etag", revision).build()
        }
        Rejected::Batch { item, reason } => {
            let inner = rejected(reason);
            let reason =
                warren_proto::error::reason_of(&inner).map(warren_proto::error::reason_text).unwrap_or_default();
            because(Aborted, ErrorReason::BatchRejected).with("item", item).with("item_reason", reason).build()
        }
        Rejected::NodeCondition { node, condition } => {
            because(FailedPrecondition, ErrorReason::NodeState).with("node", node).with("state", condition).build()
        }
        Rejected::OrphanNotFound { node, .. } => {
            because(NotFound, ErrorReason::OrphanNotFound).with("node", node).build()
        }
        Rejected::LevelTooLow { level, needed } => {
            because(FailedPrecondition, ErrorReason::LevelTooLow).with("level", level).with("needed", needed).build()
        }
        Rejected::LevelNotSupported { level, wanted, .. } => {
            because(FailedPrecondition, ErrorReason::LevelTooLow).with("level", level).with("needed", wanted).build()
        }
        Rejected::TimeStep { .. } | Rejected::TooFewClocks { .. } | Rejected::Held { .. } => {
            because(Unavailable, ErrorReason::ClockStep).retry_after(RETRY_AFTER_ELECTION).build()
        }
        Rejected::ReplicaDisk(id) => because(FailedPrecondition, ErrorReason::Membership).with("replica", id).build(),
        _ => because(Aborted, ErrorReason::Conflict).retry_after(RETRY_SOON).build(),
    }
}

/// Why a change of the group was not made.
pub fn membership(failure: &MembershipError) -> Status {
    match failure {
        MembershipError::Propose(failure) => propose(failure),
        MembershipError::NotMember(id) => {
            error(Code::NotFound, ErrorReason::ReplicaNotFound, failure).with("replica", id).build()
        }
        MembershipError::NotTaken(_) | MembershipError::NotTakenOut { .. } | MembershipError::Refused(_) => {
            error(Code::Unavailable, ErrorReason::Membership, failure).retry_after(RETRY_AFTER_ELECTION).build()
        }
        other => error(Code::FailedPrecondition, ErrorReason::Membership, other).build(),
    }
}

pub fn tenant_not_found(id: &TenantId) -> Status {
    let message = format!("there is no tenants/{id}: it has no sandbox and no quota");
    error(Code::NotFound, ErrorReason::TenantNotFound, message).with("tenant", id).build()
}

/// This replica has not applied what the caller wants to read after.
pub fn revision_not_reached(wanted: u64, applied: u64) -> Status {
    let message = format!("this replica has applied up to revision {applied}, not {wanted} yet");
    error(Code::Unavailable, ErrorReason::RevisionNotReached, message)
        .with("revision", applied)
        .retry_after(RETRY_SOON)
        .build()
}

pub fn secrets_unavailable() -> Status {
    let message = "secret_environment: the schedulers have no key to seal it with: start them with --secrets-key-file";
    error(Code::FailedPrecondition, ErrorReason::SecretsUnavailable, message).build()
}

pub fn disk_full(replica: ReplicaId, used_percent: u64) -> Status {
    let message =
        format!("the disk of replica {replica} is {used_percent} % full: creates are refused, deletes are accepted");
    error(Code::ResourceExhausted, ErrorReason::DiskFull, message)
        .with("replica", replica)
        .retry_after(RETRY_AFTER_PAUSE)
        .build()
}

/// Too much of one tenant is under way here.
pub fn tenant_overloaded(what: &str, tenant: &TenantId, limit: usize) -> Status {
    let message = format!(
        "{what}: {limit} of tenants/{tenant} are under way here, as many as one tenant may have at once; retry"
    );
    error(Code::ResourceExhausted, ErrorReason::Overloaded, message)
        .with("table", what)
        .with("tenant", tenant)
        .with("limit", limit)
        .retry_after(RETRY_SOON)
        .build()
}

/// Too much is under way here.
pub fn replica_overloaded(what: &str, limit: usize) -> Status {
    let message =
        format!("{what}: {limit} are under way here, as many as a replica takes at once; retry, or ask another");
    error(Code::ResourceExhausted, ErrorReason::Overloaded, message)
        .with("table", what)
        .with("limit", limit)
        .retry_after(RETRY_SOON)
        .build()
}

pub fn internal(message: impl ToString) -> Status {
    error(Code::Internal, ErrorReason::Internal, message).build()
}

/// What the error of a single call would have said, for one item of a batch.
pub fn item(status: &Status) -> ItemError {
    let reason = warren_proto::error::reason_of(status).map(warren_proto::error::reason_text);
    let delay = warren_proto::error::retry_after_of(status);
    ItemError {
        code: status.code().into(),
        message: status.message().to_owned(),
        reason: reason.unwrap_or_default().to_owned(),
        retry_delay: delay.and_then(|delay| delay.try_into().ok()),
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::error::{metadata_of, reason_of, retry_after_of};
    use warren_proto::ids::{Epoch, TemplateId};

    use super::*;
    use crate::state::command::LogTime;
    use crate::state::level::Level;

    fn sandbox() -> SandboxName {
        SandboxName::parse("tenants/t/sandboxes/s").unwrap()
    }

    /// Each rejection with the code and the reason that clients decide by.
    fn rejections() -> Vec<(Rejected, Code, ErrorReason)> {
        use Code::{
            Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable,
        };
        use ErrorReason as R;
        let (node, template) = (NodeId::parse("n").unwrap(), TemplateId::parse("t").unwrap());
        let full = Box::new(Rejected::RequestTableFull);
        vec![
            (Rejected::LedgerOpen, Aborted, R::Conflict),
            (Rejected::SandboxExists(sandbox()), AlreadyExists, R::SandboxAlreadyExists),
            (Rejected::SandboxNotFound(sandbox()), NotFound, R::SandboxNotFound),
            (Rejected::NodeNotFound(node.clone()), NotFound, R::NodeNotFound),
            (Rejected::TemplateNotFound(template.clone()), NotFound, R::TemplateNotFound),
            (Rejected::TemplateExists(template.clone()), AlreadyExists, R::TemplateAlreadyExists),
            (Rejected::TemplateInUse { template, sandboxes: 1 }, FailedPrecondition, R::TemplateInUse),
            (Rejected::StaleEpoch { sandbox: sandbox(), seen: Epoch(2), got: Epoch(1) }, Aborted, R::Conflict),
            (Rejected::StaleIncarnation(node.clone()), Aborted, R::SessionSuperseded),
            (Rejected::WrongState { sandbox: sandbox(), state: "PENDING" }, FailedPrecondition, R::SandboxState),
            (Rejected::DoesNotFit { sandbox: sandbox(), node: node.clone() }, Aborted, R::Conflict),
            (Rejected::RequestIdReused, InvalidArgument, R::RequestIdReused),
            (Rejected::RequestIdExpired, FailedPrecondition, R::RequestIdExpired),
            (Rejected::RequestIdFromFuture { ahead_ms: 1 }, InvalidArgument, R::InvalidField),
            (Rejected::RequestTableFull, ResourceExhausted, R::RequestTableFull),
            (Rejected::LimitReached { what: "a table", limit: 1 }, ResourceExhausted, R::Overloaded),
            (Rejected::LevelTooLow { level: Level::FIRST, needed: Level::SECOND }, FailedPrecondition, R::LevelTooLow),
            (Rejected::TimeStep { by_ms: 61_000 }, Unavailable, R::ClockStep),
            (Rejected::TooFewClocks { samples: 1, voters: 3 }, Unavailable, R::ClockStep),
            (Rejected::ReplicaDisk(ReplicaId(1)), FailedPrecondition, R::Membership),
            (Rejected::QuotaExceeded { dimension: "CPU", used: 1, limit: 1 }, ResourceExhausted, R::QuotaExceeded),
            (Rejected::CreateRate { per_minute: 1, retry_after_ms: 9 }, ResourceExhausted, R::CreateRateExceeded),
            (Rejected::Paused("creates"), Unavailable, R::Paused),
            (Rejected::Changed { sandbox: sandbox(), revision: 1 }, Aborted, R::EtagMismatch),
            (Rejected::Batch { item: 1, reason: full }, Aborted, R::BatchRejected),
            (Rejected::NodeCondition { node: node.clone(), condition: "READY" }, FailedPrecondition, R::NodeState),
            (Rejected::OrphanNotFound { node, sandbox: sandbox(), epoch: Epoch(1) }, NotFound, R::OrphanNotFound),
            (Rejected::Held { until: LogTime(1) }, Unavailable, R::ClockStep),
        ]
    }

    #[test]
    fn every_rejection_says_what_a_client_needs_to_decide() {
        for (rejection, code, reason) in rejections() {
            let status = rejected(&rejection);
            assert_eq!((status.code(), reason_of(&status)), (code, Some(reason)), "{rejection:?}");
            assert_eq!(status.message(), rejection.to_string());
            if code == Code::Unavailable || reason == ErrorReason::Conflict {
                assert!(retry_after_of(&status).is_some(), "{rejection:?} may be tried again: when?");
            }
        }
        let batch = rejected(&Rejected::Batch { item: 1, reason: Box::new(Rejected::RequestIdReused) });
        assert_eq!(metadata_of(&batch, "item_reason").as_deref(), Some("REQUEST_ID_REUSED"));
    }

    #[test]
    fn a_bug_or_a_broken_disk_is_internal() {
        let status = internal("the disk is on fire");
        assert_eq!((status.code(), reason_of(&status)), (Code::Internal, Some(ErrorReason::Internal)));
    }
}
