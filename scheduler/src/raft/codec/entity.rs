//! Entities as checkpoints hold them.

use std::sync::Arc;

use warren_proto::ids::{Epoch, Generation, ReplicaId};
use warren_proto::v1 as pb;
use warren_proto::v1::stored_answer::Reply as WireReply;
use warren_proto::v1::stored_sandbox::Life as WireLife;

use super::part::{self, array, digest_set, digests, resources, resources_to, text, u128_bytes, u128_of};
use super::{CodecError, require};
use crate::state::ReplicaRecord;
use crate::state::command::LogTime;
use crate::state::node::Node;
use crate::state::outcome::Reply;
use crate::state::request::{Answer, Scope};
use crate::state::sandbox::{Ending, Life, Sandbox};
use crate::state::template::Template;
use crate::state::tenant::Tenant;

pub fn replica_to(id: ReplicaId, record: &ReplicaRecord) -> pb::StoredReplica {
    pb::StoredReplica {
        replica_id: id.0,
        api_address: record.api_address.clone(),
        token_key: record.token_key.to_vec(),
        ..Default::default()
    }
}

pub fn replica_from(from: pb::StoredReplica) -> Result<(ReplicaId, ReplicaRecord), CodecError> {
    let record = ReplicaRecord { api_address: from.api_address, token_key: array(&from.token_key, "token_key")? };
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
            reachable: from.reachable,
            generation: from.generation.0,
            assigned: Some(resources_to(from.assigned)),
            sandboxes: from.sandboxes.iter().map(ToString::to_string).collect(),
            template_digests: digests(&from.templates),
            orphans: from.orphans.iter().map(orphan).collect(),
            revision: from.revision,
            ..Default::default()
        }
    }
}

impl TryFrom<pb::StoredNode> for Node {
    type Error = CodecError;
    fn try_from(from: pb::StoredNode) -> Result<Self, CodecError> {
        let orphan =
            |o: &pb::StoredOrphan| Ok::<_, CodecError>((part::sandbox(&o.sandbox, "orphan")?, part::epoch(o.epoch)));
        Ok(Self {
            id: part::node(&from.node, "node")?,
            report: require(from.report, "node.report")?.try_into()?,
            registered: LogTime(from.registered_ms),
            reachable: from.reachable,
            generation: Generation(from.generation),
            assigned: resources(from.assigned)?,
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

pub fn tenant_to(id: &warren_proto::ids::TenantId, tenant: &Tenant) -> pb::StoredTenant {
    pb::StoredTenant {
        tenant: id.to_string(),
        created_ms: tenant.created.0,
        sandboxes: tenant.sandboxes,
        ..Default::default()
    }
}

pub fn tenant_from(from: &pb::StoredTenant) -> Result<(warren_proto::ids::TenantId, Tenant), CodecError> {
    let tenant = Tenant { created: LogTime(from.created_ms), sandboxes: from.sandboxes };
    Ok((part::tenant(&from.tenant, "tenant")?, tenant))
}

impl From<&Life> for WireLife {
    fn from(from: &Life) -> Self {
        let placement = |node: &warren_proto::ids::NodeId, since: &LogTime| pb::StoredPlacement {
            node: node.to_string(),
            since_ms: since.0,
        };
        match from {
            Life::Pending { reason, since } => Self::Pending(pb::StoredPending {
                reason: Some(reason.into()),
                since_ms: since.0,
                ..Default::default()
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
            Life::Failed { code, message, at } => Self::Failed(pb::StoredFailed {
                code: code.clone(),
                message: message.clone(),
                at_ms: at.0,
                ..Default::default()
            }),
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
                ending: Ending {
                    exit: part::exit(stopped.exit),
                    at: LogTime(stopped.at_ms),
                    started: stopped.started_ms.map(LogTime),
                    output_tail: stopped.output_tail,
                },
            },
            WireLife::Failed(failed) => {
                Self::Failed { code: failed.code, message: failed.message, at: LogTime(failed.at_ms) }
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
            avoid: text(from.avoid.as_ref()),
            created_ms: from.created.0,
            revision: from.revision,
            ..Default::default()
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
            avoid: part::optional(&from.avoid, part::node, "sandbox.avoid")?,
            created: LogTime(from.created_ms),
            revision: from.revision,
        })
    }
}

pub fn answer_to(scope: &Scope, id: u128, answer: &Answer) -> pb::StoredAnswer {
    pb::StoredAnswer {
        tenant: text(scope.tenant.as_ref()),
        id: u128_bytes(id),
        payload: answer.payload.to_vec(),
        expires_ms: answer.expires.0,
        reply: Some(match &answer.reply {
            Reply::Done => WireReply::Done(pb::StoredBlank {}),
            Reply::Sandbox(sandbox) => WireReply::Sandbox(sandbox.as_ref().into()),
            Reply::Template(template) => WireReply::Template(template.as_ref().into()),
        }),
    }
}

pub fn answer_from(from: pb::StoredAnswer) -> Result<(Scope, u128, Answer), CodecError> {
    let reply = match require(from.reply, "answer.reply")? {
        WireReply::Names(_) => return Err(CodecError::Missing { field: "answer.reply" }),
        WireReply::Done(_) => Reply::Done,
        WireReply::Sandbox(sandbox) => Reply::Sandbox(Arc::new(sandbox.try_into()?)),
        WireReply::Template(template) => Reply::Template(Arc::new(template.try_into()?)),
    };
    let answer = Answer { payload: array(&from.payload, "answer.payload")?, expires: LogTime(from.expires_ms), reply };
    let scope = Scope { tenant: part::optional(&from.tenant, part::tenant, "answer.tenant")? };
    Ok((scope, u128_of(&from.id, "answer.id")?, answer))
}
