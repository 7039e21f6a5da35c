//! Agents' sessions: the streams, and the scheduler's end of them, step for step as `api::agent_session` does it.
//!
//! Within a session, messages of a direction arrive in order; those of two sessions of one node overtake each other. A
//! session breaks without either end knowing at once. The scheduler's end takes one message at a time, and commits what it
//! says before it takes the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use warren_node_agent::assignment::Update;
use warren_proto::ids::{Epoch, Generation, NodeId, SandboxName};
use warren_proto::v1;
use warren_proto::v1::assigned_sandbox::Desired;
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Caller, LedgerId, Observation, Observed, Phase, Role};
use warren_scheduler::state::level::Level;
use warren_scheduler::state::node::{Condition, Node, NodeReport};
use warren_scheduler::state::outcome::Reply;
use warren_scheduler::state::sandbox::{Life, Sandbox};
use warren_scheduler::state::settings::Isolation;

use super::bug::Bug;
use super::clock::{At, instant, micros};
use super::leader::{CLOCK_DRIFT, Origin};
use super::log::{Outcome, Proposal, Unsettled};
use super::queue::{Confirmation, Event};
use super::world::World;

pub type SessionId = u64;

/// What an agent says.
#[derive(Debug, Clone)]
pub enum Up {
    Hello {
        ledger_id: Option<LedgerId>,
        report: Box<NodeReport>,
        observation: Observation,
    },
    Renew {
        sequence: u64,
    },
    Observation(Observation),
    Resync,
    /// The agent closed the stream.
    Close,
}

/// What an agent hears.
#[derive(Debug, Clone)]
pub enum Down {
    Welcome { ledger_id: LedgerId, lease: Duration },
    Granted { sequence: u64 },
    Assignment(Update),
    Refused(Refusal),
}

/// Why the scheduler's end is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    NotLeader { leader: Option<usize> },
    LedgerMismatch,
    Superseded,
    Failed,
}

/// One stream, and the scheduler's end of it.
#[derive(Debug)]
pub struct Session {
    pub agent: usize,
    pub agent_life: u32,
    pub replica: usize,
    replica_life: u32,
    /// Nothing arrives any more.
    pub broken: bool,
    up_clear: At,
    down_clear: At,
    open: bool,
    busy: bool,
    inbox: VecDeque<Up>,
    node: NodeId,
    incarnation: u128,
    registered: bool,
    hello: Observation,
    /// When the last renewal arrived, by the replica's clock.
    pub received: Duration,
    told: Told,
}

/// The assignment that the agent was told.
#[derive(Debug, Default)]
struct Told {
    generation: Option<Generation>,
    sandboxes: BTreeMap<SandboxName, (Epoch, Desired)>,
}

impl World {
    pub fn open_session(&mut self, agent: usize, replica: usize) -> SessionId {
        self.sessions_made += 1;
        let session = Session {
            agent,
            agent_life: self.agents[agent].life,
            replica,
            replica_life: self.replicas[replica].life,
            broken: false,
            up_clear: 0,
            down_clear: 0,
            open: true,
            busy: false,
            inbox: VecDeque::new(),
            node: self.agents[agent].id.clone(),
            incarnation: 0,
            registered: false,
            hello: Observation::default(),
            received: Duration::ZERO,
            told: Told::default(),
        };
        self.sessions.insert(self.sessions_made, session);
        self.sessions_made
    }

    pub fn send_up(&mut self, id: SessionId, message: Up) {
        let delay = self.latency();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.up_clear = session.up_clear.max(self.now + delay) + 1;
        self.queue.put(session.up_clear, Event::ToReplica { session: id, message });
    }

    pub fn send_down(&mut self, id: SessionId, message: Down) {
        let delay = self.latency();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.down_clear = session.down_clear.max(self.now + delay) + 1;
        self.queue.put(session.down_clear, Event::ToAgent { session: id, message });
    }

    /// Whether the scheduler's end still exists.
    fn serves(&self, id: SessionId) -> bool {
        self.sessions.get(&id).is_some_and(|session| {
            session.open
                && self.replicas[session.replica].up
                && self.replicas[session.replica].life == session.replica_life
        })
    }

