//! A node agent's process: its session with the leader, its lease, and what it does to its host.
//!
//! What to do and what to say comes from the real `reconcile` and `assignment`; around them stands, step for step, what
//! `session` and `supervisor` do. Anything may be interrupted by a crash, and what is on the host stays.

use std::collections::BTreeMap;
use std::time::Duration;

use warren_node_agent::assignment::{Assignment, Goal, Outcome, Update, Want};
use warren_node_agent::driver::InstanceKey;
use warren_node_agent::reconcile::{self, Held};
use warren_proto::ids::{Generation, SandboxName};
use warren_scheduler::state::command::{LedgerId, Observation, Observed, Phase};
use warren_scheduler::state::node::NodeReport;
use warren_scheduler::state::sandbox::Exit;

use super::bug::Bug;
use super::clock::{MS, SECOND};
use super::gate::Gate;
use super::queue::Event;
use super::session::{Down, Refusal, SessionId, Up};
use super::world::World;

const HANDSHAKE: Duration = Duration::from_secs(10);
const COALESCE: Duration = Duration::from_millis(10);
const MAX_PENDING: usize = 8;
const FIRST_PAUSE: u64 = 100 * MS;
const LAST_PAUSE: u64 = 5 * SECOND;
pub const SLOW_PAUSE: u64 = 30 * SECOND;

/// What an agent waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    Connect,
    Handshake(SessionId),
    Renew(SessionId),
    /// No grant came since this many had come.
    Silence(SessionId, u64),
    Flush(SessionId),
    /// A driver refused; ask again what is to be done.
    Retry,
}

/// A running agent.
#[derive(Debug)]
pub struct Process {
    pub incarnation: u128,
    pub assignment: Assignment,
    pub held: BTreeMap<SandboxName, Held>,
    pub link: Option<Link>,
    pub gate: Gate,
    lease_until: Option<Duration>,
    next: usize,
    rounds: u32,
}

/// The agent's end of a session.
#[derive(Debug)]
pub struct Link {
    pub id: SessionId,
    pub welcomed: bool,
    lease: Duration,
    sequence: u64,
    grants: u64,
    pending: BTreeMap<u64, Duration>,
    told: Snapshot,
    flushing: bool,
    resync_asked: bool,
    /// Before the Hello was sent.
    opened: Duration,
}

impl Process {
    /// Something fenced is here, or should be, or may be in the middle of its start.
    fn is_fenced(&self) -> bool {
        let here = |held: &Held| {
            matches!(held.busy, Some(reconcile::Action::Start(_))) || held.instances.values().any(|one| one.fenced)
        };
        self.assignment.goals().values().any(Goal::is_fenced) || self.held.values().any(here)
    }
}

/// What a node holds at one moment.
type Snapshot = (Generation, BTreeMap<InstanceKey, reconcile::Phase>);

impl World {
    fn agent_timer(&mut self, agent: usize, after: Duration, timer: Timer) {
        let host = &self.agents[agent];
        let (at, life) = (host.clock.after(self.now, after), host.life);
        self.queue.put(at, Event::Agent { agent, life, timer });
    }

    /// A new process takes over what is on the host.
    pub fn start_agent(&mut self, agent: usize) {
        if self.agents[agent].process.is_some() {
            return;
        }
        self.incarnations += 1;
        let (incarnation, next) = (self.incarnations, self.rng.index(self.replicas.len()));
        let host = &mut self.agents[agent];
        host.life += 1;
        let mut held: BTreeMap<SandboxName, Held> = BTreeMap::new();
        for (sandbox, (record, foreign)) in &host.journal {
            let (record, foreign) = (Some(record.clone()), *foreign);
            held.insert(sandbox.clone(), Held { record, foreign, ..Held::default() });
        }
        for ((sandbox, epoch), instance) in &host.instances {
            let (presence, fenced) = (instance.presence.clone(), instance.fenced);
            let instance = reconcile::Instance { driver: "sim".to_owned(), presence, fenced, egress: None };
            held.entry(sandbox.clone()).or_default().instances.insert(*epoch, instance);
        }
        for (sandbox, held) in &mut held {
            held.adopt();
            if let Some(record) = &held.record {
                host.journal.insert(sandbox.clone(), (record.clone(), held.foreign));
            }
        }
        let assignment = Assignment::default();
        let gate = Gate::new(host.published);
        host.process =
            Some(Process { incarnation, assignment, held, link: None, gate, lease_until: None, next, rounds: 0 });
        self.trace.note(self.now, format_args!("{} agent {incarnation} starts", host.id));
        self.settle_actions(agent);
        self.agent_timer(agent, Duration::ZERO, Timer::Connect);
    }

