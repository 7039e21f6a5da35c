//! What a leader does of its own accord, step for step as `controller` does it: opens its term, plans with the real
//! planners over the real view, and holds room in the view for what is under way.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use warren_proto::ids::NodeId;
use warren_proto::units::Resources;
use warren_scheduler::controller::liveness::Liveness;
use warren_scheduler::placement::{Request, place};
use warren_scheduler::plan;
use warren_scheduler::state::command::{Body, Caller, Decision, LedgerId, LogTime, Phase};
use warren_scheduler::state::node::Node;
use warren_scheduler::state::outcome::Rejected;
use warren_scheduler::state::sandbox::SandboxSpec;

use super::bug::Bug;
use super::client::CallId;
use super::clock::{MS, instant};
use super::log::{Batch, Outcome, Proposal, Unsettled};
use super::queue::Event;
use super::session::SessionId;
use super::world::World;

/// As in `controller::leader`.
pub const FREEZE_BUDGET: Duration = Duration::from_secs(1);
const IDLE_PASS: Duration = Duration::from_secs(10);
const RETRY_PAUSE_MS: u64 = 200;

/// A leader's memory. All of it goes with its leadership.
#[derive(Debug)]
pub struct Lead {
    pub term: u64,
    /// The term is open: it may plan.
    pub open: bool,
    pub liveness: Liveness,
    pub sessions: BTreeMap<NodeId, SessionId>,
    pub waiting: Vec<Proposal>,
    pub flushing: bool,
    pub under_way: VecDeque<Batch>,
    /// Proposals of the pass under way that have no outcome yet.
    pub passing: usize,
    pub failed: bool,
    /// State changed since the pass began.
    pub changed: bool,
    pub wake: Option<u64>,
}

/// Who waits for a proposal's outcome.
#[derive(Debug, Clone)]
pub enum Origin {
    OpenTerm { term: u64 },
    Planned { term: u64, reserved: Option<(NodeId, Resources)>, lapsed: Option<NodeId> },
    Create { call: CallId, reserved: Option<(NodeId, Resources)> },
    Call { call: CallId },
    Register { session: SessionId },
    Observe { session: SessionId, hello: bool },
    Returned { session: SessionId, sequence: u64 },
    Nobody,
}

impl Lead {
    pub fn new(term: u64) -> Self {
        Self {
            term,
            open: false,
            liveness: Liveness::default(),
            sessions: BTreeMap::new(),
            waiting: Vec::new(),
            flushing: false,
            under_way: VecDeque::new(),
            passing: 0,
            failed: false,
            changed: false,
            wake: None,
        }
    }
}

impl World {
    /// The time that a replica's proposals carry.
    pub fn proposal_time(&self, replica: usize) -> LogTime {
        self.replicas[replica].clock.wall(self.now)
    }

    /// The next thing that must stand in the ledger before anything is planned.
    pub fn open_term(&mut self, replica: usize, term: u64) {
        let samples = vec![self.proposal_time(replica)];
        self.propose(replica, controller(), Body::AdvanceTime { samples }, Origin::OpenTerm { term });
    }

    fn term_opening(&mut self, replica: usize, term: u64, outcome: Result<Outcome, Unsettled>) {
        if self.replicas[replica].leads(term).is_none() {
            return;
        }
        match outcome {
            Ok(Ok(_) | Err(Rejected::LedgerOpen)) => {}
            Ok(Err(_)) | Err(_) => {
                let at = self.now + RETRY_PAUSE_MS * MS;
                return self.queue.put(at, Event::OpenTerm { replica, term });
            }
        }
        let this = &self.replicas[replica];
        if this.state.ledger_id.is_none() {
            let ledger_id = LedgerId(u128::from(self.rng.next()) + 1);
            return self.propose(replica, controller(), Body::OpenLedger { ledger_id }, Origin::OpenTerm { term });
        }
        let (id, api_address) = (this.id, format!("10.0.0.{}:7000", this.id.0));
        if this.state.replicas.get(&id).is_none_or(|known| known.api_address != api_address) {
            let body = Body::PutReplica { replica: id, api_address, token_key: [replica as u8; 32] };
            return self.propose(replica, controller(), body, Origin::OpenTerm { term });
        }
        self.begin_term(replica, term);
    }

