//! Golden bytes of everything that is kept on disk, round trips, and garbage.
//!
//! `tests/golden/storage.txt` holds what earlier builds wrote. A line of it is never changed: bytes that a new build writes
//! differently are bytes that an old replica's disk holds and this build must still read. New lines are printed by the test
//! that misses them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

use openraft::EntryPayload;
use proptest::prelude::*;
use prost::Message;
use warren_proto::ids::{Digest, Epoch, Generation, NodeId, ReplicaId, SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, MilliCpu, Resources};
use warren_proto::v1 as pb;

use super::CodecError;
use super::entity::{answer_from, answer_to, replica_from, replica_to, tenant_from, tenant_to};
use super::log::{decode_entry, entry_to, membership_from, membership_to, vote_from, vote_to};
use crate::raft::types::{Batch, Entry, LogId, Member, Membership, Vote};
use crate::state::ReplicaRecord;
use crate::state::command::{
    Body, Caller, Command, Decision, LedgerId, LogTime, Observation, Observed, Phase, RequestKey, Role, TemplateSpec,
};
use crate::state::node::{Node, NodeReport};
use crate::state::outcome::Reply;
use crate::state::request::{Answer, Scope};
use crate::state::sandbox::{Ending, Exit, Life, PendingCode, PendingReason, Sandbox, SandboxSpec};
use crate::state::template::Template;
use crate::state::tenant::Tenant;

const GOLDEN: &str = include_str!("../../../tests/golden/storage.txt");

// --- One of everything, every field set.

pub(crate) fn node() -> NodeId {
    NodeId::parse("node-1").unwrap()
}

fn name() -> SandboxName {
    SandboxName::parse("tenants/acme/sandboxes/box-1").unwrap()
}

pub(crate) fn template_id() -> TemplateId {
    TemplateId::parse("base").unwrap()
}

fn tenant() -> TenantId {
    TenantId::parse("acme").unwrap()
}

fn pairs() -> BTreeMap<String, String> {
    BTreeMap::from([("a".into(), "1".into()), ("b".into(), "zwei".into())])
}

fn resources() -> Resources {
    Resources { cpu: MilliCpu(250), memory: Bytes(1 << 30), disk: Bytes(3), ..Resources::default() }
}

fn report() -> NodeReport {
    NodeReport {
        incarnation: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        address: "10.0.0.1:7080".into(),
        tls: true,
        capacity: resources(),
        labels: pairs(),
        drivers: vec!["oci".into(), "sim".into()],
        agent_version: "0.1.0".into(),
    }
}

fn template_spec() -> TemplateSpec {
    TemplateSpec {
        digest: Digest([0xab; 32]),
        size_bytes: 77,
        default_command: vec!["sh".into(), "-c".into()],
        environment: pairs(),
        working_directory: "/work".into(),
    }
}

fn sandbox_spec() -> SandboxSpec {
    SandboxSpec {
        template: template_id(),
        command: vec!["sleep".into(), "9".into()],
        environment: pairs(),
        working_directory: "/tmp".into(),
        labels: pairs(),
        resources: resources(),
        pids: 64,
    }
}

fn request() -> RequestKey {
    RequestKey { id: 0x0190_0000_0000_7000_8000_0000_0000_0001, payload: [0xcd; 32] }
}

fn reason() -> PendingReason {
    PendingReason { code: PendingCode::ShortOfMemory, message: "2 GiB short".into() }
}

fn exit() -> Exit {
    Exit { code: 137, signal: 9, oom_killed: true }
}

fn phases() -> Vec<Phase> {
    vec![
        Phase::Starting,
        Phase::Running,
        Phase::Exited { exit: exit(), output_tail: b"bye".to_vec() },
        Phase::Failed { code: "START_FAILED".into(), message: "no such file".into() },
        Phase::Removed,
        Phase::Orphan,
    ]
}

fn observation() -> Observation {
    let seen = |(epoch, phase)| Observed { sandbox: name(), epoch: Epoch(epoch), phase };
    let sandboxes = (1..).zip(phases()).map(seen).collect();
    Observation { sandboxes, templates: BTreeSet::from([Digest([1; 32]), Digest([2; 32])]) }
}

