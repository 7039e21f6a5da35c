//! The ledger's rules, said aloud.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use warren_proto::ids::{Epoch, SandboxName, TemplateId};
use warren_proto::units::Resources;

use super::command::*;
use super::event::{EventKind, Position};
use super::level::Level;
use super::node::Condition;
use super::node::testing::report;
use super::outcome::{Rejected, Reply};
use super::sandbox::*;
use super::testing::{name, node, resources, spec, template};
use super::{State, invariants, request};

mod second_level;

/// A state driven as the log would drive it.
#[derive(Clone)]
struct Ledger {
    state: State,
    now: LogTime,
}

impl Ledger {
    /// Two nodes of 1,000 thousandths of a vCPU and 1,000 bytes each, and a template.
    fn new() -> Self {
        let mut ledger = Self { state: State::default(), now: LogTime(1_000_000_000) };
        ledger.run(Body::AdvanceTime { samples: vec![ledger.now] }).unwrap();
        ledger.run(Body::OpenLedger { ledger_id: LedgerId(7) }).unwrap();
        for id in ["a", "b"] {
            ledger.run(Body::RegisterNode { node: node(id), report: report(1, resources(1000, 1000)) }).unwrap();
        }
        ledger.run(template()).unwrap();
        ledger
    }

    fn run(&mut self, body: Body) -> Result<Reply, Rejected> {
        let index = self.state.revision + 1;
        let result = self.state.apply(index, &Command { caller: Caller::system("test"), time: self.now, body });
        assert_eq!(invariants::check(&self.state), Vec::<String>::new());
        result
    }

    fn create(&mut self, id: &str, on: &str, request: Option<RequestKey>) -> Result<Reply, Rejected> {
        let decision = Decision::Place(node(on).into());
        self.run(Body::CreateSandbox { sandbox: name(id), spec: spec(400, 400).into(), decision, request })
    }

    fn observe(&mut self, on: &str, id: &str, epoch: u64, phase: Phase) -> Result<Reply, Rejected> {
        let seen = Observed { sandbox: name(id), epoch: Epoch(epoch), phase };
        self.observe_all(on, vec![seen])
    }

    fn observe_all(&mut self, on: &str, sandboxes: Vec<Observed>) -> Result<Reply, Rejected> {
        let observation = Observation { sandboxes, templates: Some(BTreeSet::new()) };
        self.run(Body::Observe { node: node(on), incarnation: 1, observation })
    }

    fn life(&self, id: &str) -> &Life {
        &self.state.sandboxes.get(&name(id)).unwrap().life
    }

    fn kind(&self, id: &str) -> &'static str {
        self.life(id).kind()
    }
}

fn failed() -> Phase {
    Phase::Failed { code: "START_FAILED".into(), message: "no such file".into() }
}

fn request_at(ms: u64, salt: u128) -> RequestKey {
    RequestKey { id: (u128::from(ms) << 80) | salt, payload: [1; 32] }
}

#[test]
fn a_life_from_create_to_gone() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    assert_eq!(ledger.kind("s"), "STARTING");
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    assert_eq!(ledger.kind("s"), "RUNNING");
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
    assert_eq!(ledger.kind("s"), "STOPPING");
    assert_eq!(
        ledger.state.nodes.get(&node("a")).unwrap().assigned,
        resources(400, 400),
        "held until the node confirms"
    );
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    assert!(ledger.state.sandboxes.is_empty());
    assert_eq!(ledger.state.nodes.get(&node("a")).unwrap().assigned, Resources::default());
    let kinds: Vec<_> = ledger.state.events.after(Position::default(), 99).unwrap().iter().map(|e| e.kind).collect();
    assert_eq!(kinds, [EventKind::Created, EventKind::Updated, EventKind::Updated, EventKind::Deleted]);
}

#[test]
fn a_decision_that_does_not_hold_queues_the_sandbox_and_oversells_nothing() {
    let mut ledger = Ledger::new();
    for id in ["one", "two", "three"] {
        ledger.create(id, "a", None).unwrap();
    }
    assert_eq!(ledger.kind("three"), "PENDING");
    let place = |on| Body::PlaceSandbox { sandbox: name("three"), epoch: Epoch(0), spot: node(on).into() };
    assert!(matches!(ledger.run(place("a")), Err(Rejected::DoesNotFit { .. })));
    assert!(matches!(ledger.run(place("nowhere")), Err(Rejected::NodeNotFound(_))));
    ledger.run(place("b")).unwrap();
    assert!(matches!(ledger.run(place("b")), Err(Rejected::StaleEpoch { .. })));
}

