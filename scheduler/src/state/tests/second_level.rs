//! What the second level brings: conditions and the brake, isolation, settings, quotas, pauses, batches, time.

use warren_proto::ids::{ReplicaId, TenantId};
use warren_proto::units::MilliCpu;

use super::*;
use crate::state::MAX_TIME_STEP_MS;
use crate::state::level::Level;
use crate::state::node::Condition;
use crate::state::outcome::Subject;
use crate::state::pairs::Pairs;
use crate::state::region::HOLD_MS;
use crate::state::settings::{Expiry, Isolation, Restart, Settings};
use crate::state::tenant::{MAX_PENDING_OF_TENANT, Quota};

mod gpus;

impl Ledger {
    /// Three replicas that support all levels, and the second level.
    fn second() -> Self {
        let mut ledger = Self::new();
        let voters: BTreeSet<ReplicaId> = (1..=3).map(ReplicaId).collect();
        ledger.state.set_members(voters.clone(), BTreeSet::new());
        for replica in voters {
            ledger.announce(replica, Level::SECOND);
        }
        ledger.run(Body::SetLevel { level: Level::SECOND }).unwrap();
        ledger
    }

    fn announce(&mut self, replica: ReplicaId, max_level: Level) {
        let record = ReplicaRecord { api_address: "h:1".into(), token_key: [1; 32], disk: 7, max_level };
        self.run(Body::PutReplica { replica, record }).unwrap();
    }

    fn create_spec(&mut self, id: &str, spec: SandboxSpec, decision: Decision) -> Result<Reply, Rejected> {
        self.run(Body::CreateSandbox { sandbox: name(id), spec: spec.into(), decision, request: None })
    }

    fn turn(&mut self, id: &str, to: Condition) -> Result<Reply, Rejected> {
        self.run(Body::SetNodeCondition { node: node(id), incarnation: 1, to })
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(MAX_TIME_STEP_MS) {
            self.now = self.now.plus_ms(MAX_TIME_STEP_MS.min(ms));
            self.run(Body::AdvanceTime { samples: vec![] }).unwrap();
        }
    }
}

fn freezes() -> SandboxSpec {
    SandboxSpec { isolation: Isolation::Freeze, ..spec(400, 400) }
}

fn on(id: &str) -> Decision {
    Decision::Place(node(id).into())
}

fn queue() -> Decision {
    Decision::Queue(PendingReason { code: PendingCode::NoNodes, message: "none".into() })
}

#[test]
fn a_level_is_raised_only_when_every_member_supports_it() {
    let mut ledger = Ledger::new();
    let voters: BTreeSet<ReplicaId> = (1..=2).map(ReplicaId).collect();
    ledger.state.set_members(voters, BTreeSet::from([ReplicaId(3)]));
    ledger.announce(ReplicaId(1), Level::SECOND);
    ledger.announce(ReplicaId(2), Level::SECOND);
    let raise = Body::SetLevel { level: Level::SECOND };
    assert!(matches!(ledger.run(raise.clone()), Err(Rejected::LevelNotSupported { .. })), "a learner has not said");
    ledger.announce(ReplicaId(3), Level::FIRST);
    assert!(matches!(ledger.run(raise.clone()), Err(Rejected::LevelNotSupported { .. })), "a learner does not");
    let refused = ledger.turn("a", Condition::Suspect);
    assert_eq!(refused, Err(Rejected::LevelTooLow { level: Level::FIRST, needed: Level::SECOND }));
    ledger.announce(ReplicaId(3), Level::SECOND);
    ledger.run(raise).unwrap();
    ledger.turn("a", Condition::Suspect).unwrap();
    let skip = ledger.run(Body::SetLevel { level: Level(4) });
    assert!(matches!(skip, Err(Rejected::LevelNotSupported { .. })), "one at a time");
}

#[test]
fn a_replica_with_another_disk_is_not_the_one_that_was() {
    let mut ledger = Ledger::second();
    let record = ReplicaRecord { disk: 8, ..ledger.state.replicas[&ReplicaId(1)].clone() };
    assert_eq!(
        ledger.run(Body::PutReplica { replica: ReplicaId(1), record }),
        Err(Rejected::ReplicaDisk(ReplicaId(1)))
    );
}

