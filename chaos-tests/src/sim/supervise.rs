//! What an agent does to its host: one action a sandbox at a time, each in steps that a crash can come between.
//!
//! A start is prepared (and can be called off), its intent is written, a remnant stands on the host, and only then it runs.

use warren_node_agent::assignment::Want;
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
const RETRY: u64 = 200 * MS;

impl World {
    /// Begins every action that is due.
    pub fn settle_actions(&mut self, agent: usize) {
        let Some(process) = self.process(agent) else { return };
        for (sandbox, action) in reconcile::diff(&process.assignment, &process.held) {
            self.begin(agent, sandbox, action);
        }
    }

    pub fn settle_one(&mut self, agent: usize, sandbox: &SandboxName) {
        let Some(process) = self.process(agent) else { return };
        let nothing = Held::default();
        let held = process.held.get(sandbox).unwrap_or(&nothing);
        let known = process.assignment.is_known();
        if let Some(action) = reconcile::next_action(process.assignment.goal(sandbox), known, held) {
            self.begin(agent, sandbox.clone(), action);
        }
    }

    fn begin(&mut self, agent: usize, sandbox: SandboxName, action: Action) {
        let action = match (action, self.bug) {
            // Bug: an orphan is removed like anything else.
            (Action::FreezeOrphan(epoch), Some(Bug::OrphanKilled)) => Action::Remove(epoch),
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

    /// The next step of an action under way.
    pub fn did(&mut self, agent: usize, sandbox: SandboxName, action: Action, stage: u8) {
        match action {
            Action::Start(epoch) if stage == 0 => self.intend(agent, sandbox, epoch),
            Action::Start(epoch) => self.started(agent, sandbox, epoch),
            Action::Remove(_) | Action::FreezeOrphan(_) | Action::Thaw(_) if self.rng.per_mille(40) => {
                if let Some(held) = self.process(agent).and_then(|process| process.held.get_mut(&sandbox)) {
                    held.busy = None;
                }
                let (at, life) = (self.now + RETRY, self.agents[agent].life);
                self.queue.put(at, Event::Agent { agent, life, timer: Timer::Retry });
            }
            Action::Remove(epoch) => self.removed(agent, sandbox, epoch),
            Action::FreezeOrphan(epoch) => self.set_presence(agent, sandbox, epoch, Presence::Frozen),
            Action::Thaw(epoch) => self.set_presence(agent, sandbox, epoch, Presence::Running),
            Action::Forget => {
                self.agents[agent].journal.remove(&sandbox);
                if let Some(process) = self.process(agent) {
                    process.held.remove(&sandbox);
                }
                self.concluded(agent, &sandbox);
            }
        }
    }

    /// Until here a start can be called off; now its intent is on disk and something may be on the host.
    fn intend(&mut self, agent: usize, sandbox: SandboxName, epoch: Epoch) {
        let delay = self.rng.between(MS, 300 * MS);
        let Some(process) = self.process(agent) else { return };
        let goal = process.assignment.goal(&sandbox);
        let spec = match goal.map(|goal| &goal.want) {
            Some(Want::Running(spec)) if !reconcile::start_is_obsolete(goal, epoch) => spec.clone(),
            _ => {
                if let Some(held) = process.held.get_mut(&sandbox) {
                    held.busy = None;
                }
                return self.concluded(agent, &sandbox);
            }
        };
        let host = &mut self.agents[agent];
        host.journal.insert(sandbox.clone(), Record { epoch, stage: Stage::Starting });
        let ledger_id = host.ledger_file;
        let remnant = Instance { resources: spec.resources, presence: Presence::Remnant, fenced: false, ledger_id };
        host.instances.insert((sandbox.clone(), epoch), remnant);
        self.host_changed(agent, &sandbox);
        self.doing(agent, sandbox, Action::Start(epoch), 1, delay);
    }

    fn started(&mut self, agent: usize, sandbox: SandboxName, epoch: Epoch) {
        let fails = self.rng.per_mille(self.plan.failing_starts);
        let host = &mut self.agents[agent];
        let stage = if fails {
            host.instances.remove(&(sandbox.clone(), epoch));
            Stage::Failed(Reason::new("START_FAILED", "told to fail"))
        } else {
            if let Some(instance) = host.instances.get_mut(&(sandbox.clone(), epoch)) {
                instance.presence = Presence::Running;
            }
            Stage::Started
        };
        let record = Record { epoch, stage };
        host.journal.insert(sandbox.clone(), record.clone());
        self.trace.note(self.now, format_args!("{} {sandbox} {epoch} {:?}", host.id, record.stage));
        if !fails {
            self.plan_ending(agent, &sandbox, epoch);
        }
        if let Some(process) = self.process(agent) {
            let held = process.held.entry(sandbox.clone()).or_default();
            held.busy = None;
            held.record = Some(record);
            if !fails {
                let instance = reconcile::Instance { driver: "sim".to_owned(), presence: Presence::Running };
                held.instances.insert(epoch, instance);
            }
        }
        self.host_changed(agent, &sandbox);
        self.concluded(agent, &sandbox);
    }

    fn plan_ending(&mut self, agent: usize, sandbox: &SandboxName, epoch: Epoch) {
        if self.rng.per_mille(200) {
            let at = self.now + self.rng.between(100 * MS, 60 * SECOND);
            let boot = self.agents[agent].boot;
            self.queue.put(at, Event::Ends { agent, boot, sandbox: sandbox.clone(), epoch });
        }
    }

    fn removed(&mut self, agent: usize, sandbox: SandboxName, epoch: Epoch) {
        let host = &mut self.agents[agent];
        let gone = host.instances.remove(&(sandbox.clone(), epoch));
        let node = host.id.clone();
        self.trace.note(self.now, format_args!("{node} {sandbox} {epoch} removed"));
        if let Some(gone) = gone {
            self.oracle.instance_removed(&node, &sandbox, epoch, &gone);
        }
        let Some(process) = &mut self.agents[agent].process else { return };
        let Some(held) = process.held.get_mut(&sandbox) else { return };
        let record = held.record_after_removal(epoch);
        held.busy = None;
        held.record = record.clone();
        held.instances.remove(&epoch);
        if let Some(record) = record {
            self.agents[agent].journal.insert(sandbox.clone(), record);
        }
        self.concluded(agent, &sandbox);
    }

    /// Frozen and running replace each other; an end that came between stays.
    fn set_presence(&mut self, agent: usize, sandbox: SandboxName, epoch: Epoch, presence: Presence) {
        let changes = |have: &Presence| matches!(have, Presence::Running | Presence::Frozen);
        let host = &mut self.agents[agent];
        if let Some(real) = host.instances.get_mut(&(sandbox.clone(), epoch)).filter(|real| changes(&real.presence)) {
            real.presence = presence.clone();
        }
        if let Some(held) = host.process.as_mut().and_then(|process| process.held.get_mut(&sandbox)) {
            held.busy = None;
            if let Some(known) = held.instances.get_mut(&epoch).filter(|known| changes(&known.presence)) {
                known.presence = presence;
            }
        }
        self.host_changed(agent, &sandbox);
        self.concluded(agent, &sandbox);
    }

    fn concluded(&mut self, agent: usize, sandbox: &SandboxName) {
        if let Some(process) = self.process(agent)
            && process.held.get(sandbox).is_some_and(|held| *held == Held::default())
        {
            process.held.remove(sandbox);
        }
        self.settle_one(agent, sandbox);
        self.ring(agent);
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
