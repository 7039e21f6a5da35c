//! The rules of `reconcile`, one by one and against random histories.

use proptest::prelude::*;
use warren_proto::ids::{Digest, Generation};
use warren_proto::units::{Bytes, Resources};

use super::*;
use crate::assignment::{OnIsolation, StartSpec, TemplateRef, Update, Want};

/// With the gate open.
fn next_action(goal: Option<&Goal>, known: bool, held: &Held) -> Option<Action> {
    super::next_action(goal, known, held, false)
}

/// The one thing there is to say, if any.
fn report(goal: Option<&Goal>, known: bool, held: &Held) -> Option<Report> {
    let mut reports = super::report(goal, known, held);
    assert!(reports.len() <= 1, "{reports:?}");
    reports.pop()
}

fn says(epoch: u64, phase: Phase) -> Report {
    Report { epoch: Epoch(epoch), phase }
}

fn running(epoch: u64) -> Goal {
    let template =
        TemplateRef { digest: Digest([0; 32]), size: Bytes(1), sources: Vec::new(), download_token: String::new() };
    let spec = StartSpec {
        gpus: Vec::new(),
        resources: Resources::default(),
        pids: 1,
        template,
        command: Vec::new(),
        environment: Vec::new(),
        working_directory: "/".into(),
        driver: None,
        on_isolation: OnIsolation::Freeze,
        egress: Egress::None,
    };
    Goal { epoch: Epoch(epoch), want: Want::Running(Box::new(spec)) }
}

fn removed(epoch: u64) -> Goal {
    Goal { epoch: Epoch(epoch), want: Want::Removed }
}

fn held(record: Option<(u64, Stage)>, instances: &[(u64, Presence)]) -> Held {
    let instance = |presence: &Presence| instance(presence.clone());
    Held {
        record: record.map(|(epoch, stage)| Record { epoch: Epoch(epoch), stage }),
        instances: instances.iter().map(|(epoch, presence)| (Epoch(*epoch), instance(presence))).collect(),
        busy: None,
        foreign: None,
    }
}

fn instance(presence: Presence) -> Instance {
    Instance { driver: "fake".into(), presence, fenced: true, egress: None }
}

#[test]
fn what_it_may_reach_is_changed_while_it_runs_and_before_it_is_thawed() {
    for presence in [Presence::Running, Presence::Frozen] {
        let mut held = held(Some((2, Stage::Started)), &[(2, presence.clone())]);
        let next = |held: &Held| next_action(Some(&running(2)), true, held);
        let otherwise = (presence == Presence::Frozen).then_some(Action::Thaw(Epoch(2)));
        for (reaches, action) in [
            (None, otherwise),
            (Some(Egress::None), otherwise),
            (Some(Egress::Public), Some(Action::SetEgress(Epoch(2)))),
        ] {
            held.instances.get_mut(&Epoch(2)).expect("held").egress = reaches;
            assert_eq!(next(&held), action);
        }
        let unwanted = next_action(None, true, &held);
        assert_ne!(unwanted, Some(Action::SetEgress(Epoch(2))), "an orphan keeps what it had");
    }
}

/// As [`held`], from a ledger that the present one was restored from.
fn foreign(record: Option<(u64, Stage)>, instances: &[(u64, Presence)]) -> Held {
    let held = held(record, instances);
    Held { foreign: held.instances.keys().last().copied(), ..held }
}

fn code(report: Option<Report>) -> String {
    match report.map(|report| report.phase) {
        Some(Phase::Failed(reason)) => reason.code,
        other => format!("{other:?}"),
    }
}

#[test]
fn what_is_new_is_started_once() {
    let goal = running(1);
    assert_eq!(next_action(Some(&goal), true, &held(None, &[])), Some(Action::Start(Epoch(1))));
    for stage in [Stage::Starting, Stage::Started, Stage::Removed, Stage::Failed(Reason::new("X", ""))] {
        assert_eq!(next_action(Some(&goal), true, &held(Some((1, stage)), &[])), None);
    }
}

