//! PURE: what to do next about each sandbox, and what to say about it.
//!
//! `diff(assignment, held) -> actions`: at most one action a sandbox, none while one is under way; the supervisor carries it
//! out, changes `held`, and asks again until nothing is left to do. `report` says what the leader should know now. Both are
//! functions of the assignment and of what is held, so a lost message or a restart changes nothing.
//!
//! Invariants: no start while any instance of the sandbox is here; no start of an epoch older than one seen here; an epoch
//! is started once at most; only what is named to be removed at its very epoch, and what a newer epoch of the same ledger
//! replaces, is ended; everything else that should not run is frozen (a remnant, which never ran to begin with or is broken,
//! is cleared away).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::{Epoch, SandboxName};

use crate::assignment::{Assignment, Desired, Goal};
use crate::driver::{Ended, InstanceKey, Presence};
use crate::network::egress::Egress;

/// A code for programs and a text for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    pub code: String,
    pub message: String,
}

impl Reason {
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }

    fn interrupted() -> Self {
        Self::new("START_INTERRUPTED", "the node agent ended while it started the sandbox; nothing of it is left")
    }

    fn lost() -> Self {
        Self::new("INSTANCE_LOST", "it ran at this epoch and is gone from the host, as after a reboot")
    }

    pub fn journal_lost() -> Self {
        Self::new(
            "JOURNAL_LOST",
            "the node's journal was damaged, so it cannot say whether it ran this epoch; it does not run here",
        )
    }

    fn in_the_way() -> Self {
        Self::new("ORPHAN_IN_THE_WAY", "the node holds another instance of it that the ledger does not know")
    }

    fn stale_epoch(seen: Epoch) -> Self {
        Self::new("STALE_EPOCH", format!("the node has seen epoch {seen} of it, which is newer"))
    }
}

/// How far the newest epoch of a sandbox that was started here got. Kept in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Written before the driver is asked to start.
    Starting,
    Started,
    /// Nothing of it is left.
    Failed(Reason),
    /// Nothing of it is left, as the leader wanted.
    Removed,
}

/// What the journal holds of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The newest epoch seen.
    pub epoch: Epoch,
    pub stage: Stage,
}

/// An instance on this host, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub driver: String,
    pub presence: Presence,
    /// In the group that freezes when the lease lapses.
    pub fenced: bool,
    /// What it may reach; `None`: its driver cannot change it.
    pub egress: Option<Egress>,
}

/// All that the node knows of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    pub record: Option<Record>,
    pub instances: BTreeMap<Epoch, Instance>,
    /// What is under way.
    pub busy: Option<Action>,
    /// Epochs up to this one were given by a ledger that the node's ledger was restored from.
    pub foreign: Option<Epoch>,
}

/// One step for one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Start(Epoch),
    Remove(Epoch),
    /// It runs and the assignment does not want it to.
    Freeze(Epoch),
    /// It was frozen, and the assignment names it again.
    Thaw(Epoch),
    /// It should run, and may reach something else than it should.
    SetEgress(Epoch),
    /// Nothing is left of it and no assignment names it.
    Forget,
}

/// What the leader should know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub epoch: Epoch,
    pub phase: Phase,
}

/// As in `SandboxObservation`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Running,
    Exited(Ended),
    Failed(Reason),
    Removed,
    Orphan,
}

/// What to do next, at most one action a sandbox. `closed`: fenced sandboxes are frozen as a whole, since the lease lapsed.
pub fn diff(assignment: &Assignment, held: &BTreeMap<SandboxName, Held>, closed: bool) -> Vec<(SandboxName, Action)> {
    let nothing = Held::default();
    let next = |name: &SandboxName| {
        let held = held.get(name).unwrap_or(&nothing);
        next_action(assignment.goal(name), assignment.is_known(), held, closed)
    };
    names(assignment, held).into_iter().filter_map(|name| next(name).map(|action| (name.clone(), action))).collect()
}

/// What the leader should know of everything that is assigned or held.
pub fn report_all(assignment: &Assignment, held: &BTreeMap<SandboxName, Held>) -> BTreeMap<InstanceKey, Phase> {
    let nothing = Held::default();
    let reports = |name: &SandboxName| {
        let held = held.get(name).unwrap_or(&nothing);
        let key = |epoch| InstanceKey { sandbox: name.clone(), epoch };
        let reports = report(assignment.goal(name), assignment.is_known(), held).into_iter();
        reports.map(|report| (key(report.epoch), report.phase)).collect::<Vec<_>>()
    };
    names(assignment, held).into_iter().flat_map(reports).collect()
}

fn names<'a>(assignment: &'a Assignment, held: &'a BTreeMap<SandboxName, Held>) -> BTreeSet<&'a SandboxName> {
    assignment.goals().keys().chain(held.keys()).collect()
}

