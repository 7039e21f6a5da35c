//! Small pieces of state for the tests of the pure modules.

use std::collections::BTreeMap;

use warren_proto::ids::{Digest, NodeId, SandboxName, TemplateId};
use warren_proto::units::{Bytes, MilliCpu, Resources};

use super::State;
use super::command::{Body, Caller, Command, LogTime, TemplateSpec};
use super::node::testing::report;
use super::pairs::Pairs;
use super::sandbox::SandboxSpec;
use super::settings::{Isolation, Restart, Settings};

pub(crate) fn resources(cpu: u64, memory: u64) -> Resources {
    Resources { cpu: MilliCpu(cpu), memory: Bytes(memory), disk: Bytes(0), ..Resources::default() }
}

pub(crate) fn node(id: &str) -> NodeId {
    NodeId::parse(id).unwrap()
}

pub(crate) fn name(id: &str) -> SandboxName {
    SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).unwrap()
}

pub(crate) fn spec(cpu: u64, memory: u64) -> SandboxSpec {
    SandboxSpec {
        template: TemplateId::parse("base").unwrap(),
        command: vec![],
        environment: Pairs::default(),
        working_directory: String::new(),
        secrets: Pairs::default(),
        resources: resources(cpu, memory),
        pids: 64,
        restart: Restart::Never,
        isolation: Isolation::Keep,
        queue_timeout_ms: None,
        settings: Settings::default(),
    }
}

/// Creates template `base`.
pub(crate) fn template() -> Body {
    let spec = TemplateSpec {
        digest: Digest([1; 32]),
        size_bytes: 1,
        default_command: vec![],
        environment: BTreeMap::new(),
        working_directory: "/".into(),
    };
    Body::CreateTemplate { template: TemplateId::parse("base").unwrap(), spec, request: None }
}

/// One reachable node and template `base`.
pub(crate) fn with_node_and_template(id: &str, capacity: Resources) -> State {
    let mut state = State::default();
    let register = Body::RegisterNode { node: node(id), report: report(1, capacity) };
    for (index, body) in [register, template()].into_iter().enumerate() {
        let command = Command { caller: Caller::system("test"), time: LogTime(0), body };
        state.apply(index as u64 + 1, &command).unwrap();
    }
    state
}
