//! The simulated region: every machine and message in it, and the loop that lets one thing happen after the other.

use std::collections::BTreeMap;
use std::time::Duration;

use warren_node_agent::reconcile::Action;
use warren_proto::ids::{Digest, NodeId, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_scheduler::state::command::{Body, Caller, ReplicaRecord, TemplateSpec};
use warren_scheduler::state::gpu::GpuDevice;
use warren_scheduler::state::level::Level;

use super::bug::Bug;
use super::client::{Call, CallId, Client};
use super::clock::{At, Clock, MAX_DRIFT_PPM, MS, SECOND};
use super::host::Agent;
use super::leader::Origin;
use super::log::Log;
use super::oracle::Oracle;
use super::plan::Plan;
use super::queue::{Confirmation, Event, Queue};
use super::replica::Replica;
use super::rng::Rng;
use super::session::{Session, SessionId};
use super::trace::Trace;
use super::watcher::Watcher;

/// Everything there is.
#[derive(Debug)]
pub struct World {
    pub now: At,
    pub queue: Queue,
    pub rng: Rng,
    pub trace: Trace,
    pub oracle: Oracle,
    pub bug: Option<Bug>,
    pub plan: Plan,
    pub lease: Duration,
    pub checkpoint_every: u64,
    pub log: Log,
    pub replicas: Vec<Replica>,
    pub agents: Vec<Agent>,
    pub sessions: BTreeMap<SessionId, Session>,
    pub sessions_made: u64,
    pub incarnations: u128,
    pub clients: Vec<Client>,
    pub calls: BTreeMap<CallId, Call>,
    pub calls_made: u64,
    pub names_made: u64,
    pub last_request: Option<u128>,
    pub watchers: Vec<Watcher>,
    /// The replica whose wall clock is wrong.
    pub wrong_clock: Option<usize>,
    /// A node was forgotten, or a backup restored: the ledger may not know all that runs.
    pub upheaval: bool,
    /// No more faults and no new requests.
    pub calm: bool,
    pub steps: u64,
    /// When something was last committed.
    pub last_commit: At,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, print: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        let replicas = (1..=plan.replicas as u64).map(|n| Replica::new(n, some_clock(&mut rng, 0))).collect();
        let agents = (0..plan.agents).map(|n| some_agent(n, &mut rng)).collect();
        let clients = (0..plan.clients).map(|n| some_client(n, &mut rng)).collect();
        let mut world = Self {
            now: 0,
            queue: Queue::default(),
            rng,
            trace: Trace::new(print),
            oracle: Oracle::new(bug),
            bug,
            lease: plan.lease,
            checkpoint_every: plan.checkpoint_every,
            plan,
            log: Log::default(),
            replicas,
            agents,
            sessions: BTreeMap::new(),
            sessions_made: 0,
            incarnations: 0,
            clients,
            calls: BTreeMap::new(),
            calls_made: 0,
            names_made: 0,
            last_request: None,
            watchers: vec![Watcher::default(), Watcher::default()],
            wrong_clock: None,
            upheaval: false,
            calm: false,
            steps: 0,
            last_commit: 0,
        };
        world.populate();
        world
    }

    fn populate(&mut self) {
        self.take_over(0);
        let spec = TemplateSpec {
            digest: template_digest(),
            size_bytes: 1,
            default_command: Vec::new(),
            environment: BTreeMap::new(),
            working_directory: "/".to_owned(),
        };
        let template = TemplateId::parse("base").expect("a valid id");
        let body = Body::CreateTemplate { template, spec, request: None };
        self.propose(0, Caller::system("operator"), body, Origin::Nobody);
        for replica in 0..self.replicas.len() {
            let old_build = self.rng.per_mille(150);
            self.replicas[replica].max_level = if old_build { Level::FIRST } else { Level::MAX };
            let at = self.rng.between(5 * MS, 400 * MS);
            self.queue.put(at, Event::Announce { replica });
        }
        for agent in 0..self.agents.len() {
            let at = self.rng.below(SECOND);
            self.queue.put(at, Event::AgentStarts { agent, life: 0 });
        }
        for client in 0..self.clients.len() {
            let at = self.rng.between(50 * MS, 2 * SECOND);
            self.queue.put(at, Event::Client { client });
        }
        for watcher in 0..self.watchers.len() {
            self.queue.put(20 * MS, Event::Watch { watcher });
        }
        self.queue.put(2 * SECOND, Event::Fault);
        self.queue.put(3 * SECOND, Event::Operator);
    }

    /// How long a message takes. Most are quick; some worlds have slow ones.
    pub fn latency(&mut self) -> u64 {
        match self.rng.below(1_000) {
            n if n < self.plan.slow_messages && !self.calm => self.rng.between(100 * MS, 4 * SECOND),
            n if n < 60 => self.rng.between(2 * MS, 100 * MS),
            _ => self.rng.between(50, 2 * MS),
        }
    }

    /// Lets the next thing happen; `false` when nothing is left.
    pub fn step(&mut self) -> bool {
        let Some((at, event)) = self.queue.next() else { return false };
        self.now = self.now.max(at);
        self.steps += 1;
        self.oracle.time_is(self.now, self.steps);
        self.happen(event);
        true
    }

    fn happen(&mut self, event: Event) {
        if let Some(agent) = self.agent_concerned(&event)
            && let Some(waiting) = &mut self.agents[agent].stalled
        {
            return waiting.push_back(event);
        }
        match event {
            Event::Flush { replica, term } => self.flush(replica, term),
            Event::Committed { replica, term } => self.committed(replica, term),
            Event::CatchUp { replica, life } => self.catch_up(replica, life),
            Event::Elect => self.elect(),
            Event::StepDown { replica, term } => self.step_down(replica, term),
            Event::OpenTerm { replica, term } => {
                if self.replicas[replica].leads(term).is_some() {
                    self.open_term(replica, term);
                }
            }
            Event::Pass { replica, term } => self.pass(replica, term),
            Event::Confirmed { replica, term, what } => self.confirmed(replica, term, what),
            Event::ToReplica { session, message } => self.deliver_to_replica(session, message),
            Event::ToAgent { session, message } => {
                if let Some(link) = self.sessions.get(&session).filter(|link| !link.broken)
                    && self.agents[link.agent].life == link.agent_life
                {
                    self.deliver_to_agent(link.agent, session, message);
                }
            }
            Event::ReplicaLearns { session } => self.replica_learns(session),
            Event::Agent { agent, life, timer } => {
                if self.agents[agent].life == life {
                    self.agent_event(agent, timer);
                }
            }
            Event::Doing { agent, life, sandbox, action, stage } => {
                if self.agents[agent].life == life {
                    self.did(agent, sandbox, action, stage);
                }
            }
            Event::Done { agent, life, sandbox, action, done } => {
                if self.agents[agent].life == life {
                    self.done(agent, &sandbox, action, done);
                }
            }
            Event::Fence { agent } => self.fence(agent),
            Event::Operator => self.operator(),
            Event::CalmOperator => self.calm_operator(),
            Event::Announce { replica } => self.announce(replica),
            Event::Ends { agent, boot, sandbox, epoch } => self.ends(agent, boot, sandbox, epoch),
            Event::AgentStarts { agent, life } => {
                if self.agents[agent].life == life {
                    self.start_agent(agent);
                }
            }
            Event::AgentWakes { agent } => self.wake_agent(agent),
            Event::Client { client } => self.client_acts(client),
            Event::Arrives { call, replica, hops } => self.arrives(call, replica, hops),
            Event::Answered { call, answer } => self.answered(call, answer),
            Event::GivesUp { call } => self.gives_up(call),
            Event::Watch { watcher } => self.watch(watcher),
            Event::Fault => self.fault(),
            Event::ReplicaStarts { replica } => self.start_replica(replica),
            Event::Heals { replica } => self.heals(replica),
            Event::ClockSettles { replica } => self.clock_settles(replica),
        }
    }

    /// The agent whose process this event needs.
    fn agent_concerned(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Agent { agent, .. } | Event::Done { agent, .. } => Some(*agent),
            Event::Doing { agent, action: Action::Start(_), stage: 0, .. } => Some(*agent),
            Event::ToAgent { session, .. } => self.sessions.get(session).map(|session| session.agent),
            _ => None,
        }
    }

    /// A replica tells the ledger what it is; it may be an older build at first.
    fn announce(&mut self, replica: usize) {
        let this = &self.replicas[replica];
        let (id, max_level) = (this.id, this.max_level);
        let record = ReplicaRecord {
            api_address: format!("10.0.0.{}:7000", id.0),
            token_key: [7; 32],
            disk: u128::from(id.0),
            max_level,
        };
        let leader = self.log.leader.filter(|leader| self.replicas[*leader].lead.is_some());
        if let Some(leader) = leader {
            self.propose(leader, Caller::system("replica"), Body::PutReplica { replica: id, record }, Origin::Nobody);
        }
        let known = self.oracle.state().replicas.get(&id).map(|record| record.max_level);
        let again = if known == Some(Level::MAX) { return } else { self.rng.between(SECOND, 20 * SECOND) };
        if known.is_some() {
            // It was replaced by the newer build.
            self.replicas[replica].max_level = Level::MAX;
        }
        self.queue.put(self.now + again, Event::Announce { replica });
    }

    /// One thing that an operator does, and the time of the next.
    fn operator(&mut self) {
        if !self.calm {
            self.operator_acts();
            let at = self.now + self.rng.between(SECOND, self.plan.operator_pause);
            self.queue.put(at, Event::Operator);
        }
    }

    fn step_down(&mut self, replica: usize, term: u64) {
        let this = &mut self.replicas[replica];
        if this.cut || !this.up {
            return;
        }
        this.known_leader = self.log.leader;
        if this.lead.as_ref().is_some_and(|lead| lead.term < term) {
            self.lose_leadership(replica);
            self.schedule_catch_up(replica);
        }
    }

    fn confirmed(&mut self, replica: usize, term: u64, what: Confirmation) {
        let confirmed = self.really_leads(replica, term) && self.replicas[replica].leads(term).is_some();
        match what {
            Confirmation::Renewal { session, sequence, received } => {
                if self.replicas[replica].lead.is_some() {
                    self.renewal_confirmed(session, sequence, received, confirmed);
                }
            }
            Confirmation::Read { call } => self.read_confirmed(call, replica, confirmed),
        }
    }

    /// A stopped agent goes on: everything that came meanwhile is there at once.
    pub fn wake_agent(&mut self, agent: usize) {
        let Some(waiting) = self.agents[agent].stalled.take() else { return };
        self.trace.note(self.now, format_args!("{} goes on", self.agents[agent].id));
        for event in waiting {
            self.happen(event);
        }
    }
}