/// The number of each body on disk. A new body does not compile until it stands here, and does not pass without a sample.
fn number(body: &Body) -> u32 {
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
    }
}

/// Highest number of a body.
const LAST_NUMBER: u32 = 22;

fn bodies() -> Vec<(&'static str, Body)> {
    let create =
        |decision| Body::CreateSandbox { sandbox: name(), spec: sandbox_spec(), decision, request: Some(request()) };
    vec![
        ("open_ledger", Body::OpenLedger { ledger_id: LedgerId(0xfeed_beef) }),
        ("advance_time", Body::AdvanceTime { samples: vec![LogTime(1), LogTime(1_700_000_000_000)] }),
        ("put_replica", Body::PutReplica { replica: ReplicaId(3), api_address: "h:1".into(), token_key: [9; 32] }),
        ("register_node", Body::RegisterNode { node: node(), report: report() }),
        ("set_node_reachable", Body::SetNodeReachable { node: node(), incarnation: 5, reachable: true }),
        ("observe", Body::Observe { node: node(), incarnation: 5, observation: observation() }),
        (
            "create_template",
            Body::CreateTemplate { template: template_id(), spec: template_spec(), request: Some(request()) },
        ),
        ("delete_template", Body::DeleteTemplate { template: template_id() }),
        ("create_sandbox_placed", create(Decision::Place(node()))),
        ("create_sandbox_queued", create(Decision::Queue(reason()))),
        ("place_sandbox", Body::PlaceSandbox { sandbox: name(), epoch: Epoch(4), node: node() }),
        ("explain_pending", Body::ExplainPending { sandbox: name(), epoch: Epoch(4), reason: reason() }),
        ("delete_sandbox", Body::DeleteSandbox { sandbox: name(), request: Some(request()) }),
        ("forget_ended", Body::ForgetEnded { sandboxes: vec![name()] }),
    ]
}

fn command(body: Body) -> Command {
    let caller = Caller { principal: "CN=agent".into(), role: Role::Tenant, tenant: Some(tenant()) };
    Command { caller, time: LogTime(1_700_000_000_123), body }
}

pub(crate) fn log_id() -> LogId {
    LogId::new_term_index(7, 4242)
}

pub(crate) fn membership() -> Membership {
    let member = |n: u64| Member { peer_address: format!("p{n}:1"), api_address: format!("a{n}:2") };
    let members: BTreeMap<u64, Member> = (1..=4).map(|id| (id, member(id))).collect();
    Membership::new(vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3])], members).unwrap()
}

fn entries() -> Vec<(&'static str, Entry)> {
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
        ("pending", Life::Pending { reason: reason(), since }),
        ("starting", Life::Starting { node: node(), since }),
        ("running", Life::Running { node: node(), since }),
        ("stopping", Life::Stopping { node: node(), since }),
        ("stopped", Life::Stopped { node: Some(node()), ending: ending.clone() }),
        ("stopped_gone", Life::Stopped { node: None, ending: Ending { started: None, ..ending } }),
        ("failed", Life::Failed { code: "LOST".into(), message: "gone".into(), at: since }),
    ]
}

pub(crate) fn sandbox(life: Life) -> Sandbox {
    Sandbox {
        name: name(),
        spec: Arc::new(sandbox_spec()),
        life,
        epoch: Epoch(6),
        failed_starts: 2,
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
        reachable: true,
        generation: Generation(17),
        assigned: resources(),
        sandboxes: std::iter::once(name()).collect(),
        templates: BTreeSet::from([Digest([4; 32])]),
        orphans: BTreeSet::from([(name(), Epoch(2))]),
        revision: 98,
    }
}

pub(crate) fn replica() -> (ReplicaId, ReplicaRecord) {
    (ReplicaId(2), ReplicaRecord { api_address: "h:2".into(), token_key: [8; 32] })
}

pub(crate) fn owner() -> (TenantId, Tenant) {
    (tenant(), Tenant { created: LogTime(2), sandboxes: 3 })
}

