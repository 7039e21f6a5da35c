//! What a leader does of its own accord, step for step as `controller` does it: opens its term, plans with the real
//! planners over the real view, judges silent nodes by the real `Liveness`, and holds room in the view for what is under way.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use warren_proto::ids::NodeId;
use warren_proto::units::Resources;
use warren_scheduler::controller::liveness::Liveness;
use warren_scheduler::controller::log_clock::LogClock;
use warren_scheduler::placement::view::Reservation;
use warren_scheduler::plan;
use warren_scheduler::plan::liveness::{BRAKED_PAUSE, Step, Verdict};
use warren_scheduler::plan::moves::Searched;
use warren_scheduler::plan::pending::Cursor;
use warren_scheduler::state::command::{Body, Caller, LedgerId, LogTime};
use warren_scheduler::state::outcome::Rejected;

use super::bug::Bug;
use super::client::CallId;
use super::clock::{MS, instant};
use super::log::{Batch, Outcome, Proposal, Unsettled};
use super::queue::Event;
use super::session::SessionId;
use super::world::World;

/// As in `controller::leader`.
pub const FREEZE_BUDGET: Duration = Duration::from_secs(1);
pub const CLOCK_DRIFT: f64 = 1.01;
const IDLE_PASS: Duration = Duration::from_secs(10);
const RETRY_PAUSE_MS: u64 = 200;

/// A leader's memory. All of it goes with its leadership.
#[derive(Debug)]
pub struct Lead {
    pub term: u64,
    /// The term is open: it may plan.
    pub open: bool,
    pub liveness: Liveness,
    pub log_clock: Option<LogClock>,
    searched: Searched,
    cursor: Cursor,
    pub sessions: BTreeMap<NodeId, SessionId>,
    pub waiting: Vec<Proposal>,
    pub flushing: bool,
    pub under_way: VecDeque<Batch>,
    /// Answers of a majority that are on their way.
    pub acks: usize,
    /// Proposals of the pass under way that have no outcome yet.
    passing: usize,
    failed: bool,
    /// State changed since the pass began.
    changed: bool,
    wake: Option<u64>,
}

/// Room that a decision holds, as the view and as the oracle know it.
#[derive(Debug, Clone)]
pub struct Held {
    pub reservation: Reservation,
    pub node: NodeId,
    pub resources: Resources,
}

/// Who waits for a proposal's outcome.
#[derive(Debug, Clone)]
pub enum Origin {
    OpenTerm {
        term: u64,
    },
    /// The clock is set in the middle of a term.
    SetClock {
        term: u64,
    },
    Planned {
        term: u64,
    },
    Placed {
        term: u64,
        held: Held,
    },
    Judged {
        term: u64,
        verdict: Verdict,
    },
    Create {
        call: CallId,
        held: Vec<Held>,
    },
    Call {
        call: CallId,
    },
    Register {
        session: SessionId,
    },
    Observe {
        session: SessionId,
        hello: bool,
    },
    Returned {
        session: SessionId,
        sequence: u64,
    },
    Nobody,
}

impl Lead {
    pub fn new(term: u64) -> Self {
        Self {
            term,
            open: false,
            liveness: Liveness::default(),
            log_clock: None,
            searched: Searched::new(),
            cursor: Cursor::default(),
            sessions: BTreeMap::new(),
            waiting: Vec::new(),
            flushing: false,
            under_way: VecDeque::new(),
            acks: 0,
            passing: 0,
            failed: false,
            changed: false,
            wake: None,
        }
    }
}

impl World {
    /// Log time as a leader has it: what its proposals carry.
    pub fn log_now(&self, replica: usize) -> LogTime {
        let this = &self.replicas[replica];
        if self.bug == Some(Bug::ClockPoison) {
            return this.clock.wall(self.now);
        }
        let reading = instant(this.clock.monotonic(self.now));
        let clock = this.lead.as_ref().and_then(|lead| lead.log_clock);
        clock.map_or(this.state.log_time, |clock| clock.read(reading).max(this.state.log_time))
    }

    /// The clocks of a quorum, this one's among them; fewer where it reaches fewer.
    fn read_clocks(&mut self, replica: usize) -> Vec<LogTime> {
        let quorum = self.replicas.len() / 2 + 1;
        let mut others: Vec<usize> = (0..self.replicas.len())
            .filter(|other| *other != replica && self.replicas[*other].up && !self.replicas[*other].cut)
            .collect();
        let mut samples = vec![self.replicas[replica].clock.wall(self.now)];
        while samples.len() < quorum && !others.is_empty() && !self.replicas[replica].cut {
            let other = others.swap_remove(self.rng.index(others.len()));
            samples.push(self.replicas[other].clock.wall(self.now));
        }
        if samples.len() < quorum { Vec::new() } else { samples }
    }