    /// The agent's process is gone; what it was doing is cut off where it stands.
    pub fn stop_agent(&mut self, agent: usize) {
        let link = self.agents[agent].process.take().and_then(|process| process.link);
        self.agents[agent].stalled = None;
        self.agents[agent].life += 1;
        self.trace.note(self.now, format_args!("{} agent is gone", self.agents[agent].id));
        self.cut_off_starts(agent);
        if let Some(link) = link {
            self.send_up(link.id, Up::Close);
        }
    }

    pub fn process(&mut self, agent: usize) -> Option<&mut Process> {
        self.agents[agent].process.as_mut()
    }

    fn link(&mut self, agent: usize, id: SessionId) -> Option<&mut Link> {
        self.process(agent)?.link.as_mut().filter(|link| link.id == id)
    }

    pub fn agent_event(&mut self, agent: usize, timer: Timer) {
        match timer {
            Timer::Connect => self.connect(agent),
            Timer::Handshake(id) => {
                if self.link(agent, id).is_some_and(|link| !link.welcomed) {
                    self.end_session(agent, FIRST_PAUSE);
                }
            }
            Timer::Renew(id) => self.send_renewal(agent, id),
            Timer::Silence(id, grants) => {
                if self.link(agent, id).is_some_and(|link| link.grants == grants) {
                    self.end_session(agent, FIRST_PAUSE);
                }
            }
            Timer::Flush(id) => self.flush_observation(agent, id),
            Timer::Retry => self.settle_actions(agent),
        }
    }

    fn connect(&mut self, agent: usize) {
        let count = self.replicas.len();
        let Some(process) = self.process(agent).filter(|process| process.link.is_none()) else { return };
        let replica = process.next % count;
        process.next = (replica + 1) % count;
        if !self.replicas[replica].up {
            return self.pause(agent, FIRST_PAUSE);
        }
        let id = self.open_session(agent, replica);
        let told = self.snapshot(agent);
        let host = &self.agents[agent];
        let opened = host.reading(self.now);
        let Some(process) = &host.process else { return };
        let report = NodeReport {
            incarnation: process.incarnation,
            address: format!("{}:7070", host.id),
            tls: false,
            capacity: host.capacity,
            labels: BTreeMap::new(),
            drivers: vec!["sim".to_owned()],
            agent_version: "sim".to_owned(),
            fence: host.has_fence,
            gpus: host.gpus.clone(),
        };
        let observation = self.observation(agent, &told, None);
        let ledger_id = host.ledger_file;
        let link = Link {
            id,
            welcomed: false,
            lease: Duration::ZERO,
            sequence: 0,
            grants: 0,
            pending: BTreeMap::new(),
            told,
            flushing: false,
            resync_asked: false,
            opened,
        };
        if let Some(process) = self.process(agent) {
            process.link = Some(link);
        }
        self.send_up(id, Up::Hello { ledger_id, report: Box::new(report), observation });
        self.agent_timer(agent, HANDSHAKE, Timer::Handshake(id));
    }

    fn pause(&mut self, agent: usize, least: u64) {
        let Some(process) = self.process(agent) else { return };
        process.rounds += 1;
        let bound = LAST_PAUSE.min(FIRST_PAUSE << process.rounds.min(10)).max(least);
        let pause = Duration::from_micros(self.rng.between(bound / 4, bound));
        self.agent_timer(agent, pause, Timer::Connect);
    }

    /// Gives the session up and looks for another.
    fn end_session(&mut self, agent: usize, pause: u64) {
        let Some(link) = self.process(agent).and_then(|process| process.link.take()) else { return };
        self.trace.note(self.now, format_args!("{} gives up session {}", self.agents[agent].id, link.id));
        self.send_up(link.id, Up::Close);
        self.pause(agent, pause);
    }

    pub fn deliver_to_agent(&mut self, agent: usize, id: SessionId, message: Down) {
        if self.link(agent, id).is_none() {
            return;
        }
        match message {
            Down::Welcome { ledger_id, lease } => self.welcomed(agent, id, ledger_id, lease),
            Down::Granted { sequence } => self.granted(agent, id, sequence),
            Down::Assignment(update) => self.assign(agent, id, update),
            Down::Refused(refusal) => self.refused(agent, refusal),
        }
    }

    fn refused(&mut self, agent: usize, refusal: Refusal) {
        self.trace.note(self.now, format_args!("{} is refused: {refusal:?}", self.agents[agent].id));
        let redirect = match refusal {
            Refusal::NotLeader { leader: Some(leader) } => {
                if let Some(process) = self.process(agent) {
                    process.next = leader;
                }
                true
            }
            _ => false,
        };
        let slow = matches!(refusal, Refusal::LedgerMismatch | Refusal::Superseded);
        if redirect && self.rng.per_mille(700) {
            if let Some(process) = self.process(agent) {
                process.link = None;
            }
            return self.agent_timer(agent, Duration::from_millis(1), Timer::Connect);
        }
        self.end_session(agent, if slow { SLOW_PAUSE } else { FIRST_PAUSE });
    }