/// An agent that had removed a sandbox once asked without end to forget it, and burnt a core.
#[test]
fn what_is_forgotten_is_left_at_rest() {
    let gone = held(Some((1, Stage::Removed)), &[]);
    assert_eq!(next_action(None, true, &gone), Some(Action::Forget));
    assert_eq!(next_action(None, true, &Held::default()), None);
    assert_eq!(next_action(None, false, &Held::default()), None);
}

#[test]
fn what_ran_and_is_gone_is_reported_and_never_restarted() {
    let gone = held(Some((1, Stage::Started)), &[]);
    assert_eq!(code(report(Some(&running(1)), true, &gone)), "INSTANCE_LOST");
    assert_eq!(code(report(None, false, &gone)), "INSTANCE_LOST");
    let interrupted = held(Some((1, Stage::Starting)), &[]);
    assert_eq!(code(report(Some(&running(1)), true, &interrupted)), "START_INTERRUPTED");
}

#[test]
fn an_older_epoch_is_refused() {
    let newer = held(Some((3, Stage::Started)), &[(3, Presence::Running)]);
    assert_eq!(next_action(Some(&running(2)), true, &newer), None);
    assert_eq!(next_action(Some(&removed(2)), true, &newer), None);
    let stale = says(2, Phase::Failed(Reason::stale_epoch(Epoch(3))));
    assert_eq!(super::report(Some(&running(2)), true, &newer), [says(3, Phase::Running), stale]);
    let seen = held(Some((3, Stage::Removed)), &[]);
    assert_eq!(next_action(Some(&running(2)), true, &seen), None);
    assert_eq!(code(report(Some(&running(2)), true, &seen)), "STALE_EPOCH");
}

#[test]
fn an_older_instance_goes_before_a_newer_epoch_starts() {
    let older = held(Some((1, Stage::Started)), &[(1, Presence::Running)]);
    assert_eq!(next_action(Some(&running(2)), true, &older), Some(Action::Remove(Epoch(1))));
    let both = [says(1, Phase::Running), says(2, Phase::Starting)];
    assert_eq!(super::report(Some(&running(2)), true, &older), both, "both are on the host");
}

#[test]
fn what_is_to_be_removed_is_reported_removed_also_when_it_never_was_here() {
    assert_eq!(next_action(Some(&removed(1)), true, &held(None, &[])), None);
    assert_eq!(
        report(Some(&removed(1)), true, &held(None, &[])),
        Some(Report { epoch: Epoch(1), phase: Phase::Removed })
    );
    let here = held(Some((1, Stage::Started)), &[(1, Presence::Running)]);
    assert_eq!(next_action(Some(&removed(1)), true, &here), Some(Action::Remove(Epoch(1))));
    assert_eq!(report(Some(&removed(1)), true, &here), Some(Report { epoch: Epoch(1), phase: Phase::Running }));
}

#[test]
fn what_no_assignment_names_is_frozen_and_never_ended() {
    let orphan = held(Some((1, Stage::Started)), &[(1, Presence::Running)]);
    assert_eq!(next_action(None, false, &orphan), None, "no assignment has been received yet");
    assert_eq!(next_action(None, true, &orphan), Some(Action::Freeze(Epoch(1))));
    let frozen = held(Some((1, Stage::Started)), &[(1, Presence::Frozen)]);
    assert_eq!(next_action(None, true, &frozen), None);
    assert_eq!(report(None, true, &frozen), Some(Report { epoch: Epoch(1), phase: Phase::Orphan }));
    assert_eq!(next_action(Some(&running(1)), true, &frozen), Some(Action::Thaw(Epoch(1))));
}