    /// Sets log time by a quorum's clocks. Without a quorum nothing comes of it.
    fn set_clock(&mut self, replica: usize, origin: Origin) {
        let samples = self.read_clocks(replica);
        if samples.is_empty() {
            return self.settle(replica, origin, Err(Unsettled::Unknown));
        }
        self.propose(replica, controller(), Body::AdvanceTime { samples }, origin);
    }

    fn clock_was_set(&mut self, replica: usize, term: u64) {
        let this = &mut self.replicas[replica];
        let (at, reading) = (this.state.log_time, instant(this.clock.monotonic(self.now)));
        if let Some(lead) = this.leads(term) {
            lead.log_clock = Some(LogClock::starting(at, reading));
        }
    }

    /// The first thing that must stand in the ledger before anything is planned.
    pub fn open_term(&mut self, replica: usize, term: u64) {
        if let Some(lead) = self.replicas[replica].leads(term) {
            lead.log_clock = None;
        }
        self.set_clock(replica, Origin::OpenTerm { term });
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
        if self.replicas[replica].lead.as_ref().is_some_and(|lead| lead.log_clock.is_none()) {
            self.clock_was_set(replica, term);
        }
        if self.replicas[replica].state.ledger_id.is_none() {
            let ledger_id = LedgerId(u128::from(self.rng.next()) + 1);
            return self.propose(replica, controller(), Body::OpenLedger { ledger_id }, Origin::OpenTerm { term });
        }
        self.begin_term(replica, term);
    }

    fn begin_term(&mut self, replica: usize, term: u64) {
        let wait = self.grace();
        let this = &mut self.replicas[replica];
        let until = instant(this.clock.monotonic(self.now) + wait);
        let nodes: Vec<_> = this.state.nodes.values().map(|node| (node.id.clone(), node.condition)).collect();
        let Some(lead) = this.leads(term) else { return };
        lead.open = true;
        lead.liveness.begin_term(nodes.into_iter(), until, wait);
        self.wake_planner(replica, 0);
    }