pub(crate) fn answers() -> Vec<(&'static str, Scope, Answer)> {
    let answer = |reply| Answer { payload: [6; 32], expires: LogTime(600_000), reply };
    let life = Life::Running { node: node(), since: LogTime(1) };
    vec![
        ("answer_done", Scope { tenant: None }, answer(Reply::Done)),
        ("answer_sandbox", Scope { tenant: Some(tenant()) }, answer(Reply::Sandbox(Arc::new(sandbox(life))))),
        ("answer_template", Scope { tenant: None }, answer(Reply::Template(Arc::new(template())))),
    ]
}

// --- Golden bytes.

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn golden_lines() -> impl Iterator<Item = (&'static str, &'static str)> {
    GOLDEN.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '))
}

/// What an earlier build wrote.
pub(crate) fn kept(name: &str) -> Option<Vec<u8>> {
    golden_lines().find(|(key, _)| *key == name).map(|(_, text)| unhex(text))
}

/// Collects every difference, so that one run shows them all.
#[derive(Default)]
struct Golden {
    seen: BTreeSet<String>,
    wrong: Vec<String>,
}

impl Golden {
    /// `value` is written as an earlier build wrote it, and what that build wrote is read as `value`.
    fn check<V: PartialEq + Debug, M: Message + Default>(
        &mut self,
        name: &str,
        value: &V,
        to: impl Fn(&V) -> M,
        from: impl Fn(M) -> Result<V, CodecError>,
    ) {
        let written = to(value).encode_to_vec();
        self.seen.insert(name.to_owned());
        match kept(name) {
            Some(kept) => {
                assert_eq!(from(M::decode(kept.as_slice()).unwrap()).as_ref(), Ok(value), "{name} is misread");
                if kept != written {
                    self.wrong.push(format!("{name} {}", hex(&written)));
                }
            }
            None => self.wrong.push(format!("{name} {}", hex(&written))),
        }
    }

    fn finish(self) {
        assert!(self.wrong.is_empty(), "not as in tests/golden/storage.txt:\n{}", self.wrong.join("\n"));
        // Files are the checkpoint's own test.
        let kept: BTreeSet<_> = golden_lines().map(|(k, _)| k.to_owned()).filter(|k| !k.ends_with("_file")).collect();
        assert_eq!(kept, self.seen, "what was ever written must stay readable");
    }
}

#[test]
fn bytes_on_disk_stay_as_they_are() {
    let mut golden = Golden::default();
    let vote = Vote::new_committed(7, 3);
    golden.check("vote", &vote, vote_to, |m| vote_from(&m));
    golden.check("log_id", &log_id(), super::log::log_id_to, |m| Ok(super::log::log_id_from(&m)));
    golden.check(
        "membership",
        &membership(),
        |m| membership_to(Some(&log_id()), m),
        |m| membership_from(&m).map(|stored| stored.membership().clone()),
    );
    for (name, entry) in entries() {
        golden.check(name, &entry, entry_to, super::log::entry_from);
    }
    for (name, body) in bodies() {
        golden.check(&format!("command_{name}"), &command(body), |c| pb::StoredCommand::from(c), TryInto::try_into);
    }
    golden.check("node", &whole_node(), |n| pb::StoredNode::from(n), TryInto::try_into);
    golden.check("template", &template(), |t| pb::StoredTemplate::from(t), TryInto::try_into);
    for (name, life) in lives() {
        let sandbox = sandbox(life);
        golden.check(&format!("sandbox_{name}"), &sandbox, |s| pb::StoredSandbox::from(s), TryInto::try_into);
    }
    golden.check("replica", &replica(), |(id, record)| replica_to(*id, record), replica_from);
    golden.check("tenant", &owner(), |(id, tenant)| tenant_to(id, tenant), |m| tenant_from(&m));
    for (name, scope, answer) in answers() {
        let value = (scope, request().id, answer);
        golden.check(name, &value, |(scope, id, answer)| answer_to(scope, *id, answer), answer_from);
    }
    golden.finish();
}