#[test]
fn only_what_freezes_is_taken_off_a_node_that_is_down_and_its_room_counts_until_the_node_says_so() {
    let mut ledger = Ledger::second();
    ledger.create_spec("kept", spec(400, 400), on("a")).unwrap();
    ledger.create_spec("frozen", freezes(), on("a")).unwrap();
    let requeue = |id: &str| Body::RequeueSandbox { sandbox: name(id), epoch: Epoch(1) };
    assert!(ledger.run(requeue("frozen")).is_err(), "its node is heard of");
    ledger.turn("a", Condition::Suspect).unwrap();
    assert!(ledger.run(requeue("frozen")).is_err(), "its node may come back in time");
    assert!(ledger.turn("b", Condition::Down).is_err(), "from ready to down there is a step between");
    ledger.turn("a", Condition::Down).unwrap();
    assert!(ledger.run(requeue("kept")).is_err(), "it may run there");
    ledger.run(requeue("frozen")).unwrap();
    assert_eq!(ledger.state.nodes[&node("a")].assigned, resources(800, 800), "what is left over counts");
    ledger.run(Body::PlaceSandbox { sandbox: name("frozen"), epoch: Epoch(1), spot: node("b").into() }).unwrap();
    assert_eq!(ledger.state.sandboxes[&name("frozen")].epoch, Epoch(2));

    ledger.turn("a", Condition::Ready).unwrap();
    ledger.observe("a", "frozen", 1, Phase::Running).unwrap();
    assert_eq!(ledger.kind("frozen"), "STARTING", "the old instance says nothing of the new one");
    ledger.observe("a", "frozen", 1, Phase::Removed).unwrap();
    assert_eq!(ledger.state.nodes[&node("a")].assigned, resources(400, 400));
}

#[test]
fn a_node_that_holds_an_old_instance_takes_no_new_one_and_without_a_fence_nothing_that_freezes() {
    let mut ledger = Ledger::second();
    ledger.create_spec("s", freezes(), on("a")).unwrap();
    ledger.turn("a", Condition::Suspect).unwrap();
    ledger.turn("a", Condition::Down).unwrap();
    ledger.run(Body::RequeueSandbox { sandbox: name("s"), epoch: Epoch(1) }).unwrap();
    ledger.turn("a", Condition::Ready).unwrap();
    let back = ledger.run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(1), spot: node("a").into() });
    assert!(matches!(back, Err(Rejected::DoesNotFit { .. })), "{back:?}");
    let unfenced = super::super::node::NodeReport { fence: false, ..report(2, resources(1000, 1000)) };
    ledger.run(Body::RegisterNode { node: node("b"), report: unfenced }).unwrap();
    let there = ledger.run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(1), spot: node("b").into() });
    assert!(matches!(there, Err(Rejected::DoesNotFit { .. })), "{there:?}");
}

#[test]
fn the_brake_holds_when_too_many_fall_silent_and_is_released_by_their_return_or_an_operator() {
    let mut ledger = Ledger::second();
    let ids: Vec<String> = (0..10).map(|n| format!("n{n}")).collect();
    for id in &ids {
        ledger.run(Body::RegisterNode { node: node(id), report: report(1, resources(1, 1)) }).unwrap();
    }
    // Of 12 nodes, two are believed.
    for id in &ids[..3] {
        ledger.turn(id, Condition::Suspect).unwrap();
    }
    assert!(matches!(ledger.turn("n0", Condition::Down), Err(Rejected::Braked { lapsed: 3, believed: 2 })));
    ledger.turn("n2", Condition::Ready).unwrap();
    ledger.turn("n0", Condition::Down).unwrap();
    for id in &ids[3..6] {
        ledger.turn(id, Condition::Suspect).unwrap();
    }
    assert!(ledger.turn("n3", Condition::Down).is_err());
    ledger.run(Body::ReleaseBrake).unwrap();
    ledger.turn("n3", Condition::Down).unwrap();
}

/// Twelve nodes, of which two are believed to fail within a minute: `n0` to `n9`, `a` and `b`.
fn twelve() -> Ledger {
    let mut ledger = Ledger::second();
    for n in 0..10 {
        let register = Body::RegisterNode { node: node(&format!("n{n}")), report: report(1, resources(1, 1)) };
        ledger.run(register).unwrap();
    }
    ledger
}

#[test]
fn those_that_are_down_already_count_when_others_fall_silent_and_return() {
    let mut ledger = twelve();
    for id in ["n0", "n1"] {
        ledger.turn(id, Condition::Suspect).unwrap();
        ledger.turn(id, Condition::Down).unwrap();
    }
    for id in ["n2", "n3"] {
        ledger.turn(id, Condition::Suspect).unwrap();
    }
    ledger.turn("n3", Condition::Ready).unwrap();
    assert!(matches!(ledger.turn("n2", Condition::Down), Err(Rejected::Braked { lapsed: 3, believed: 2 })));
    ledger.pass(10 * 60_000);
    assert!(ledger.turn("n2", Condition::Down).is_err(), "time alone settles nothing");
    ledger.turn("n4", Condition::Suspect).unwrap();
    ledger.turn("n4", Condition::Ready).unwrap();
    assert!(ledger.turn("n2", Condition::Down).is_err(), "nor do others");
    ledger.turn("n1", Condition::Ready).unwrap();
    ledger.turn("n2", Condition::Down).unwrap();
}