#[test]
fn exactly_the_named_epoch_is_removed() {
    let leftover = held(Some((1, Stage::Started)), &[(1, Presence::Running)]);
    assert_eq!(next_action(Some(&removed(1)), true, &leftover), Some(Action::Remove(Epoch(1))));
    // An order for another epoch ends nothing: what it does not name is an orphan, and says so.
    assert_eq!(next_action(Some(&removed(2)), true, &leftover), Some(Action::Freeze(Epoch(1))));
    let both = [says(1, Phase::Orphan), says(2, Phase::Removed)];
    assert_eq!(super::report(Some(&removed(2)), true, &leftover), both);
    let orphan = held(Some((1, Stage::Started)), &[(1, Presence::Frozen)]);
    assert_eq!(next_action(Some(&removed(2)), true, &orphan), None);
    assert_eq!(next_action(Some(&removed(1)), true, &orphan), Some(Action::Remove(Epoch(1))), "an operator's order");
}

#[test]
fn what_an_earlier_ledger_started_is_ended_by_name_only() {
    let before = foreign(Some((2, Stage::Started)), &[(2, Presence::Running)]);
    for goal in [running(3), running(1), removed(1), removed(3)] {
        assert_eq!(next_action(Some(&goal), true, &before), Some(Action::Freeze(Epoch(2))), "{goal:?}");
    }
    let frozen = foreign(Some((2, Stage::Started)), &[(2, Presence::Frozen)]);
    assert_eq!(next_action(Some(&running(3)), true, &frozen), None, "nothing starts beside it");
    let reports = super::report(Some(&running(3)), true, &frozen);
    assert_eq!(reports, [says(2, Phase::Orphan), says(3, Phase::Failed(Reason::in_the_way()))]);
    assert_eq!(next_action(Some(&removed(2)), true, &frozen), Some(Action::Remove(Epoch(2))));
    assert_eq!(next_action(Some(&running(2)), true, &frozen), Some(Action::Thaw(Epoch(2))));
    let mut named = before;
    named.is_named(Epoch(2));
    assert_eq!(next_action(Some(&running(3)), true, &named), Some(Action::Remove(Epoch(2))), "it is this ledger's now");
}

#[test]
fn while_the_gate_is_closed_nothing_fenced_starts_and_what_is_not_wanted_is_held_back() {
    let closed = |goal: Option<&Goal>, held: &Held| super::next_action(goal, true, held, true);
    assert_eq!(closed(Some(&running(1)), &Held::default()), None);
    let here = held(Some((1, Stage::Started)), &[(1, Presence::Running)]);
    assert_eq!(closed(Some(&running(1)), &here), None);
    assert!(!is_unsettled(Some(&running(1)), true, &here));
    for goal in [None, Some(removed(1)), Some(running(2))] {
        assert!(is_unsettled(goal.as_ref(), true, &here));
        assert_eq!(closed(goal.as_ref(), &here), Some(Action::Freeze(Epoch(1))), "before the group is thawed");
    }
    assert!(is_unsettled(Some(&running(1)), false, &held(Some((2, Stage::Started)), &[(2, Presence::Running)])));
    assert!(is_unsettled(None, false, &here), "nobody has said yet that it may run");
    let starting = Held { busy: Some(Action::Start(Epoch(1))), ..Held::default() };
    assert!(is_unsettled(Some(&removed(1)), true, &starting), "a start that the freeze caught half-way would go on");
    assert!(!is_unsettled(Some(&running(1)), true, &starting));
    let frozen = held(Some((1, Stage::Started)), &[(1, Presence::Frozen)]);
    assert!(!is_unsettled(Some(&removed(1)), true, &frozen));
    assert_eq!(closed(Some(&removed(1)), &frozen), Some(Action::Remove(Epoch(1))));
}

#[test]
fn a_remnant_is_cleared_away_and_reported_failed() {
    let remnant = held(Some((1, Stage::Starting)), &[(1, Presence::Remnant)]);
    assert_eq!(next_action(None, false, &remnant), Some(Action::Remove(Epoch(1))));
    let record = remnant.record_after_removal(Epoch(1)).expect("record");
    assert_eq!(record.stage, Stage::Failed(Reason::interrupted()));
    let broken = held(Some((1, Stage::Started)), &[(1, Presence::Remnant)]);
    assert_eq!(broken.record_after_removal(Epoch(1)).expect("record").stage, Stage::Failed(Reason::lost()));
}

