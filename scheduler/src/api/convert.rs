//! State, as clients see it.

use prost_types::Timestamp;
use warren_proto::ids::{Epoch, SandboxName};
use warren_proto::units::Resources;
use warren_proto::v1::{self, NodeState, SandboxState};

use crate::controller::{Answered, IDLE_PASS};
use crate::state::State;
use crate::state::command::LogTime;
use crate::state::event::Event;
use crate::state::gpu::GpuDevice;
use crate::state::node::{Condition, Node};
use crate::state::sandbox::{FailedKind, Life, PendingCode, Sandbox};
use crate::state::settings::{Egress, Isolation, Restart};
use crate::state::template::Template;

pub fn timestamp(time: LogTime) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(time.0 / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(time.0 % 1000).unwrap_or(0).saturating_mul(1_000_000),
    }
}

pub fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub fn resources(from: Resources, pids: u64) -> v1::Resources {
    v1::Resources {
        cpu_milli: int(from.cpu.0),
        memory_bytes: int(from.memory.0),
        disk_bytes: int(from.disk.0),
        pids: int(pids),
        gpus: int(from.gpus.0),
    }
}

/// The kinds of life ([`Life::kind`]) that can show a state.
pub fn kinds_of(state: SandboxState) -> &'static [&'static str] {
    match state {
        SandboxState::Unspecified => &[],
        SandboxState::Pending => &["PENDING"],
        SandboxState::Starting => &["STARTING"],
        SandboxState::Running => &["RUNNING"],
        SandboxState::Unreachable => &["STARTING", "RUNNING"],
        SandboxState::Stopping => &["STOPPING"],
        SandboxState::Stopped => &["STOPPED"],
        SandboxState::Failed => &["FAILED"],
        SandboxState::Cancelled => &["CANCELLED"],
        SandboxState::Lost => &["LOST"],
    }
}

/// The state that a sandbox shows now.
pub fn sandbox_state(state: &State, sandbox: &Sandbox) -> SandboxState {
    shown_state(sandbox, state.is_unreachable(sandbox))
}

/// The state that a sandbox shows: one that starts or runs on a node that is down (`unreachable`) shows that.
pub fn shown_state(sandbox: &Sandbox, unreachable: bool) -> SandboxState {
    match &sandbox.life {
        Life::Pending { .. } => SandboxState::Pending,
        Life::Starting { .. } | Life::Running { .. } if unreachable => SandboxState::Unreachable,
        Life::Starting { .. } => SandboxState::Starting,
        Life::Running { .. } => SandboxState::Running,
        Life::Stopping { .. } => SandboxState::Stopping,
        Life::Stopped { .. } => SandboxState::Stopped,
        Life::Failed { kind: FailedKind::Failed, .. } => SandboxState::Failed,
        Life::Failed { kind: FailedKind::Cancelled, .. } => SandboxState::Cancelled,
        Life::Failed { kind: FailedKind::Lost, .. } => SandboxState::Lost,
    }
}

/// `condition`: of its node.
fn reason(sandbox: &Sandbox, condition: Condition) -> Option<v1::StateReason> {
    let (code, message) = match &sandbox.life {
        Life::Pending { reason, .. } => (pending_code(reason.code).to_owned(), reason.message.clone()),
        Life::Failed { code, message, .. } => (code.to_string(), message.to_string()),
        life => {
            let node = life.node()?;
            let (code, what) = match condition {
                Condition::Ready => return None,
                Condition::Suspect => ("NODE_SUSPECT", "has not renewed its lease; it may be back in a moment"),
                Condition::Down => {
                    ("NODE_UNREACHABLE", "is down; what it does is known when it returns, or is forgotten")
                }
            };
            (code.to_owned(), format!("node {node} {what}"))
        }
    };
    Some(v1::StateReason { code, message })
}

fn pending_code(code: PendingCode) -> &'static str {
    match code {
        PendingCode::NoNodes => "NO_NODES",
        PendingCode::ShortOfCpu => "SHORT_OF_CPU",
        PendingCode::ShortOfMemory => "SHORT_OF_MEMORY",
        PendingCode::ShortOfDisk => "SHORT_OF_DISK",
        PendingCode::TooLarge => "TOO_LARGE",
        PendingCode::Conflict => "CONFLICT",
        PendingCode::StartFailed => "START_FAILED",
        PendingCode::ShortOfGpus => "SHORT_OF_GPUS",
        PendingCode::Paused => "PAUSED",
        PendingCode::Restarting => "RESTARTING",
        PendingCode::NodeDown => "NODE_DOWN",
    }
}