#[test]
fn nothing_is_placed_on_a_node_whose_lease_lapsed() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    ledger.run(Body::SetNodeReachable { node: node("a"), incarnation: 1, reachable: false }).unwrap();
    ledger.create("late", "a", None).unwrap();
    assert_eq!(ledger.kind("late"), "PENDING");
    assert!(ledger.state.is_unreachable(ledger.state.sandboxes.get(&name("s")).unwrap()));
    ledger.run(Body::RegisterNode { node: node("a"), report: report(2, resources(1000, 1000)) }).unwrap();
    assert!(!ledger.state.is_unreachable(ledger.state.sandboxes.get(&name("s")).unwrap()));
}

#[test]
fn a_failed_start_is_tried_elsewhere_and_not_for_ever() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    for attempt in 1..MAX_START_ATTEMPTS {
        ledger.observe("a", "s", u64::from(attempt), failed()).unwrap();
        assert_eq!(ledger.kind("s"), "PENDING");
        let sandbox = ledger.state.sandboxes.get(&name("s")).unwrap();
        assert_eq!(sandbox.avoid, Some(node("a")));
        ledger
            .run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(u64::from(attempt)), spot: node("a").into() })
            .unwrap();
    }
    ledger.observe("a", "s", u64::from(MAX_START_ATTEMPTS), failed()).unwrap();
    assert_eq!(ledger.kind("s"), "FAILED");
}

#[test]
fn what_an_older_epoch_or_agent_says_changes_nothing() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    ledger.observe("a", "s", 1, failed()).unwrap();
    ledger.run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(1), spot: node("b").into() }).unwrap();
    for (on, epoch) in [("a", 1), ("a", 2), ("b", 1)] {
        ledger.observe(on, "s", epoch, Phase::Running).unwrap();
        assert_eq!(ledger.kind("s"), "STARTING", "{on} {epoch}");
    }
    let report = report(5, resources(1000, 1000));
    ledger.run(Body::RegisterNode { node: node("b"), report }).unwrap();
    assert_eq!(ledger.observe("b", "s", 2, Phase::Running), Err(Rejected::StaleIncarnation(node("b"))));
}

#[test]
fn a_main_process_that_ends_is_stopped_with_its_exit_and_frees_its_node() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    let exit = Exit { code: 137, signal: 9, oom_killed: true };
    ledger.observe("a", "s", 1, Phase::Exited { exit, output_tail: b"bye".to_vec() }).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    match ledger.life("s") {
        Life::Stopped { node: None, ending } => assert_eq!((ending.exit, &ending.output_tail[..]), (exit, &b"bye"[..])),
        other => panic!("{other:?}"),
    }
    assert_eq!(ledger.state.nodes.get(&node("a")).unwrap().assigned, Resources::default());
    let forget = Body::ForgetEnded { sandboxes: vec![name("s")] };
    ledger.run(forget.clone()).unwrap();
    assert_eq!(ledger.kind("s"), "STOPPED", "its retention is not over");
    ledger.now = ledger.now.plus_ms(ENDED_RETENTION_MS);
    ledger.run(Body::AdvanceTime { samples: vec![ledger.now] }).unwrap();
    ledger.run(forget).unwrap();
    assert!(ledger.state.sandboxes.is_empty());
}

#[test]
fn a_node_that_was_forgotten_and_returns_goes_on_above_its_generations() {
    let mut ledger = Ledger::new();
    ledger.state.level = Level::SECOND;
    for id in ["r", "s", "t"] {
        let _placed_or_queued = ledger.create(id, "a", None).unwrap();
    }
    let before = ledger.state.nodes[&node("a")].generation;
    for to in [Condition::Suspect, Condition::Down] {
        ledger.run(Body::SetNodeCondition { node: node("a"), incarnation: 1, to }).unwrap();
    }
    ledger.run(Body::ForgetNode { node: node("a") }).unwrap();
    ledger.run(Body::RegisterNode { node: node("a"), report: report(1, resources(1000, 1000)) }).unwrap();
    assert!(ledger.state.nodes[&node("a")].generation > before, "or its agent would take what it is told for old");
}

