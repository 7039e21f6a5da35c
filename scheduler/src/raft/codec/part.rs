//! Pieces that commands and entities share.

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::{Digest, Epoch, NodeId, SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_proto::v1 as pb;
use warren_proto::v1::stored_pending_reason::Code;

use super::settings::{isolation, isolation_to, restart, restart_to, settings, settings_beside_labels};
use super::{CodecError, require};
use crate::state::command::{RequestKey, TemplateSpec};
use crate::state::gpu::{GpuDevice, GpuHold, GpuHolds, GpuUse, GpuUsed};
use crate::state::node::NodeReport;
use crate::state::pairs::Pairs;
use crate::state::sandbox::{Exit, PendingCode, PendingReason, SandboxSpec};
use crate::state::settings::Settings;

pub(super) fn sandbox(text: &str, field: &'static str) -> Result<SandboxName, CodecError> {
    SandboxName::parse(text).map_err(|_| CodecError::Malformed { field })
}

pub(super) fn node(text: &str, field: &'static str) -> Result<NodeId, CodecError> {
    NodeId::parse(text).map_err(|_| CodecError::Malformed { field })
}

pub(super) fn template(text: &str, field: &'static str) -> Result<TemplateId, CodecError> {
    TemplateId::parse(text).map_err(|_| CodecError::Malformed { field })
}

pub(super) fn tenant(text: &str, field: &'static str) -> Result<TenantId, CodecError> {
    TenantId::parse(text).map_err(|_| CodecError::Malformed { field })
}

/// `None` stands as the empty string.
pub(super) fn optional<T>(
    text: &str,
    parse: fn(&str, &'static str) -> Result<T, CodecError>,
    field: &'static str,
) -> Result<Option<T>, CodecError> {
    if text.is_empty() { Ok(None) } else { parse(text, field).map(Some) }
}

pub(super) fn text<T: ToString>(value: Option<&T>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

pub(super) fn array<const N: usize>(bytes: &[u8], field: &'static str) -> Result<[u8; N], CodecError> {
    bytes.try_into().map_err(|_| CodecError::Malformed { field })
}

pub(super) fn u128_of(bytes: &[u8], field: &'static str) -> Result<u128, CodecError> {
    array(bytes, field).map(u128::from_be_bytes)
}

pub(super) fn u128_bytes(value: u128) -> Vec<u8> {
    value.to_be_bytes().to_vec()
}

pub(super) fn epoch(value: u64) -> Epoch {
    Epoch(value)
}

pub(super) fn pairs(map: &BTreeMap<String, String>) -> Vec<pb::StoredPair> {
    map.iter().map(|(key, value)| pb::StoredPair { key: key.clone(), value: value.clone() }).collect()
}

pub(super) fn map<M: FromIterator<(String, String)>>(pairs: Vec<pb::StoredPair>) -> M {
    pairs.into_iter().map(|pair| (pair.key, pair.value)).collect()
}

pub(super) fn small_pairs(map: &Pairs) -> Vec<pb::StoredPair> {
    map.iter().map(|(key, value)| pb::StoredPair { key: key.to_owned(), value: value.as_ref().to_owned() }).collect()
}

fn secret(name: &str, sealed: &[u8]) -> pb::StoredSecret {
    pb::StoredSecret { name: name.to_owned(), sealed: sealed.to_vec() }
}

pub(super) fn digests(set: &BTreeSet<Digest>) -> Vec<Vec<u8>> {
    set.iter().map(|digest| digest.0.to_vec()).collect()
}

pub(super) fn digest_set(list: &[Vec<u8>]) -> Result<BTreeSet<Digest>, CodecError> {
    list.iter().map(|bytes| array(bytes, "template_digests").map(Digest)).collect()
}

pub(super) fn gpu_holds_to(holds: &GpuHolds) -> Vec<pb::StoredGpuHold> {
    let hold = |hold: &GpuHold| stored_hold(&hold.uuid, hold.milli, hold.memory);
    holds.iter().map(hold).collect()
}

pub(super) fn gpu_holds(holds: &[pb::StoredGpuHold]) -> Result<GpuHolds, CodecError> {
    let hold = |hold: &pb::StoredGpuHold| {
        let uuid = if hold.uuid.is_empty() { Err(CodecError::Missing { field: "gpu.uuid" }) } else { Ok(&hold.uuid) };
        Ok(GpuHold { uuid: uuid?.as_str().into(), milli: hold.milli, memory: Bytes(hold.memory_bytes) })
    };
    holds.iter().map(hold).collect()
}

pub(super) fn gpu_use_to(used: &GpuUse) -> Vec<pb::StoredGpuHold> {
    used.iter().map(|(uuid, used)| stored_hold(uuid, used.milli, used.memory)).collect()
}

pub(super) fn gpu_use(used: &[pb::StoredGpuHold]) -> Result<GpuUse, CodecError> {
    let held = gpu_holds(used)?;
    let one = |hold: &GpuHold| (hold.uuid.clone(), GpuUsed { milli: hold.milli, memory: hold.memory });
    Ok(held.iter().map(one).collect())
}

fn stored_hold(uuid: &str, milli: u32, memory: Bytes) -> pb::StoredGpuHold {
    pb::StoredGpuHold { uuid: uuid.to_owned(), milli, memory_bytes: memory.0 }
}

fn device_to(device: &GpuDevice) -> pb::StoredGpuDevice {
    pb::StoredGpuDevice {
        uuid: device.uuid.to_string(),
        model: device.model.to_string(),
        memory_bytes: device.memory.0,
        enforced: device.enforced,
    }
}

fn device(from: pb::StoredGpuDevice) -> GpuDevice {
    GpuDevice {
        uuid: from.uuid.into(),
        model: from.model.into(),
        memory: Bytes(from.memory_bytes),
        enforced: from.enforced,
    }
}

pub(super) fn resources_to(from: Resources) -> pb::StoredResources {
    pb::StoredResources {
        cpu_milli: from.cpu.0,
        memory_bytes: from.memory.0,
        disk_bytes: from.disk.0,
        gpus: from.gpus.0,
    }
}

pub(super) fn resources(from: Option<pb::StoredResources>) -> Result<Resources, CodecError> {
    let from = require(from, "resources")?;
    Ok(Resources {
        cpu: MilliCpu(from.cpu_milli),
        memory: Bytes(from.memory_bytes),
        disk: Bytes(from.disk_bytes),
        gpus: Gpus(from.gpus),
    })
}

impl From<&NodeReport> for pb::StoredNodeReport {
    fn from(from: &NodeReport) -> Self {
        Self {
            incarnation: u128_bytes(from.incarnation),
            address: from.address.clone(),
            tls: from.tls,
            capacity: Some(resources_to(from.capacity)),
            labels: pairs(&from.labels),
            drivers: from.drivers.clone(),
            agent_version: from.agent_version.clone(),
            fence: from.fence,
            gpus: from.gpus.iter().map(device_to).collect(),
        }
    }
}

impl TryFrom<pb::StoredNodeReport> for NodeReport {
    type Error = CodecError;
    fn try_from(from: pb::StoredNodeReport) -> Result<Self, CodecError> {
        Ok(Self {
            incarnation: u128_of(&from.incarnation, "report.incarnation")?,
            address: from.address,
            tls: from.tls,
            capacity: resources(from.capacity)?,
            labels: map(from.labels),
            drivers: from.drivers,
            agent_version: from.agent_version,
            fence: from.fence,
            gpus: from.gpus.into_iter().map(device).collect(),
        })
    }
}

impl From<&TemplateSpec> for pb::StoredTemplateSpec {
    fn from(from: &TemplateSpec) -> Self {
        Self {
            digest: from.digest.0.to_vec(),
            size_bytes: from.size_bytes,
            default_command: from.default_command.clone(),
            environment: pairs(&from.environment),
            working_directory: from.working_directory.clone(),
        }
    }
}

impl TryFrom<pb::StoredTemplateSpec> for TemplateSpec {
    type Error = CodecError;
    fn try_from(from: pb::StoredTemplateSpec) -> Result<Self, CodecError> {
        Ok(Self {
            digest: Digest(array(&from.digest, "template.digest")?),
            size_bytes: from.size_bytes,
            default_command: from.default_command,
            environment: map(from.environment),
            working_directory: from.working_directory,
        })
    }
}

impl From<&SandboxSpec> for pb::StoredSandboxSpec {
    fn from(from: &SandboxSpec) -> Self {
        Self {
            template: from.template.to_string(),
            command: from.command.clone(),
            environment: small_pairs(&from.environment),
            working_directory: from.working_directory.clone(),
            labels: small_pairs(&from.settings.labels),
            resources: Some(resources_to(from.resources)),
            pids: from.pids,
            settings: settings_beside_labels(&from.settings),
            secrets: from.secrets.iter().map(|(name, sealed)| secret(name, sealed)).collect(),
            restart: restart_to(from.restart),
            isolation: isolation_to(from.isolation),
            queue_timeout_ms: from.queue_timeout_ms,
        }
    }
}

impl TryFrom<pb::StoredSandboxSpec> for SandboxSpec {
    type Error = CodecError;
    fn try_from(from: pb::StoredSandboxSpec) -> Result<Self, CodecError> {
        Ok(Self {
            template: template(&from.template, "spec.template")?,
            command: from.command,
            environment: map(from.environment),
            working_directory: from.working_directory,
            settings: Settings { labels: map(from.labels), ..settings(from.settings.unwrap_or_default())? },
            restart: restart(from.restart),
            isolation: isolation(from.isolation),
            queue_timeout_ms: from.queue_timeout_ms,
            secrets: from.secrets.into_iter().map(|secret| (secret.name, secret.sealed)).collect(),
            resources: resources(from.resources)?,
            pids: from.pids,
        })
    }
}

impl From<&PendingReason> for pb::StoredPendingReason {
    fn from(from: &PendingReason) -> Self {
        let code = match from.code {
            PendingCode::NoNodes => Code::NoNodes,
            PendingCode::ShortOfCpu => Code::ShortOfCpu,
            PendingCode::ShortOfMemory => Code::ShortOfMemory,
            PendingCode::ShortOfDisk => Code::ShortOfDisk,
            PendingCode::TooLarge => Code::TooLarge,
            PendingCode::Conflict => Code::Conflict,
            PendingCode::StartFailed => Code::StartFailed,
            PendingCode::ShortOfGpus => Code::ShortOfGpus,
            PendingCode::Paused => Code::Paused,
            PendingCode::Restarting => Code::Restarting,
            PendingCode::NodeDown => Code::NodeDown,
        };
        Self { code: code.into(), message: from.message.clone() }
    }
}

impl TryFrom<pb::StoredPendingReason> for PendingReason {
    type Error = CodecError;
    fn try_from(from: pb::StoredPendingReason) -> Result<Self, CodecError> {
        let code = match from.code() {
            Code::NoNodes => PendingCode::NoNodes,
            Code::ShortOfCpu => PendingCode::ShortOfCpu,
            Code::ShortOfMemory => PendingCode::ShortOfMemory,
            Code::ShortOfDisk => PendingCode::ShortOfDisk,
            Code::TooLarge => PendingCode::TooLarge,
            Code::Conflict => PendingCode::Conflict,
            Code::StartFailed => PendingCode::StartFailed,
            Code::ShortOfGpus => PendingCode::ShortOfGpus,
            Code::Paused => PendingCode::Paused,
            Code::Restarting => PendingCode::Restarting,
            Code::NodeDown => PendingCode::NodeDown,
            Code::Unspecified => return Err(CodecError::Missing { field: "reason.code" }),
        };
        Ok(Self { code, message: from.message })
    }
}

impl From<&RequestKey> for pb::StoredRequestKey {
    fn from(from: &RequestKey) -> Self {
        Self { id: u128_bytes(from.id), payload: from.payload.to_vec() }
    }
}

pub(super) fn request(from: Option<pb::StoredRequestKey>) -> Result<Option<RequestKey>, CodecError> {
    let Some(from) = from else { return Ok(None) };
    Ok(Some(RequestKey { id: u128_of(&from.id, "request.id")?, payload: array(&from.payload, "request.payload")? }))
}

impl From<Exit> for pb::StoredExit {
    fn from(from: Exit) -> Self {
        Self { code: from.code, signal: from.signal, oom_killed: from.oom_killed }
    }
}

pub(super) fn exit(from: Option<pb::StoredExit>) -> Exit {
    let from = from.unwrap_or_default();
    Exit { code: from.code, signal: from.signal, oom_killed: from.oom_killed }
}