#[test]
fn after_the_brake_released_itself_those_that_are_left_still_count() {
    let mut ledger = twelve();
    for id in ["n0", "n1", "n2"] {
        ledger.turn(id, Condition::Suspect).unwrap();
    }
    ledger.turn("n2", Condition::Ready).unwrap();
    ledger.turn("n0", Condition::Down).unwrap();
    ledger.turn("n1", Condition::Down).unwrap();
    ledger.turn("n3", Condition::Suspect).unwrap();
    assert!(matches!(ledger.turn("n3", Condition::Down), Err(Rejected::Braked { lapsed: 3, believed: 2 })));
    ledger.run(Body::ReleaseBrake).unwrap();
    ledger.turn("n3", Condition::Down).unwrap();
}

#[test]
fn nodes_that_nobody_has_heard_of_since_a_restore_are_not_all_declared_down() {
    let mut ledger = twelve();
    super::super::node::suspect_all(&mut ledger.state);
    assert!(matches!(ledger.turn("n0", Condition::Down), Err(Rejected::Braked { lapsed: 12, believed: 2 })));
    for id in (1..=8).map(|n| format!("n{n}")).chain(["a".to_owned()]) {
        ledger.turn(&id, Condition::Ready).unwrap();
    }
    assert!(ledger.turn("n0", Condition::Down).is_err());
    ledger.turn("b", Condition::Ready).unwrap();
    ledger.turn("n0", Condition::Down).unwrap();
}

#[test]
fn lapses_that_lie_far_apart_do_not_add_up() {
    let mut ledger = Ledger::second();
    for n in 0..8 {
        let id = format!("n{n}");
        ledger.run(Body::RegisterNode { node: node(&id), report: report(1, resources(1, 1)) }).unwrap();
        ledger.turn(&id, Condition::Suspect).unwrap();
        ledger.turn(&id, Condition::Down).unwrap();
        ledger.pass(61_000);
    }
    assert_eq!(ledger.state.region.brake_since, None);
}

#[test]
fn a_forgotten_nodes_sandboxes_are_lost_or_start_elsewhere_as_they_said() {
    let mut ledger = Ledger::second();
    let restarts = SandboxSpec { restart: Restart::Always, ..spec(100, 100) };
    ledger.create_spec("never", spec(100, 100), on("a")).unwrap();
    ledger.create_spec("always", restarts, on("a")).unwrap();
    ledger.create_spec("deleted", spec(100, 100), on("a")).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("deleted"), request: None }).unwrap();
    let forget = Body::ForgetNode { node: node("a") };
    assert!(matches!(ledger.run(forget.clone()), Err(Rejected::NodeCondition { .. })), "it is ready");
    ledger.turn("a", Condition::Suspect).unwrap();
    let refused = ledger.run(forget.clone());
    assert!(matches!(refused, Err(Rejected::NodeCondition { .. })), "what freezes may still run: {refused:?}");
    ledger.turn("a", Condition::Down).unwrap();
    ledger.run(forget).unwrap();
    assert_eq!((ledger.kind("never"), ledger.kind("always")), ("LOST", "PENDING"));
    assert!(!ledger.state.sandboxes.contains_key(&name("deleted")));
    assert!(!ledger.state.nodes.contains_key(&node("a")) && ledger.state.suspects.is_empty());
}

#[test]
fn an_orphan_is_stopped_only_by_order_and_is_gone_when_the_node_says_so() {
    let mut ledger = Ledger::second();
    ledger.observe("a", "stranger", 3, Phase::Orphan).unwrap();
    let stop = |epoch| Body::StopOrphan { node: node("a"), sandbox: name("stranger"), epoch: Epoch(epoch) };
    assert!(matches!(ledger.run(stop(4)), Err(Rejected::OrphanNotFound { .. })));
    let before = ledger.state.nodes[&node("a")].generation;
    ledger.run(stop(3)).unwrap();
    ledger.run(stop(3)).unwrap();
    let a = ledger.state.nodes[&node("a")].clone();
    assert!(a.generation > before && a.orphans.is_empty() && a.leftovers.len() == 1);
    ledger.observe("a", "stranger", 3, Phase::Removed).unwrap();
    assert!(ledger.state.nodes[&node("a")].leftovers.is_empty());
}

#[test]
fn a_host_that_comes_back_smaller_takes_nothing_until_what_it_holds_fits() {
    let mut ledger = Ledger::second();
    ledger.create("one", "a", None).unwrap();
    ledger.create("two", "a", None).unwrap();
    ledger.run(Body::RegisterNode { node: node("a"), report: report(2, resources(500, 500)) }).unwrap();
    let a = ledger.state.nodes[&node("a")].clone();
    assert!(a.shrunk && a.report.capacity == resources(500, 500) && a.free() == resources(0, 0));
    ledger.create("three", "a", None).unwrap();
    assert_eq!(ledger.kind("three"), "PENDING");
    let seen = Observed {
        sandbox: name("one"),
        epoch: Epoch(1),
        phase: Phase::Failed { code: "X".into(), message: String::new() },
    };
    let observation = Observation { sandboxes: vec![seen], templates: None };
    ledger.run(Body::Observe { node: node("a"), incarnation: 2, observation }).unwrap();
    assert!(!ledger.state.nodes[&node("a")].shrunk, "what it holds fits again");
}

