//! What the supervisor knows, changed in whole steps under its lock.

use std::collections::BTreeMap;

use tokio_util::sync::{CancellationToken, DropGuard};
use warren_proto::ids::{Epoch, SandboxName};

use super::gate::Gate;
use super::work::{Done, Job};
use crate::assignment::{Assignment, Desired, Goal, Want};
use crate::driver::{InstanceKey, Presence};
use crate::journal::Entry;
use crate::reconcile::{self, Action, Held, Instance, Reason, Record, Stage};

/// What the node should hold, holds and does.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub assignment: Assignment,
    pub held: BTreeMap<SandboxName, Held>,
    /// Dropped with the instance: ends the task that waits for its main process.
    pub watches: BTreeMap<InstanceKey, DropGuard>,
    /// Calls off the preparation of a start.
    pub starting: BTreeMap<SandboxName, (Epoch, CancellationToken)>,
    /// Failures in a row of what a sandbox needs next.
    pub failures: BTreeMap<SandboxName, u32>,
    pub gate: Gate,
    /// The journal may lack what it once held, and no whole assignment has come since.
    pub forgot: bool,
}

impl Model {
    /// Nothing would run that must not, if the fenced group were thawed.
    pub fn is_settled(&self) -> bool {
        let known = self.assignment.is_known();
        !self.held.iter().any(|(name, held)| reconcile::is_unsettled(self.assignment.goal(name), known, held))
    }

    /// Something fenced is here, or should be, or may be in the middle of its start.
    pub fn is_fenced(&self) -> bool {
        let here = |held: &Held| {
            matches!(held.busy, Some(Action::Start(_))) || held.instances.values().any(|instance| instance.fenced)
        };
        self.assignment.goals().values().any(Goal::is_fenced) || self.held.values().any(here)
    }

    pub fn know_the_named(&mut self) {
        for (name, goal) in self.assignment.goals() {
            if let (Want::Running(_), Some(held)) = (&goal.want, self.held.get_mut(name)) {
                held.is_named(goal.epoch);
            }
        }
    }

    /// Forgets the assignment and counts all that is here to an earlier ledger; answers what the journal must say.
    pub fn disown(&mut self) -> Vec<(SandboxName, Entry)> {
        self.assignment = Assignment::default();
        self.call_off_obsolete_starts();
        let mut entries = Vec::new();
        for (name, held) in &mut self.held {
            held.foreign = held.newest_epoch().or(held.foreign);
            let record = held.record.clone();
            entries.extend(record.map(|record| (name.clone(), Entry { record, foreign: held.foreign })));
        }
        entries
    }

    /// Writes off what should run and of which nothing is known; answers what the journal must say. What is here at an older
    /// epoch is not doubted: a newer one would have replaced it.
    pub fn doubt_the_unknown(&mut self) -> Vec<(SandboxName, Entry)> {
        let mut entries = Vec::new();
        for (name, goal) in self.assignment.goals() {
            if goal.desired() == Desired::Running && !self.held.contains_key(name) {
                let record = Record { epoch: goal.epoch, stage: Stage::Failed(Reason::journal_lost()) };
                self.held.insert(name.clone(), Held { record: Some(record.clone()), ..Held::default() });
                entries.push((name.clone(), Entry { record, foreign: None }));
            }
        }
        entries
    }

    pub fn call_off_obsolete_starts(&mut self) {
        for (sandbox, (epoch, cancel)) in &self.starting {
            if reconcile::start_is_obsolete(self.assignment.goal(sandbox), *epoch) {
                cancel.cancel();
            }
        }
    }

    /// What a task needs for an action; `None` where the model has changed under it.
    pub fn job(&mut self, sandbox: &SandboxName, action: Action) -> Option<Job> {
        let driver = |epoch| self.held.get(sandbox)?.instances.get(epoch).map(|instance| instance.driver.clone());
        Some(match &action {
            Action::Start(epoch) => {
                let Some(Goal { want: Want::Running(spec), .. }) = self.assignment.goal(sandbox) else { return None };
                let cancel = CancellationToken::new();
                let job = Job::Start { spec: spec.clone(), cancel: cancel.clone() };
                self.starting.insert(sandbox.clone(), (*epoch, cancel));
                job
            }
            Action::Remove(epoch) | Action::Freeze(epoch) | Action::Thaw(epoch) => {
                Job::Driver { driver: driver(epoch)?, failures: self.failures.get(sandbox).copied().unwrap_or(0) }
            }
            Action::SetEgress(epoch) => Job::Egress {
                driver: driver(epoch)?,
                egress: self.assignment.goal(sandbox)?.egress()?.clone(),
                failures: self.failures.get(sandbox).copied().unwrap_or(0),
            },
            Action::Forget => Job::Forget,
        })
    }

    pub fn conclude(&mut self, sandbox: &SandboxName, action: Action, done: Done) {
        self.starting.remove(sandbox);
        match &done {
            Done::Retry => *self.failures.entry(sandbox.clone()).or_default() += 1,
            _ => drop(self.failures.remove(sandbox)),
        }
        let held = self.held.entry(sandbox.clone()).or_default();
        held.busy = None;
        match (action, done) {
            (Action::Start(epoch), Done::Started { driver, record, fenced, egress }) => {
                held.record = Some(record);
                held.instances.insert(epoch, Instance { driver, presence: Presence::Running, fenced, egress });
            }
            (_, Done::NotStarted { record }) => held.record = Some(record),
            (Action::Remove(epoch), Done::Removed { record }) => {
                held.record = record;
                held.instances.remove(&epoch);
                self.watches.remove(&InstanceKey { sandbox: sandbox.clone(), epoch });
            }
            (Action::SetEgress(epoch), Done::EgressSet { egress }) => {
                if let Some(instance) = held.instances.get_mut(&epoch) {
                    instance.egress = Some(egress);
                }
            }
            (Action::Freeze(epoch), Done::Carried) => held.set_presence(epoch, Presence::Frozen),
            (Action::Thaw(epoch), Done::Carried) => held.set_presence(epoch, Presence::Running),
            (Action::Forget, Done::Carried) => {
                self.held.remove(sandbox);
            }
            _ => {}
        }
        if self.held.get(sandbox).is_some_and(|held| *held == Held::default()) {
            self.held.remove(sandbox);
        }
    }

    pub fn record_after_removal(&self, key: &InstanceKey) -> Option<Record> {
        self.held.get(&key.sandbox)?.record_after_removal(key.epoch)
    }
}

impl Held {
    /// Of all that is known here, a start under way included.
    fn newest_epoch(&self) -> Option<Epoch> {
        let starting = self.busy.and_then(|action| if let Action::Start(epoch) = action { Some(epoch) } else { None });
        let here = self.instances.keys().copied().chain(starting);
        here.chain(self.record.as_ref().map(|record| record.epoch)).max()
    }

    /// Frozen and running replace each other; an end that came between stays.
    fn set_presence(&mut self, epoch: Epoch, presence: Presence) {
        if let Some(instance) = self.instances.get_mut(&epoch)
            && matches!(instance.presence, Presence::Running | Presence::Frozen)
        {
            instance.presence = presence;
        }
    }
}
