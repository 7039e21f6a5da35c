//! One of everything that is kept on disk, every field set: what the golden bytes and the checkpoints' tests are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use openraft::EntryPayload;
use warren_proto::ids::{Digest, Epoch, Generation, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};

use crate::raft::types::{Batch, Entry, LogId, Member, Membership};
use crate::state::State;
use crate::state::command::{
    BatchItem, Body, Caller, Change, Command, Decision, LedgerId, LogTime, Observation, Observed, Phase, ReplicaRecord,
    RequestKey, Role, Spot, TemplateSpec,
};
use crate::state::event::{Event, EventKind, Position};
use crate::state::gpu::{GpuDevice, GpuHold, GpuHolds, GpuUse};
use crate::state::level::Level;
use crate::state::node::{Condition, Holding, Node, NodeReport};
use crate::state::outcome::{Kept, Reply, Subject};
use crate::state::pairs::Pairs;
use crate::state::region::{Pauses, Region};
use crate::state::request::{Answer, Scope};
use crate::state::sandbox::{Ending, Exit, FailedKind, Life, PendingCode, PendingReason, Sandbox, SandboxSpec};
use crate::state::settings::{Egress, Expiry, Isolation, Restart, Settings};
use crate::state::template::Template;
use crate::state::tenant::{Quota, Tenant};

pub(crate) fn node() -> NodeId {
    NodeId::parse("node-1").unwrap()
}

pub(crate) fn name() -> SandboxName {
    SandboxName::parse("tenants/acme/sandboxes/box-1").unwrap()
}

pub(crate) fn template_id() -> TemplateId {
    TemplateId::parse("base").unwrap()
}

pub(crate) fn tenant() -> TenantId {
    TenantId::parse("acme").unwrap()
}

pub(crate) fn small_pairs() -> Pairs {
    pairs().into_iter().collect()
}

pub(crate) fn pairs() -> BTreeMap<String, String> {
    BTreeMap::from([("a".into(), "1".into()), ("b".into(), "zwei".into())])
}

pub(crate) fn resources() -> Resources {
    Resources { cpu: MilliCpu(250), memory: Bytes(1 << 30), disk: Bytes(3), ..Resources::default() }
}

pub(crate) fn report() -> NodeReport {
    NodeReport {
        incarnation: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        address: "10.0.0.1:7080".into(),
        tls: true,
        capacity: resources(),
        labels: pairs(),
        drivers: vec!["oci".into(), "sim".into()],
        agent_version: "0.1.0".into(),
        fence: false,
        gpus: Vec::new(),
    }
}

pub(crate) fn template_spec() -> TemplateSpec {
    TemplateSpec {
        digest: Digest([0xab; 32]),
        size_bytes: 77,
        default_command: vec!["sh".into(), "-c".into()],
        environment: pairs(),
        working_directory: "/work".into(),
    }
}

pub(crate) fn sandbox_spec() -> SandboxSpec {
    SandboxSpec {
        template: template_id(),
        command: vec!["sleep".into(), "9".into()],
        environment: small_pairs(),
        working_directory: "/tmp".into(),
        secrets: Pairs::default(),
        resources: resources(),
        pids: 64,
        restart: Restart::Never,
        isolation: Isolation::Keep,
        queue_timeout_ms: None,
        settings: Settings { labels: small_pairs(), ..Settings::default() },
    }
}

/// As the second level allows.
pub(crate) fn full_spec() -> SandboxSpec {
    SandboxSpec {
        secrets: [("TOKEN", vec![1, 2, 3])].into_iter().collect(),
        resources: Resources { gpus: Gpus(2), ..resources() },
        restart: Restart::OnFailure,
        isolation: Isolation::Freeze,
        queue_timeout_ms: Some(60_000),
        settings: settings(),
        ..sandbox_spec()
    }
}

