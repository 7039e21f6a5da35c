//! API clients: they create one or several, update, delete and list, retry what they did not hear of with the same request id, and go to any replica.

use std::sync::Arc;

use warren_proto::ids::{SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_scheduler::state::command::{BatchItem, Body, Caller, Change, RequestKey, Role};
use warren_scheduler::state::outcome::Reply;
use warren_scheduler::state::pairs::Pairs;
use warren_scheduler::state::sandbox::SandboxSpec;
use warren_scheduler::state::settings::{Egress, Expiry, Isolation, Restart, Settings};

use super::clock::{At, Clock, MS, SECOND};
use super::leader::Origin;
use super::log::{Outcome, Unsettled};
use super::queue::{Confirmation, Event};
use super::world::World;

pub type CallId = u64;

/// How often a client tries one request.
const MAX_ATTEMPTS: u32 = 6;

/// How long a client waits for an answer.
const PATIENCE: u64 = 4 * SECOND;

/// Replicas that one request passes through.
const MAX_HOPS: u8 = 3;

/// What a client wants.
#[derive(Debug, Clone)]
pub enum Op {
    Create {
        chosen: Option<SandboxName>,
        tenant: TenantId,
        spec: Arc<SandboxSpec>,
        key: Option<RequestKey>,
    },
    /// All of these, or none.
    Batch {
        items: Vec<(Option<SandboxName>, Arc<SandboxSpec>)>,
        key: Option<RequestKey>,
    },
    Update {
        name: SandboxName,
        change: Change,
        if_revision: Option<u64>,
        key: Option<RequestKey>,
    },
    Delete {
        name: SandboxName,
        key: Option<RequestKey>,
    },
    List,
}

/// One attempt.
#[derive(Debug, Clone)]
pub struct Call {
    pub client: usize,
    pub op: Op,
    /// Newest revision that anybody had been told when it was sent.
    pub floor: u64,
    pub attempt: u32,
}

/// What a client is told.
#[derive(Debug, Clone)]
pub enum Answer {
    Settled(Outcome),
    Listed {
        revision: u64,
        names: Vec<SandboxName>,
    },
    /// It may have happened or not.
    Unknown,
}

/// One client.
#[derive(Debug)]
pub struct Client {
    pub tenant: TenantId,
    pub clock: Clock,
    pub replica: usize,
    again: Option<(Op, u32)>,
    known: Vec<SandboxName>,
}

impl Client {
    pub fn new(tenant: TenantId, clock: Clock) -> Self {
        Self { tenant, clock, replica: 0, again: None, known: Vec::new() }
    }

    fn caller(&self) -> Caller {
        Caller { principal: "client".to_owned(), role: Role::Tenant, tenant: Some(self.tenant.clone()) }
    }
}

impl World {
    /// A client's next request, or the last one again.
    pub fn client_acts(&mut self, client: usize) {
        if self.calm {
            return;
        }
        let (op, attempt) = match self.clients[client].again.take() {
            Some(again) => again,
            None => (self.new_op(client), 1),
        };
        if attempt > 1 || self.rng.per_mille(100) {
            self.clients[client].replica = self.rng.index(self.replicas.len());
        }
        self.calls_made += 1;
        let (call, replica) = (self.calls_made, self.clients[client].replica);
        self.calls.insert(call, Call { client, op, floor: self.oracle.told_revision(), attempt });
        let delay = self.latency();
        if !self.rng.per_mille(self.plan.lost_calls) {
            self.queue.put(self.now + delay, Event::Arrives { call, replica, hops: 0 });
            if self.rng.per_mille(20) {
                // A proxy repeated it.
                let again = self.now + delay + self.rng.between(1, 2 * SECOND);
                self.queue.put(again, Event::Arrives { call, replica, hops: 0 });
            }
        }
        self.queue.put(self.now + PATIENCE, Event::GivesUp { call });
    }

    fn new_op(&mut self, client: usize) -> Op {
        let crowded = self.oracle.sandboxes() > self.plan.most_sandboxes;
        let known = self.clients[client].known.len();
        match self.rng.below(100) {
            0..40 if !crowded => self.new_create(client),
            40..48 if !crowded => self.new_batch(client),
            48..56 => Op::List,
            56..74 if known > 0 => self.new_update(client),
            _ if known > 0 => {
                let at = self.rng.index(known);
                let name = self.clients[client].known.swap_remove(at);
                let key = self.new_key(client, 2, &name.to_string());
                Op::Delete { name, key }
            }
            _ if crowded => Op::List,
            _ => self.new_create(client),
        }
    }

    fn new_create(&mut self, client: usize) -> Op {
        let spec = self.new_spec();
        let chosen = if self.rng.per_mille(300) { Some(self.some_name(client)) } else { None };
        let key = self.new_key(client, 1, &format!("{chosen:?} {spec:?}"));
        Op::Create { chosen, tenant: self.clients[client].tenant.clone(), spec: Arc::new(spec), key }
    }

    /// A few; now and then one of them cannot be.
    fn new_batch(&mut self, client: usize) -> Op {
        let mut items = Vec::new();
        for _ in 0..self.rng.between(1, 4) {
            let spec = Arc::new(self.new_spec());
            let chosen = if self.rng.per_mille(150) { Some(self.some_name(client)) } else { None };
            items.push((chosen, spec));
        }
        if self.rng.per_mille(200) {
            let template = TemplateId::parse("missing").expect("a valid id");
            items.push((None, Arc::new(SandboxSpec { template, ..self.new_spec() })));
        }
        let key = self.new_key(client, 3, &format!("{items:?}"));
        Op::Batch { items, key }
    }

    /// Of one that it knows; with the revision that this has now, one that it had, or none.
    fn new_update(&mut self, client: usize) -> Op {
        let known = self.clients[client].known.len();
        let at = self.rng.index(known);
        let name = self.clients[client].known[at].clone();
        let revision = self.oracle.state().sandboxes.get(&name).map_or(0, |sandbox| sandbox.revision);
        let if_revision = match self.rng.below(3) {
            0 => None,
            1 => Some(revision),
            _ => Some(self.rng.between(0, revision)),
        };
        let value = self.rng.below(4).to_string();
        let mut maybe = || self.rng.per_mille(400);
        let change = Change {
            labels: maybe().then(|| Pairs::from_iter([("v".to_owned(), value.clone())])),
            annotations: maybe().then(|| Pairs::from_iter([("note".to_owned(), value)])),
            expiry: maybe().then_some(Expiry::After(300_000)),
            egress: maybe().then_some(if maybe() { Egress::Public } else { Egress::None }),
            priority: maybe().then_some(3),
        };
        let key = self.new_key(client, 4, &format!("{name} {change:?} {if_revision:?}"));
        Op::Update { name, change, if_revision, key }
    }

    fn some_name(&mut self, client: usize) -> SandboxName {
        let name = format!("tenants/{}/sandboxes/s{}", self.clients[client].tenant, self.rng.below(6));
        SandboxName::parse(&name).expect("a valid name")
    }

    fn new_spec(&mut self) -> SandboxSpec {
        let spec = SandboxSpec {
            template: TemplateId::parse("base").expect("a valid id"),
            command: Vec::new(),
            environment: Pairs::default(),
            working_directory: String::new(),
            secrets: Pairs::default(),
            resources: Resources {
                cpu: MilliCpu(250 * self.rng.between(1, 8)),
                memory: Bytes(Bytes::MIB * 256 * self.rng.between(1, 12)),
                disk: Bytes(Bytes::GIB),
                gpus: Gpus(u64::from(self.rng.per_mille(100))),
            },
            pids: 64,
            restart: match self.rng.below(6) {
                0 => Restart::Always,
                1 => Restart::OnFailure,
                _ => Restart::Never,
            },
            isolation: if self.rng.per_mille(self.plan.freezing) { Isolation::Freeze } else { Isolation::Keep },
            queue_timeout_ms: self.rng.per_mille(150).then(|| self.rng.between(1_000, 120_000)),
            settings: Settings {
                expiry: match self.rng.below(8) {
                    0 => Expiry::After(self.rng.between(1_000, 600_000)),
                    _ => Expiry::Never,
                },
                priority: u8::try_from(self.rng.below(3)).unwrap_or(0),
                ..Settings::default()
            },
        };
        // What the first level knows is asked for too.
        if self.rng.per_mille(250) { plain(spec) } else { spec }
    }

    /// Most requests have an id; some clients reuse one for something else, and some of their clocks are off.
    fn new_key(&mut self, client: usize, kind: u8, payload: &str) -> Option<RequestKey> {
        if self.rng.per_mille(200) {
            return None;
        }
        let stamp = self.clients[client].clock.wall(self.now).0;
        let id = u128::from(stamp) << 80 | 7 << 76 | u128::from(self.rng.next());
        let id = if self.rng.per_mille(20) { self.last_request.unwrap_or(id) } else { id };
        self.last_request = Some(id);
        let mut hash = [kind; 32];
        for (at, byte) in payload.bytes().enumerate() {
            hash[at % 32] = hash[at % 32].wrapping_mul(31).wrapping_add(byte);
        }
        Some(RequestKey { id, payload: hash })
    }

    /// A request reaches a replica, which serves it or passes it on to the leader.
    pub fn arrives(&mut self, id: CallId, replica: usize, hops: u8) {
        let Some(call) = self.calls.get(&id).cloned() else { return };
        let this = &self.replicas[replica];
        if !this.up {
            return self.answer(id, Answer::Unknown);
        }
        if this.lead.is_none() {
            return match this.known_leader.filter(|leader| *leader != replica && hops < MAX_HOPS && !this.cut) {
                Some(leader) => {
                    let at = self.now + self.latency();
                    self.queue.put(at, Event::Arrives { call: id, replica: leader, hops: hops + 1 });
                }
                None => self.answer(id, Answer::Unknown),
            };
        }
        self.serve_call(id, replica, call);
    }

    fn serve_call(&mut self, id: CallId, replica: usize, call: Call) {
        let caller = self.clients[call.client].caller();
        match call.op {
            Op::Create { chosen, tenant, spec, key } => {
                let sandbox = self.name_for(&tenant, chosen);
                let (decision, reserved) = self.decide(replica, &spec);
                let held = reserved.into_iter().collect();
                let body = Body::CreateSandbox { sandbox, spec, decision, request: key };
                self.propose(replica, caller, body, Origin::Create { call: id, held });
            }
            Op::Batch { items, key } => {
                let tenant = self.clients[call.client].tenant.clone();
                let mut held = Vec::new();
                let mut decided = Vec::new();
                for (chosen, spec) in items {
                    let sandbox = self.name_for(&tenant, chosen);
                    let (decision, reserved) = self.decide(replica, &spec);
                    held.extend(reserved);
                    decided.push(BatchItem { sandbox, spec, decision });
                }
                let body = Body::CreateBatch { items: decided, request: key };
                self.propose(replica, caller, body, Origin::Create { call: id, held });
            }
            Op::Update { name, change, if_revision, key } => {
                let body = Body::UpdateSandbox { sandbox: name, change, if_revision, request: key };
                self.propose(replica, caller, body, Origin::Call { call: id });
            }
            Op::Delete { name, key } => {
                let body = Body::DeleteSandbox { sandbox: name, request: key };
                self.propose(replica, caller, body, Origin::Call { call: id });
            }
            Op::List => {
                let round_trip = self.latency() + self.rng.between(200, 2_000);
                let Some(term) = self.replicas[replica].lead.as_ref().map(|lead| lead.term) else { return };
                let what = Confirmation::Read { call: id };
                self.queue.put(self.now + round_trip, Event::Confirmed { replica, term, what });
            }
        }
    }

    /// The chosen name, or one that nobody has had.
    fn name_for(&mut self, tenant: &TenantId, chosen: Option<SandboxName>) -> SandboxName {
        self.names_made += 1;
        let fresh = format!("tenants/{tenant}/sandboxes/r{}", self.names_made);
        chosen.unwrap_or_else(|| SandboxName::parse(&fresh).expect("a valid name"))
    }

    /// A read that a quorum confirmed answers from what is applied here.
    pub fn read_confirmed(&mut self, id: CallId, replica: usize, confirmed: bool) {
        if !confirmed {
            return self.answer(id, Answer::Unknown);
        }
        let state = &self.replicas[replica].state;
        let names = state.sandboxes.keys().cloned().collect();
        self.answer(id, Answer::Listed { revision: state.revision, names });
    }

    pub fn answer_call(&mut self, id: CallId, outcome: Result<Outcome, Unsettled>) {
        let answer = match outcome {
            Ok(outcome) => Answer::Settled(outcome),
            Err(Unsettled::NotLeader | Unsettled::Unknown) => Answer::Unknown,
        };
        self.answer(id, answer);
    }

    fn answer(&mut self, call: CallId, answer: Answer) {
        let delay = self.latency();
        if !self.rng.per_mille(self.plan.lost_calls) {
            self.queue.put(self.now + delay, Event::Answered { call, answer });
        }
    }

    pub fn answered(&mut self, id: CallId, answer: Answer) {
        let Some(call) = self.calls.remove(&id) else { return };
        match &answer {
            Answer::Settled(outcome) => {
                self.trace.note(self.now, format_args!("client {} told {}", call.client, brief(outcome)));
                self.oracle.acknowledged(&call, outcome);
                if let (Op::Create { .. }, Ok(Reply::Sandbox(sandbox))) = (&call.op, outcome) {
                    self.clients[call.client].known.push(sandbox.name.clone());
                }
                if let (Op::Batch { .. }, Ok(Reply::Batch(names))) = (&call.op, outcome) {
                    self.clients[call.client].known.extend(names.iter().cloned());
                }
            }
            Answer::Listed { revision, names } => self.oracle.listed(&call, *revision, names),
            Answer::Unknown => return self.try_again(call),
        }
        let at = self.now + self.think();
        self.queue.put(at, Event::Client { client: call.client });
    }

    pub fn gives_up(&mut self, id: CallId) {
        if let Some(call) = self.calls.remove(&id) {
            self.try_again(call);
        }
    }

    pub fn try_again(&mut self, call: Call) {
        let repeats = call.attempt < MAX_ATTEMPTS && self.rng.per_mille(900);
        // Without a request id or a chosen name a create cannot be repeated safely, nor an update that another may have followed.
        let safe = match &call.op {
            Op::Create { chosen, key, .. } => chosen.is_some() || key.is_some(),
            Op::Batch { items, key } => key.is_some() || items.iter().all(|(chosen, _)| chosen.is_some()),
            Op::Update { if_revision, key, .. } => key.is_some() || if_revision.is_some(),
            Op::Delete { .. } | Op::List => true,
        };
        if repeats && safe {
            self.clients[call.client].again = Some((call.op, call.attempt + 1));
        }
        let at = self.now + self.rng.between(10 * MS, SECOND);
        self.queue.put(at, Event::Client { client: call.client });
    }

    fn think(&mut self) -> At {
        let most = self.plan.think.max(2);
        self.rng.between(most / 10, most)
    }
}

/// Without what later levels brought.
fn plain(spec: SandboxSpec) -> SandboxSpec {
    SandboxSpec {
        resources: Resources { gpus: Gpus(0), ..spec.resources },
        restart: Restart::Never,
        isolation: Isolation::Keep,
        queue_timeout_ms: None,
        settings: Settings::default(),
        ..spec
    }
}

fn brief(outcome: &Outcome) -> String {
    match outcome {
        Ok(Reply::Sandbox(sandbox)) => format!("{} {} {}", sandbox.name, sandbox.epoch, sandbox.life.kind()),
        Ok(_) => "done".to_owned(),
        Err(rejected) => rejected.to_string(),
    }
}