#[test]
fn time_does_not_jump_but_by_a_quorums_clocks_and_then_no_deadline_fires_for_ten_minutes() {
    let mut ledger = Ledger::second();
    let expiring =
        SandboxSpec { settings: Settings { expiry: Expiry::After(30_000), ..Settings::default() }, ..spec(1, 1) };
    ledger.create_spec("s", expiring, on("a")).unwrap();
    ledger.create_spec("ended", spec(1, 1), queue()).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("ended"), request: None }).unwrap();
    ledger.create_spec("exited", spec(1, 1), on("a")).unwrap();
    let exit = Phase::Exited { exit: Exit::default(), output_tail: vec![] };
    ledger.observe("a", "exited", 1, exit).unwrap();
    let start = ledger.state.log_time;
    ledger.now = start.plus_ms(MAX_TIME_STEP_MS + 1);
    assert!(matches!(ledger.run(Body::AdvanceTime { samples: vec![] }), Err(Rejected::TimeStep { by_ms: 60_001 })));
    assert_eq!(ledger.state.log_time, start, "a wrong clock moves nothing");
    let year = start.plus_ms(365 * 24 * 3600 * 1000);
    let few = ledger.run(Body::AdvanceTime { samples: vec![year] });
    assert!(matches!(few, Err(Rejected::TooFewClocks { samples: 1, voters: 3 })));
    ledger.now = start;
    let poisoned = Body::AdvanceTime { samples: vec![year, start.plus_ms(5), start.plus_ms(4)] };
    ledger.run(poisoned).unwrap();
    assert_eq!(ledger.state.log_time, start.plus_ms(5), "one wrong clock of three says nothing");
    ledger.run(Body::AdvanceTime { samples: vec![year, year] }).unwrap();
    ledger.now = year;
    let end = Body::EndDue { sandboxes: vec![name("s")] };
    assert!(matches!(ledger.run(end.clone()), Err(Rejected::Held { .. })));
    let forget = Body::ForgetEnded { sandboxes: vec![name("exited")] };
    assert!(matches!(ledger.run(forget), Err(Rejected::Held { .. })), "its record is not lost either");
    ledger.pass(HOLD_MS + 1000);
    ledger.run(end).unwrap();
    assert_eq!(ledger.kind("s"), "STOPPING");
}

#[test]
fn a_sandbox_that_waits_too_long_is_cancelled_and_one_that_is_not_due_is_not_ended() {
    let mut ledger = Ledger::second();
    let impatient = SandboxSpec { queue_timeout_ms: Some(1000), ..spec(1, 1) };
    ledger.create_spec("s", impatient, queue()).unwrap();
    ledger.create_spec("patient", spec(1, 1), queue()).unwrap();
    let end = Body::EndDue { sandboxes: vec![name("s"), name("patient")] };
    ledger.run(end.clone()).unwrap();
    assert_eq!(ledger.kind("s"), "PENDING", "not yet");
    ledger.pass(1000);
    ledger.run(end).unwrap();
    assert_eq!((ledger.kind("s"), ledger.kind("patient")), ("CANCELLED", "PENDING"));
}

#[test]
fn an_update_changes_what_its_mask_names_and_a_retried_create_still_finds_its_sandbox() {
    let mut ledger = Ledger::second();
    ledger.create("s", "a", None).unwrap();
    let labels: Pairs = [("k", "v")].into_iter().collect();
    let change = Change { labels: Some(labels.clone()), priority: Some(9), ..Change::default() };
    let update = |change, if_revision| Body::UpdateSandbox { sandbox: name("s"), change, if_revision, request: None };
    let revision = ledger.state.sandboxes[&name("s")].revision;
    assert!(matches!(ledger.run(update(change.clone(), Some(revision + 1))), Err(Rejected::Changed { .. })));
    ledger.run(update(change, Some(revision))).unwrap();
    let settings = ledger.state.sandboxes[&name("s")].settings().clone();
    assert_eq!((settings.labels, settings.priority), (labels, 9));
    ledger.create("s", "a", None).unwrap();
}

#[test]
fn a_restart_policy_starts_it_again_elsewhere_or_here_after_a_while() {
    let mut ledger = Ledger::second();
    let restarts = SandboxSpec { restart: Restart::OnFailure, ..spec(1, 1) };
    ledger.create_spec("s", restarts, on("a")).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    let exited = |code| Phase::Exited { exit: Exit { code, ..Exit::default() }, output_tail: vec![] };
    ledger.observe("a", "s", 1, exited(1)).unwrap();
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    assert!(matches!(ledger.life("s"), Life::Pending { not_before, .. } if *not_before > ledger.now));
    ledger.run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(1), spot: node("b").into() }).unwrap();
    ledger.observe("b", "s", 2, Phase::Running).unwrap();
    ledger.observe("b", "s", 2, exited(0)).unwrap();
    ledger.observe("b", "s", 2, Phase::Removed).unwrap();
    assert_eq!(ledger.kind("s"), "STOPPED", "it ended as it should");
}