#[test]
fn every_body_has_its_number_and_a_sample() {
    let mut numbers = BTreeSet::new();
    for (_, body) in bodies() {
        let stored = pb::StoredCommand { body: Some((&body).into()), ..Default::default() }.encode_to_vec();
        let key = prost::encoding::decode_varint(&mut stored.as_slice()).unwrap();
        assert_eq!(key >> 3, u64::from(number(&body)), "{body:?}");
        numbers.insert(number(&body));
    }
    assert!(numbers.into_iter().eq(10..=LAST_NUMBER));
}

// --- What a newer build, a broken disk or a bad peer may hand in.

#[test]
fn what_a_newer_build_wrote_is_refused_not_skipped() {
    let (_, batch) = entries().pop().unwrap();
    let newer = pb::StoredEntry { version: super::VERSION + 1, ..entry_to(&batch) };
    assert!(matches!(decode_entry(&newer.encode_to_vec()), Err(CodecError::Version { field: "entry", got: 2 })));
    let newer = pb::StoredVote { version: super::VERSION + 1, ..vote_to(&Vote::new(1, 1)) };
    assert!(matches!(vote_from(&newer), Err(CodecError::Version { field: "vote", got: 2 })));

    let (_, body) = bodies().remove(0);
    let mut unknown = pb::StoredCommand { body: None, ..pb::StoredCommand::from(&command(body)) }.encode_to_vec();
    prost::encoding::bytes::encode(LAST_NUMBER + 1, &b"of a newer build".to_vec(), &mut unknown);
    let unknown = pb::StoredCommand::decode(unknown.as_slice()).unwrap();
    assert_eq!(Command::try_from(unknown), Err(CodecError::Missing { field: "command.body" }));
}

/// Decodes as everything; only a panic is wrong.
fn decode_as_anything(bytes: &[u8]) {
    let _any = decode_entry(bytes);
    let _any = pb::StoredVote::decode(bytes).map(|m| vote_from(&m));
    let _any = pb::StoredMembership::decode(bytes).map(|m| membership_from(&m));
    let _any = pb::StoredCommand::decode(bytes).map(Command::try_from);
    let _any = pb::StoredNode::decode(bytes).map(Node::try_from);
    let _any = pb::StoredTemplate::decode(bytes).map(Template::try_from);
    let _any = pb::StoredSandbox::decode(bytes).map(Sandbox::try_from);
    let _any = pb::StoredReplica::decode(bytes).map(replica_from);
    let _any = pb::StoredTenant::decode(bytes).map(|m| tenant_from(&m));
    let _any = pb::StoredAnswer::decode(bytes).map(answer_from);
}

#[test]
fn golden_bytes_cut_short_or_changed_never_panic() {
    for (_, kept) in golden_lines() {
        let whole = unhex(kept);
        for at in 0..whole.len() {
            decode_as_anything(&whole[..at]);
            for flip in [0x01, 0x08, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] ^= flip;
                decode_as_anything(&changed);
            }
        }
    }
}

fn any_id() -> impl Strategy<Value = NodeId> {
    "[a-z][a-z0-9]{0,20}".prop_map(|text| NodeId::parse(&text).unwrap())
}

fn any_name() -> impl Strategy<Value = SandboxName> {
    "tenants/[a-z]{1,9}/sandboxes/[a-z0-9]{1,20}".prop_map(|text| SandboxName::parse(&text).unwrap())
}

fn any_map() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(".{0,8}", ".{0,8}", 0..4)
}

fn any_resources() -> impl Strategy<Value = Resources> {
    any::<(u64, u64, u64)>().prop_map(|(c, m, d)| Resources {
        cpu: MilliCpu(c),
        memory: Bytes(m),
        disk: Bytes(d),
        ..Resources::default()
    })
}

fn any_request() -> impl Strategy<Value = Option<RequestKey>> {
    prop::option::of(any::<(u128, [u8; 32])>().prop_map(|(id, payload)| RequestKey { id, payload }))
}