fn some_clock(rng: &mut Rng, most_skew_ms: u64) -> Clock {
    let drift = i64::try_from(rng.below(2 * MAX_DRIFT_PPM + 1)).unwrap_or(0) - MAX_DRIFT_PPM as i64;
    let skew = i64::try_from(rng.below(2 * most_skew_ms + 1)).unwrap_or(0) - most_skew_ms as i64;
    Clock::new(rng.between(10 * SECOND, 1_000_000 * SECOND), drift, skew)
}

fn some_agent(number: usize, rng: &mut Rng) -> Agent {
    let capacity = Resources {
        cpu: MilliCpu(1_000 * rng.between(1, 6)),
        memory: Bytes(Bytes::GIB * rng.between(2, 10)),
        disk: Bytes(Bytes::GIB * rng.between(3, 100)),
        gpus: Gpus(rng.below(3)),
    };
    Agent {
        id: NodeId::parse(&format!("n{number}")).expect("a valid id"),
        clock: some_clock(rng, 0),
        capacity,
        full_capacity: capacity,
        gpus: (0..capacity.gpus.0).filter(|_| number.is_multiple_of(2)).map(gpu).collect(),
        instances: BTreeMap::new(),
        journal: BTreeMap::new(),
        ledger_file: None,
        templates: vec![template_digest()],
        has_fence: rng.per_mille(900),
        published: Duration::ZERO,
        frozen: true,
        life: 0,
        boot: 0,
        process: None,
        stalled: None,
    }
}

fn gpu(number: u64) -> GpuDevice {
    let uuid = format!("GPU-{number}").into();
    GpuDevice { uuid, model: "sim".into(), memory: Bytes(Bytes::GIB), enforced: false }
}

fn some_client(number: usize, rng: &mut Rng) -> Client {
    let tenant = TenantId::parse(&format!("t{}", number % 2)).expect("a valid id");
    // Most clients' clocks are about right.
    let skew = if rng.per_mille(100) { 90_000 } else { 200 };
    Client::new(tenant, some_clock(rng, skew))
}

fn template_digest() -> Digest {
    Digest([7; 32])
}
