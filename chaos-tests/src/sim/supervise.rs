//! What an agent does to its host: one action a sandbox at a time, each in steps that a crash can come between.
//!
//! A start is prepared (and can be called off), its intent is written, a remnant stands on the host, and only then it runs.

use warren_node_agent::assignment::{OnIsolation, Want};
use warren_node_agent::driver::Presence;
use warren_node_agent::reconcile::{self, Action, Held, Reason, Record, Stage};
use warren_proto::ids::{Epoch, SandboxName};

use super::agent::Timer;
use super::bug::Bug;
use super::clock::{MS, SECOND};
use super::host::Instance;
use super::queue::Event;
use super::world::World;

/// Pause after a driver's refusal.
const RETRY: u64 = 500 * MS;

/// After so many looks at a group that stays frozen, a start is given up: the minute that drivers take at most.
const START_TRIES: u8 = 120;

/// How an action ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    Started {
        fenced: bool,
    },
    /// It could not be started, and nothing of it is left.
    NotStarted,
    /// Called off before anything was done.
    CalledOff,
    /// Removed, frozen, thawed or forgotten.
    Carried,
    /// The driver said no; ask again later.
    Refused,
}

impl World {
    /// Begins every action that is due.
    pub fn settle_actions(&mut self, agent: usize) {
        let now = self.agents[agent].reading(self.now);
        let Some(process) = self.process(agent) else { return };
        let closed = process.gate.is_closed(now);
        for (sandbox, action) in reconcile::diff(&process.assignment, &process.held, closed) {
            self.begin(agent, sandbox, action);
        }
    }

    pub fn settle_one(&mut self, agent: usize, sandbox: &SandboxName) {
        let now = self.agents[agent].reading(self.now);
        let Some(process) = self.process(agent) else { return };
        let closed = process.gate.is_closed(now);
        let nothing = Held::default();
        let held = process.held.get(sandbox).unwrap_or(&nothing);
        let known = process.assignment.is_known();
        if let Some(action) = reconcile::next_action(process.assignment.goal(sandbox), known, held, closed) {
            self.begin(agent, sandbox.clone(), action);
        }
    }

    fn begin(&mut self, agent: usize, sandbox: SandboxName, action: Action) {
        let action = match (action, self.bug) {
            // Bug: an orphan is removed like anything else.
            (Action::Freeze(epoch), Some(Bug::OrphanKilled)) => Action::Remove(epoch),
            (action, _) => action,
        };
        let delay = match action {
            Action::Start(_) => self.rng.between(MS, 400 * MS),
            _ => self.rng.between(MS, 50 * MS),
        };
        let Some(process) = self.process(agent) else { return };
        process.held.entry(sandbox.clone()).or_default().busy = Some(action);
        self.doing(agent, sandbox, action, 0, delay);
    }

    fn doing(&mut self, agent: usize, sandbox: SandboxName, action: Action, stage: u8, delay: u64) {
        let life = self.agents[agent].life;
        self.queue.put(self.now + delay, Event::Doing { agent, life, sandbox, action, stage });
    }

    /// The next step of an action under way. What a driver does goes on while the agent is stopped; the agent hears of it later.
    pub fn did(&mut self, agent: usize, sandbox: SandboxName, action: Action, stage: u8) {
        let done = match action {
            Action::Start(epoch) if stage == 0 => return self.intend(agent, sandbox, epoch),
            Action::Start(epoch) => match self.start(agent, &sandbox, epoch, stage) {
                Some(done) => done,
                // A runtime in a frozen group stands still.
                None => return self.doing(agent, sandbox, action, stage + 1, RETRY),
            },
            // A simulated host has no network: none of its instances strays.
            Action::Forget | Action::SetEgress(_) => Done::Carried,
            _ if self.rng.per_mille(40) => Done::Refused,
            Action::Remove(epoch) => {
                self.remove(agent, &sandbox, epoch);
                Done::Carried
            }
            Action::Freeze(epoch) => self.set_presence(agent, &sandbox, epoch, Presence::Frozen),
            Action::Thaw(epoch) => self.set_presence(agent, &sandbox, epoch, Presence::Running),
        };
        let life = self.agents[agent].life;
        self.queue.put(self.now, Event::Done { agent, life, sandbox, action, done });
    }