    fn begin_term(&mut self, replica: usize, term: u64) {
        let wait = self.lease.mul_f64(1.01) + FREEZE_BUDGET;
        let this = &mut self.replicas[replica];
        let deadline = instant(this.clock.monotonic(self.now) + wait);
        let nodes: Vec<NodeId> =
            this.state.nodes.values().filter(|node| node.reachable).map(|node| node.id.clone()).collect();
        let Some(lead) = this.leads(term) else { return };
        lead.open = true;
        lead.liveness.begin_term(nodes.into_iter(), deadline);
        self.wake_planner(replica, 0);
    }

    /// Sees to it that a pass happens `delay` from now, or earlier.
    pub fn wake_planner(&mut self, replica: usize, delay: u64) {
        let at = self.now + delay;
        let Some(lead) = self.replicas[replica].lead.as_mut().filter(|lead| lead.open) else { return };
        if lead.passing > 0 {
            lead.changed = true;
        } else if lead.wake.is_none_or(|wake| wake > at) {
            lead.wake = Some(at);
            let term = lead.term;
            self.queue.put(at, Event::Pass { replica, term });
        }
    }

    pub fn after_leader_applied(&mut self, replica: usize, _term: u64) {
        let delay = self.rng.between(10, 500);
        self.wake_planner(replica, delay);
    }

    /// Plans once and proposes everything planned.
    pub fn pass(&mut self, replica: usize, term: u64) {
        let now = self.now;
        let log_now = self.proposal_time(replica);
        let fleet = self.nodes_for_view(replica);
        let this = &mut self.replicas[replica];
        let monotonic = this.clock.monotonic(now);
        let state = this.state.clone();
        let Some(lead) = this.lead.as_mut().filter(|lead| lead.term == term) else { return };
        if lead.wake.is_none_or(|wake| wake > now) || lead.passing > 0 {
            return;
        }
        lead.wake = None;
        let lapsed = lead.liveness.take_lapsed(instant(monotonic), plan::MAX_COMMANDS);
        let mut planned: Vec<(Body, Option<(NodeId, Resources)>, Option<NodeId>)> = Vec::new();
        for node in lapsed.iter().filter_map(|id| state.nodes.get(id)).filter(|node| node.reachable) {
            let (id, incarnation) = (node.id.clone(), node.report.incarnation);
            let body = Body::SetNodeReachable { node: id.clone(), incarnation, reachable: false };
            planned.push((body, None, Some(id)));
        }
        let upkeep = plan::ended::plan(&state, log_now).into_iter().chain(plan::tick::plan(&state, log_now));
        planned.extend(upkeep.map(|body| (body, None, None)));
        this.view.sync(&fleet);
        for body in plan::pending::plan(&state, &mut this.view) {
            let reserved = match &body {
                Body::PlaceSandbox { sandbox, node, .. } => {
                    state.sandboxes.get(sandbox).map(|sandbox| (node.clone(), sandbox.spec.resources))
                }
                _ => None,
            };
            planned.push((body, reserved, None));
        }
        if let Some(lead) = &mut self.replicas[replica].lead {
            (lead.passing, lead.failed, lead.changed) = (planned.len(), false, false);
        }
        if planned.is_empty() {
            return self.sleep_until_due(replica);
        }
        for (body, reserved, lapsed) in planned {
            if let Some((node, resources)) = &reserved {
                self.oracle.decided(replica, term, node, *resources, &self.replicas[replica].state);
            }
            self.propose(replica, controller(), body, Origin::Planned { term, reserved, lapsed });
        }
    }

    fn sleep_until_due(&mut self, replica: usize) {
        let this = &self.replicas[replica];
        let idle = this.clock.after(self.now, IDLE_PASS) - self.now;
        let Some(lead) = &this.lead else { return };
        let monotonic = this.clock.monotonic(self.now);
        let due = lead.liveness.next_deadline().map(|at| at.saturating_duration_since(instant(monotonic)));
        let delay = due.map_or(idle, |due| idle.min(this.clock.after(self.now, due) - self.now));
        self.wake_planner(replica, delay);
    }