pub(crate) fn settings() -> Settings {
    Settings {
        labels: small_pairs(),
        annotations: small_pairs(),
        expiry: Expiry::After(3_600_000),
        egress: Egress::List(vec!["example.com:443".into()]),
        priority: 70,
    }
}

pub(crate) fn quota() -> Quota {
    Quota {
        cpu: Some(MilliCpu(1)),
        memory: Some(Bytes(2)),
        disk: Some(Bytes(3)),
        gpus: Some(Gpus(0)),
        sandboxes: Some(5),
        creates_per_minute: None,
    }
}

pub(crate) fn request() -> RequestKey {
    RequestKey { id: 0x0190_0000_0000_7000_8000_0000_0000_0001, payload: [0xcd; 32] }
}

pub(crate) fn reason() -> PendingReason {
    PendingReason { code: PendingCode::ShortOfMemory, message: "2 GiB short".into() }
}

/// Every code. A new one does not compile until it has a name here, and does not pass without a sample.
pub(crate) fn reasons() -> Vec<(&'static str, PendingReason)> {
    let name = |code| match code {
        PendingCode::NoNodes => "reason_no_nodes",
        PendingCode::ShortOfCpu => "reason_short_of_cpu",
        PendingCode::ShortOfMemory => "reason_short_of_memory",
        PendingCode::ShortOfDisk => "reason_short_of_disk",
        PendingCode::TooLarge => "reason_too_large",
        PendingCode::Conflict => "reason_conflict",
        PendingCode::StartFailed => "reason_start_failed",
        PendingCode::ShortOfGpus => "reason_short_of_gpus_2",
        PendingCode::Paused => "reason_paused_2",
        PendingCode::Restarting => "reason_restarting_2",
        PendingCode::NodeDown => "reason_node_down_2",
    };
    let codes = [
        PendingCode::NoNodes,
        PendingCode::ShortOfCpu,
        PendingCode::ShortOfMemory,
        PendingCode::ShortOfDisk,
        PendingCode::TooLarge,
        PendingCode::Conflict,
        PendingCode::StartFailed,
        PendingCode::ShortOfGpus,
        PendingCode::Paused,
        PendingCode::Restarting,
        PendingCode::NodeDown,
    ];
    codes.into_iter().map(|code| (name(code), PendingReason { code, message: "why".into() })).collect()
}

pub(crate) fn exit() -> Exit {
    Exit { code: 137, signal: 9, oom_killed: true }
}

pub(crate) fn phases() -> Vec<Phase> {
    vec![
        Phase::Starting,
        Phase::Running,
        Phase::Exited { exit: exit(), output_tail: b"bye".to_vec() },
        Phase::Failed { code: "START_FAILED".into(), message: "no such file".into() },
        Phase::Removed,
        Phase::Orphan,
    ]
}

pub(crate) fn observation() -> Observation {
    let seen = |(epoch, phase)| Observed { sandbox: name(), epoch: Epoch(epoch), phase };
    let sandboxes = (1..).zip(phases()).map(seen).collect();
    Observation { sandboxes, templates: Some(BTreeSet::from([Digest([1; 32]), Digest([2; 32])])) }
}

/// The number of each body on disk. A new body does not compile until it stands here, and does not pass without a sample.
pub(crate) fn number(body: &Body) -> u32 {
    match body {
        Body::OpenLedger { .. } => 10,
        Body::AdvanceTime { .. } => 11,
        Body::PutReplica { .. } => 12,
        Body::RegisterNode { .. } => 13,
        Body::SetNodeReachable { .. } => 14,
        Body::Observe { .. } => 15,
        Body::CreateTemplate { .. } => 16,
        Body::DeleteTemplate { .. } => 17,
        Body::CreateSandbox { .. } => 18,
        Body::PlaceSandbox { .. } => 19,
        Body::ExplainPending { .. } => 20,
        Body::DeleteSandbox { .. } => 21,
        Body::ForgetEnded { .. } => 22,
        Body::SetLevel { .. } => 23,
        Body::SetNodeCondition { .. } => 24,
        Body::SetNodePolicy { .. } => 25,
        Body::ForgetNode { .. } => 26,
        Body::StopOrphan { .. } => 27,
        Body::RequeueSandbox { .. } => 28,
        Body::UpdateSandbox { .. } => 29,
        Body::CreateBatch { .. } => 30,
        Body::SetQuota { .. } => 31,
        Body::SetPause { .. } => 32,
        Body::ReleaseBrake => 33,
        Body::EndDue { .. } => 34,
    }
}

