//! Commands as log entries hold them. Each body has its number for ever.

use warren_proto::ids::{Epoch, ReplicaId};
use warren_proto::v1 as pb;
use warren_proto::v1::stored_caller::Role as WireRole;
use warren_proto::v1::stored_command::Body as WireBody;
use warren_proto::v1::stored_create_sandbox::Decision as WireDecision;
use warren_proto::v1::stored_observed::Phase as WirePhase;

use super::part::{self, array, digest_set, digests, text, u128_bytes, u128_of};
use super::{CodecError, require};
use crate::state::command::{Body, Caller, Command, Decision, LedgerId, LogTime, Observation, Observed, Phase, Role};

impl From<&Command> for pb::StoredCommand {
    fn from(from: &Command) -> Self {
        Self { caller: Some((&from.caller).into()), time_ms: from.time.0, body: Some((&from.body).into()) }
    }
}

impl TryFrom<pb::StoredCommand> for Command {
    type Error = CodecError;
    fn try_from(from: pb::StoredCommand) -> Result<Self, CodecError> {
        Ok(Self {
            caller: require(from.caller, "command.caller")?.try_into()?,
            time: LogTime(from.time_ms),
            body: require(from.body, "command.body")?.try_into()?,
        })
    }
}

impl From<&Caller> for pb::StoredCaller {
    fn from(from: &Caller) -> Self {
        let role = match from.role {
            Role::System => WireRole::System,
            Role::Node => WireRole::Node,
            Role::Operator => WireRole::Operator,
            Role::Tenant => WireRole::Tenant,
        };
        Self { principal: from.principal.clone(), role: role.into(), tenant: text(from.tenant.as_ref()) }
    }
}

impl TryFrom<pb::StoredCaller> for Caller {
    type Error = CodecError;
    fn try_from(from: pb::StoredCaller) -> Result<Self, CodecError> {
        let role = match from.role() {
            WireRole::System => Role::System,
            WireRole::Node => Role::Node,
            WireRole::Operator => Role::Operator,
            WireRole::Tenant => Role::Tenant,
            WireRole::Unspecified => return Err(CodecError::Missing { field: "caller.role" }),
        };
        let tenant = part::optional(&from.tenant, part::tenant, "caller.tenant")?;
        Ok(Self { principal: from.principal, role, tenant })
    }
}

impl From<&Body> for WireBody {
    fn from(from: &Body) -> Self {
        match from {
            Body::OpenLedger { ledger_id } => {
                Self::OpenLedger(pb::StoredOpenLedger { ledger_id: u128_bytes(ledger_id.0) })
            }
            Body::AdvanceTime { samples } => {
                Self::AdvanceTime(pb::StoredAdvanceTime { samples_ms: samples.iter().map(|time| time.0).collect() })
            }
            Body::PutReplica { replica, api_address, token_key } => Self::PutReplica(pb::StoredPutReplica {
                replica_id: replica.0,
                api_address: api_address.clone(),
                token_key: token_key.to_vec(),
                ..Default::default()
            }),
            Body::RegisterNode { node, report } => {
                Self::RegisterNode(pb::StoredRegisterNode { node: node.to_string(), report: Some(report.into()) })
            }
            Body::SetNodeReachable { node, incarnation, reachable } => {
                Self::SetNodeReachable(pb::StoredSetNodeReachable {
                    node: node.to_string(),
                    incarnation: u128_bytes(*incarnation),
                    reachable: *reachable,
                })
            }
            Body::Observe { node, incarnation, observation } => Self::Observe(pb::StoredObserve {
                node: node.to_string(),
                incarnation: u128_bytes(*incarnation),
                sandboxes: observation.sandboxes.iter().map(Into::into).collect(),
                template_digests: digests(&observation.templates),
            }),
            Body::CreateTemplate { template, spec, request } => Self::CreateTemplate(pb::StoredCreateTemplate {
                template: template.to_string(),
                spec: Some(spec.into()),
                request: request.as_ref().map(Into::into),
            }),
            Body::DeleteTemplate { template } => {
                Self::DeleteTemplate(pb::StoredDeleteTemplate { template: template.to_string() })
            }
            Body::CreateSandbox { sandbox, spec, decision, request } => Self::CreateSandbox(pb::StoredCreateSandbox {
                sandbox: sandbox.to_string(),
                spec: Some(spec.into()),
                decision: Some(decision.into()),
                request: request.as_ref().map(Into::into),
            }),
            Body::PlaceSandbox { sandbox, epoch, node } => Self::PlaceSandbox(pb::StoredPlaceSandbox {
                sandbox: sandbox.to_string(),
                epoch: epoch.0,
                node: node.to_string(),
            }),
            Body::ExplainPending { sandbox, epoch, reason } => Self::ExplainPending(pb::StoredExplainPending {
                sandbox: sandbox.to_string(),
                epoch: epoch.0,
                reason: Some(reason.into()),
            }),
            Body::DeleteSandbox { sandbox, request } => Self::DeleteSandbox(pb::StoredDeleteSandbox {
                sandbox: sandbox.to_string(),
                request: request.as_ref().map(Into::into),
            }),
            Body::ForgetEnded { sandboxes } => Self::ForgetEnded(pb::StoredForgetEnded {
                sandboxes: sandboxes.iter().map(ToString::to_string).collect(),
            }),
        }
    }
}

