//! Entities as checkpoints hold them.

use std::sync::Arc;

use warren_proto::ids::{Epoch, Generation, ReplicaId, SandboxName, TenantId};
use warren_proto::v1 as pb;
use warren_proto::v1::stored_answer::Reply as WireReply;
use warren_proto::v1::stored_sandbox::Life as WireLife;

use super::part::{self, array, digest_set, digests, resources, resources_to, text, u128_bytes, u128_of};
use super::settings::{settings, settings_to};
use super::{CodecError, region, require};
use crate::state::command::{LogTime, ReplicaRecord};
use crate::state::node::{Condition, Holding, Node};
use crate::state::outcome::{Kept, Reply, Subject};
use crate::state::request::{Answer, Scope};
use crate::state::sandbox::{Ending, FailedKind, Life, Sandbox};
use crate::state::template::Template;
use crate::state::tenant::Tenant;

pub fn replica_to(id: ReplicaId, record: &ReplicaRecord) -> pb::StoredReplica {
    pb::StoredReplica {
        replica_id: id.0,
        api_address: record.api_address.clone(),
        token_key: record.token_key.to_vec(),
        disk_id: super::command::disk_to(record.disk),
        max_level: super::command::level_to(record.max_level),
    }
}

pub fn replica_from(from: pb::StoredReplica) -> Result<(ReplicaId, ReplicaRecord), CodecError> {
    let record = ReplicaRecord {
        token_key: array(&from.token_key, "token_key")?,
        disk: super::command::disk(&from.disk_id)?,
        max_level: super::command::level(from.max_level),
        api_address: from.api_address,
    };
    Ok((ReplicaId(from.replica_id), record))
}

impl From<&Node> for pb::StoredNode {
    fn from(from: &Node) -> Self {
        let orphan = |(sandbox, epoch): &(_, Epoch)| pb::StoredOrphan {
            sandbox: warren_proto::ids::SandboxName::to_string(sandbox),
            epoch: epoch.0,
        };
        Self {
            node: from.id.to_string(),
            report: Some((&from.report).into()),
            registered_ms: from.registered.0,
            reachable: from.is_ready(),
            generation: from.generation.0,
            assigned: Some(resources_to(from.assigned)),
            gpu_use: part::gpu_use_to(&from.gpu_use),
            sandboxes: from.sandboxes.iter().map(ToString::to_string).collect(),
            template_digests: digests(&from.templates),
            orphans: from.orphans.iter().map(orphan).collect(),
            revision: from.revision,
            condition: if from.is_ready() { 0 } else { condition_to(from.condition).into() },
            condition_since_ms: from.since.0,
            suspected_ms: from.suspected.0,
            cordoned: from.cordoned,
            shrunk: from.shrunk,
            labels: part::pairs(&from.labels),
            leftovers: from.leftovers.iter().map(leftover_to).collect(),
        }
    }
}

fn leftover_to(((sandbox, epoch), held): (&(SandboxName, Epoch), &Holding)) -> pb::StoredLeftover {
    pb::StoredLeftover {
        sandbox: sandbox.to_string(),
        epoch: epoch.0,
        resources: Some(resources_to(held.resources)),
        gpus: part::gpu_holds_to(&held.gpus),
    }
}

fn leftover(from: &pb::StoredLeftover) -> Result<((SandboxName, Epoch), Holding), CodecError> {
    let holding = Holding { resources: resources(from.resources)?, gpus: part::gpu_holds(&from.gpus)? };
    Ok(((part::sandbox(&from.sandbox, "leftover")?, Epoch(from.epoch)), holding))
}

pub(super) fn condition_to(from: Condition) -> pb::StoredCondition {
    match from {
        Condition::Ready => pb::StoredCondition::Ready,
        Condition::Suspect => pb::StoredCondition::Suspect,
        Condition::Down => pb::StoredCondition::Down,
    }
}

pub(super) fn condition(from: pb::StoredCondition) -> Option<Condition> {
    match from {
        pb::StoredCondition::Unspecified => None,
        pb::StoredCondition::Ready => Some(Condition::Ready),
        pb::StoredCondition::Suspect => Some(Condition::Suspect),
        pb::StoredCondition::Down => Some(Condition::Down),
    }
}