    fn planned_settled(&mut self, replica: usize, term: u64, lapsed: Option<NodeId>, unsettled: bool) {
        let again = instant(self.replicas[replica].clock.monotonic(self.now));
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        lead.passing = lead.passing.saturating_sub(1);
        lead.failed |= unsettled;
        if unsettled && let Some(node) = lapsed {
            lead.liveness.renew(&node, again);
        }
        if lead.passing > 0 {
            return;
        }
        let (failed, changed) = (lead.failed, lead.changed);
        match (failed, changed) {
            (true, _) => self.wake_planner(replica, RETRY_PAUSE_MS * MS),
            (false, true) => self.wake_planner(replica, 100),
            (false, false) => self.sleep_until_due(replica),
        }
    }

    /// Chooses a node for a new sandbox and holds its room in the view.
    pub fn decide(&mut self, replica: usize, spec: &SandboxSpec) -> (Decision, Option<(NodeId, Resources)>) {
        let fleet = self.nodes_for_view(replica);
        let this = &mut self.replicas[replica];
        let state = this.state.clone();
        let request = Request {
            resources: spec.resources,
            template: state.templates.get(&spec.template).map(|template| template.spec.digest),
            avoid: None,
        };
        this.view.sync(&fleet);
        if self.rng.per_mille(self.plan.wild_decisions) {
            // A leader may decide on whatever it likes: what does not hold must not be applied.
            let nodes: Vec<NodeId> = state.nodes.keys().cloned().collect();
            if let Some(node) = self.rng.pick(&nodes) {
                return (Decision::Place(node.clone()), None);
            }
        }
        match place(&this.view, &request) {
            Ok(node) => {
                this.view.reserve(&node, spec.resources);
                let term = this.lead.as_ref().map_or(0, |lead| lead.term);
                self.oracle.decided(replica, term, &node, spec.resources, &state);
                (Decision::Place(node.clone()), Some((node, spec.resources)))
            }
            Err(unplaceable) => (Decision::Queue(unplaceable.reason()), None),
        }
    }

    /// What was applied must be in the view before the reservation goes.
    fn release(&mut self, replica: usize, reserved: Option<(NodeId, Resources)>) {
        let Some((node, resources)) = reserved else { return };
        let this = &mut self.replicas[replica];
        this.view.sync(&this.state.nodes);
        this.view.release(&node, resources);
        self.oracle.released(replica, &node, resources);
    }

    /// Tells whoever waits what became of a proposal.
    pub fn settle(&mut self, replica: usize, origin: Origin, outcome: Result<Outcome, Unsettled>) {
        match origin {
            Origin::Nobody => {}
            Origin::OpenTerm { term } => self.term_opening(replica, term, outcome),
            Origin::Planned { term, reserved, lapsed } => {
                self.release(replica, reserved);
                self.planned_settled(replica, term, lapsed, outcome.is_err());
            }
            Origin::Create { call, reserved } => {
                self.release(replica, reserved);
                self.answer_call(call, replica, outcome);
            }
            Origin::Call { call } => self.answer_call(call, replica, outcome),
            Origin::Register { session } => self.registered(session, outcome),
            Origin::Observe { session, hello } => self.observed(session, hello, outcome),
            Origin::Returned { session, sequence } => self.returned(session, sequence, outcome),
        }
    }

    /// The fleet as the view is to see it. With the bug, what an uncommitted observation says is gone counts as free.
    fn nodes_for_view(&self, replica: usize) -> OrdMap<NodeId, Arc<Node>> {
        let this = &self.replicas[replica];
        let mut nodes = this.state.nodes.clone();
        let Some(lead) = this.lead.as_ref().filter(|_| self.bug == Some(Bug::OverlayCountsFrees)) else { return nodes };
        let under_way = lead.under_way.iter().flat_map(|batch| &batch.proposals).chain(&lead.waiting);
        for proposal in under_way {
            let Body::Observe { node: id, observation, .. } = &proposal.command.body else { continue };
            let Some(node) = nodes.get_mut(id).map(Arc::make_mut) else { continue };
            for gone in observation.sandboxes.iter().filter(|seen| seen.phase == Phase::Removed) {
                let held = this.state.sandboxes.get(&gone.sandbox).filter(|held| held.life.node() == Some(id));
                if let Some(held) = held {
                    node.assigned = node.assigned.saturating_sub(held.spec.resources);
                }
            }
        }
        nodes
    }
}

fn controller() -> Caller {
    Caller::system("controller")
}