    pub fn deliver_to_replica(&mut self, id: SessionId, message: Up) {
        if !self.serves(id) || self.sessions.get(&id).is_none_or(|session| session.broken) {
            return;
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if matches!(message, Up::Close) {
            return self.close(id);
        }
        session.inbox.push_back(message);
        self.serve(id);
    }

    /// The scheduler's end is over; what it has under way in the log goes on.
    fn close(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.open = false;
        session.inbox.clear();
        let (replica, node) = (session.replica, session.node.clone());
        if let Some(lead) = &mut self.replicas[replica].lead
            && lead.sessions.get(&node) == Some(&id)
        {
            lead.sessions.remove(&node);
        }
    }

    fn refuse(&mut self, id: SessionId, refusal: Refusal) {
        self.send_down(id, Down::Refused(refusal));
        self.close(id);
    }

    pub fn close_sessions_of(&mut self, replica: usize) {
        let leader = self.replicas[replica].known_leader.filter(|leader| *leader != replica);
        let up = self.replicas[replica].up;
        let open: Vec<SessionId> =
            self.sessions.iter().filter(|(_, s)| s.replica == replica && s.open).map(|(id, _)| *id).collect();
        for id in open {
            if up {
                self.refuse(id, Refusal::NotLeader { leader });
            } else {
                // The process is gone: its connections are reset.
                self.send_down(id, Down::Refused(Refusal::Failed));
                self.close(id);
            }
        }
    }

    pub fn replica_learns(&mut self, id: SessionId) {
        if self.serves(id) {
            self.close(id);
        }
    }

    /// Takes the next message, unless one is being dealt with.
    fn serve(&mut self, id: SessionId) {
        while self.serves(id) {
            let Some(session) = self.sessions.get_mut(&id).filter(|session| !session.busy) else { return };
            let Some(message) = session.inbox.pop_front() else { return };
            let replica = session.replica;
            if self.replicas[replica].lead.is_none() {
                let leader = self.replicas[replica].known_leader.filter(|leader| *leader != replica);
                return self.refuse(id, Refusal::NotLeader { leader });
            }
            match message {
                Up::Hello { ledger_id, report, observation } => self.hello(id, ledger_id, *report, observation),
                Up::Renew { sequence } => self.renew(id, sequence),
                Up::Observation(observation) => self.observe(id, observation, false),
                Up::Resync => {
                    session.told = Told::default();
                    self.push(id);
                }
                Up::Close => self.close(id),
            }
        }
    }

    fn hello(&mut self, id: SessionId, ledger_id: Option<LedgerId>, report: NodeReport, observation: Observation) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let (replica, node) = (session.replica, session.node.clone());
        let state = &self.replicas[replica].state;
        let known = |theirs: &LedgerId| state.ledger_id == Some(*theirs) || state.predecessors.contains(theirs);
        if ledger_id.is_some_and(|theirs| !known(&theirs)) {
            return self.refuse(id, Refusal::LedgerMismatch);
        }
        session.busy = true;
        session.incarnation = report.incarnation;
        session.hello = observation;
        let body = Body::RegisterNode { node: node.clone(), report };
        self.propose(replica, node_caller(&node), body, Origin::Register { session: id });
    }

    pub fn registered(&mut self, id: SessionId, outcome: Result<Outcome, Unsettled>) {
        if !matches!(outcome, Ok(Ok(_))) {
            return self.refuse(id, Refusal::Failed);
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let mut observation = std::mem::take(&mut session.hello);
        let missing = missing(&self.replicas[session.replica].state, &session.node, &observation.sandboxes);
        observation.sandboxes.extend(missing);
        self.observe(id, observation, true);
    }

    fn observe(&mut self, id: SessionId, observation: Observation, hello: bool) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.busy = true;
        let (replica, node, incarnation) = (session.replica, session.node.clone(), session.incarnation);
        let state = &self.replicas[replica].state;
        let known = state.nodes.get(&node).map(|record| &record.templates);
        let mut templates = observation.templates.filter(|templates| known != Some(templates));
        let mut sandboxes = observation.sandboxes;
        sandboxes.retain(|seen| seen.phase != Phase::Starting);
        if sandboxes.is_empty() && templates.is_none() {
            return self.observed(id, hello, Ok(Ok(Reply::Done)));
        }
        if state.level == Level::FIRST {
            templates = templates.or_else(|| known.cloned());
        }
        let body = Body::Observe { node: node.clone(), incarnation, observation: Observation { sandboxes, templates } };
        self.propose(replica, node_caller(&node), body, Origin::Observe { session: id, hello });
    }

    pub fn observed(&mut self, id: SessionId, hello: bool, outcome: Result<Outcome, Unsettled>) {
        if !matches!(outcome, Ok(Ok(_))) {
            return self.refuse(id, Refusal::Failed);
        }
        if hello {
            self.welcome(id);
        }
        self.ready(id);
    }