impl TryFrom<pb::StoredNode> for Node {
    type Error = CodecError;
    fn try_from(from: pb::StoredNode) -> Result<Self, CodecError> {
        let orphan =
            |o: &pb::StoredOrphan| Ok::<_, CodecError>((part::sandbox(&o.sandbox, "orphan")?, part::epoch(o.epoch)));
        // A ledger of the first level knows only whether it is heard of.
        let of_first = if from.reachable { Condition::Ready } else { Condition::Down };
        let is_in = condition(from.condition()).unwrap_or(of_first);
        Ok(Self {
            id: part::node(&from.node, "node")?,
            report: require(from.report, "node.report")?.try_into()?,
            registered: LogTime(from.registered_ms),
            condition: is_in,
            since: LogTime(from.condition_since_ms),
            suspected: LogTime(from.suspected_ms),
            cordoned: from.cordoned,
            shrunk: from.shrunk,
            leftovers: from.leftovers.iter().map(leftover).collect::<Result<_, _>>()?,
            labels: part::map(from.labels),
            generation: Generation(from.generation),
            assigned: resources(from.assigned)?,
            gpu_use: part::gpu_use(&from.gpu_use)?,
            sandboxes: from
                .sandboxes
                .iter()
                .map(|name| part::sandbox(name, "node.sandboxes"))
                .collect::<Result<_, _>>()?,
            templates: digest_set(&from.template_digests)?,
            orphans: from.orphans.iter().map(orphan).collect::<Result<_, _>>()?,
            revision: from.revision,
        })
    }
}

impl From<&Template> for pb::StoredTemplate {
    fn from(from: &Template) -> Self {
        Self {
            template: from.id.to_string(),
            spec: Some((&from.spec).into()),
            created_ms: from.created.0,
            users: from.users,
            revision: from.revision,
        }
    }
}

impl TryFrom<pb::StoredTemplate> for Template {
    type Error = CodecError;
    fn try_from(from: pb::StoredTemplate) -> Result<Self, CodecError> {
        Ok(Self {
            id: part::template(&from.template, "template")?,
            spec: require(from.spec, "template.spec")?.try_into()?,
            created: LogTime(from.created_ms),
            users: from.users,
            revision: from.revision,
        })
    }
}

/// What its sandboxes ask for is left out: whoever puts them back counts that anew.
pub fn tenant_to(id: &TenantId, tenant: &Tenant) -> pb::StoredTenant {
    let (left, at) = tenant.creates_left;
    pb::StoredTenant {
        tenant: id.to_string(),
        created_ms: tenant.created.0,
        sandboxes: tenant.sandboxes,
        quota: tenant.quota.as_ref().map(region::quota_to),
        creates_left_milli: left,
        creates_left_at_ms: at.0,
    }
}

pub fn tenant_from(from: pb::StoredTenant) -> Result<(TenantId, Tenant), CodecError> {
    let tenant = Tenant {
        created: LogTime(from.created_ms),
        sandboxes: from.sandboxes,
        quota: from.quota.map(region::quota),
        creates_left: (from.creates_left_milli, LogTime(from.creates_left_at_ms)),
        ..Tenant::default()
    };
    Ok((part::tenant(&from.tenant, "tenant")?, tenant))
}

impl From<&Life> for WireLife {
    fn from(from: &Life) -> Self {
        let placement = |node: &warren_proto::ids::NodeId, since: &LogTime| pb::StoredPlacement {
            node: node.to_string(),
            since_ms: since.0,
        };
        match from {
            Life::Pending { reason, since, not_before } => Self::Pending(pb::StoredPending {
                reason: Some(reason.into()),
                since_ms: since.0,
                not_before_ms: not_before.0,
            }),
            Life::Starting { node, since } => Self::Starting(placement(node, since)),
            Life::Running { node, since } => Self::Running(placement(node, since)),
            Life::Stopping { node, since } => Self::Stopping(placement(node, since)),
            Life::Stopped { node, ending } => Self::Stopped(pb::StoredStopped {
                node: text(node.as_ref()),
                exit: Some(ending.exit.into()),
                at_ms: ending.at.0,
                started_ms: ending.started.map(|time| time.0),
                output_tail: ending.output_tail.clone(),
            }),
            Life::Failed { kind, code, message, at } => {
                let kind = match kind {
                    FailedKind::Failed => pb::stored_failed::Kind::Unspecified,
                    FailedKind::Cancelled => pb::stored_failed::Kind::Cancelled,
                    FailedKind::Lost => pb::stored_failed::Kind::Lost,
                };
                let (code, message) = (code.to_string(), message.to_string());
                Self::Failed(pb::StoredFailed { code, message, at_ms: at.0, kind: kind.into() })
            }
        }
    }
}

impl TryFrom<WireLife> for Life {
    type Error = CodecError;
    fn try_from(from: WireLife) -> Result<Self, CodecError> {
        let placed =
            |p: &pb::StoredPlacement| Ok::<_, CodecError>((part::node(&p.node, "life.node")?, LogTime(p.since_ms)));
        Ok(match from {
            WireLife::Pending(pending) => Self::Pending {
                reason: require(pending.reason, "pending.reason")?.try_into()?,
                since: LogTime(pending.since_ms),
                not_before: LogTime(pending.not_before_ms),
            },
            WireLife::Starting(placement) => {
                let (node, since) = placed(&placement)?;
                Self::Starting { node, since }
            }
            WireLife::Running(placement) => {
                let (node, since) = placed(&placement)?;
                Self::Running { node, since }
            }
            WireLife::Stopping(placement) => {
                let (node, since) = placed(&placement)?;
                Self::Stopping { node, since }
            }
            WireLife::Stopped(stopped) => Self::Stopped {
                node: part::optional(&stopped.node, part::node, "stopped.node")?,
                ending: Box::new(Ending {
                    exit: part::exit(stopped.exit),
                    at: LogTime(stopped.at_ms),
                    started: stopped.started_ms.map(LogTime),
                    output_tail: stopped.output_tail,
                }),
            },
            WireLife::Failed(failed) => {
                let kind = match failed.kind() {
                    pb::stored_failed::Kind::Unspecified => FailedKind::Failed,
                    pb::stored_failed::Kind::Cancelled => FailedKind::Cancelled,
                    pb::stored_failed::Kind::Lost => FailedKind::Lost,
                };
                Self::Failed {
                    kind,
                    code: failed.code.into(),
                    message: failed.message.into(),
                    at: LogTime(failed.at_ms),
                }
            }
        })
    }
}

