//! Golden bytes of everything that is kept on disk, round trips, and garbage.
//!
//! `tests/golden/storage.txt` holds what earlier builds wrote. A line of it is never changed: bytes that a new build writes
//! differently are bytes that an old replica's disk holds and this build must still read. New lines are printed by the test
//! that misses them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use openraft::EntryPayload;
use proptest::prelude::*;
use prost::Message;
use warren_proto::ids::{Digest, Epoch, NodeId, ReplicaId, SandboxName};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_proto::v1 as pb;

use super::CodecError;
use super::entity::{answer_from, answer_to, replica_from, replica_to, tenant_from, tenant_to};
use super::log::{decode_entry, entry_to, membership_from, membership_to, vote_from, vote_to};
use super::region::{event_from, event_to, region_from, region_to};
use super::samples::*;
use crate::raft::types::{Batch, Entry, LogId, Vote};
use crate::state::State;
use crate::state::command::{
    BatchItem, Body, Caller, Change, Command, Decision, LogTime, Observation, Observed, Phase, ReplicaRecord,
    RequestKey, Role, Spot,
};
use crate::state::event::Position;
use crate::state::gpu::{GpuHold, GpuHolds};
use crate::state::level::Level;
use crate::state::node::{Node, NodeReport};
use crate::state::sandbox::{Exit, PendingReason, Sandbox, SandboxSpec};
use crate::state::settings::{Egress, Expiry, Isolation, MAX_PRIORITY, Restart, Settings};
use crate::state::template::Template;
use crate::state::tenant::{Quota, Tenant};

const GOLDEN: &str = include_str!("../../../tests/golden/storage.txt");

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

    /// What an earlier build wrote, and this one writes differently.
    fn reads<V: PartialEq + Debug, M: Message + Default>(
        &mut self,
        name: &str,
        value: &V,
        from: impl Fn(M) -> Result<V, CodecError>,
    ) {
        self.seen.insert(name.to_owned());
        let kept = kept(name).unwrap_or_default();
        assert_eq!(from(M::decode(kept.as_slice()).unwrap()).as_ref(), Ok(value), "{name} is misread");
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
    let batch = bodies().into_iter().find(|(name, _)| *name == "create_batch_2").unwrap().1;
    golden.reads("command_create_batch", &command(batch), |c: pb::StoredCommand| c.try_into());
    golden.check("node", &whole_node(), |n| pb::StoredNode::from(n), TryInto::try_into);
    golden.check("template", &template(), |t| pb::StoredTemplate::from(t), TryInto::try_into);
    for (name, life) in lives() {
        let sandbox = sandbox(life);
        golden.check(&format!("sandbox_{name}"), &sandbox, |s| pb::StoredSandbox::from(s), TryInto::try_into);
    }
    golden.check("replica", &replica(), |(id, record)| replica_to(*id, record), replica_from);
    golden.check("tenant", &owner(), |(id, tenant)| tenant_to(id, tenant), tenant_from);
    golden.check("node_2", &silent_node(), |n| pb::StoredNode::from(n), TryInto::try_into);
    for (name, sandbox) in sandboxes_of_second_level() {
        golden.check(name, &sandbox, |s| pb::StoredSandbox::from(s), TryInto::try_into);
    }
    golden.check("replica_2", &(ReplicaId(2), full_record()), |(id, record)| replica_to(*id, record), replica_from);
    let limited = Tenant { quota: Some(quota()), creates_left: (500, LogTime(7)), ..owner().1 };
    golden.check("tenant_2", &(tenant(), limited), |(id, tenant)| tenant_to(id, tenant), tenant_from);
    golden.check("event_2", &event(), event_to, event_from);
    for (name, event) in later_events() {
        golden.check(name, &event, event_to, event_from);
    }
    for (name, reason) in reasons() {
        golden.check(name, &reason, |r| pb::StoredPendingReason::from(r), TryInto::try_into);
    }
    golden.check("node_gpus_2", &gpu_node(), |n| pb::StoredNode::from(n), TryInto::try_into);
    golden.check("node_suspect_2", &suspect_node(), |n| pb::StoredNode::from(n), TryInto::try_into);
    golden.check(
        "membership_standby",
        &membership_with_standby(),
        |m| membership_to(None, m),
        |m| membership_from(&m).map(|stored| stored.membership().clone()),
    );
    golden.check("event_unreachable_2", &unreachable_event(), event_to, event_from);
    check_region(&mut golden);
    for (name, scope, answer) in answers() {
        let value = (scope, request().id, answer);
        golden.check(name, &value, |(scope, id, answer)| answer_to(scope, *id, answer), answer_from);
    }
    golden.finish();
}