/// As it is now.
pub fn sandbox(state: &State, from: &Sandbox) -> v1::Sandbox {
    let node = from.life.node().and_then(|id| state.nodes.get(id));
    sandbox_as(from, node.map_or(Condition::Ready, |node| node.condition))
}

/// As an event left it, whatever has become of its node since.
pub fn sandbox_of_event(event: &Event) -> v1::Sandbox {
    sandbox_as(&event.sandbox, if event.unreachable { Condition::Down } else { Condition::Ready })
}

/// As it is now, with what must be counted: where it stands in its tenant's queue, and when it is looked at again. `now`: log time.
pub fn sandbox_in_full(state: &State, from: &Sandbox, now: LogTime) -> v1::Sandbox {
    let mut to = sandbox(state, from);
    if let Life::Pending { not_before, .. } = &from.life {
        to.queue_position = int(queue_position(state, from));
        let at_the_latest = now.plus_ms(u64::try_from(IDLE_PASS.as_millis()).unwrap_or(u64::MAX));
        to.retry_time = Some(timestamp(if *not_before > now { *not_before } else { at_the_latest }));
    }
    to
}

/// From 1; 0 where it does not wait. Walks what stands before it: at most [`MAX_PENDING_OF_TENANT`](crate::state::tenant::MAX_PENDING_OF_TENANT).
fn queue_position(state: &State, sandbox: &Sandbox) -> u64 {
    let (priority, created) = sandbox.rank();
    let own = (priority, created, sandbox.name.clone());
    let queue = state.indexes.queues.get(&sandbox.name.tenant).filter(|queue| queue.contains(&own));
    queue.map_or(0, |queue| queue.range(..=own).count() as u64)
}

/// What a change of `name` answers.
pub fn answered(state: &State, name: &SandboxName, answered: &Answered<Sandbox>) -> v1::Sandbox {
    match answered {
        Answered::Is(of) => sandbox(state, of),
        Answered::WasAt { revision } => gone(name, *revision),
    }
}

/// What stands for a sandbox that is gone: the request that is answered was carried out by `revision`, and is not again.
pub fn gone(name: &SandboxName, revision: u64) -> v1::Sandbox {
    let message = format!("this request was carried out by revision {revision}; the sandbox is gone since");
    v1::Sandbox {
        name: name.to_string(),
        revision,
        reason: Some(v1::StateReason { code: "GONE".to_owned(), message }),
        ..v1::Sandbox::default()
    }
}

fn sandbox_as(from: &Sandbox, node: Condition) -> v1::Sandbox {
    let (spec, settings) = (&from.spec, from.settings());
    let mut to = v1::Sandbox {
        name: from.name.to_string(),
        template: spec.template.name(),
        command: spec.command.clone(),
        environment: spec.environment.to_map(),
        working_directory: spec.working_directory.clone(),
        labels: settings.labels.to_map(),
        annotations: settings.annotations.to_map(),
        egress: Some(egress(&settings.egress)),
        restart_policy: restart(spec.restart).into(),
        on_isolation: isolation(spec.isolation).into(),
        deadline: from.deadline().map(timestamp),
        on_deadline: v1::OnDeadline::Delete.into(),
        queue_timeout: spec.queue_timeout_ms.map(duration),
        priority: i32::from(settings.priority),
        etag: etag(from),
        secret_names: spec.secrets.keys().map(str::to_owned).collect(),
        restart_count: from.restarts,
        resources: Some(resources(spec.resources, spec.pids)),
        state: shown_state(from, node == Condition::Down).into(),
        reason: reason(from, node),
        node: from.life.node().map(|node| node.name()).unwrap_or_default(),
        epoch: from.epoch.0,
        create_time: Some(timestamp(from.created)),
        revision: from.revision,
        gpu_uuids: from.gpus.iter().map(|hold| hold.uuid.to_string()).collect(),
        ..v1::Sandbox::default()
    };
    match &from.life {
        Life::Pending { .. } => to.retry_time = from.backs_off_until().map(timestamp),
        Life::Running { since, .. } => to.start_time = Some(timestamp(*since)),
        Life::Failed { at, .. } => to.end_time = Some(timestamp(*at)),
        Life::Stopped { ending, .. } => {
            to.start_time = ending.started.map(timestamp);
            to.end_time = Some(timestamp(ending.at));
            to.output_tail = ending.output_tail.clone();
            to.exit_status = Some(v1::ExitStatus {
                code: ending.exit.code,
                signal: ending.exit.signal,
                oom_killed: ending.exit.oom_killed,
            });
        }
        _ => {}
    }
    to
}

