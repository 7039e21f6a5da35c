//! Commands as log entries hold them. Each body has its number for ever.

use std::sync::Arc;

use prost::Message;
use warren_proto::ids::{Epoch, ReplicaId, SandboxName};
use warren_proto::v1 as pb;
use warren_proto::v1::stored_batch_item::Decision as WireItemDecision;
use warren_proto::v1::stored_caller::Role as WireRole;
use warren_proto::v1::stored_command::Body as WireBody;
use warren_proto::v1::stored_create_sandbox::Decision as WireDecision;
use warren_proto::v1::stored_observed::Phase as WirePhase;

use super::part::{self, array, digest_set, digests, text, u128_bytes, u128_of};
use super::region;
use super::settings::{settings, settings_to};
use super::{CodecError, require};
use crate::state::command::{
    BatchItem, Body, Caller, Change, Command, Decision, LedgerId, LogTime, Observation, Observed, Phase, ReplicaRecord,
    RequestKey, Role, Spot,
};
use crate::state::level::Level;
use crate::state::sandbox::{PendingReason, SandboxSpec};
use crate::state::settings::Settings;

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

/// A command, written and read back: for simulations.
pub fn stored_and_read(command: &Command) -> Result<Command, CodecError> {
    let bytes = pb::StoredCommand::from(command).encode_to_vec();
    pb::StoredCommand::decode(bytes.as_slice())?.try_into()
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
            Body::PutReplica { replica, record } => Self::PutReplica(put_replica_to(*replica, record)),
            Body::SetLevel { level } => Self::SetLevel(pb::StoredSetLevel { level: level.0 }),
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
                template_digests: observation.templates.as_ref().map(digests).unwrap_or_default(),
                templates_unchanged: observation.templates.is_none(),
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
                spec: Some(spec.as_ref().into()),
                decision: Some(decision.into()),
                gpus: gpus_of(decision),
                request: request.as_ref().map(Into::into),
            }),
            Body::PlaceSandbox { sandbox, epoch, spot } => Self::PlaceSandbox(pb::StoredPlaceSandbox {
                sandbox: sandbox.to_string(),
                epoch: epoch.0,
                node: spot.node.to_string(),
                gpus: part::gpu_holds_to(&spot.gpus),
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
            Body::EndDue { sandboxes } => {
                Self::EndDue(pb::StoredEndDue { sandboxes: sandboxes.iter().map(ToString::to_string).collect() })
            }
            other => of_second_level(other),
        }
    }
}

/// The bodies of level 2.
fn of_second_level(from: &Body) -> WireBody {
    match from {
        Body::SetNodeCondition { node, incarnation, to } => WireBody::SetNodeCondition(pb::StoredSetNodeCondition {
            node: node.to_string(),
            incarnation: u128_bytes(*incarnation),
            condition: super::entity::condition_to(*to).into(),
        }),
        Body::SetNodePolicy { node, cordoned, set_labels, remove_labels } => {
            WireBody::SetNodePolicy(pb::StoredSetNodePolicy {
                node: node.to_string(),
                cordoned: *cordoned,
                set_labels: part::pairs(set_labels),
                remove_labels: remove_labels.iter().cloned().collect(),
            })
        }
        Body::ForgetNode { node } => WireBody::ForgetNode(pb::StoredForgetNode { node: node.to_string() }),
        Body::StopOrphan { node, sandbox, epoch } => WireBody::StopOrphan(pb::StoredStopOrphan {
            node: node.to_string(),
            sandbox: sandbox.to_string(),
            epoch: epoch.0,
        }),
        Body::RequeueSandbox { sandbox, epoch } => {
            WireBody::RequeueSandbox(pb::StoredRequeueSandbox { sandbox: sandbox.to_string(), epoch: epoch.0 })
        }
        Body::UpdateSandbox { sandbox, change, if_revision, request } => {
            WireBody::UpdateSandbox(update_to(sandbox, change, *if_revision, request.as_ref()))
        }
        Body::CreateBatch { items, request } => WireBody::CreateBatch(create_batch_to(items, request.as_ref())),
        Body::SetQuota { tenant, quota } => WireBody::SetQuota(pb::StoredSetQuota {
            tenant: text(tenant.as_ref()),
            quota: quota.as_ref().map(region::quota_to),
        }),
        Body::SetPause { creates, placement, moves } => {
            WireBody::SetPause(pb::StoredSetPause { creates: *creates, placement: *placement, moves: *moves })
        }
        _ => WireBody::ReleaseBrake(pb::StoredBlank {}),
    }
}

pub fn put_replica_to(replica: ReplicaId, record: &ReplicaRecord) -> pb::StoredPutReplica {
    pb::StoredPutReplica {
        replica_id: replica.0,
        api_address: record.api_address.clone(),
        token_key: record.token_key.to_vec(),
        disk_id: disk_to(record.disk),
        max_level: level_to(record.max_level),
    }
}

/// The first is absent: builds that knew no other did not write it.
pub fn level_to(level: Level) -> u32 {
    if level <= Level::FIRST { 0 } else { level.0 }
}