impl From<&Sandbox> for pb::StoredSandbox {
    fn from(from: &Sandbox) -> Self {
        Self {
            sandbox: from.name.to_string(),
            spec: Some(from.spec.as_ref().into()),
            life: Some((&from.life).into()),
            epoch: from.epoch.0,
            failed_starts: from.failed_starts,
            gpus: part::gpu_holds_to(&from.gpus),
            avoid: text(from.avoid.as_ref()),
            created_ms: from.created.0,
            revision: from.revision,
            settings: from.updated.as_deref().map(settings_to),
            restarts: from.restarts,
        }
    }
}

impl TryFrom<pb::StoredSandbox> for Sandbox {
    type Error = CodecError;
    fn try_from(from: pb::StoredSandbox) -> Result<Self, CodecError> {
        Ok(Self {
            name: part::sandbox(&from.sandbox, "sandbox")?,
            spec: Arc::new(require(from.spec, "sandbox.spec")?.try_into()?),
            life: require(from.life, "sandbox.life")?.try_into()?,
            epoch: Epoch(from.epoch),
            failed_starts: from.failed_starts,
            gpus: part::gpu_holds(&from.gpus)?,
            avoid: part::optional(&from.avoid, part::node, "sandbox.avoid")?,
            created: LogTime(from.created_ms),
            revision: from.revision,
            updated: from.settings.map(settings).transpose()?.map(Arc::new),
            restarts: from.restarts,
        })
    }
}

impl From<&Kept> for pb::StoredKept {
    fn from(from: &Kept) -> Self {
        let (sandbox, template) = match &from.what {
            Subject::Sandbox(name) => (name.to_string(), String::new()),
            Subject::Template(id) => (String::new(), id.to_string()),
        };
        Self { sandbox, template, created_ms: from.created.0, revision: from.revision }
    }
}

impl TryFrom<pb::StoredKept> for Kept {
    type Error = CodecError;
    fn try_from(from: pb::StoredKept) -> Result<Self, CodecError> {
        let what = if from.template.is_empty() {
            Subject::Sandbox(part::sandbox(&from.sandbox, "kept.sandbox")?)
        } else {
            Subject::Template(part::template(&from.template, "kept.template")?)
        };
        Ok(Self { what, created: LogTime(from.created_ms), revision: from.revision })
    }
}

pub fn answer_to(scope: &Scope, id: u128, answer: &Answer) -> pb::StoredAnswer {
    pb::StoredAnswer {
        tenant: text(scope.tenant.as_ref()),
        id: u128_bytes(id),
        payload: answer.payload.to_vec(),
        expires_ms: answer.expires.0,
        reply: Some(match &answer.reply {
            Reply::Batch(names) => {
                WireReply::Names(pb::StoredNames { sandboxes: names.iter().map(ToString::to_string).collect() })
            }
            Reply::Done => WireReply::Done(pb::StoredBlank {}),
            Reply::Sandbox(sandbox) => WireReply::Sandbox(sandbox.as_ref().into()),
            Reply::Template(template) => WireReply::Template(template.as_ref().into()),
            Reply::Gone(kept) => WireReply::Kept(kept.into()),
        }),
    }
}

pub fn answer_from(from: pb::StoredAnswer) -> Result<(Scope, u128, Answer), CodecError> {
    let reply = match require(from.reply, "answer.reply")? {
        WireReply::Names(names) => Reply::Batch(
            names.sandboxes.iter().map(|name| part::sandbox(name, "answer.names")).collect::<Result<_, _>>()?,
        ),
        WireReply::Done(_) => Reply::Done,
        WireReply::Sandbox(sandbox) => Reply::Sandbox(Arc::new(sandbox.try_into()?)),
        WireReply::Template(template) => Reply::Template(Arc::new(template.try_into()?)),
        WireReply::Kept(kept) => Reply::Gone(kept.try_into()?),
    };
    let answer = Answer { payload: array(&from.payload, "answer.payload")?, expires: LogTime(from.expires_ms), reply };
    let scope = Scope { tenant: part::optional(&from.tenant, part::tenant, "answer.tenant")? };
    Ok((scope, u128_of(&from.id, "answer.id")?, answer))
}