/// Highest number of a body.
pub(crate) const LAST_NUMBER: u32 = 34;

pub(crate) fn bodies() -> Vec<(&'static str, Body)> {
    let create = |decision| Body::CreateSandbox {
        sandbox: name(),
        spec: sandbox_spec().into(),
        decision,
        request: Some(request()),
    };
    let mut bodies = vec![
        ("open_ledger", Body::OpenLedger { ledger_id: LedgerId(0xfeed_beef) }),
        ("advance_time", Body::AdvanceTime { samples: vec![LogTime(1), LogTime(1_700_000_000_000)] }),
        ("put_replica", Body::PutReplica { replica: ReplicaId(3), record: record("h:1", 9) }),
        ("register_node", Body::RegisterNode { node: node(), report: report() }),
        ("set_node_reachable", Body::SetNodeReachable { node: node(), incarnation: 5, reachable: true }),
        ("observe", Body::Observe { node: node(), incarnation: 5, observation: observation() }),
        (
            "create_template",
            Body::CreateTemplate { template: template_id(), spec: template_spec(), request: Some(request()) },
        ),
        ("delete_template", Body::DeleteTemplate { template: template_id() }),
        ("create_sandbox_placed", create(Decision::Place(node().into()))),
        ("create_sandbox_queued", create(Decision::Queue(reason()))),
        ("place_sandbox", Body::PlaceSandbox { sandbox: name(), epoch: Epoch(4), spot: node().into() }),
        ("explain_pending", Body::ExplainPending { sandbox: name(), epoch: Epoch(4), reason: reason() }),
        ("delete_sandbox", Body::DeleteSandbox { sandbox: name(), request: Some(request()) }),
        ("forget_ended", Body::ForgetEnded { sandboxes: vec![name()] }),
    ];
    bodies.extend(bodies_of_second_level());
    bodies
}