    /// Ready for the next message.
    fn ready(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.busy = false;
        }
        if self.serves(id) {
            self.push(id);
            self.serve(id);
        }
    }

    fn welcome(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let (replica, node) = (session.replica, session.node.clone());
        let this = &mut self.replicas[replica];
        let deadline = instant(this.clock.monotonic(self.now) + self.lease);
        let ledger_id = this.state.ledger_id.unwrap_or_default();
        let Some(lead) = &mut this.lead else { return };
        if !lead.liveness.renew(&node, deadline) && self.bug != Some(Bug::DownRacesRenewal) {
            return self.refuse(id, Refusal::Failed);
        }
        if !self.serves(id) {
            return self.wake_planner(replica, 0);
        }
        let older = self.replicas[replica].lead.as_mut().and_then(|lead| lead.sessions.insert(node, id));
        if let Some(older) = older.filter(|older| *older != id) {
            self.refuse(older, Refusal::Superseded);
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            session.registered = true;
        }
        let lease = self.lease;
        self.send_down(id, Down::Welcome { ledger_id, lease });
        self.wake_planner(replica, 0);
    }

    fn renew(&mut self, id: SessionId, sequence: u64) {
        let round_trip = self.latency() + self.rng.between(200, 2_000);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.busy = true;
        let replica = session.replica;
        let received = self.replicas[replica].clock.monotonic(self.now);
        session.received = received;
        self.oracle.lease_asked(id, sequence, self.now + micros(self.lease.mul_f64(CLOCK_DRIFT)));
        let Some(term) = self.replicas[replica].lead.as_ref().map(|lead| lead.term) else { return };
        let what = Confirmation::Renewal { session: id, sequence, received };
        self.queue.put(self.now + round_trip, Event::Confirmed { replica, term, what });
    }

    /// A quorum has, or has not, acknowledged this leader since a renewal arrived.
    pub fn renewal_confirmed(&mut self, id: SessionId, sequence: u64, received: Duration, confirmed: bool) {
        if !confirmed && self.bug != Some(Bug::RenewalWithoutQuorum) {
            return self.refuse(id, Refusal::Failed);
        }
        let Some(session) = self.sessions.get(&id) else { return };
        let (replica, node, incarnation) = (session.replica, session.node.clone(), session.incarnation);
        let lease = self.lease;
        let this = &mut self.replicas[replica];
        let Some(record) = this.state.nodes.get(&node).filter(|record| record.report.incarnation == incarnation) else {
            return self.refuse(id, Refusal::Failed);
        };
        let (ready, level) = (record.is_ready(), this.state.level);
        let Some(lead) = &mut this.lead else { return };
        let renewed = lead.liveness.renew(&node, instant(received + lease));
        if !confirmed {
            self.oracle.granted_without_quorum(&node);
        }
        if !renewed && self.bug != Some(Bug::DownRacesRenewal) {
            return self.refuse(id, Refusal::Failed);
        }
        self.wake_planner(replica, 1_000);
        if ready || !renewed {
            return self.grant(id, sequence);
        }
        let body = match level {
            Level::FIRST => Body::SetNodeReachable { node: node.clone(), incarnation, reachable: true },
            _ => Body::SetNodeCondition { node: node.clone(), incarnation, to: Condition::Ready },
        };
        self.propose(replica, node_caller(&node), body, Origin::Returned { session: id, sequence });
    }

    pub fn returned(&mut self, id: SessionId, sequence: u64, outcome: Result<Outcome, Unsettled>) {
        match outcome {
            Ok(Ok(_)) => self.grant(id, sequence),
            _ => self.refuse(id, Refusal::Failed),
        }
    }

    fn grant(&mut self, id: SessionId, sequence: u64) {
        if self.serves(id) {
            self.grant_is_allowed(id);
            self.send_down(id, Down::Granted { sequence });
        }
        self.ready(id);
    }

    /// Rule 2: no lease for a node that is being declared down.
    fn grant_is_allowed(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let this = &self.replicas[session.replica];
        let Some(lead) = &this.lead else { return };
        if session.received + self.lease <= this.clock.monotonic(self.now) {
            // It is over already: the agent gains nothing by it.
            return;
        }
        let under_way = lead.under_way.iter().flat_map(|batch| &batch.proposals).chain(&lead.waiting);
        let goes_down = |proposal: &Proposal| {
            matches!(&proposal.command.body, Body::SetNodeCondition { node, incarnation, to: Condition::Down }
                if *node == session.node && *incarnation == session.incarnation)
        };
        if under_way.into_iter().any(goes_down) {
            self.oracle.granted_to_what_goes_down(&session.node);
        }
    }

    /// State moved: every idle session is told what is new for its node.
    pub fn push_all(&mut self, replica: usize) {
        let Some(lead) = &self.replicas[replica].lead else { return };
        for id in lead.sessions.values().copied().collect::<Vec<_>>() {
            if self.sessions.get(&id).is_some_and(|session| !session.busy) {
                self.push(id);
            }
        }
    }

    fn push(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id).filter(|session| session.registered && session.open) else {
            return;
        };
        let state = &self.replicas[session.replica].state;
        if let Some(update) = session.told.update(state, &session.node) {
            self.send_down(id, Down::Assignment(update));
        }
    }
}