/// Changes whenever the sandbox does.
pub fn etag(sandbox: &Sandbox) -> String {
    sandbox.revision.to_string()
}

pub fn duration(ms: u64) -> prost_types::Duration {
    let nanos = i32::try_from(ms % 1000).unwrap_or(0).saturating_mul(1_000_000);
    prost_types::Duration { seconds: int(ms / 1000), nanos }
}

pub fn egress(from: &Egress) -> v1::Egress {
    let (mode, allow) = match from {
        Egress::None => (v1::EgressMode::None, Vec::new()),
        Egress::Public => (v1::EgressMode::Public, Vec::new()),
        Egress::List(allow) => (v1::EgressMode::List, allow.clone()),
    };
    v1::Egress { mode: mode.into(), allow }
}

fn restart(from: Restart) -> v1::RestartPolicy {
    match from {
        Restart::Never => v1::RestartPolicy::Never,
        Restart::OnFailure => v1::RestartPolicy::OnFailure,
        Restart::Always => v1::RestartPolicy::Always,
    }
}

pub fn isolation(from: Isolation) -> v1::OnIsolation {
    match from {
        Isolation::Keep => v1::OnIsolation::Keep,
        Isolation::Freeze => v1::OnIsolation::Freeze,
    }
}

pub fn node(from: &Node) -> v1::Node {
    let state = match from.condition {
        Condition::Ready => NodeState::Ready,
        Condition::Suspect => NodeState::Suspect,
        Condition::Down => NodeState::Down,
    };
    let instance = |(name, epoch): &(SandboxName, Epoch)| format!("{name}@{epoch}");
    v1::Node {
        name: from.id.name(),
        state: state.into(),
        address: from.report.address.clone(),
        labels: from.all_labels(),
        capacity: Some(resources(from.report.capacity, 0)),
        assigned: Some(resources(from.assigned, 0)),
        sandbox_count: i32::try_from(from.sandboxes.len()).unwrap_or(i32::MAX),
        generation: from.generation.0,
        drivers: from.report.drivers.clone(),
        agent_version: from.report.agent_version.clone(),
        register_time: Some(timestamp(from.registered)),
        orphans: from.orphans.iter().map(instance).collect(),
        template_digests: from.templates.iter().map(ToString::to_string).collect(),
        revision: from.revision,
        cordoned: from.cordoned,
        state_time: Some(timestamp(from.since)),
        fence: from.report.fence,
        leftovers: from.leftovers.keys().map(instance).collect(),
        gpus: from.report.gpus.iter().map(|device| gpu(from, device)).collect(),
    }
}

fn gpu(node: &Node, device: &GpuDevice) -> v1::NodeGpu {
    v1::NodeGpu {
        uuid: device.uuid.to_string(),
        model: device.model.to_string(),
        memory_bytes: int(device.memory.0),
        held_milli: node.gpu_use.of(&device.uuid).milli.into(),
        enforced: device.enforced,
    }
}

pub fn template(state: &State, from: &Template) -> v1::Template {
    let holders = state.nodes.values().filter(|node| node.is_ready() && node.templates.contains(&from.spec.digest));
    v1::Template {
        name: from.id.name(),
        digest: from.spec.digest.to_string(),
        size_bytes: int(from.spec.size_bytes),
        default_command: from.spec.default_command.clone(),
        environment: from.spec.environment.clone(),
        working_directory: from.spec.working_directory.clone(),
        create_time: Some(timestamp(from.created)),
        holders: holders.map(|node| node.id.name()).collect(),
    }
}