#[test]
fn a_quota_bounds_what_a_tenant_has_at_once_and_frees_with_it() {
    let mut ledger = Ledger::second();
    let tenant = TenantId::parse("t").unwrap();
    let quota = Quota { cpu: Some(MilliCpu(900)), sandboxes: Some(5), ..Quota::default() };
    ledger.run(Body::SetQuota { tenant: Some(tenant.clone()), quota: Some(quota) }).unwrap();
    ledger.create("one", "a", None).unwrap();
    ledger.create("two", "b", None).unwrap();
    let third = ledger.create("three", "a", None);
    assert_eq!(third, Err(Rejected::QuotaExceeded { dimension: "cpu_milli", used: 800, limit: 900 }));
    ledger.run(Body::DeleteSandbox { sandbox: name("one"), request: None }).unwrap();
    assert!(ledger.create("three", "a", None).is_err(), "it still holds its node");
    ledger.observe("a", "one", 1, Phase::Removed).unwrap();
    ledger.create("three", "a", None).unwrap();
    ledger.run(Body::SetQuota { tenant: Some(tenant), quota: None }).unwrap();
    ledger.create("four", "b", None).unwrap();
}

#[test]
fn a_default_quota_bounds_the_rate_of_creates_of_every_tenant() {
    let mut ledger = Ledger::second();
    let quota = Quota { creates_per_minute: Some(2), ..Quota::default() };
    ledger.run(Body::SetQuota { tenant: None, quota: Some(quota) }).unwrap();
    ledger.create_spec("one", spec(1, 1), queue()).unwrap();
    ledger.create_spec("two", spec(1, 1), queue()).unwrap();
    let third = ledger.create_spec("three", spec(1, 1), queue());
    assert_eq!(third, Err(Rejected::CreateRate { per_minute: 2, retry_after_ms: 30_000 }));
    for id in ["one", "two"] {
        ledger.run(Body::DeleteSandbox { sandbox: name(id), request: None }).unwrap();
    }
    assert!(ledger.create_spec("three", spec(1, 1), queue()).is_err(), "deleting does not give the rate back");
    ledger.pass(30_000);
    ledger.create_spec("three", spec(1, 1), queue()).unwrap();
}

#[test]
fn a_refused_tenant_leaves_no_record_and_empty_ones_make_room() {
    let mut ledger = Ledger::second();
    let create = |tenant: String| Body::CreateSandbox {
        sandbox: SandboxName::new(TenantId::parse(&tenant).unwrap(), name("s").id.clone()),
        spec: spec(1, 1).into(),
        decision: queue(),
        request: None,
    };
    let quota = |sandboxes| Quota { sandboxes, creates_per_minute: Some(60), ..Quota::default() };
    ledger.run(Body::SetQuota { tenant: None, quota: Some(quota(Some(0))) }).unwrap();
    assert!(matches!(ledger.run(create("nobody".into())), Err(Rejected::QuotaExceeded { .. })));
    assert_eq!(ledger.state.tenants.len(), 0, "a refusal changes nothing");
    ledger.run(Body::SetQuota { tenant: None, quota: Some(quota(None)) }).unwrap();
    for n in 0..100 {
        let body = create(format!("tenant-{n}"));
        let Body::CreateSandbox { sandbox, .. } = &body else { continue };
        let sandbox = sandbox.clone();
        ledger.run(body).unwrap();
        ledger.run(Body::DeleteSandbox { sandbox, request: None }).unwrap();
        ledger.pass(2_000);
    }
    assert!(ledger.state.tenants.len() < 10, "{} tenants that have nothing", ledger.state.tenants.len());
}

#[test]
fn one_tenant_does_not_fill_the_queue_of_all() {
    let mut ledger = Ledger::second();
    let spec = std::sync::Arc::new(spec(1, 1));
    let item = |n: u64| BatchItem { sandbox: name(&format!("s{n:06}")), spec: spec.clone(), decision: queue() };
    let batches: Vec<u64> = (0..MAX_PENDING_OF_TENANT).step_by(500).collect();
    for first in batches {
        let last = MAX_PENDING_OF_TENANT.min(first + 500);
        ledger.run(Body::CreateBatch { items: (first..last).map(item).collect(), request: None }).unwrap();
    }
    let more = ledger.run(Body::CreateBatch { items: vec![item(MAX_PENDING_OF_TENANT)], request: None });
    assert!(matches!(more, Err(Rejected::Batch { item: 0, .. })), "{more:?}");
    let create = |tenant: &str| Body::CreateSandbox {
        sandbox: SandboxName::new(TenantId::parse(tenant).unwrap(), name("one-more").id.clone()),
        spec: spec.clone(),
        decision: queue(),
        request: None,
    };
    assert!(matches!(ledger.run(create("t")), Err(Rejected::LimitReached { limit: MAX_PENDING_OF_TENANT, .. })));
    ledger.run(create("another")).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("s000000"), request: None }).unwrap();
    ledger.run(create("t")).unwrap();
}