/// What the assignment means for an instance that is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It should run.
    Wanted,
    /// It should go: it is named to be removed, or a newer epoch of the same ledger took its place.
    Going,
    /// The assignment is older than it, and refused.
    Newer,
    /// The ledger does not know it.
    Orphan,
    /// No assignment has been received.
    Unknown,
}

/// The next step for one sandbox. `known`: a whole assignment has been received; `closed` as for [`diff`].
pub fn next_action(goal: Option<&Goal>, known: bool, held: &Held, closed: bool) -> Option<Action> {
    if held.busy.is_some() {
        return None;
    }
    if let Some(epoch) = held.remnant() {
        return Some(Action::Remove(epoch));
    }
    let first = |wanted: &dyn Fn(Fate, &Instance) -> bool| {
        let mut all = held.instances.iter();
        all.find(|(epoch, instance)| wanted(held.fate(**epoch, goal, known), instance)).map(|(epoch, _)| *epoch)
    };
    let runs = |instance: &Instance| instance.presence == Presence::Running;
    // Before the group is thawed, what must not run again is frozen by itself.
    let held_back = |fate, i: &Instance| closed && i.fenced && runs(i) && !matches!(fate, Fate::Wanted | Fate::Unknown);
    if let Some(epoch) = first(&held_back) {
        return Some(Action::Freeze(epoch));
    }
    if let Some(epoch) = first(&|fate, _| fate == Fate::Going) {
        return Some(Action::Remove(epoch));
    }
    if let Some(epoch) = first(&|fate, i| fate == Fate::Orphan && runs(i)) {
        return Some(Action::Freeze(epoch));
    }
    // Before it runs again.
    let wanted = goal.and_then(Goal::egress);
    let strays = |i: &Instance| i.egress.as_ref().zip(wanted).is_some_and(|(is, should)| is != should);
    let lives = |i: &Instance| matches!(i.presence, Presence::Running | Presence::Frozen);
    if let Some(epoch) = first(&|fate, i| fate == Fate::Wanted && lives(i) && strays(i)) {
        return Some(Action::SetEgress(epoch));
    }
    if let Some(epoch) = first(&|fate, i| fate == Fate::Wanted && i.presence == Presence::Frozen) {
        return Some(Action::Thaw(epoch));
    }
    match goal {
        _ if !held.instances.is_empty() => None,
        Some(goal) => may_start(goal, held, closed).then_some(Action::Start(goal.epoch)),
        // Once forgotten there is nothing to forget: asking again must come to rest.
        None => (known && held.record.is_some()).then_some(Action::Forget),
    }
}

/// Nothing of the sandbox is here.
fn may_start(goal: &Goal, held: &Held, closed: bool) -> bool {
    let new = held.record.as_ref().is_none_or(|record| record.epoch < goal.epoch);
    // In a frozen group the start would stop half-way.
    let waits = closed && goal.is_fenced();
    goal.desired() == Desired::Running && new && !waits
}

/// Whether an instance runs, or would if its group were thawed, that must not.
pub fn is_unsettled(goal: Option<&Goal>, known: bool, held: &Held) -> bool {
    let must_not = |epoch: &Epoch| held.fate(*epoch, goal, known) != Fate::Wanted;
    // A start that the freeze caught half-way would go on.
    let starts = matches!(&held.busy, Some(Action::Start(epoch)) if must_not(epoch));
    starts || held.instances.iter().any(|(epoch, i)| i.fenced && i.presence == Presence::Running && must_not(epoch))
}

/// Whether a start of `epoch` that is under way is no longer wanted.
pub fn start_is_obsolete(goal: Option<&Goal>, epoch: Epoch) -> bool {
    goal.is_none_or(|goal| goal.epoch != epoch || goal.desired() == Desired::Removed)
}

/// What to say of one sandbox: of each instance that is here, and of what is assigned and is not.
pub fn report(goal: Option<&Goal>, known: bool, held: &Held) -> Vec<Report> {
    let here = held.instances.iter().map(|(epoch, instance)| Report {
        epoch: *epoch,
        phase: phase_here(&instance.presence, held.fate(*epoch, goal, known)),
    });
    let mut reports: Vec<Report> = here.collect();
    match (held.busy, goal) {
        (Some(Action::Start(epoch)), _) => reports.push(Report { epoch, phase: Phase::Starting }),
        (_, Some(goal)) if !held.instances.contains_key(&goal.epoch) => {
            reports.push(Report { epoch: goal.epoch, phase: phase_gone(goal, held) });
        }
        (_, None) if !known && held.instances.is_empty() => {
            reports.extend(held.record.as_ref().map(Record::as_report));
        }
        _ => {}
    }
    reports
}