    fn welcomed(&mut self, agent: usize, id: SessionId, ledger_id: LedgerId, lease: Duration) {
        match self.agents[agent].ledger_file {
            Some(ours) if ours != ledger_id => self.change_ledger(agent, ledger_id),
            Some(_) => {}
            None => self.agents[agent].ledger_file = Some(ledger_id),
        }
        if let Some(process) = self.process(agent) {
            process.rounds = 0;
        }
        let Some(link) = self.link(agent, id) else { return };
        link.welcomed = true;
        self.trace.note(self.now, format_args!("{} has session {id}", self.agents[agent].id));
        let Some(link) = self.link(agent, id) else { return };
        link.lease = lease;
        link.flushing = true;
        self.agent_timer(agent, Duration::ZERO, Timer::Renew(id));
        self.agent_timer(agent, lease, Timer::Silence(id, 0));
        self.agent_timer(agent, COALESCE, Timer::Flush(id));
    }

    fn send_renewal(&mut self, agent: usize, id: SessionId) {
        let sent = self.agents[agent].clock.monotonic(self.now);
        let jitter = self.rng.between(800, 1_000);
        let Some(link) = self.link(agent, id) else { return };
        link.sequence += 1;
        let (sequence, lease) = (link.sequence, link.lease);
        link.pending.insert(sequence, sent);
        if link.pending.len() > MAX_PENDING {
            link.pending.pop_first();
        }
        self.send_up(id, Up::Renew { sequence });
        let next = Duration::from_micros(u64::try_from(lease.as_micros()).unwrap_or(u64::MAX) / 3 * jitter / 1_000);
        self.agent_timer(agent, next, Timer::Renew(id));
    }

    fn granted(&mut self, agent: usize, id: SessionId, sequence: u64) {
        let arrived = self.agents[agent].reading(self.now);
        let from_receipt = self.bug == Some(Bug::LeaseFromReceipt);
        let Some(process) = self.process(agent) else { return };
        let lease_until = process.lease_until;
        let Some(link) = process.link.as_mut().filter(|link| link.id == id) else { return };
        let Some(sent) = link.pending.remove(&sequence) else { return };
        link.pending = link.pending.split_off(&sequence);
        let opened = link.opened;
        let lapsed = lease_until.is_some_and(|until| opened < until && until <= arrived);
        if (lapsed || process.gate.outlasts(opened)) && process.gate.is_closed(arrived) && process.is_fenced() {
            // The ledger may have moved sandboxes meanwhile, and this session's assignment may not say so yet.
            return self.end_session(agent, FIRST_PAUSE);
        }
        let Some(link) = process.link.as_mut() else { return };
        link.grants += 1;
        let (lease, grants) = (link.lease, link.grants);
        let until = if from_receipt { arrived } else { sent } + lease;
        let ends = self.agents[agent].clock.when(until);
        self.oracle.lease_taken(&self.agents[agent].id, id, sequence, ends);
        let Some(process) = self.process(agent) else { return };
        process.lease_until = process.lease_until.max(Some(until));
        process.gate.leased(until, opened);
        self.extend_gate(agent);
        self.agent_timer(agent, lease, Timer::Silence(id, grants));
    }

    /// Tells the fence of the last grant, where it may be told; what waited for that begins.
    pub fn extend_gate(&mut self, agent: usize) {
        let now = self.agents[agent].reading(self.now);
        let Some(process) = self.process(agent) else { return };
        let (was_closed, fenced) = (process.gate.is_closed(now), process.is_fenced());
        let (assignment, held) = (&process.assignment, &process.held);
        let unsettled = |(name, held): (&SandboxName, &Held)| {
            reconcile::is_unsettled(assignment.goal(name), assignment.is_known(), held)
        };
        let Some(until) = process.gate.extend(now, fenced, || !held.iter().any(unsettled)) else { return };
        self.publish(agent, until);
        if was_closed {
            self.settle_actions(agent);
        }
    }

    /// What the assignment wants to run is the ledger's, whosever it was, unless the assignment is from before the ledger
    /// forgot it.
    fn own_the_named(&mut self, agent: usize) {
        let host = &self.agents[agent];
        if !self.upheaval || host.ledger_file != self.oracle.state().ledger_id {
            return;
        }
        let Some(process) = &host.process else { return };
        let wanted = process.assignment.goals().iter().filter(|(_, goal)| matches!(goal.want, Want::Running(_)));
        let named: Vec<_> = wanted
            .filter(|(name, goal)| self.is_known(agent, name, goal.epoch))
            .map(|(name, goal)| (name.clone(), goal.epoch))
            .collect();
        for key in named {
            if let Some(instance) = self.agents[agent].instances.get_mut(&key) {
                instance.disowned = false;
            }
        }
    }