#[test]
fn what_a_node_no_longer_has_is_lost_and_said_to_be() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    assert!(matches!(ledger.life("s"), Life::Failed { code, .. } if **code == *"LOST"));
}

#[test]
fn an_orphan_is_noted_and_left_alone() {
    let mut ledger = Ledger::new();
    let orphan = Observed { sandbox: name("ghost"), epoch: Epoch(3), phase: Phase::Orphan };
    ledger.observe_all("a", vec![orphan]).unwrap();
    assert_eq!(ledger.state.nodes.get(&node("a")).unwrap().orphans.len(), 1);
    ledger.run(Body::RegisterNode { node: node("a"), report: report(1, resources(1000, 1000)) }).unwrap();
    assert!(ledger.state.nodes.get(&node("a")).unwrap().orphans.is_empty());
}

#[test]
fn the_same_request_twice_has_one_effect_and_the_first_answer() {
    let mut ledger = Ledger::new();
    let key = request_at(ledger.now.0, 1);
    let first = ledger.create("s", "a", Some(key)).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    assert_eq!(ledger.create("s", "a", Some(key)).unwrap(), first);
    let other = RequestKey { payload: [2; 32], ..key };
    assert_eq!(ledger.create("s", "a", Some(other)), Err(Rejected::RequestIdReused));
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    assert_eq!(ledger.create("s", "a", Some(key)).unwrap(), first, "a late retry does not create it again");
    assert!(ledger.state.sandboxes.is_empty());
}

#[test]
fn an_old_request_id_is_refused_whether_or_not_it_was_seen() {
    let mut ledger = Ledger::new();
    let seen = request_at(ledger.now.0, 1);
    ledger.create("s", "a", Some(seen)).unwrap();
    ledger.now = ledger.now.plus_ms(request::RETENTION_MS);
    ledger.run(Body::AdvanceTime { samples: vec![ledger.now] }).unwrap();
    assert_eq!(ledger.create("s", "a", Some(seen)), Err(Rejected::RequestIdExpired));
    assert!(ledger.state.requests.is_empty(), "its answer was cleared away");
    let unseen = request_at(ledger.now.0 - request::RETENTION_MS, 2);
    assert_eq!(ledger.create("x", "a", Some(unseen)), Err(Rejected::RequestIdExpired));
    let ahead = request_at(ledger.now.0 + request::MAX_AHEAD_MS + 1, 3);
    assert!(matches!(ledger.create("x", "a", Some(ahead)), Err(Rejected::RequestIdFromFuture { .. })));
}

#[test]
fn a_chosen_id_is_idempotent_for_the_same_sandbox_only() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    assert!(ledger.create("s", "b", None).is_ok(), "the same spec, whatever the decision");
    let other = Body::CreateSandbox {
        sandbox: name("s"),
        spec: spec(1, 1).into(),
        decision: Decision::Place(node("a").into()),
        request: None,
    };
    assert_eq!(ledger.run(other), Err(Rejected::SandboxExists(name("s"))));
    assert_eq!(ledger.state.sandboxes.len(), 1);
}

#[test]
fn a_name_that_is_used_again_gets_an_epoch_that_was_never_used() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    ledger.create("s", "a", None).unwrap();
    assert_eq!(ledger.state.sandboxes.get(&name("s")).unwrap().epoch, Epoch(2));
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    assert_eq!(ledger.kind("s"), "STARTING");
}

#[test]
fn a_retry_of_a_create_that_found_its_sandbox_there_does_not_make_it_again() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    let second = request_at(ledger.now.0, 9);
    ledger.create("s", "a", Some(second)).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    ledger.create("s", "a", Some(second)).unwrap();
    assert!(ledger.state.sandboxes.is_empty(), "its answer was given before the delete");
}

#[test]
fn a_template_in_use_stays() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    let base = TemplateId::parse("base").unwrap();
    let delete = Body::DeleteTemplate { template: base.clone() };
    assert_eq!(ledger.run(delete.clone()), Err(Rejected::TemplateInUse { template: base, sandboxes: 1 }));
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    ledger.run(delete).unwrap();
}