pub fn level(stored: u32) -> Level {
    Level(stored.max(Level::FIRST.0))
}

/// Absent where it is not told.
pub fn disk_to(disk: u128) -> Vec<u8> {
    if disk == 0 { Vec::new() } else { u128_bytes(disk) }
}

pub fn disk(bytes: &[u8]) -> Result<u128, CodecError> {
    if bytes.is_empty() { Ok(0) } else { u128_of(bytes, "disk_id") }
}

fn update_to(
    sandbox: &SandboxName,
    change: &Change,
    if_revision: Option<u64>,
    request: Option<&RequestKey>,
) -> pb::StoredUpdateSandbox {
    let Change { labels, annotations, expiry, egress, priority } = change.clone();
    pb::StoredUpdateSandbox {
        sandbox: sandbox.to_string(),
        labels: labels.is_some(),
        annotations: annotations.is_some(),
        expiry: expiry.is_some(),
        egress: egress.is_some(),
        priority: priority.is_some(),
        settings: Some(settings_to(&Settings {
            labels: labels.unwrap_or_default(),
            annotations: annotations.unwrap_or_default(),
            expiry: expiry.unwrap_or_default(),
            egress: egress.unwrap_or_default(),
            priority: priority.unwrap_or_default(),
        })),
        if_revision,
        request: request.map(Into::into),
    }
}

fn update(body: pb::StoredUpdateSandbox) -> Result<Body, CodecError> {
    let new = settings(require(body.settings, "settings")?)?;
    Ok(Body::UpdateSandbox {
        sandbox: part::sandbox(&body.sandbox, "sandbox")?,
        change: Change::of(new, body.labels, body.annotations, body.expiry, body.egress, body.priority),
        if_revision: body.if_revision,
        request: part::request(body.request)?,
    })
}

/// Equal specs stand there once.
/// A command is one entry of the log, which is bounded: what items have in common is written once, so that 1,000 fit.
fn create_batch_to(items: &[BatchItem], request: Option<&RequestKey>) -> pb::StoredCreateBatch {
    let tenant = items.first().map(|item| &item.sandbox.tenant);
    let (mut specs, mut nodes, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
    let mut wire = Vec::with_capacity(items.len());
    for BatchItem { sandbox, spec, decision } in items {
        let gpus = gpus_of(decision);
        let decision = match decision {
            Decision::Place(spot) => WireItemDecision::PlaceAt(place_of(&mut nodes, &spot.node)),
            Decision::Queue(reason) => WireItemDecision::QueueAt(place_of(&mut reasons, reason)),
        };
        let own = Some(&sandbox.tenant) == tenant;
        let sandbox = if own { sandbox.id.to_string() } else { sandbox.to_string() };
        let spec = place_of(&mut specs, spec);
        wire.push(pb::StoredBatchItem { sandbox, spec, decision: Some(decision), gpus });
    }
    pb::StoredCreateBatch {
        specs: specs.into_iter().map(|spec| spec.as_ref().into()).collect(),
        items: wire,
        request: request.map(Into::into),
        nodes: nodes.into_iter().map(ToString::to_string).collect(),
        reasons: reasons.into_iter().map(Into::into).collect(),
        tenant: text(tenant),
    }
}

/// Where `value` stands among those seen; it is appended where it is new. The last ones are the likeliest.
fn place_of<'a, T: PartialEq>(seen: &mut Vec<&'a T>, value: &'a T) -> u32 {
    let known = seen.iter().rposition(|known| std::ptr::eq(*known, value) || *known == value);
    let place = known.unwrap_or_else(|| {
        seen.push(value);
        seen.len() - 1
    });
    u32::try_from(place).unwrap_or(u32::MAX)
}

fn create_batch(body: pb::StoredCreateBatch) -> Result<Body, CodecError> {
    let specs = body
        .specs
        .into_iter()
        .map(|spec| Ok(Arc::<SandboxSpec>::new(spec.try_into()?)))
        .collect::<Result<Vec<_>, CodecError>>()?;
    let nodes = body.nodes.iter().map(|node| part::node(node, "nodes")).collect::<Result<Vec<_>, _>>()?;
    let reasons =
        body.reasons.into_iter().map(TryInto::try_into).collect::<Result<Vec<PendingReason>, CodecError>>()?;
    let item = |item: pb::StoredBatchItem| {
        let spec = at(&specs, item.spec, "item.spec")?;
        let decision = match require(item.decision, "item.decision")? {
            WireItemDecision::Place(node) => Decision::Place(spot(&node, &item.gpus)?),
            WireItemDecision::Queue(reason) => Decision::Queue(reason.try_into()?),
            WireItemDecision::PlaceAt(place) => {
                Decision::Place(Spot { node: at(&nodes, place, "item.place_at")?, gpus: part::gpu_holds(&item.gpus)? })
            }
            WireItemDecision::QueueAt(place) => Decision::Queue(at(&reasons, place, "item.queue_at")?),
        };
        let sandbox = match item.sandbox.contains('/') {
            true => part::sandbox(&item.sandbox, "item.sandbox")?,
            false => part::sandbox(&format!("tenants/{}/sandboxes/{}", body.tenant, item.sandbox), "item.sandbox")?,
        };
        Ok(BatchItem { sandbox, spec, decision })
    };
    let items = body.items.into_iter().map(item).collect::<Result<_, CodecError>>()?;
    Ok(Body::CreateBatch { items, request: part::request(body.request)? })
}