fn phase_here(presence: &Presence, fate: Fate) -> Phase {
    match (presence, fate) {
        // Being cleared away: not failed before nothing is left of it.
        (Presence::Remnant, _) => Phase::Starting,
        (_, Fate::Orphan) => Phase::Orphan,
        // Nothing else is ever frozen by itself; before the first assignment it still is one.
        (Presence::Frozen, Fate::Unknown) => Phase::Orphan,
        (Presence::Running | Presence::Frozen, _) => Phase::Running,
        (Presence::Ended(ended), _) => Phase::Exited(ended.clone()),
    }
}

/// The assigned epoch is not here.
fn phase_gone(goal: &Goal, held: &Held) -> Phase {
    let any = |fate| held.instances.keys().any(|epoch| held.fate(*epoch, Some(goal), true) == fate);
    match (goal.desired(), held.record.as_ref()) {
        (Desired::Removed, _) => Phase::Removed,
        (Desired::Running, _) if any(Fate::Orphan) => Phase::Failed(Reason::in_the_way()),
        (Desired::Running, Some(record)) if record.epoch > goal.epoch => {
            Phase::Failed(Reason::stale_epoch(record.epoch))
        }
        (Desired::Running, Some(record)) if record.epoch == goal.epoch => match &record.stage {
            Stage::Removed => Phase::Failed(Reason::lost()),
            stage => phase_of_stage(stage),
        },
        (Desired::Running, _) => Phase::Starting,
    }
}

/// Nothing is here: what the journal's stage means then.
fn phase_of_stage(stage: &Stage) -> Phase {
    match stage {
        Stage::Starting => Phase::Failed(Reason::interrupted()),
        Stage::Started => Phase::Failed(Reason::lost()),
        Stage::Failed(reason) => Phase::Failed(reason.clone()),
        Stage::Removed => Phase::Removed,
    }
}

impl Record {
    fn as_report(&self) -> Report {
        Report { epoch: self.epoch, phase: phase_of_stage(&self.stage) }
    }
}

impl Held {
    fn remnant(&self) -> Option<Epoch> {
        self.instances.iter().find(|(_, i)| i.presence == Presence::Remnant).map(|(epoch, _)| *epoch)
    }

    fn fate(&self, epoch: Epoch, goal: Option<&Goal>, known: bool) -> Fate {
        let Some(goal) = goal else { return if known { Fate::Orphan } else { Fate::Unknown } };
        let foreign = self.foreign.is_some_and(|newest| epoch <= newest);
        match (epoch.cmp(&goal.epoch), goal.desired()) {
            (Ordering::Equal, Desired::Running) => Fate::Wanted,
            (Ordering::Equal, Desired::Removed) => Fate::Going,
            (Ordering::Less, Desired::Running) if !foreign => Fate::Going,
            (Ordering::Greater, _) if !foreign => Fate::Newer,
            // Exactly the named epoch is removed, and what another ledger started is this one's only by name.
            _ => Fate::Orphan,
        }
    }

    /// The leader wants `epoch` to run: what an earlier ledger knew of the sandbox is this ledger's now.
    pub fn is_named(&mut self, epoch: Epoch) {
        if self.foreign.is_some_and(|newest| newest <= epoch && self.instances.contains_key(&epoch)) {
            self.foreign = None;
        }
    }

    /// The record once the instance at `epoch` is removed: why it went decides what is reported.
    pub fn record_after_removal(&self, epoch: Epoch) -> Option<Record> {
        let record = self.record.as_ref();
        if let Some(newer) = record.filter(|record| record.epoch > epoch) {
            return Some(newer.clone());
        }
        let was_remnant = self.instances.get(&epoch).is_some_and(|i| i.presence == Presence::Remnant);
        let stage = match record.filter(|record| record.epoch == epoch).map(|record| &record.stage) {
            _ if !was_remnant => Stage::Removed,
            Some(Stage::Starting) | None => Stage::Failed(Reason::interrupted()),
            Some(Stage::Started) => Stage::Failed(Reason::lost()),
            Some(settled) => settled.clone(),
        };
        Some(Record { epoch, stage })
    }

    /// Brings the record up to what a new agent finds on the host: what runs was started.
    pub fn adopt(&mut self) {
        let Some((epoch, instance)) = self.instances.last_key_value() else { return };
        let stage = match instance.presence {
            Presence::Remnant => Stage::Starting,
            _ => Stage::Started,
        };
        let known = self.record.as_ref().map(|record| (record.epoch, &record.stage));
        if known.is_none_or(|(seen, at)| seen < *epoch || (seen == *epoch && *at == Stage::Starting)) {
            self.record = Some(Record { epoch: *epoch, stage });
        }
    }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