#[test]
fn log_time_never_goes_back_and_no_command_moves_it_far() {
    let mut ledger = Ledger::new();
    let start = ledger.state.log_time;
    ledger.now = LogTime(0);
    ledger.create("s", "a", None).unwrap();
    assert_eq!(ledger.state.log_time, start);
    ledger.now = start.plus_ms(10 * super::MAX_TIME_STEP_MS);
    ledger.create("t", "a", None).unwrap();
    assert_eq!(ledger.state.log_time, start.plus_ms(super::MAX_TIME_STEP_MS));
    ledger.run(Body::AdvanceTime { samples: vec![LogTime(5), start.plus_ms(9), LogTime(u64::MAX)] }).unwrap();
    assert_eq!(ledger.state.log_time, start.plus_ms(super::MAX_TIME_STEP_MS), "the median lies behind");
}

#[test]
fn a_watcher_that_was_overtaken_is_told() {
    let mut ledger = Ledger::new();
    ledger.create("s", "a", None).unwrap();
    let ring = super::event::EventRing::starting_after(ledger.state.revision);
    assert!(ring.after(Position::default(), 1).is_err());
    assert_eq!(ring.after(Position::end_of(ledger.state.revision), 1).unwrap(), vec![]);
}

fn any_body() -> impl Strategy<Value = Body> {
    let sandbox = || prop::sample::select(vec!["s0", "s1", "s2", "s3"]).prop_map(name);
    let host = || prop::sample::select(vec!["a", "b", "c"]).prop_map(node);
    let phase = prop_oneof![
        Just(Phase::Starting),
        Just(Phase::Running),
        Just(Phase::Removed),
        Just(Phase::Orphan),
        Just(failed()),
        Just(Phase::Exited { exit: Exit::default(), output_tail: vec![] }),
    ];
    let seen = (sandbox(), 0u64..5, phase).prop_map(|(sandbox, epoch, phase)| Observed {
        sandbox,
        epoch: Epoch(epoch),
        phase,
    });
    let observe = (host(), 0u128..3, prop::collection::vec(seen, 0..4)).prop_map(|(node, incarnation, sandboxes)| {
        Body::Observe { node, incarnation, observation: Observation { sandboxes, templates: Some(BTreeSet::new()) } }
    });
    let key = prop::option::of((0u64..3, 0u8..2).prop_map(|(salt, payload)| RequestKey {
        payload: [payload; 32],
        ..request_at(1_000_000_000, u128::from(salt))
    }));
    prop_oneof![
        4 => (sandbox(), host(), 1u64..700, key.clone()).prop_map(|(sandbox, on, cpu, request)| Body::CreateSandbox {
            sandbox, spec: spec(cpu, cpu).into(), decision: Decision::Place(on.into()), request
        }),
        6 => observe,
        3 => (sandbox(), 0u64..5, host()).prop_map(|(sandbox, epoch, node)| Body::PlaceSandbox { sandbox, epoch: Epoch(epoch), spot: node.into() }),
        2 => (sandbox(), key).prop_map(|(sandbox, request)| Body::DeleteSandbox { sandbox, request }),
        1 => (host(), 0u128..3, 0u64..1500).prop_map(|(node, incarnation, size)| Body::RegisterNode {
            node, report: report(incarnation, resources(size, size))
        }),
        1 => (host(), 0u128..3, any::<bool>()).prop_map(|(node, incarnation, reachable)| Body::SetNodeReachable { node, incarnation, reachable }),
        1 => sandbox().prop_map(|sandbox| Body::ForgetEnded { sandboxes: vec![sandbox] }),
        1 => (0u64..9_000_000).prop_map(|ms| Body::AdvanceTime { samples: vec![LogTime(1_000_000_000 + ms)] }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Rule 1 and the indexes hold after every command, whatever is proposed; epochs and log time never go back; the same
    /// log gives the same state.
    #[test]
    fn the_invariants_hold_in_every_prefix(bodies in prop::collection::vec(any_body(), 1..60)) {
        let (mut ledger, mut twin) = (Ledger::new(), Ledger::new());
        let mut epochs: BTreeMap<SandboxName, Epoch> = BTreeMap::new();
        for body in bodies {
            let before = ledger.state.log_time;
            let _accepted_or_rejected = ledger.run(body.clone());
            let _the_same = twin.run(body);
            prop_assert!(ledger.state.log_time >= before);
            for sandbox in ledger.state.sandboxes.values() {
                let highest = epochs.entry(sandbox.name.clone()).or_default();
                prop_assert!(sandbox.epoch >= *highest);
                *highest = sandbox.epoch;
            }
        }
        prop_assert!(ledger.state.sandboxes == twin.state.sandboxes && ledger.state.nodes == twin.state.nodes);
    }
}
