//! What agents say, from wire to domain. Parsed once, then trusted.

use std::collections::{BTreeMap, BTreeSet};

use tonic::Status;
use warren_proto::ids::{Digest, Epoch, NodeId, SandboxName};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_proto::v1;
use warren_proto::v1::sandbox_observation::Phase as WirePhase;

use crate::api::status::invalid_field;
use crate::api::validate;
use crate::state::command::{Observation, Observed, Phase};
use crate::state::gpu::{GpuDevice, MAX_DEVICES};
use crate::state::node::NodeReport;
use crate::state::sandbox::Exit;

/// Bytes of output that are kept of an ended sandbox (section 5 of the design).
const MAX_OUTPUT_TAIL: usize = 4 * 1024;

/// Longest reason that is kept of a failure, in bytes.
const MAX_REASON: usize = 1024;

/// Most sandboxes of one observation: as many as a large host runs.
const MAX_OBSERVED: usize = 10_000;

/// Most drivers of a node, and bytes of a driver's name.
const MAX_DRIVERS: usize = 32;

/// Most templates that one node reports: they fit a log entry.
const MAX_REPORTED: usize = 1_000;

/// Longest uuid or model of a GPU, in bytes: NVML gives at most 96.
const MAX_GPU_TEXT: usize = 128;

/// An agent's first message.
pub(super) struct Hello {
    pub node: NodeId,
    pub ledger_id: Option<String>,
    pub report: NodeReport,
    pub observation: Observation,
}

pub(super) fn hello(wire: v1::Hello) -> Result<Hello, Status> {
    let node = NodeId::from_name(&wire.node).map_err(|e| invalid_field("hello.node", e.to_string()))?;
    let incarnation =
        uuid::Uuid::parse_str(&wire.incarnation).map_err(|_| invalid_field("hello.incarnation", "must be a UUIDv7"))?;
    let capacity = wire.capacity.ok_or_else(|| invalid_field("hello.capacity", "must be set"))?;
    if wire.data_plane_address.rsplit_once(':').is_none() {
        return Err(invalid_field("hello.data_plane_address", "must be `host:port`"));
    }
    let labels = wire.labels.into_iter().map(|label| (label.key, label.value)).collect::<BTreeMap<_, _>>();
    let labels = validate::labels("hello.labels", &labels)?;
    if wire.drivers.len() > MAX_DRIVERS || wire.drivers.iter().any(|driver| driver.len() > MAX_DRIVERS) {
        return Err(invalid_field("hello.drivers", format!("at most {MAX_DRIVERS}, each of at most as many bytes")));
    }
    let report = NodeReport {
        incarnation: incarnation.as_u128(),
        address: wire.data_plane_address,
        tls: wire.data_plane_tls,
        capacity: Resources {
            cpu: MilliCpu(amount("hello.capacity.cpu_milli", capacity.cpu_milli)?),
            memory: Bytes(amount("hello.capacity.memory_bytes", capacity.memory_bytes)?),
            disk: Bytes(amount("hello.capacity.disk_bytes", capacity.disk_bytes)?),
            gpus: Gpus(amount("hello.capacity.gpus", capacity.gpus)?),
        },
        labels,
        drivers: wire.drivers,
        agent_version: shortened(&wire.agent_version),
        fence: wire.fence,
        gpus: devices(wire.gpus)?,
    };
    let observation = wire.observation.ok_or_else(|| invalid_field("hello.observation", "must be set"))?;
    let observation = self::observation(observation)?;
    Ok(Hello { node, ledger_id: Some(wire.ledger_id).filter(|id| !id.is_empty()), report, observation })
}

/// By uuid, none twice.
fn devices(wire: Vec<v1::GpuDevice>) -> Result<Vec<GpuDevice>, Status> {
    if wire.len() > MAX_DEVICES {
        return Err(invalid_field("hello.gpus", format!("at most {MAX_DEVICES}")));
    }
    let mut devices = BTreeMap::new();
    for gpu in wire {
        if gpu.uuid.is_empty() || gpu.uuid.len() > MAX_GPU_TEXT || gpu.model.len() > MAX_GPU_TEXT {
            let limits = format!("uuid must be set; it and the model have at most {MAX_GPU_TEXT} bytes");
            return Err(invalid_field("hello.gpus", limits));
        }
        let device = GpuDevice {
            uuid: gpu.uuid.as_str().into(),
            model: gpu.model.into(),
            memory: Bytes(amount("hello.gpus.memory_bytes", gpu.memory_bytes)?),
            enforced: gpu.enforced,
        };
        if devices.insert(gpu.uuid, device).is_some() {
            return Err(invalid_field("hello.gpus.uuid", "is named twice"));
        }
    }
    Ok(devices.into_values().collect())
}

fn amount(field: &str, value: i64) -> Result<u64, Status> {
    u64::try_from(value).map_err(|_| invalid_field(field, "must not be negative"))
}

pub(super) fn observation(wire: v1::Observation) -> Result<Observation, Status> {
    if wire.sandboxes.len() > MAX_OBSERVED || wire.template_digests.len() > MAX_REPORTED {
        let limits = format!("at most {MAX_OBSERVED} sandboxes and {MAX_REPORTED} templates");
        return Err(invalid_field("observation", limits));
    }
    let digest =
        |text: &String| Digest::parse(text).map_err(|e| invalid_field("observation.template_digests", e.to_string()));
    Ok(Observation {
        templates: Some(wire.template_digests.iter().map(digest).collect::<Result<BTreeSet<_>, _>>()?),
        sandboxes: wire.sandboxes.into_iter().map(observed).collect::<Result<Vec<_>, _>>()?,
    })
}

fn observed(wire: v1::SandboxObservation) -> Result<Observed, Status> {
    let sandbox =
        SandboxName::parse(&wire.sandbox).map_err(|e| invalid_field("observation.sandboxes.sandbox", e.to_string()))?;
    let phase = match wire.phase() {
        WirePhase::Starting => Phase::Starting,
        WirePhase::Running => Phase::Running,
        WirePhase::Removed => Phase::Removed,
        WirePhase::Orphan => Phase::Orphan,
        WirePhase::Exited => Phase::Exited { exit: exit(wire.exit_status), output_tail: tail(wire.output_tail) },
        WirePhase::Failed => failed(wire.reason.unwrap_or_default()),
        WirePhase::Unspecified => return Err(invalid_field("observation.sandboxes.phase", "must be set")),
    };
    Ok(Observed { sandbox, epoch: Epoch(wire.epoch), phase })
}

fn exit(wire: Option<v1::ExitStatus>) -> Exit {
    let wire = wire.unwrap_or_default();
    Exit { code: wire.code, signal: wire.signal, oom_killed: wire.oom_killed }
}

fn tail(mut output: Vec<u8>) -> Vec<u8> {
    output.split_off(output.len().saturating_sub(MAX_OUTPUT_TAIL))
}

fn failed(reason: v1::StateReason) -> Phase {
    let code = if reason.code.is_empty() { "START_FAILED".to_owned() } else { shortened(&reason.code) };
    Phase::Failed { code, message: shortened(&reason.message) }
}

fn shortened(text: &str) -> String {
    let end = (0..=MAX_REASON.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_owned()
}