pub(crate) fn bodies_of_second_level() -> Vec<(&'static str, Body)> {
    let item = |id: &str, decision| {
        let sandbox = SandboxName::parse(&format!("tenants/acme/sandboxes/{id}")).unwrap();
        BatchItem { sandbox, spec: full_spec().into(), decision }
    };
    let Settings { labels, annotations, expiry, egress, priority } = settings();
    let (labels, annotations, expiry) = (Some(labels), Some(annotations), Some(expiry));
    let change = Change { labels, annotations, expiry, egress: Some(egress), priority: Some(priority) };
    let update = |change, if_revision| Body::UpdateSandbox { sandbox: name(), change, if_revision, request: None };
    let unchanged = Observation { templates: None, ..observation() };
    vec![
        ("put_replica_2", Body::PutReplica { replica: ReplicaId(3), record: full_record() }),
        ("register_node_2", Body::RegisterNode { node: node(), report: NodeReport { fence: true, ..report() } }),
        ("observe_2", Body::Observe { node: node(), incarnation: 5, observation: unchanged }),
        (
            "create_sandbox_2",
            Body::CreateSandbox {
                sandbox: name(),
                spec: full_spec().into(),
                decision: Decision::Place(node().into()),
                request: None,
            },
        ),
        ("set_level", Body::SetLevel { level: Level(2) }),
        ("set_node_condition", Body::SetNodeCondition { node: node(), incarnation: 5, to: Condition::Suspect }),
        (
            "set_node_policy",
            Body::SetNodePolicy {
                node: node(),
                cordoned: Some(false),
                set_labels: pairs(),
                remove_labels: BTreeSet::from(["gone".into()]),
            },
        ),
        ("forget_node", Body::ForgetNode { node: node() }),
        ("stop_orphan", Body::StopOrphan { node: node(), sandbox: name(), epoch: Epoch(3) }),
        ("requeue_sandbox", Body::RequeueSandbox { sandbox: name(), epoch: Epoch(3) }),
        ("update_sandbox", update(change, Some(12))),
        ("update_sandbox_one", update(Change { priority: Some(0), ..Change::default() }, None)),
        (
            "create_batch_2",
            Body::CreateBatch {
                items: vec![item("b-1", Decision::Place(node().into())), item("b-2", Decision::Queue(reason()))],
                request: Some(request()),
            },
        ),
        ("set_quota", Body::SetQuota { tenant: Some(tenant()), quota: Some(quota()) }),
        ("set_quota_default", Body::SetQuota { tenant: None, quota: None }),
        (
            "register_node_gpus_2",
            Body::RegisterNode { node: node(), report: NodeReport { gpus: devices(), ..report() } },
        ),
        ("place_sandbox_gpus_2", Body::PlaceSandbox { sandbox: name(), epoch: Epoch(4), spot: gpu_spot() }),
        (
            "create_sandbox_gpus_2",
            Body::CreateSandbox {
                sandbox: name(),
                spec: full_spec().into(),
                decision: Decision::Place(gpu_spot()),
                request: None,
            },
        ),
        (
            "create_batch_gpus_2",
            Body::CreateBatch { items: vec![item("b-1", Decision::Place(gpu_spot()))], request: None },
        ),
        ("set_pause", Body::SetPause { creates: Some(true), placement: Some(false), moves: None }),
        ("release_brake", Body::ReleaseBrake),
        ("end_due", Body::EndDue { sandboxes: vec![name()] }),
    ]
}

pub(crate) fn record(api_address: &str, key: u8) -> ReplicaRecord {
    ReplicaRecord { api_address: api_address.into(), token_key: [key; 32], disk: 0, max_level: Level::FIRST }
}

pub(crate) fn full_record() -> ReplicaRecord {
    ReplicaRecord { disk: 0xd15c, max_level: Level(2), ..record("h:3", 7) }
}

pub(crate) fn command(body: Body) -> Command {
    let caller = Caller { principal: "CN=agent".into(), role: Role::Tenant, tenant: Some(tenant()) };
    Command { caller, time: LogTime(1_700_000_000_123), body }
}

pub(crate) fn log_id() -> LogId {
    LogId::new_term_index(7, 4242)
}

pub(crate) fn membership() -> Membership {
    let member = |n: u64| Member { peer_address: format!("p{n}:1"), api_address: format!("a{n}:2"), standby: false };
    let members: BTreeMap<u64, Member> = (1..=4).map(|id| (id, member(id))).collect();
    Membership::new(vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3])], members).unwrap()
}

/// With a standby, and with a learner that is none.
pub(crate) fn membership_with_standby() -> Membership {
    let member = |n: u64| Member { peer_address: format!("p{n}:1"), api_address: format!("a{n}:2"), standby: n == 3 };
    let members: BTreeMap<u64, Member> = (1..=3).map(|id| (id, member(id))).collect();
    Membership::new(vec![BTreeSet::from([1])], members).unwrap()
}

pub(crate) fn entries() -> Vec<(&'static str, Entry)> {
    // Two, for good: each new body has a line of its own.
    let two = ["put_replica", "delete_template"];
    let commands: Vec<_> =
        bodies().into_iter().filter(|(name, _)| two.contains(name)).map(|(_, body)| command(body)).collect();
    vec![
        ("entry_blank", Entry { log_id: log_id(), payload: EntryPayload::Blank }),
        ("entry_membership", Entry { log_id: log_id(), payload: EntryPayload::Membership(membership()) }),
        ("entry_batch", Entry { log_id: log_id(), payload: EntryPayload::Normal(Batch { commands: commands.into() }) }),
    ]
}