#[test]
fn a_pause_of_moves_leaves_everything_where_it_is() {
    let mut ledger = Ledger::second();
    ledger.create_spec("s", freezes(), on("a")).unwrap();
    ledger.turn("a", Condition::Suspect).unwrap();
    ledger.turn("a", Condition::Down).unwrap();
    let pause = |moves| Body::SetPause { creates: None, placement: None, moves: Some(moves) };
    ledger.run(pause(true)).unwrap();
    let requeue = Body::RequeueSandbox { sandbox: name("s"), epoch: Epoch(1) };
    assert_eq!(ledger.run(requeue.clone()), Err(Rejected::Paused("moves")));
    assert_eq!(ledger.state.sandboxes[&name("s")].life.node(), Some(&node("a")));
    ledger.create("new", "b", None).unwrap();
    assert_eq!(ledger.kind("new"), "STARTING", "what is new is placed all the same");
    ledger.run(pause(false)).unwrap();
    ledger.run(requeue).unwrap();
    assert_eq!(ledger.kind("s"), "PENDING");
}

/// One sandbox of 400 is within the quota, two are not, whichever dimension is bounded.
#[test]
fn each_dimension_has_its_quota() {
    use warren_proto::units::{Bytes, Gpus};
    let dimensions = [
        ("memory_bytes", Quota { memory: Some(Bytes(700)), ..Quota::default() }),
        ("disk_bytes", Quota { disk: Some(Bytes(700)), ..Quota::default() }),
        ("gpus", Quota { gpus: Some(Gpus(700)), ..Quota::default() }),
    ];
    for (dimension, quota) in dimensions {
        let mut ledger = Ledger::second();
        ledger.run(Body::SetQuota { tenant: None, quota: Some(quota) }).unwrap();
        let resources = Resources { disk: Bytes(400), gpus: Gpus(400), ..resources(400, 400) };
        let wanted = || SandboxSpec { resources, ..spec(400, 400) };
        ledger.create_spec("one", wanted(), queue()).unwrap();
        let second = ledger.create_spec("two", wanted(), queue());
        assert_eq!(second, Err(Rejected::QuotaExceeded { dimension, used: 400, limit: 700 }));
        ledger.run(Body::DeleteSandbox { sandbox: name("one"), request: None }).unwrap();
        ledger.create_spec("two", wanted(), queue()).unwrap();
    }
}

#[test]
fn a_batch_is_created_whole_or_not_at_all_and_once() {
    let mut ledger = Ledger::second();
    let item = |id: &str, cpu| BatchItem { sandbox: name(id), spec: spec(cpu, 1).into(), decision: on("a") };
    ledger.create("taken", "b", None).unwrap();
    let before = ledger.state.sandboxes.clone();
    let clash = Body::CreateBatch { items: vec![item("x", 1), item("taken", 1)], request: None };
    assert!(matches!(ledger.run(clash), Err(Rejected::Batch { item: 1, .. })));
    assert!(ledger.state.sandboxes == before, "nothing of it");
    let request = Some(request_at(ledger.now.0, 1));
    let both = Body::CreateBatch { items: vec![item("x", 1), item("y", 1)], request };
    let first = ledger.run(both.clone()).unwrap();
    assert_eq!(first, Reply::Batch(vec![name("x"), name("y")]));
    assert_eq!(ledger.run(both).unwrap(), first);
    assert_eq!(ledger.state.sandboxes.len(), 3);
}

#[test]
fn what_an_operator_paused_is_refused_or_waits() {
    let mut ledger = Ledger::second();
    let pause = |creates, placement| Body::SetPause { creates: Some(creates), placement: Some(placement), moves: None };
    ledger.run(pause(false, true)).unwrap();
    ledger.create("s", "a", None).unwrap();
    assert!(matches!(ledger.life("s"), Life::Pending { reason, .. } if reason.code == PendingCode::Paused));
    let place = Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(0), spot: node("a").into() };
    assert_eq!(ledger.run(place), Err(Rejected::Paused("placement")));
    ledger.run(pause(true, false)).unwrap();
    assert_eq!(ledger.create("other", "a", None), Err(Rejected::Paused("creates")));
    ledger.create("s", "a", None).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("s"), request: None }).unwrap();
}