impl TryFrom<WireBody> for Body {
    type Error = CodecError;
    fn try_from(from: WireBody) -> Result<Self, CodecError> {
        Ok(match from {
            WireBody::OpenLedger(body) => {
                Self::OpenLedger { ledger_id: LedgerId(u128_of(&body.ledger_id, "ledger_id")?) }
            }
            WireBody::AdvanceTime(body) => {
                Self::AdvanceTime { samples: body.samples_ms.into_iter().map(LogTime).collect() }
            }
            WireBody::PutReplica(body) => Self::PutReplica {
                replica: ReplicaId(body.replica_id),
                api_address: body.api_address,
                token_key: array(&body.token_key, "token_key")?,
            },
            WireBody::RegisterNode(body) => Self::RegisterNode {
                node: part::node(&body.node, "node")?,
                report: require(body.report, "report")?.try_into()?,
            },
            WireBody::SetNodeReachable(body) => Self::SetNodeReachable {
                node: part::node(&body.node, "node")?,
                incarnation: u128_of(&body.incarnation, "incarnation")?,
                reachable: body.reachable,
            },
            WireBody::Observe(body) => observe(body)?,
            WireBody::CreateTemplate(body) => Self::CreateTemplate {
                template: part::template(&body.template, "template")?,
                spec: require(body.spec, "spec")?.try_into()?,
                request: part::request(body.request)?,
            },
            WireBody::DeleteTemplate(body) => {
                Self::DeleteTemplate { template: part::template(&body.template, "template")? }
            }
            WireBody::CreateSandbox(body) => Self::CreateSandbox {
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                spec: require(body.spec, "spec")?.try_into()?,
                decision: require(body.decision, "decision")?.try_into()?,
                request: part::request(body.request)?,
            },
            WireBody::PlaceSandbox(body) => Self::PlaceSandbox {
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                epoch: Epoch(body.epoch),
                node: part::node(&body.node, "node")?,
            },
            WireBody::ExplainPending(body) => Self::ExplainPending {
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                epoch: Epoch(body.epoch),
                reason: require(body.reason, "reason")?.try_into()?,
            },
            WireBody::DeleteSandbox(body) => Self::DeleteSandbox {
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                request: part::request(body.request)?,
            },
            WireBody::SetLevel(_)
            | WireBody::SetNodeCondition(_)
            | WireBody::SetNodePolicy(_)
            | WireBody::ForgetNode(_)
            | WireBody::StopOrphan(_)
            | WireBody::RequeueSandbox(_)
            | WireBody::UpdateSandbox(_)
            | WireBody::CreateBatch(_)
            | WireBody::SetQuota(_)
            | WireBody::SetPause(_)
            | WireBody::ReleaseBrake(_)
            | WireBody::EndDue(_) => return Err(CodecError::Missing { field: "command.body" }),
            WireBody::ForgetEnded(body) => Self::ForgetEnded {
                sandboxes: body
                    .sandboxes
                    .iter()
                    .map(|name| part::sandbox(name, "sandboxes"))
                    .collect::<Result<_, _>>()?,
            },
        })
    }
}

fn observe(body: pb::StoredObserve) -> Result<Body, CodecError> {
    Ok(Body::Observe {
        node: part::node(&body.node, "node")?,
        incarnation: u128_of(&body.incarnation, "incarnation")?,
        observation: Observation {
            sandboxes: body.sandboxes.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            templates: digest_set(&body.template_digests)?,
        },
    })
}

impl From<&Decision> for WireDecision {
    fn from(from: &Decision) -> Self {
        match from {
            Decision::Place(node) => Self::Place(node.to_string()),
            Decision::Queue(reason) => Self::Queue(reason.into()),
        }
    }
}

impl TryFrom<WireDecision> for Decision {
    type Error = CodecError;
    fn try_from(from: WireDecision) -> Result<Self, CodecError> {
        Ok(match from {
            WireDecision::Place(node) => Self::Place(part::node(&node, "decision.place")?),
            WireDecision::Queue(reason) => Self::Queue(reason.try_into()?),
        })
    }
}

impl From<&Observed> for pb::StoredObserved {
    fn from(from: &Observed) -> Self {
        let phase = match &from.phase {
            Phase::Starting => WirePhase::Starting(pb::StoredBlank {}),
            Phase::Running => WirePhase::Running(pb::StoredBlank {}),
            Phase::Removed => WirePhase::Removed(pb::StoredBlank {}),
            Phase::Orphan => WirePhase::Orphan(pb::StoredBlank {}),
            Phase::Exited { exit, output_tail } => {
                WirePhase::Exited(pb::StoredExited { exit: Some((*exit).into()), output_tail: output_tail.clone() })
            }
            Phase::Failed { code, message } => {
                WirePhase::Failed(pb::StoredFailure { code: code.clone(), message: message.clone() })
            }
        };
        Self { sandbox: from.sandbox.to_string(), epoch: from.epoch.0, phase: Some(phase) }
    }
}

impl TryFrom<pb::StoredObserved> for Observed {
    type Error = CodecError;
    fn try_from(from: pb::StoredObserved) -> Result<Self, CodecError> {
        let phase = match require(from.phase, "observed.phase")? {
            WirePhase::Starting(_) => Phase::Starting,
            WirePhase::Running(_) => Phase::Running,
            WirePhase::Removed(_) => Phase::Removed,
            WirePhase::Orphan(_) => Phase::Orphan,
            WirePhase::Exited(ended) => Phase::Exited { exit: part::exit(ended.exit), output_tail: ended.output_tail },
            WirePhase::Failed(failure) => Phase::Failed { code: failure.code, message: failure.message },
        };
        Ok(Self { sandbox: part::sandbox(&from.sandbox, "observed.sandbox")?, epoch: Epoch(from.epoch), phase })
    }
}