fn at<T: Clone>(table: &[T], place: u32, field: &'static str) -> Result<T, CodecError> {
    let found = usize::try_from(place).ok().and_then(|place| table.get(place));
    found.cloned().ok_or(CodecError::Malformed { field })
}

fn names(names: &[String]) -> Result<Vec<SandboxName>, CodecError> {
    names.iter().map(|name| part::sandbox(name, "sandboxes")).collect()
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
            WireBody::PutReplica(body) => {
                Self::PutReplica { replica: ReplicaId(body.replica_id), record: put_replica(&body)? }
            }
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
                spec: Arc::new(require(body.spec, "spec")?.try_into()?),
                decision: decision(require(body.decision, "decision")?, &body.gpus)?,
                request: part::request(body.request)?,
            },
            WireBody::PlaceSandbox(body) => Self::PlaceSandbox {
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                epoch: Epoch(body.epoch),
                spot: spot(&body.node, &body.gpus)?,
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
            WireBody::SetLevel(body) => Self::SetLevel { level: Level(body.level) },
            WireBody::SetNodeCondition(body) => Self::SetNodeCondition {
                to: super::entity::condition(body.condition()).ok_or(CodecError::Missing { field: "condition" })?,
                node: part::node(&body.node, "node")?,
                incarnation: u128_of(&body.incarnation, "incarnation")?,
            },
            WireBody::SetNodePolicy(body) => Self::SetNodePolicy {
                node: part::node(&body.node, "node")?,
                cordoned: body.cordoned,
                set_labels: part::map(body.set_labels),
                remove_labels: body.remove_labels.into_iter().collect(),
            },
            WireBody::ForgetNode(body) => Self::ForgetNode { node: part::node(&body.node, "node")? },
            WireBody::StopOrphan(body) => Self::StopOrphan {
                node: part::node(&body.node, "node")?,
                sandbox: part::sandbox(&body.sandbox, "sandbox")?,
                epoch: Epoch(body.epoch),
            },
            WireBody::RequeueSandbox(body) => {
                Self::RequeueSandbox { sandbox: part::sandbox(&body.sandbox, "sandbox")?, epoch: Epoch(body.epoch) }
            }
            WireBody::UpdateSandbox(body) => update(body)?,
            WireBody::CreateBatch(body) => create_batch(body)?,
            WireBody::SetQuota(body) => Self::SetQuota {
                tenant: part::optional(&body.tenant, part::tenant, "tenant")?,
                quota: body.quota.map(region::quota),
            },
            WireBody::SetPause(body) => {
                Self::SetPause { creates: body.creates, placement: body.placement, moves: body.moves }
            }
            WireBody::ReleaseBrake(_) => Self::ReleaseBrake,
            WireBody::EndDue(body) => Self::EndDue { sandboxes: names(&body.sandboxes)? },
            WireBody::ForgetEnded(body) => Self::ForgetEnded { sandboxes: names(&body.sandboxes)? },
        })
    }
}

/// What a replica says of itself.
pub fn put_replica(body: &pb::StoredPutReplica) -> Result<ReplicaRecord, CodecError> {
    Ok(ReplicaRecord {
        api_address: body.api_address.clone(),
        token_key: array(&body.token_key, "token_key")?,
        disk: disk(&body.disk_id)?,
        max_level: level(body.max_level),
    })
}

fn observe(body: pb::StoredObserve) -> Result<Body, CodecError> {
    Ok(Body::Observe {
        node: part::node(&body.node, "node")?,
        incarnation: u128_of(&body.incarnation, "incarnation")?,
        observation: Observation {
            sandboxes: body.sandboxes.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            templates: if body.templates_unchanged { None } else { Some(digest_set(&body.template_digests)?) },
        },
    })
}

impl From<&Decision> for WireDecision {
    fn from(from: &Decision) -> Self {
        match from {
            Decision::Place(spot) => Self::Place(spot.node.to_string()),
            Decision::Queue(reason) => Self::Queue(reason.into()),
        }
    }
}

fn decision(from: WireDecision, gpus: &[pb::StoredGpuHold]) -> Result<Decision, CodecError> {
    Ok(match from {
        WireDecision::Place(node) => Decision::Place(spot(&node, gpus)?),
        WireDecision::Queue(reason) => Decision::Queue(reason.try_into()?),
    })
}

fn spot(node: &str, gpus: &[pb::StoredGpuHold]) -> Result<Spot, CodecError> {
    Ok(Spot { node: part::node(node, "decision.place")?, gpus: part::gpu_holds(gpus)? })
}

fn gpus_of(decision: &Decision) -> Vec<pb::StoredGpuHold> {
    match decision {
        Decision::Place(spot) => part::gpu_holds_to(&spot.gpus),
        Decision::Queue(_) => Vec::new(),
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