    /// Until here a start can be called off; now its intent is on disk and something may be on the host.
    fn intend(&mut self, agent: usize, sandbox: SandboxName, epoch: Epoch) {
        let delay = self.rng.between(MS, 300 * MS);
        let Some(process) = self.process(agent) else { return };
        let goal = process.assignment.goal(&sandbox);
        let spec = match goal.map(|goal| &goal.want) {
            Some(Want::Running(spec)) if !reconcile::start_is_obsolete(goal, epoch) => spec.clone(),
            _ => return self.done(agent, &sandbox, Action::Start(epoch), Done::CalledOff),
        };
        let disowned = self.upheaval && !self.is_known(agent, &sandbox, epoch);
        let host = &mut self.agents[agent];
        let fenced = host.has_fence && spec.on_isolation == OnIsolation::Freeze;
        let presence = Presence::Remnant;
        let remnant = Instance { resources: spec.resources, presence, fenced, disowned };
        host.instances.insert((sandbox.clone(), epoch), remnant);
        self.write_journal(agent, &sandbox, Record { epoch, stage: Stage::Starting });
        self.host_changed(agent, &sandbox);
        self.doing(agent, sandbox, Action::Start(epoch), 1, delay);
    }

    /// The runtime's part of a start; `None` while it stands still.
    fn start(&mut self, agent: usize, sandbox: &SandboxName, epoch: Epoch, tries: u8) -> Option<Done> {
        let fails = self.rng.per_mille(if self.calm { 0 } else { self.plan.failing_starts });
        let host = &mut self.agents[agent];
        let key = (sandbox.clone(), epoch);
        let instance = host.instances.get_mut(&key)?;
        let fenced = instance.fenced;
        if fenced && host.frozen && tries < START_TRIES {
            return None;
        }
        let runs = !fails && tries < START_TRIES;
        if runs {
            instance.presence = Presence::Running;
            self.plan_ending(agent, sandbox, epoch);
        } else {
            host.instances.remove(&key);
        }
        let node = &self.agents[agent].id;
        self.trace.note(self.now, format_args!("{node} {sandbox} {epoch} {}", if runs { "runs" } else { "fails" }));
        self.host_changed(agent, sandbox);
        Some(if runs { Done::Started { fenced } } else { Done::NotStarted })
    }

    /// The agent hears how an action ended, and begins the next one.
    pub fn done(&mut self, agent: usize, sandbox: &SandboxName, action: Action, done: Done) {
        let ended = match action {
            // Whoever waits for an end hears at once of one that came before.
            Action::Start(epoch) => self.agents[agent]
                .instances
                .get(&(sandbox.clone(), epoch))
                .and_then(|one| matches!(one.presence, Presence::Ended(_)).then(|| one.presence.clone())),
            _ => None,
        };
        let Some(process) = self.process(agent) else { return };
        let held = process.held.entry(sandbox.clone()).or_default();
        held.busy = None;
        let mut record = None;
        match (action, done) {
            (_, Done::Refused) => {
                let (at, life) = (self.now + RETRY, self.agents[agent].life);
                return self.queue.put(at, Event::Agent { agent, life, timer: Timer::Retry });
            }
            (Action::Start(epoch), Done::Started { fenced }) => {
                let (driver, presence) = ("sim".to_owned(), ended.unwrap_or(Presence::Running));
                held.instances.insert(epoch, reconcile::Instance { driver, presence, fenced, egress: None });
                record = Some(Record { epoch, stage: Stage::Started });
            }
            (Action::Start(epoch), Done::NotStarted) => {
                let reason = Reason::new("START_FAILED", "told to fail");
                record = Some(Record { epoch, stage: Stage::Failed(reason) });
            }
            (Action::Remove(epoch), Done::Carried) => {
                record = held.record_after_removal(epoch);
                held.instances.remove(&epoch);
            }
            (Action::Freeze(epoch), Done::Carried) => presence_is(held, epoch, Presence::Frozen),
            (Action::Thaw(epoch), Done::Carried) => presence_is(held, epoch, Presence::Running),
            (Action::Forget, Done::Carried) => {
                process.held.remove(sandbox);
                self.agents[agent].journal.remove(sandbox);
            }
            _ => {}
        }
        if let Some(record) = record {
            if let Some(held) = self.process(agent).and_then(|process| process.held.get_mut(sandbox)) {
                held.record = Some(record.clone());
            }
            self.write_journal(agent, sandbox, record);
        }
        self.concluded(agent, sandbox);
    }