#[test]
fn adoption_believes_the_host() {
    let mut found = held(Some((1, Stage::Starting)), &[(1, Presence::Running)]);
    found.adopt();
    assert_eq!(found.record, Some(Record { epoch: Epoch(1), stage: Stage::Started }));
    let mut unknown = held(None, &[(4, Presence::Ended(Ended::default()))]);
    unknown.adopt();
    assert_eq!(unknown.record, Some(Record { epoch: Epoch(4), stage: Stage::Started }));
}

// ---- random histories of one sandbox ----

#[derive(Debug, Clone)]
enum Step {
    /// The leader's wish: a running or removed epoch, or nothing.
    Assign(Option<(u64, bool)>),
    /// Carry out the next action; `false`: it fails.
    Act(bool),
    /// The main process ends.
    End,
    /// The agent is killed in the middle of what it does; `true`: and the host reboots.
    Crash(bool),
    /// The lease lapses.
    Lapse,
    /// A lease is granted.
    Lease,
    /// The ledger is restored.
    Restore,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => prop::option::weighted(0.8, (1u64..5, prop::bool::weighted(0.7))).prop_map(Step::Assign),
        6 => prop::bool::weighted(0.8).prop_map(Step::Act),
        1 => Just(Step::End),
        1 => prop::bool::ANY.prop_map(Step::Crash),
        1 => Just(Step::Lapse),
        2 => Just(Step::Lease),
        1 => Just(Step::Restore),
    ]
}

/// A host and an agent, as small as they can be.
#[derive(Debug, Default)]
struct World {
    assignment: Assignment,
    generation: u64,
    closed: bool,
    held: BTreeMap<SandboxName, Held>,
    started: Vec<Epoch>,
}

fn sandbox() -> SandboxName {
    SandboxName::parse("tenants/t/sandboxes/s").expect("name")
}

impl World {
    fn assign(&mut self, wish: Option<(u64, bool)>) {
        self.generation += 1;
        let goal = wish.map(|(epoch, run)| if run { running(epoch) } else { removed(epoch) });
        let goals = goal.map(|goal| (sandbox(), goal)).into_iter().collect();
        self.assignment.apply(Update::Full { generation: Generation(self.generation), goals });
        if let (Some((epoch, true)), Some(held)) = (wish, self.held.get_mut(&sandbox())) {
            held.is_named(Epoch(epoch));
        }
    }

    /// The group is thawed once nothing unwanted would run.
    fn lease(&mut self) {
        let goal = self.assignment.goal(&sandbox());
        let held = self.held.get(&sandbox()).cloned().unwrap_or_default();
        if !self.assignment.is_known() || is_unsettled(goal, true, &held) {
            return;
        }
        self.closed = false;
        for (epoch, instance) in &held.instances {
            let wanted = goal.is_some_and(|goal| goal.epoch == *epoch && goal.desired() == Desired::Running);
            assert!(wanted || instance.presence != Presence::Running, "thawed though it was moved");
        }
    }

    fn restore(&mut self) {
        self.assignment = Assignment::default();
        for held in self.held.values_mut() {
            let record = held.record.as_ref().map(|record| record.epoch);
            held.foreign = held.instances.keys().copied().chain(record).max();
        }
    }

    fn next(&self) -> Option<Action> {
        let actions = diff(&self.assignment, &self.held, self.closed);
        assert!(actions.len() <= 1);
        actions.first().map(|(_, action)| *action)
    }