fn check_region(golden: &mut Golden) {
    let floor = Position { index: 3, ordinal: 4 };
    let whole = |state: &State| (state.level, state.predecessors.clone(), state.restored_floor, state.region.clone());
    let read = |stored| {
        let mut state = State::default();
        region_from(&mut state, stored).map(|floor| (whole(&state), floor))
    };
    golden.check("region_2", &(whole(&region()), floor), |_| region_to(&region(), floor), read);
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
    let _any = pb::StoredTenant::decode(bytes).map(tenant_from);
    let _any = pb::StoredEvent::decode(bytes).map(event_from);
    let _any = pb::StoredRegion::decode(bytes).map(|m| region_from(&mut State::default(), m));
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
    any::<(u64, u64, u64, u64)>().prop_map(|(cpu, memory, disk, gpus)| Resources {
        cpu: MilliCpu(cpu),
        memory: Bytes(memory),
        disk: Bytes(disk),
        gpus: Gpus(gpus),
    })
}

fn any_request() -> impl Strategy<Value = Option<RequestKey>> {
    prop::option::of(any::<(u128, [u8; 32])>().prop_map(|(id, payload)| RequestKey { id, payload }))
}

fn any_reason() -> impl Strategy<Value = PendingReason> {
    (prop::sample::select(reasons()), ".{0,20}").prop_map(|((_, reason), message)| PendingReason { message, ..reason })
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let expiry = prop_oneof![
        Just(Expiry::Never),
        any::<u64>().prop_map(|at| Expiry::At(LogTime(at))),
        any::<u64>().prop_map(Expiry::After),
    ];
    let egress = prop_oneof![
        Just(Egress::None),
        Just(Egress::Public),
        prop::collection::vec(".{0,9}", 0..3).prop_map(Egress::List),
    ];
    (any_map(), any_map(), expiry, egress, 0..=MAX_PRIORITY).prop_map(
        |(labels, annotations, expiry, egress, priority)| Settings {
            labels: labels.into_iter().collect(),
            annotations: annotations.into_iter().collect(),
            expiry,
            egress,
            priority,
        },
    )
}

fn any_spec() -> impl Strategy<Value = SandboxSpec> {
    let command = prop::collection::vec(".{0,9}", 0..4);
    let secrets = prop::collection::btree_map("[A-Z]{1,4}", any::<Vec<u8>>(), 0..3);
    let restart = prop::sample::select(vec![Restart::Never, Restart::OnFailure, Restart::Always]);
    let isolation = prop::sample::select(vec![Isolation::Keep, Isolation::Freeze]);
    let process = (command, any_map(), ".{0,9}", secrets);
    let rest = (any_settings(), any_resources(), any::<u64>(), restart, isolation, any_limit());
    (process, rest).prop_map(|(process, rest)| {
        let (command, environment, working_directory, secrets) = process;
        let (settings, resources, pids, restart, isolation, queue_timeout_ms) = rest;
        SandboxSpec {
            template: template_id(),
            command,
            environment: environment.into_iter().collect(),
            working_directory,
            secrets: secrets.iter().map(|(name, sealed)| (name.as_str(), sealed.clone())).collect(),
            resources,
            pids,
            restart,
            isolation,
            queue_timeout_ms,
            settings,
        }
    })
}

/// 0 is a number like others, and not the same as none.
fn any_limit() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), Just(Some(0)), any::<u64>().prop_map(Some)]
}

fn any_quota() -> impl Strategy<Value = Quota> {
    let limit = any_limit;
    (limit(), limit(), limit(), limit(), limit(), limit()).prop_map(
        |(cpu, memory, disk, gpus, sandboxes, creates_per_minute)| Quota {
            cpu: cpu.map(MilliCpu),
            memory: memory.map(Bytes),
            disk: disk.map(Bytes),
            gpus: gpus.map(Gpus),
            sandboxes,
            creates_per_minute,
        },
    )
}

fn any_spot() -> impl Strategy<Value = Spot> {
    (any_id(), any_holds()).prop_map(|(node, gpus)| Spot { node, gpus })
}

fn any_holds() -> impl Strategy<Value = GpuHolds> {
    let hold = ("[A-Z0-9-]{1,9}", any::<(u32, u64)>());
    let hold = hold.prop_map(|(uuid, (milli, memory))| GpuHold { uuid: uuid.into(), milli, memory: Bytes(memory) });
    prop::collection::vec(hold, 0..4).prop_map(GpuHolds::from_iter)
}

fn any_decision() -> impl Strategy<Value = Decision> {
    prop_oneof![any_spot().prop_map(Decision::Place), any_reason().prop_map(Decision::Queue)]
}

fn any_change() -> impl Strategy<Value = Change> {
    (any_settings(), any::<[bool; 5]>()).prop_map(|(new, [labels, annotations, expiry, egress, priority])| {
        Change::of(new, labels, annotations, expiry, egress, priority)
    })
}

fn any_observed() -> impl Strategy<Value = Observed> {
    let phase = prop_oneof![
        prop::sample::select(phases()),
        (any::<(i32, i32, bool)>(), any::<Vec<u8>>()).prop_map(|((code, signal, oom_killed), output_tail)| {
            Phase::Exited { exit: Exit { code, signal, oom_killed }, output_tail }
        }),
        (".{0,9}", ".{0,9}").prop_map(|(code, message)| Phase::Failed { code, message }),
    ];
    (any_name(), any::<u64>(), phase).prop_map(|(sandbox, epoch, phase)| Observed {
        sandbox,
        epoch: Epoch(epoch),
        phase,
    })
}