fn any_reason() -> impl Strategy<Value = PendingReason> {
    let code = prop::sample::select(vec![
        PendingCode::NoNodes,
        PendingCode::ShortOfCpu,
        PendingCode::ShortOfMemory,
        PendingCode::ShortOfDisk,
        PendingCode::TooLarge,
        PendingCode::Conflict,
        PendingCode::StartFailed,
    ]);
    (code, ".{0,20}").prop_map(|(code, message)| PendingReason { code, message })
}

fn any_spec() -> impl Strategy<Value = SandboxSpec> {
    let command = prop::collection::vec(".{0,9}", 0..4);
    (command, any_map(), ".{0,9}", any_map(), any_resources(), any::<u64>()).prop_map(
        |(command, environment, working_directory, labels, resources, pids)| {
            let template = template_id();
            SandboxSpec { template, command, environment, working_directory, labels, resources, pids }
        },
    )
}

fn any_body() -> impl Strategy<Value = Body> {
    let decision = prop_oneof![any_id().prop_map(Decision::Place), any_reason().prop_map(Decision::Queue)];
    let phase = prop_oneof![
        prop::sample::select(phases()),
        (any::<(i32, i32, bool)>(), any::<Vec<u8>>()).prop_map(|((code, signal, oom_killed), output_tail)| {
            Phase::Exited { exit: Exit { code, signal, oom_killed }, output_tail }
        }),
    ];
    let seen = (any_name(), any::<u64>(), phase).prop_map(|(sandbox, epoch, phase)| Observed {
        sandbox,
        epoch: Epoch(epoch),
        phase,
    });
    let digests = prop::collection::btree_set(any::<[u8; 32]>().prop_map(Digest), 0..4);
    prop_oneof![
        (any_name(), any_spec(), decision, any_request()).prop_map(|(sandbox, spec, decision, request)| {
            Body::CreateSandbox { sandbox, spec, decision, request }
        }),
        (any_id(), any::<u128>(), prop::collection::vec(seen, 0..5), digests).prop_map(
            |(node, incarnation, sandboxes, templates)| Body::Observe {
                node,
                incarnation,
                observation: Observation { sandboxes, templates }
            }
        ),
        (any_id(), any::<u128>(), ".{0,20}", any::<bool>(), any_resources(), any_map()).prop_map(
            |(node, incarnation, address, tls, capacity, labels)| Body::RegisterNode {
                node,
                report: NodeReport { incarnation, address, tls, capacity, labels, ..report() }
            }
        ),
        (any_name(), any::<u64>(), any_reason()).prop_map(|(sandbox, epoch, reason)| Body::ExplainPending {
            sandbox,
            epoch: Epoch(epoch),
            reason
        }),
        (any_name(), any_request()).prop_map(|(sandbox, request)| Body::DeleteSandbox { sandbox, request }),
        any::<Vec<u64>>().prop_map(|ms| Body::AdvanceTime { samples: ms.into_iter().map(LogTime).collect() }),
        prop::collection::vec(any_name(), 0..5).prop_map(|sandboxes| Body::ForgetEnded { sandboxes }),
        prop::sample::select(bodies()).prop_map(|(_, body)| body),
    ]
}

proptest! {
    #[test]
    fn an_entry_comes_back_as_it_was(
        bodies in prop::collection::vec(any_body(), 0..6),
        (term, index, time) in any::<(u64, u64, u64)>(),
        role in prop::sample::select(vec![Role::System, Role::Node, Role::Operator, Role::Tenant]),
        own in prop::option::of(Just(tenant())),
        principal in ".{0,12}",
    ) {
        let caller = Caller { principal, role, tenant: own };
        let commands: Vec<_> =
            bodies.into_iter().map(|body| Command { caller: caller.clone(), time: LogTime(time), body }).collect();
        let payload = EntryPayload::Normal(Batch { commands: commands.into() });
        let entry = Entry { log_id: LogId::new_term_index(term, index), payload };
        let bytes = entry_to(&entry).encode_to_vec();
        prop_assert_eq!(decode_entry(&bytes), Ok(entry.clone()));
        prop_assert_eq!(entry_to(&entry).encode_to_vec(), bytes, "equal values have equal bytes");
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_as_anything(&bytes);
    }
}