#[test]
fn cordoned_nodes_take_nothing_and_operators_labels_win() {
    let mut ledger = Ledger::second();
    let policy = |cordoned, set: &[(&str, &str)]| Body::SetNodePolicy {
        node: node("a"),
        cordoned: Some(cordoned),
        set_labels: set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        remove_labels: BTreeSet::new(),
    };
    ledger.run(policy(true, &[("zone", "z1")])).unwrap();
    ledger.create("s", "a", None).unwrap();
    assert_eq!(ledger.kind("s"), "PENDING");
    ledger.run(policy(false, &[])).unwrap();
    assert_eq!(ledger.state.nodes[&node("a")].all_labels()["zone"], "z1");
    ledger.run(Body::PlaceSandbox { sandbox: name("s"), epoch: Epoch(0), spot: node("a").into() }).unwrap();
}

/// What the second level adds to what may be proposed.
fn any_second_body() -> impl Strategy<Value = Body> {
    let sandbox = || prop::sample::select(vec!["s0", "s1", "s2", "s3"]).prop_map(name);
    let host = || prop::sample::select(vec!["a", "b", "c"]).prop_map(node);
    let to = prop::sample::select(vec![Condition::Ready, Condition::Suspect, Condition::Suspect, Condition::Down]);
    let isolation = prop::sample::select(vec![Isolation::Keep, Isolation::Freeze]);
    let restart = prop::sample::select(vec![Restart::Never, Restart::Always]);
    let created =
        (sandbox(), host(), 1u64..700, isolation, restart).prop_map(|(sandbox, on, cpu, isolation, restart)| {
            let spec = SandboxSpec { isolation, restart, ..spec(cpu, cpu) };
            BatchItem { sandbox, spec: spec.into(), decision: Decision::Place(on.into()) }
        });
    prop_oneof![
        3 => any_body(),
        2 => (host(), 0u128..3, to).prop_map(|(node, incarnation, to)| Body::SetNodeCondition { node, incarnation, to }),
        2 => prop::collection::vec(created, 1..3).prop_map(|items| Body::CreateBatch { items, request: None }),
        1 => (sandbox(), 0u64..5).prop_map(|(sandbox, epoch)| Body::RequeueSandbox { sandbox, epoch: Epoch(epoch) }),
        1 => host().prop_map(|node| Body::ForgetNode { node }),
        1 => (host(), sandbox(), 0u64..5).prop_map(|(node, sandbox, epoch)| {
            Body::StopOrphan { node, sandbox, epoch: Epoch(epoch) }
        }),
        1 => sandbox().prop_map(|sandbox| Body::EndDue { sandboxes: vec![sandbox] }),
        1 => (sandbox(), 0u8..3).prop_map(|(sandbox, priority)| Body::UpdateSandbox {
            sandbox,
            change: Change { priority: Some(priority), ..Change::default() },
            if_revision: None,
            request: None,
        }),
        1 => Just(Body::ReleaseBrake),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Rule 1, the counts and the indexes hold after every command of either level; epochs never go back.
    #[test]
    fn the_invariants_hold_in_every_prefix_of_the_second_level(bodies in prop::collection::vec(any_second_body(), 1..80)) {
        let mut ledger = Ledger::second();
        let mut epochs: BTreeMap<SandboxName, Epoch> = BTreeMap::new();
        for body in bodies {
            let _accepted_or_rejected = ledger.run(body);
            for sandbox in ledger.state.sandboxes.values() {
                let highest = epochs.entry(sandbox.name.clone()).or_default();
                prop_assert!(sandbox.epoch >= *highest);
                *highest = sandbox.epoch;
            }
        }
    }
}

/// Rule 3, without holding on to whole sandboxes: the second time there is no second effect, and the sandbox is as it is by then.
#[test]
fn a_request_that_comes_again_is_answered_by_what_is_there() {
    let mut ledger = Ledger::second();
    let spec = SandboxSpec { command: vec!["x".repeat(10_000)], ..spec(1, 1) };
    let request = Some(request_at(ledger.now.0, 1));
    let create = Body::CreateSandbox { sandbox: name("s"), spec: spec.into(), decision: on("a"), request };
    assert!(matches!(ledger.run(create.clone()), Ok(Reply::Sandbox(made)) if made.life.kind() == "STARTING"));
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    let (sandboxes, events) = (ledger.state.sandboxes.clone(), ledger.state.events.len());
    assert!(matches!(ledger.run(create.clone()), Ok(Reply::Sandbox(now)) if now.life.kind() == "RUNNING"));
    let delete = Body::DeleteSandbox { sandbox: name("s"), request: Some(request_at(ledger.now.0, 2)) };
    assert!(ledger.state.sandboxes == sandboxes && ledger.state.events.len() == events, "no second effect");
    assert!(matches!(ledger.run(delete.clone()), Ok(Reply::Sandbox(last)) if last.life.kind() == "STOPPING"));
    let deleted_at = ledger.state.revision;
    ledger.observe("a", "s", 1, Phase::Removed).unwrap();
    assert!(!ledger.state.sandboxes.contains_key(&name("s")));
    ledger.now = ledger.now.plus_ms(1);
    // Another takes the name: it is not what the request made.
    ledger.create("s", "b", None).unwrap();
    for (body, revision) in [(create, deleted_at - 3), (delete, deleted_at)] {
        let Ok(Reply::Gone(kept)) = ledger.run(body) else { panic!("it is gone") };
        assert_eq!((kept.what, kept.revision), (Subject::Sandbox(name("s")), revision));
    }
    assert_eq!(ledger.state.sandboxes[&name("s")].life.kind(), "STARTING", "the other is left alone");
    let held: usize = ledger.state.requests.iter().map(|(_, _, answer)| format!("{answer:?}").len()).max().unwrap();
    assert!(held < 1000, "an answer holds no specification");
}

/// What an answer of the first level looks like, for builds that know no other.
#[test]
fn at_the_first_level_answers_are_kept_whole() {
    let mut ledger = Ledger::new();
    let request = Some(request_at(ledger.now.0, 1));
    let create = Body::CreateSandbox { sandbox: name("s"), spec: spec(1, 1).into(), decision: on("a"), request };
    let first = ledger.run(create.clone()).unwrap();
    ledger.observe("a", "s", 1, Phase::Running).unwrap();
    assert_eq!(ledger.run(create).unwrap(), first);
}

#[test]
fn an_answer_of_a_batch_counts_for_each_that_it_names() {
    use crate::state::request::{Answer, MAX_REQUESTS_OF_TENANT, Scope};
    let mut ledger = Ledger::second();
    let tenant = TenantId::parse("t").unwrap();
    let scope = Scope { tenant: Some(tenant) };
    let names: Vec<_> = (0..32).map(|n| name(&format!("b{n}"))).collect();
    for id in 0..MAX_REQUESTS_OF_TENANT / 32 {
        let (payload, expires) = ([0; 32], ledger.now.plus_ms(1000));
        let answer = Answer { payload, expires, reply: Reply::Batch(names.clone()) };
        ledger.state.requests.insert(scope.clone(), u128::from(id), answer);
    }
    let request = Some(request_at(ledger.now.0, 1));
    let create = Body::CreateSandbox { sandbox: name("s"), spec: spec(1, 1).into(), decision: on("a"), request };
    assert_eq!(ledger.run(create.clone()), Err(Rejected::RequestTableFull));
    // Each command clears a few away.
    for _ in 0..100 {
        ledger.pass(20);
    }
    ledger.run(create).expect("they are over");
}

#[test]
fn what_a_tenant_and_the_region_choose_is_bounded_in_bytes() {
    use crate::state::tenant::{MAX_CHOSEN_BYTES, MAX_CHOSEN_BYTES_OF_TENANT};
    let mut ledger = Ledger::second();
    let large = |id: &str| {
        let spec = SandboxSpec { command: vec!["x".repeat(10_000)], ..spec(1, 1) };
        Body::CreateSandbox { sandbox: name(id), spec: spec.into(), decision: queue(), request: None }
    };
    ledger.run(large("first")).unwrap();
    let own = ledger.state.tenants[&name("first").tenant].chosen_bytes;
    assert!(own >= 10_000 && own == ledger.state.indexes.chosen_bytes);
    let full = |ledger: &Ledger, body| {
        let mut state = ledger.state.clone();
        let index = state.revision + 1;
        state.apply(index, &Command { caller: Caller::system("test"), time: state.log_time, body })
    };
    let mut rich = Ledger { state: ledger.state.clone(), ..Ledger::second() };
    let tenant = rich.state.tenants.get_mut(&name("first").tenant).unwrap();
    tenant.chosen_bytes = MAX_CHOSEN_BYTES_OF_TENANT - 5_000;
    let refused = full(&rich, large("second"));
    assert!(matches!(refused, Err(Rejected::LimitReached { limit: MAX_CHOSEN_BYTES_OF_TENANT, .. })), "{refused:?}");
    let labels = Some([("k", "x".repeat(6_000))].into_iter().collect());
    let change = Change { labels, ..Change::default() };
    let update = Body::UpdateSandbox { sandbox: name("first"), change, if_revision: None, request: None };
    assert!(matches!(full(&rich, update.clone()), Err(Rejected::LimitReached { .. })), "an update grows it too");
    ledger.state.indexes.chosen_bytes = MAX_CHOSEN_BYTES - 5_000;
    let refused = full(&ledger, large("second"));
    assert!(matches!(refused, Err(Rejected::LimitReached { limit: MAX_CHOSEN_BYTES, .. })), "{refused:?}");
    ledger.state.indexes.chosen_bytes = own;
    ledger.run(update).unwrap();
    assert!(ledger.state.indexes.chosen_bytes > own + 6_000);
    ledger.run(Body::DeleteSandbox { sandbox: name("first"), request: None }).unwrap();
    assert_eq!(ledger.state.indexes.chosen_bytes, 0);
}