    /// Does one action and checks what must hold at every one.
    fn act(&mut self, succeeds: bool) {
        let Some(action) = self.next() else { return };
        let goal = self.assignment.goal(&sandbox()).cloned();
        let held = self.held.entry(sandbox()).or_default();
        match action {
            Action::Start(epoch) => {
                assert!(held.instances.is_empty(), "two epochs at once");
                assert!(!self.closed, "started into a frozen group");
                assert!(held.record.as_ref().is_none_or(|r| r.epoch < epoch), "an old epoch started");
                self.started.push(epoch);
                let stage = if succeeds { Stage::Started } else { Stage::Failed(Reason::new("START_FAILED", "")) };
                held.record = Some(Record { epoch, stage });
                if succeeds {
                    held.instances.insert(epoch, instance(Presence::Running));
                }
            }
            Action::Remove(epoch) if succeeds => {
                let remnant = held.instances[&epoch].presence == Presence::Remnant;
                let foreign = held.foreign.is_some_and(|newest| epoch <= newest);
                let ordered = goal.is_some_and(|goal| match goal.desired() {
                    Desired::Removed => goal.epoch == epoch,
                    Desired::Running => goal.epoch > epoch && !foreign,
                });
                assert!(remnant || ordered, "an orphan was ended");
                assert!(
                    remnant || !self.closed || held.instances[&epoch].presence != Presence::Running,
                    "not held back first"
                );
                held.record = held.record_after_removal(epoch);
                held.instances.remove(&epoch);
            }
            Action::Freeze(epoch) if succeeds => {
                assert!(goal.is_none_or(|goal| goal.epoch != epoch || self.closed), "what is wanted was frozen");
                held.instances.get_mut(&epoch).expect("instance").presence = Presence::Frozen;
            }
            Action::Thaw(epoch) if succeeds => {
                held.instances.get_mut(&epoch).expect("instance").presence = Presence::Running;
            }
            Action::Forget => {
                assert!(held.instances.is_empty() && goal.is_none());
                self.held.remove(&sandbox());
                self.started.clear();
            }
            _ => {}
        }
    }

    fn end(&mut self) {
        for instance in self.held.values_mut().flat_map(|held| held.instances.values_mut()) {
            if instance.presence == Presence::Running {
                instance.presence = Presence::Ended(Ended::default());
            }
        }
    }

    /// A start under way leaves its intent and a remnant; a reboot leaves the journal alone.
    fn crash(&mut self, reboot: bool) {
        if let Some(Action::Start(epoch)) = self.next() {
            let held = self.held.entry(sandbox()).or_default();
            held.record = Some(Record { epoch, stage: Stage::Starting });
            held.instances.insert(epoch, instance(Presence::Remnant));
            self.started.push(epoch);
        }
        self.assignment = Assignment::default();
        for held in self.held.values_mut() {
            if reboot {
                held.instances.clear();
            }
            held.adopt();
        }
    }
}

proptest! {
    #[test]
    fn any_history_converges_and_starts_each_epoch_once(steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::default();
        for step in steps {
            match step {
                Step::Assign(wish) => world.assign(wish),
                Step::Act(succeeds) => world.act(succeeds),
                Step::End => world.end(),
                Step::Crash(reboot) => world.crash(reboot),
                Step::Lapse => world.closed = true,
                Step::Lease => world.lease(),
                Step::Restore => world.restore(),
            }
            prop_assert!(world.held.values().all(|held| held.instances.len() <= 1), "two epochs at once");
        }
        for _ in 0..4 {
            world.act(true);
        }
        world.lease();
        prop_assert!(!world.closed || !world.assignment.is_known(), "a lease opens it again");
        for _ in 0..4 {
            world.act(true);
        }
        prop_assert_eq!(world.next(), None, "it settles, and then nothing more is done");
        let mut once = world.started.clone();
        once.dedup();
        prop_assert_eq!(&once, &world.started, "no epoch is started twice");
        prop_assert!(once.is_sorted());
        let reports = report_all(&world.assignment, &world.held);
        if let Some(goal) = world.assignment.goal(&sandbox()) {
            let phase = reports.get(&InstanceKey { sandbox: sandbox(), epoch: goal.epoch });
            prop_assert!(phase.is_some(), "what is assigned is reported");
            prop_assert!(phase != Some(&Phase::Starting), "settled, and still starting: {:?}", goal);
        }
    }
}