    /// From the lapse of a lease to the verdict that its node is down.
    pub fn grace(&self) -> Duration {
        self.lease.mul_f64(CLOCK_DRIFT) + FREEZE_BUDGET
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

    pub fn after_leader_applied(&mut self, replica: usize) {
        let delay = self.rng.between(10, 500);
        self.wake_planner(replica, delay);
    }

    /// Plans once and proposes everything planned.
    pub fn pass(&mut self, replica: usize, term: u64) {
        let now = self.now;
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        if lead.wake.is_none_or(|wake| wake > now) || lead.passing > 0 {
            return;
        }
        (lead.wake, lead.failed, lead.changed) = (None, false, false);
        let log_now = self.log_now(replica);
        let state = self.replicas[replica].state.clone();
        if plan::tick::needs_quorum(&state, log_now) {
            if let Some(lead) = self.replicas[replica].leads(term) {
                lead.passing = 1;
            }
            return self.set_clock(replica, Origin::SetClock { term });
        }
        let fleet = self.fleet_for_view(replica);
        let this = &mut self.replicas[replica];
        let monotonic = instant(this.clock.monotonic(now));
        let Some(lead) = this.lead.as_mut() else { return };
        let verdicts = lead.liveness.judge(monotonic, plan::MAX_COMMANDS);
        let bodies = plan::from_state(&state, log_now, &mut lead.searched);
        this.view.sync(&fleet);
        let placements = plan::pending::plan(&state, &mut this.view, log_now, &mut lead.cursor);
        // One more, which is settled last here: so a pass never ends while it is still proposing.
        lead.passing = verdicts.len() + bodies.len() + placements.commands.len() + 1;
        for verdict in verdicts {
            self.judge(replica, term, verdict);
        }
        for body in bodies {
            self.propose(replica, controller(), body, Origin::Planned { term });
        }
        let mut reserved = placements.reserved.into_iter();
        for body in placements.commands {
            let origin = match self.room_of(replica, term, &body, &mut reserved) {
                Some(held) => Origin::Placed { term, held },
                None => Origin::Planned { term },
            };
            self.propose(replica, controller(), body, origin);
        }
        self.one_settled(replica, term, false);
    }

    /// The room that a planned placement holds; the oracle is told of it, and of reasons.
    fn room_of(
        &mut self,
        replica: usize,
        term: u64,
        body: &Body,
        reserved: &mut impl Iterator<Item = Reservation>,
    ) -> Option<Held> {
        if let Body::ExplainPending { sandbox: name, reason, .. } = body {
            let state = &self.replicas[replica].state;
            let sandbox = state.sandboxes.get(name)?;
            self.oracle.said_why(replica, state, Some(name), &sandbox.spec, reason);
        }
        let Body::PlaceSandbox { sandbox, spot, .. } = body else { return None };
        let resources = self.replicas[replica].state.sandboxes.get(sandbox)?.spec.resources;
        let reservation = reserved.next()?;
        self.oracle.decided(replica, term, &spot.node, resources, &self.replicas[replica].state);
        Some(Held { reservation, node: spot.node.clone(), resources })
    }

    fn judge(&mut self, replica: usize, term: u64, verdict: Verdict) {
        let state = self.replicas[replica].state.clone();
        self.trace
            .note(self.now, format_args!("replica {replica} thinks {} {}", verdict.node, verdict.condition.name()));
        match plan::liveness::decide(&state, &verdict) {
            Step::Propose(body) => self.propose(replica, controller(), *body, Origin::Judged { term, verdict }),
            Step::Nothing => self.judged(replica, term, &verdict, Ok(())),
            Step::Wait => {
                let again = instant(self.replicas[replica].clock.monotonic(self.now) + BRAKED_PAUSE);
                if let Some(lead) = self.replicas[replica].leads(term) {
                    lead.liveness.settled(&verdict, false, again);
                }
                self.one_settled(replica, term, false);
            }
        }
    }

    fn judged(&mut self, replica: usize, term: u64, verdict: &Verdict, result: Result<(), bool>) {
        let this = &mut self.replicas[replica];
        let reading = this.clock.monotonic(self.now);
        let stands = plan::liveness::stands(&this.state, verdict);
        let again = if result.is_err() { reading + BRAKED_PAUSE } else { reading };
        if let Some(lead) = this.leads(term) {
            lead.liveness.settled(verdict, stands, instant(again));
        }
        self.one_settled(replica, term, result == Err(true));
    }

    fn sleep_until_due(&mut self, replica: usize) {
        let this = &self.replicas[replica];
        let reading = this.clock.monotonic(self.now);
        let log_now = self.log_now(replica);
        let Some(lead) = &this.lead else { return };
        let judged = lead.liveness.next_deadline().map(|at| at.saturating_duration_since(instant(reading)));
        let due = plan::due::next(&this.state, log_now);
        let due = due.map(|at| Duration::from_millis(at.0.saturating_sub(log_now.0)));
        let wait = [due, judged].into_iter().flatten().fold(IDLE_PASS, Duration::min);
        let delay = this.clock.after(self.now, wait) - self.now;
        self.wake_planner(replica, delay);
    }

    fn one_settled(&mut self, replica: usize, term: u64, failed: bool) {
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        lead.passing = lead.passing.saturating_sub(1);
        lead.failed |= failed;
        if lead.passing > 0 {
            return;
        }
        match (lead.failed, lead.changed) {
            (true, _) => self.wake_planner(replica, RETRY_PAUSE_MS * MS),
            (false, true) => self.wake_planner(replica, 100),
            (false, false) => self.sleep_until_due(replica),
        }
    }

    /// Tells whoever waits what became of a proposal.
    pub fn settle(&mut self, replica: usize, origin: Origin, outcome: Result<Outcome, Unsettled>) {
        match origin {
            Origin::Nobody => {}
            Origin::OpenTerm { term } => self.term_opening(replica, term, outcome),
            Origin::SetClock { term } => {
                let failed = !matches!(outcome, Ok(Ok(_)));
                if !failed {
                    self.clock_was_set(replica, term);
                }
                self.one_settled(replica, term, failed);
            }
            Origin::Planned { term } => self.one_settled(replica, term, outcome.is_err()),
            Origin::Placed { term, held } => {
                self.release(replica, &held);
                self.one_settled(replica, term, outcome.is_err());
            }
            Origin::Judged { term, verdict } => {
                let result = match outcome {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(_)) => Err(false),
                    Err(_) => Err(true),
                };
                self.judged(replica, term, &verdict, result);
            }
            Origin::Create { call, held } => {
                held.iter().for_each(|held| self.release(replica, held));
                self.answer_call(call, outcome);
            }
            Origin::Call { call } => self.answer_call(call, outcome),
            Origin::Register { session } => self.registered(session, outcome),
            Origin::Observe { session, hello } => self.observed(session, hello, outcome),
            Origin::Returned { session, sequence } => self.returned(session, sequence, outcome),
        }
    }
}

fn controller() -> Caller {
    Caller::system("controller")
}