    fn plan_ending(&mut self, agent: usize, sandbox: &SandboxName, epoch: Epoch) {
        if self.rng.per_mille(200) {
            let at = self.now + self.rng.between(100 * MS, 60 * SECOND);
            let boot = self.agents[agent].boot;
            self.queue.put(at, Event::Ends { agent, boot, sandbox: sandbox.clone(), epoch });
        }
    }

    fn remove(&mut self, agent: usize, sandbox: &SandboxName, epoch: Epoch) {
        let host = &mut self.agents[agent];
        let gone = host.instances.remove(&(sandbox.clone(), epoch));
        let node = host.id.clone();
        self.trace.note(self.now, format_args!("{node} {sandbox} {epoch} removed"));
        if let Some(gone) = gone {
            self.oracle.instance_removed(&node, sandbox, epoch, &gone);
        }
    }

    /// Frozen and running replace each other; an end that came between stays.
    fn set_presence(&mut self, agent: usize, sandbox: &SandboxName, epoch: Epoch, presence: Presence) -> Done {
        let instance = self.agents[agent].instances.get_mut(&(sandbox.clone(), epoch));
        if let Some(instance) = instance.filter(|one| matches!(one.presence, Presence::Running | Presence::Frozen)) {
            instance.presence = presence;
        }
        self.host_changed(agent, sandbox);
        Done::Carried
    }

    fn concluded(&mut self, agent: usize, sandbox: &SandboxName) {
        if let Some(process) = self.process(agent)
            && process.held.get(sandbox).is_some_and(|held| *held == Held::default())
        {
            process.held.remove(sandbox);
        }
        self.settle_one(agent, sandbox);
        self.extend_gate(agent);
        self.ring(agent);
    }

    fn write_journal(&mut self, agent: usize, sandbox: &SandboxName, record: Record) {
        let host = &mut self.agents[agent];
        let held = host.process.as_ref().and_then(|process| process.held.get(sandbox));
        let foreign = held.and_then(|held| held.foreign);
        host.journal.insert(sandbox.clone(), (record, foreign));
    }

    /// A start that a crash cut off is a remnant, or its runtime finished it, or nothing of it is left.
    pub fn cut_off_starts(&mut self, agent: usize) {
        let remnants: Vec<(SandboxName, Epoch)> = self.agents[agent]
            .instances
            .iter()
            .filter(|(_, instance)| instance.presence == Presence::Remnant)
            .map(|(key, _)| key.clone())
            .collect();
        for key in remnants {
            match self.rng.below(3) {
                0 => drop(self.agents[agent].instances.remove(&key)),
                1 => {
                    if let Some(instance) = self.agents[agent].instances.get_mut(&key) {
                        instance.presence = Presence::Running;
                    }
                    self.plan_ending(agent, &key.0, key.1);
                    self.host_changed(agent, &key.0);
                }
                _ => {}
            }
        }
    }
}

/// Frozen and running replace each other; an end that came between stays.
fn presence_is(held: &mut Held, epoch: Epoch, presence: Presence) {
    if let Some(instance) = held.instances.get_mut(&epoch)
        && matches!(instance.presence, Presence::Running | Presence::Frozen)
    {
        instance.presence = presence;
    }
}