    /// The leader's ledger was restored from the one that the node belongs to: what is here is that one's until this one names
    /// it.
    fn change_ledger(&mut self, agent: usize, ledger_id: LedgerId) {
        let host = &mut self.agents[agent];
        if let Some(process) = &mut host.process {
            process.assignment = Assignment::default();
            for (name, held) in &mut process.held {
                let starting = match held.busy {
                    Some(reconcile::Action::Start(epoch)) => Some(epoch),
                    _ => None,
                };
                let recorded = held.record.as_ref().map(|record| record.epoch);
                let newest = held.instances.keys().copied().chain(starting).chain(recorded).max();
                held.foreign = newest.or(held.foreign);
                if let Some(record) = &held.record {
                    host.journal.insert(name.clone(), (record.clone(), held.foreign));
                }
            }
        }
        host.ledger_file = Some(ledger_id);
    }

    fn assign(&mut self, agent: usize, id: SessionId, update: Update) {
        let Some(process) = self.process(agent) else { return };
        let whole = matches!(update, Update::Full { .. });
        let outcome = process.assignment.apply(update);
        let Some(link) = process.link.as_mut().filter(|link| link.id == id) else { return };
        link.resync_asked &= !whole;
        match outcome {
            Outcome::NeedWhole if !std::mem::replace(&mut link.resync_asked, true) => self.send_up(id, Up::Resync),
            Outcome::Applied => {
                if whole {
                    process.gate.assigned(link.opened);
                }
                for (name, goal) in process.assignment.goals() {
                    if let (Want::Running(_), Some(held)) = (&goal.want, process.held.get_mut(name)) {
                        held.is_named(goal.epoch);
                    }
                }
                self.own_the_named(agent);
                self.extend_gate(agent);
                self.settle_actions(agent);
                self.ring(agent);
            }
            Outcome::Stale | Outcome::NeedWhole => {}
        }
    }

    /// What the node holds has changed: the leader is told soon.
    pub fn ring(&mut self, agent: usize) {
        let Some(process) = self.process(agent) else { return };
        let Some(link) = process.link.as_mut().filter(|link| link.welcomed) else { return };
        if !std::mem::replace(&mut link.flushing, true) {
            let id = link.id;
            self.agent_timer(agent, COALESCE, Timer::Flush(id));
        }
    }

    fn flush_observation(&mut self, agent: usize, id: SessionId) {
        let now = self.snapshot(agent);
        let Some(link) = self.link(agent, id) else { return };
        link.flushing = false;
        if link.told == now {
            return;
        }
        let before = std::mem::replace(&mut link.told, now.clone());
        let observation = self.observation(agent, &now, Some(&before));
        self.send_up(id, Up::Observation(observation));
    }

    fn snapshot(&self, agent: usize) -> Snapshot {
        let Some(process) = &self.agents[agent].process else { return (Generation(0), BTreeMap::new()) };
        (process.assignment.generation(), reconcile::report_all(&process.assignment, &process.held))
    }

    /// Everything, or what is new since `before`.
    fn observation(&self, agent: usize, now: &Snapshot, before: Option<&Snapshot>) -> Observation {
        let is_new = |key: &InstanceKey, phase| before.and_then(|before| before.1.get(key)) != Some(phase);
        let changed = now.1.iter().filter(|(key, phase)| is_new(key, phase));
        Observation {
            sandboxes: changed.map(|(key, phase)| observed(key, phase)).collect(),
            templates: Some(self.agents[agent].templates.iter().copied().collect()),
        }
    }
}

fn observed(key: &InstanceKey, phase: &reconcile::Phase) -> Observed {
    let phase = match phase {
        reconcile::Phase::Starting => Phase::Starting,
        reconcile::Phase::Running => Phase::Running,
        reconcile::Phase::Exited(ended) => Phase::Exited {
            exit: Exit { code: ended.exit.code, signal: ended.exit.signal, oom_killed: ended.exit.oom_killed },
            output_tail: ended.output_tail.clone(),
        },
        reconcile::Phase::Failed(reason) => {
            Phase::Failed { code: reason.code.clone(), message: reason.message.clone() }
        }
        reconcile::Phase::Removed => Phase::Removed,
        reconcile::Phase::Orphan => Phase::Orphan,
    };
    Observed { sandbox: key.sandbox.clone(), epoch: key.epoch, phase }
}
