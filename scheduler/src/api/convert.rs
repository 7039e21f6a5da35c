//! State, as clients see it.

use prost_types::Timestamp;
use warren_proto::units::Resources;
use warren_proto::v1::{self, NodeState, SandboxState};

use crate::state::State;
use crate::state::command::LogTime;
use crate::state::node::Node;
use crate::state::sandbox::{Life, PendingCode, Sandbox};
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

/// The state that a sandbox shows: a running one whose node is out of reach shows that.
pub fn sandbox_state(state: &State, sandbox: &Sandbox) -> SandboxState {
    match &sandbox.life {
        Life::Pending { .. } => SandboxState::Pending,
        Life::Starting { .. } => SandboxState::Starting,
        Life::Running { .. } if state.is_unreachable(sandbox) => SandboxState::Unreachable,
        Life::Running { .. } => SandboxState::Running,
        Life::Stopping { .. } => SandboxState::Stopping,
        Life::Stopped { .. } => SandboxState::Stopped,
        Life::Failed { .. } => SandboxState::Failed,
    }
}

fn reason(state: &State, sandbox: &Sandbox) -> Option<v1::StateReason> {
    let (code, message) = match &sandbox.life {
        Life::Pending { reason, .. } => (pending_code(reason.code).to_owned(), reason.message.clone()),
        Life::Failed { code, message, .. } => (code.clone(), message.clone()),
        life => {
            let node = life.node().and_then(|id| state.nodes.get(id)).filter(|node| !node.reachable)?;
            let message = format!(
                "node {} has not renewed its lease; what it does goes on, and is known when it returns",
                node.id
            );
            ("NODE_UNREACHABLE".to_owned(), message)
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
    }
}

pub fn sandbox(state: &State, from: &Sandbox) -> v1::Sandbox {
    let spec = &from.spec;
    let mut to = v1::Sandbox {
        name: from.name.to_string(),
        template: spec.template.name(),
        command: spec.command.clone(),
        environment: spec.environment.clone(),
        working_directory: spec.working_directory.clone(),
        labels: spec.labels.clone(),
        resources: Some(resources(spec.resources, spec.pids)),
        state: sandbox_state(state, from).into(),
        reason: reason(state, from),
        node: from.life.node().map(|node| node.name()).unwrap_or_default(),
        epoch: from.epoch.0,
        create_time: Some(timestamp(from.created)),
        revision: from.revision,
        ..v1::Sandbox::default()
    };
    match &from.life {
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

pub fn node(from: &Node) -> v1::Node {
    let state = if from.reachable { NodeState::Ready } else { NodeState::Suspect };
    v1::Node {
        name: from.id.name(),
        state: state.into(),
        address: from.report.address.clone(),
        labels: from.report.labels.clone(),
        capacity: Some(resources(from.report.capacity, 0)),
        assigned: Some(resources(from.assigned, 0)),
        sandbox_count: i32::try_from(from.sandboxes.len()).unwrap_or(i32::MAX),
        generation: from.generation.0,
        drivers: from.report.drivers.clone(),
        agent_version: from.report.agent_version.clone(),
        register_time: Some(timestamp(from.registered)),
        orphans: from.orphans.iter().map(|(name, _)| name.to_string()).collect(),
        template_digests: from.templates.iter().map(ToString::to_string).collect(),
        revision: from.revision,
        ..Default::default()
    }
}

pub fn template(state: &State, from: &Template) -> v1::Template {
    let holders = state.nodes.values().filter(|node| node.reachable && node.templates.contains(&from.spec.digest));
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