/// Bodies of sandboxes.
fn any_body_of_sandboxes() -> impl Strategy<Value = Body> {
    let item = (any_name(), any_spec(), any_decision()).prop_map(|(sandbox, spec, decision)| BatchItem {
        sandbox,
        spec: spec.into(),
        decision,
    });
    let epoch = || any::<u64>().prop_map(Epoch);
    prop_oneof![
        (any_name(), any_spec(), any_decision(), any_request()).prop_map(|(sandbox, spec, decision, request)| {
            Body::CreateSandbox { sandbox, spec: spec.into(), decision, request }
        }),
        (prop::collection::vec(item, 0..4), any_request())
            .prop_map(|(items, request)| Body::CreateBatch { items, request }),
        (any_name(), any_change(), any_limit(), any_request()).prop_map(|(sandbox, change, if_revision, request)| {
            Body::UpdateSandbox { sandbox, change, if_revision, request }
        }),
        (any_name(), epoch(), any_reason()).prop_map(|(sandbox, epoch, reason)| Body::ExplainPending {
            sandbox,
            epoch,
            reason
        }),
        (any_name(), epoch(), any_spot()).prop_map(|(sandbox, epoch, spot)| Body::PlaceSandbox {
            sandbox,
            epoch,
            spot
        }),
        (any_name(), epoch()).prop_map(|(sandbox, epoch)| Body::RequeueSandbox { sandbox, epoch }),
        (any_name(), any_request()).prop_map(|(sandbox, request)| Body::DeleteSandbox { sandbox, request }),
        prop::collection::vec(any_name(), 0..5).prop_map(|sandboxes| Body::ForgetEnded { sandboxes }),
        prop::collection::vec(any_name(), 0..5).prop_map(|sandboxes| Body::EndDue { sandboxes }),
    ]
}

/// Bodies of nodes and of the region.
fn any_body_of_the_region() -> impl Strategy<Value = Body> {
    let digests = prop::option::of(prop::collection::btree_set(any::<[u8; 32]>().prop_map(Digest), 0..4));
    let flag = any::<Option<bool>>;
    let owner = prop::option::of(Just(tenant()));
    let remove = prop::collection::btree_set(".{0,8}", 0..3);
    prop_oneof![
        (any_id(), any::<u128>(), prop::collection::vec(any_observed(), 0..5), digests).prop_map(
            |(node, incarnation, sandboxes, templates)| Body::Observe {
                node,
                incarnation,
                observation: Observation { sandboxes, templates }
            }
        ),
        (any_id(), any::<u128>(), ".{0,20}", any::<(bool, bool)>(), any_resources(), any_map()).prop_map(
            |(node, incarnation, address, (tls, fence), capacity, labels)| Body::RegisterNode {
                node,
                report: NodeReport { incarnation, address, tls, capacity, labels, fence, ..report() }
            }
        ),
        (any_id(), flag(), any_map(), remove).prop_map(|(node, cordoned, set_labels, remove_labels)| {
            Body::SetNodePolicy { node, cordoned, set_labels, remove_labels }
        }),
        (any::<u64>(), any::<u128>(), any::<[u8; 32]>(), 1u32.., ".{0,9}").prop_map(
            |(id, disk, token_key, level, api_address)| Body::PutReplica {
                replica: ReplicaId(id),
                record: ReplicaRecord { api_address, token_key, disk, max_level: Level(level) },
            }
        ),
        (flag(), flag(), flag()).prop_map(|(creates, placement, moves)| Body::SetPause { creates, placement, moves }),
        (owner, prop::option::of(any_quota())).prop_map(|(tenant, quota)| Body::SetQuota { tenant, quota }),
        any::<u32>().prop_map(|level| Body::SetLevel { level: Level(level) }),
        any::<Vec<u64>>().prop_map(|ms| Body::AdvanceTime { samples: ms.into_iter().map(LogTime).collect() }),
        prop::sample::select(bodies()).prop_map(|(_, body)| body),
    ]
}

fn any_body() -> impl Strategy<Value = Body> {
    prop_oneof![any_body_of_sandboxes(), any_body_of_the_region()]
}

proptest! {
    /// The leader applies what it was given, the others what they decode: it must be the same.
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

/// No sandbox is at revision 0, so such an update is refused; read as one without a condition, it would be made on the replicas
/// that have it from their logs, and refused where it is in memory.
#[test]
fn an_update_as_of_revision_0_stays_one() {
    let sandbox = SandboxName::parse("tenants/t/sandboxes/s").unwrap();
    for if_revision in [None, Some(0), Some(1)] {
        let (sandbox, change) = (sandbox.clone(), Default::default());
        let body = Body::UpdateSandbox { sandbox, change, if_revision, request: None };
        let command = Command { caller: Caller::system("test"), time: LogTime(1), body };
        assert_eq!(super::command::stored_and_read(&command).unwrap(), command);
    }
}