impl Told {
    /// What brings the agent up to date with `state`, if it is not.
    fn update(&mut self, state: &State, id: &NodeId) -> Option<Update> {
        let node = state.nodes.get(id)?;
        if self.generation == Some(node.generation) {
            return None;
        }
        let wanted = wanted(state, node);
        let wire = |name: &SandboxName, (epoch, desired)| assigned(state, name, epoch, desired);
        let update = match self.generation {
            None => Update::try_from(v1::Assignment {
                generation: node.generation.0,
                sandboxes: wanted.iter().filter_map(|(name, want)| wire(name, *want)).collect(),
            }),
            Some(base) => Update::try_from(v1::AssignmentDelta {
                base_generation: base.0,
                generation: node.generation.0,
                upserts: wanted
                    .iter()
                    .filter(|(name, want)| self.sandboxes.get(*name) != Some(*want))
                    .filter_map(|(name, want)| wire(name, *want))
                    .collect(),
                removes: self.sandboxes.keys().filter(|n| !wanted.contains_key(*n)).map(ToString::to_string).collect(),
            }),
        };
        self.generation = Some(node.generation);
        self.sandboxes = wanted;
        Some(update.expect("an assignment that was derived from state makes sense"))
    }
}

/// What a node should do: with what lives there, and with what is left over.
pub fn wanted(state: &State, node: &Node) -> BTreeMap<SandboxName, (Epoch, Desired)> {
    let left = node.leftovers.keys().map(|(name, epoch)| (name.clone(), (*epoch, Desired::Removed)));
    let lives = node.sandboxes.iter().filter_map(|name| state.sandboxes.get(name));
    let lives = lives.map(|sandbox| (sandbox.name.clone(), (sandbox.epoch, desired(sandbox))));
    left.chain(lives).collect()
}

fn desired(sandbox: &Sandbox) -> Desired {
    match sandbox.life {
        Life::Starting { .. } | Life::Running { .. } => Desired::Running,
        Life::Stopping { .. } | Life::Stopped { .. } | Life::Pending { .. } | Life::Failed { .. } => Desired::Removed,
    }
}

fn assigned(state: &State, name: &SandboxName, epoch: Epoch, desired: Desired) -> Option<v1::AssignedSandbox> {
    if desired == Desired::Removed {
        let (sandbox, desired) = (name.to_string(), desired.into());
        return Some(v1::AssignedSandbox { sandbox, epoch: epoch.0, desired, ..v1::AssignedSandbox::default() });
    }
    let sandbox = state.sandboxes.get(name)?;
    let template = state.templates.get(&sandbox.spec.template)?;
    let resources = sandbox.spec.resources;
    let amount = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    Some(v1::AssignedSandbox {
        sandbox: name.to_string(),
        epoch: sandbox.epoch.0,
        desired: desired.into(),
        resources: Some(v1::Resources {
            cpu_milli: amount(resources.cpu.0),
            memory_bytes: amount(resources.memory.0),
            disk_bytes: amount(resources.disk.0),
            pids: amount(sandbox.spec.pids),
            ..v1::Resources::default()
        }),
        template: Some(v1::AssignedTemplate {
            digest: template.spec.digest.to_string(),
            size_bytes: amount(template.spec.size_bytes),
            ..v1::AssignedTemplate::default()
        }),
        command: sandbox.spec.command.clone(),
        on_isolation: match sandbox.spec.isolation {
            Isolation::Keep => v1::OnIsolation::Keep.into(),
            Isolation::Freeze => v1::OnIsolation::Freeze.into(),
        },
        ..v1::AssignedSandbox::default()
    })
}

/// What the ledger says is on the node and the agent does not hold, as `controller` works it out.
fn missing(state: &State, node: &NodeId, held: &[Observed]) -> Vec<Observed> {
    let held: BTreeSet<(&SandboxName, Epoch)> = held.iter().map(|seen| (&seen.sandbox, seen.epoch)).collect();
    let Some(record) = state.nodes.get(node) else { return Vec::new() };
    let lives = record.sandboxes.iter().filter_map(|name| state.sandboxes.get(name));
    let lives = lives.filter(|sandbox| !matches!(sandbox.life, Life::Starting { .. })).map(|s| (&s.name, s.epoch));
    let leftovers = record.leftovers.keys().map(|(name, epoch)| (name, *epoch));
    lives
        .chain(leftovers)
        .filter(|instance| !held.contains(instance))
        .map(|(name, epoch)| Observed { sandbox: name.clone(), epoch, phase: Phase::Removed })
        .collect()
}

pub fn node_caller(node: &NodeId) -> Caller {
    Caller { principal: node.name(), role: Role::Node, tenant: None }
}
