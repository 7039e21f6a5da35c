//! PURE: what to do next about each sandbox, and what to say about it.
//!
//! `diff(assignment, held) -> actions`: at most one action a sandbox, none while one is under way; the supervisor carries it
//! out, changes `held`, and asks again until nothing is left to do. `report` says what the leader should know now. Both are
//! functions of the assignment and of what is held, so a lost message or a restart changes nothing.
//!
//! Invariants: no start while any instance of the sandbox is here; no start of an epoch older than one seen here; an epoch
//! is started once at most; what a known assignment does not name is frozen, never ended (a remnant, which never ran to
//! begin with or is broken, is cleared away).

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::{Epoch, SandboxName};

use crate::assignment::{Assignment, Desired, Goal};
use crate::driver::{Ended, Presence};

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
}

/// All that the node knows of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    pub record: Option<Record>,
    pub instances: BTreeMap<Epoch, Instance>,
    /// What is under way.
    pub busy: Option<Action>,
}

/// One step for one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Start(Epoch),
    Remove(Epoch),
    /// It runs and no assignment names it.
    FreezeOrphan(Epoch),
    /// It was an orphan, and the assignment names it again.
    Thaw(Epoch),
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

/// What to do next, at most one action a sandbox.
pub fn diff(assignment: &Assignment, held: &BTreeMap<SandboxName, Held>) -> Vec<(SandboxName, Action)> {
    let nothing = Held::default();
    names(assignment, held)
        .into_iter()
        .filter_map(|name| {
            let held = held.get(name).unwrap_or(&nothing);
            next_action(assignment.goal(name), assignment.is_known(), held).map(|action| (name.clone(), action))
        })
        .collect()
}

/// What the leader should know of everything that is assigned or held.
pub fn report_all(assignment: &Assignment, held: &BTreeMap<SandboxName, Held>) -> BTreeMap<SandboxName, Report> {
    let nothing = Held::default();
    names(assignment, held)
        .into_iter()
        .filter_map(|name| {
            let held = held.get(name).unwrap_or(&nothing);
            report(assignment.goal(name), assignment.is_known(), held).map(|report| (name.clone(), report))
        })
        .collect()
}

fn names<'a>(assignment: &'a Assignment, held: &'a BTreeMap<SandboxName, Held>) -> BTreeSet<&'a SandboxName> {
    assignment.goals().keys().chain(held.keys()).collect()
}

/// The next step for one sandbox. `known`: a whole assignment has been received.
pub fn next_action(goal: Option<&Goal>, known: bool, held: &Held) -> Option<Action> {
    if held.busy.is_some() {
        return None;
    }
    if let Some(epoch) = held.remnant() {
        return Some(Action::Remove(epoch));
    }
    match goal {
        Some(goal) => match held.oldest_up_to(goal) {
            Some(epoch) => Some(Action::Remove(epoch)),
            None if goal.desired() == Desired::Removed => None,
            None => toward_running(goal.epoch, held),
        },
        None if known => without_goal(held),
        None => None,
    }
}

/// Nothing older is here, and the assignment wants `epoch` to run.
fn toward_running(epoch: Epoch, held: &Held) -> Option<Action> {
    match held.instances.first_key_value() {
        Some((here, instance)) if *here == epoch => {
            (instance.presence == Presence::Frozen).then_some(Action::Thaw(epoch))
        }
        // A newer one: the assignment is old, and refused.
        Some(_) => None,
        None => held.record.as_ref().is_none_or(|record| record.epoch < epoch).then_some(Action::Start(epoch)),
    }
}

fn without_goal(held: &Held) -> Option<Action> {
    let running = held.instances.iter().find(|(_, instance)| instance.presence == Presence::Running);
    match running {
        Some((epoch, _)) => Some(Action::FreezeOrphan(*epoch)),
        // Once forgotten there is nothing to forget: asking again must come to rest.
        None => (held.instances.is_empty() && held.record.is_some()).then_some(Action::Forget),
    }
}

/// Whether a start of `epoch` that is under way is no longer wanted.
pub fn start_is_obsolete(goal: Option<&Goal>, epoch: Epoch) -> bool {
    goal.is_none_or(|goal| goal.epoch != epoch || goal.desired() == Desired::Removed)
}

/// What to say of one sandbox; `None`: nothing is assigned and nothing is here.
pub fn report(goal: Option<&Goal>, known: bool, held: &Held) -> Option<Report> {
    if let Some(Action::Start(epoch)) = held.busy {
        return Some(Report { epoch, phase: Phase::Starting });
    }
    match (held.instances.last_key_value(), goal) {
        (Some((here, _)), Some(goal)) if *here < goal.epoch && goal.desired() == Desired::Running => {
            Some(Report { epoch: goal.epoch, phase: Phase::Starting })
        }
        (Some((here, instance)), _) => {
            Some(Report { epoch: *here, phase: phase_here(&instance.presence, goal.is_some(), known) })
        }
        (None, Some(goal)) => Some(Report { epoch: goal.epoch, phase: phase_gone(goal, held.record.as_ref()) }),
        (None, None) if known => None,
        (None, None) => {
            held.record.as_ref().map(|record| Report { epoch: record.epoch, phase: phase_of_stage(&record.stage) })
        }
    }
}

fn phase_here(presence: &Presence, named: bool, known: bool) -> Phase {
    match presence {
        // Being cleared away: not failed before nothing is left of it.
        Presence::Remnant => Phase::Starting,
        _ if known && !named => Phase::Orphan,
        // Only orphans are ever frozen; before the first assignment it still is one.
        Presence::Frozen if !named => Phase::Orphan,
        Presence::Running | Presence::Frozen => Phase::Running,
        Presence::Ended(ended) => Phase::Exited(ended.clone()),
    }
}

fn phase_gone(goal: &Goal, record: Option<&Record>) -> Phase {
    match (goal.desired(), record) {
        (Desired::Removed, _) => Phase::Removed,
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

impl Held {
    fn remnant(&self) -> Option<Epoch> {
        self.instances.iter().find(|(_, i)| i.presence == Presence::Remnant).map(|(epoch, _)| *epoch)
    }

    /// The oldest instance that `goal` does not want.
    fn oldest_up_to(&self, goal: &Goal) -> Option<Epoch> {
        let (epoch, _) = self.instances.first_key_value()?;
        let unwanted = match goal.desired() {
            Desired::Running => *epoch < goal.epoch,
            Desired::Removed => *epoch <= goal.epoch,
        };
        unwanted.then_some(*epoch)
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