pub(crate) fn lives() -> Vec<(&'static str, Life)> {
    let since = LogTime(12);
    let ending = Ending { exit: exit(), at: LogTime(20), started: Some(LogTime(0)), output_tail: b"tail".to_vec() };
    vec![
        ("pending", Life::Pending { reason: reason(), since, not_before: LogTime::default() }),
        ("starting", Life::Starting { node: node(), since }),
        ("running", Life::Running { node: node(), since }),
        ("stopping", Life::Stopping { node: node(), since }),
        ("stopped", Life::Stopped { node: Some(node()), ending: Box::new(ending.clone()) }),
        ("stopped_gone", Life::Stopped { node: None, ending: Box::new(Ending { started: None, ..ending }) }),
        ("failed", Life::Failed { kind: FailedKind::Failed, code: "LOST".into(), message: "gone".into(), at: since }),
    ]
}

pub(crate) fn sandbox(life: Life) -> Sandbox {
    Sandbox {
        name: name(),
        spec: Arc::new(sandbox_spec()),
        life,
        epoch: Epoch(6),
        updated: None,
        restarts: 0,
        failed_starts: 2,
        gpus: GpuHolds::default(),
        avoid: Some(node()),
        created: LogTime(11),
        revision: 99,
    }
}

pub(crate) fn template() -> Template {
    Template { id: template_id(), spec: template_spec(), created: LogTime(3), users: 8, revision: 5 }
}

pub(crate) fn whole_node() -> Node {
    Node {
        id: node(),
        report: report(),
        registered: LogTime(10),
        condition: Condition::Ready,
        since: LogTime(0),
        suspected: LogTime(0),
        cordoned: false,
        shrunk: false,
        labels: BTreeMap::new(),
        leftovers: BTreeMap::new(),
        generation: Generation(17),
        assigned: resources(),
        gpu_use: GpuUse::default(),
        sandboxes: std::iter::once(name()).collect(),
        templates: BTreeSet::from([Digest([4; 32])]),
        orphans: BTreeSet::from([(name(), Epoch(2))]),
        revision: 98,
    }
}

pub(crate) fn replica() -> (ReplicaId, ReplicaRecord) {
    (ReplicaId(2), record("h:2", 8))
}

pub(crate) fn owner() -> (TenantId, Tenant) {
    (tenant(), Tenant { created: LogTime(2), sandboxes: 3, ..Tenant::default() })
}

/// A node with everything that the second level knows.
pub(crate) fn silent_node() -> Node {
    let old = SandboxName::parse("tenants/acme/sandboxes/old").unwrap();
    Node {
        condition: Condition::Down,
        since: LogTime(9),
        suspected: LogTime(8),
        cordoned: true,
        shrunk: true,
        labels: pairs(),
        leftovers: BTreeMap::from([((old, Epoch(1)), Holding { resources: resources(), ..Holding::default() })]),
        ..whole_node()
    }
}

/// A node with devices, some of them held.
pub(crate) fn gpu_node() -> Node {
    let old = SandboxName::parse("tenants/acme/sandboxes/old").unwrap();
    let mut gpu_use = GpuUse::default();
    gpu_use.add(&holds());
    Node {
        report: NodeReport { gpus: devices(), ..report() },
        gpu_use,
        leftovers: BTreeMap::from([((old, Epoch(1)), Holding { resources: resources(), gpus: holds() })]),
        ..whole_node()
    }
}

fn devices() -> Vec<GpuDevice> {
    let device =
        |uuid: &str, enforced| GpuDevice { uuid: uuid.into(), model: "A100".into(), memory: Bytes(40), enforced };
    vec![device("GPU-1", false), device("MIG-2", true)]
}

fn holds() -> GpuHolds {
    devices().iter().map(GpuHold::whole).collect()
}

fn gpu_spot() -> Spot {
    Spot { node: node(), gpus: holds() }
}

pub(crate) fn suspect_node() -> Node {
    Node { condition: Condition::Suspect, since: LogTime(9), suspected: LogTime(9), ..whole_node() }
}

/// Lives and settings that the second level knows.
pub(crate) fn sandboxes_of_second_level() -> Vec<(&'static str, Sandbox)> {
    let at = LogTime(12);
    let failed = |kind| Life::Failed { kind, code: "X".into(), message: "y".into(), at };
    let pending = Life::Pending { reason: reason(), since: at, not_before: LogTime(13) };
    let updated = Settings { expiry: Expiry::At(LogTime(99)), egress: Egress::Public, ..settings() };
    let whole = Sandbox { spec: full_spec().into(), updated: Some(updated.into()), restarts: 4, ..sandbox(pending) };
    vec![
        ("sandbox_whole_2", whole),
        ("sandbox_cancelled_2", sandbox(failed(FailedKind::Cancelled))),
        ("sandbox_lost_2", sandbox(failed(FailedKind::Lost))),
        ("sandbox_gpus_2", Sandbox { gpus: holds(), ..sandbox(Life::Running { node: node(), since: at }) }),
    ]
}

/// A region with everything set; beside it nothing.
pub(crate) fn region() -> State {
    State {
        level: Level(2),
        predecessors: vec![LedgerId(1), LedgerId(2)],
        restored_floor: Epoch(1 << 20),
        region: Region {
            pauses: Pauses { creates: true, placement: false, moves: true },
            lapses: std::iter::once((LogTime(5), node())).collect(),
            brake_since: Some(LogTime(0)),
            hold_until: LogTime(77),
            default_quota: Some(quota()),
        },
        ..State::default()
    }
}

pub(crate) fn event() -> Event {
    let life = Life::Running { node: node(), since: LogTime(1) };
    let (sandbox, before) = (Arc::new(sandbox(life)), None);
    let position = Position { index: 9, ordinal: 2 };
    Event { position, kind: EventKind::Created, sandbox, before, unreachable: false, unreachable_before: false }
}

/// Its node went from down to down: both are said.
pub(crate) fn unreachable_event() -> Event {
    let before = Some(event().sandbox);
    Event { kind: EventKind::Updated, before, unreachable: true, unreachable_before: true, ..event() }
}

/// The other kinds, with the sandbox as it was before.
pub(crate) fn later_events() -> Vec<(&'static str, Event)> {
    let before = Some(event().sandbox);
    let life = Life::Stopping { node: node(), since: LogTime(2) };
    let stopping = Arc::new(Sandbox { revision: 100, ..sandbox(life) });
    let updated = Event { kind: EventKind::Updated, sandbox: stopping, before: before.clone(), ..event() };
    let deleted = Event { kind: EventKind::Deleted, before, ..event() };
    vec![("event_updated_2", updated), ("event_deleted_2", deleted)]
}

pub(crate) fn answers() -> Vec<(&'static str, Scope, Answer)> {
    let answer = |reply| Answer { payload: [6; 32], expires: LogTime(600_000), reply };
    let kept = |what| Reply::Gone(Kept { what, created: LogTime(11), revision: 99 });
    let life = Life::Running { node: node(), since: LogTime(1) };
    vec![
        ("answer_done", Scope { tenant: None }, answer(Reply::Done)),
        ("answer_sandbox", Scope { tenant: Some(tenant()) }, answer(Reply::Sandbox(Arc::new(sandbox(life))))),
        ("answer_template", Scope { tenant: None }, answer(Reply::Template(Arc::new(template())))),
        ("answer_batch_2", Scope { tenant: None }, answer(Reply::Batch(vec![name()]))),
        ("answer_kept_2", Scope { tenant: Some(tenant()) }, answer(kept(Subject::Sandbox(name())))),
        ("answer_kept_template_2", Scope { tenant: None }, answer(kept(Subject::Template(template_id())))),
    ]
}
