//! The oracle: sees every committed command, every host and every answer, and says what must not be.
//!
//! It keeps a state of its own, to which it applies every command as it is committed, and beside it a small model that trusts
//! nothing of the code under test: which placements there were, what was answered to whom, what happened in which order.
//! The first violation stops the world. Rules are numbered as in section 4 of the design.

mod bounds;
mod calm;
mod changes;
mod hosts;
mod ledger;
mod reasons;
mod replicas;
mod requests;
mod silence;
mod watches;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use warren_proto::ids::{Epoch, Generation, NodeId, SandboxName, TenantId};
use warren_proto::units::Resources;
use warren_scheduler::raft::testing::StateHash;
use warren_scheduler::state::State;
use warren_scheduler::state::event::{Event, Position};
use warren_scheduler::state::sandbox::Life;
use warren_scheduler::state::settings::Settings;

use super::bug::Bug;
use super::clock::At;
use super::faulty;
use super::log::{Entry, Outcome};
use super::replica::empty;
use super::rng::Rng;
use super::session::SessionId;
use super::trace::Trace;
use requests::Answered;
use silence::Lapses;

/// States that are kept for comparison with followers that lag.
const KEPT: usize = 1_024;

/// Replicas and oracle take the hash of their states at the indexes that this divides: as while serving, only closer together.
pub const HASHED_EVERY: u64 = 16;

/// What must not be, and is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which rule of the design.
    pub rule: u8,
    pub what: String,
    pub at: At,
    pub step: u64,
    /// Ledger index, as far as it was committed.
    pub index: u64,
}

/// What the oracle knows.
#[derive(Debug)]
pub struct Oracle {
    pub violation: Option<Violation>,
    bug: Option<Bug>,
    now: At,
    step: u64,
    /// The ledger as it is committed.
    state: State,
    states: VecDeque<(u64, State)>,
    outcomes: VecDeque<(u64, Vec<Outcome>)>,
    hash: StateHash,
    hashes: VecDeque<(u64, u128)>,
    /// Every event that there ever was, in order.
    events: Vec<Event>,
    /// The last placement of every name, also of those that are gone.
    placed: BTreeMap<SandboxName, (Epoch, NodeId)>,
    all_placed: BTreeSet<(SandboxName, Epoch, NodeId)>,
    /// What each sandbox's settings must be, by its creation and the updates since.
    settings: BTreeMap<SandboxName, Settings>,
    /// Names that must be in the ledger.
    expected: BTreeSet<SandboxName>,
    /// Up to which epoch a node was told to remove a sandbox.
    removable: BTreeMap<(NodeId, SandboxName), Epoch>,
    /// What nodes said that they have, last.
    reported: BTreeMap<NodeId, Resources>,
    answered: BTreeMap<(Option<TenantId>, u128), Answered>,
    in_flight: BTreeMap<(usize, NodeId), Resources>,
    watchers: BTreeMap<usize, Position>,
    /// Until when a lease is good at most, by session and sequence of its renewal.
    leases: BTreeMap<(SessionId, u64), At>,
    lapses: Lapses,
    /// Newest generation of each node's assignment, also of those that were forgotten.
    generations: BTreeMap<NodeId, Generation>,
    told_revision: u64,
    pub commands: u64,
}

impl Oracle {
    pub fn new(bug: Option<Bug>) -> Self {
        Self {
            violation: None,
            bug,
            now: 0,
            step: 0,
            state: empty(),
            states: VecDeque::new(),
            outcomes: VecDeque::new(),
            hash: StateHash::default(),
            hashes: VecDeque::new(),
            events: Vec::new(),
            placed: BTreeMap::new(),
            all_placed: BTreeSet::new(),
            settings: BTreeMap::new(),
            expected: BTreeSet::new(),
            removable: BTreeMap::new(),
            reported: BTreeMap::new(),
            answered: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            watchers: BTreeMap::new(),
            leases: BTreeMap::new(),
            lapses: Lapses::default(),
            generations: BTreeMap::new(),
            told_revision: 0,
            commands: 0,
        }
    }

    pub fn time_is(&mut self, now: At, step: u64) {
        (self.now, self.step) = (now, step);
    }

    /// Keeps the first violation; what follows from it is of no interest.
    fn wrong(&mut self, rule: u8, what: impl Into<String>) {
        if self.violation.is_none() {
            let (at, step, index) = (self.now, self.step, self.state.revision);
            self.violation = Some(Violation { rule, what: what.into(), at, step, index });
        }
    }

    /// The ledger as it is committed.
    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn sandboxes(&self) -> usize {
        self.state.sandboxes.len()
    }

    /// Newest revision that anybody was told.
    pub fn told_revision(&self) -> u64 {
        self.told_revision
    }

    /// An entry was committed.
    pub fn committed(&mut self, now: At, index: u64, entry: &Entry, trace: &mut Trace) {
        self.now = now;
        self.state.revision = index;
        if let Some(members) = &entry.members {
            self.state.set_members(members.clone(), BTreeSet::new());
        }
        let mut outcomes = Vec::with_capacity(entry.proposals.len());
        for proposal in &entry.proposals {
            let before = self.state.clone();
            let outcome = faulty::apply(&mut self.state, index, &proposal.command, self.bug);
            self.commands += 1;
            if let Err(rejected) = &outcome {
                trace.note(now, format_args!("rejected: {rejected}"));
            }
            let events = self.new_events(&before);
            for event in &events {
                let sandbox = &event.sandbox;
                trace.note(
                    now,
                    format_args!("{:?} {} {} {:?}", event.kind, sandbox.name, sandbox.epoch, sandbox.life.kind()),
                );
            }
            self.check_command(&before, &proposal.command, &outcome, &events);
            self.events.extend(events);
            outcomes.push(outcome);
        }
        self.states.push_back((index, self.state.clone()));
        self.outcomes.push_back((index, outcomes));
        if index.is_multiple_of(HASHED_EVERY) {
            self.hashes.push_back((index, self.hash.update(&self.state)));
        }
        if self.states.len() > KEPT {
            self.states.pop_front();
            self.outcomes.pop_front();
        }
        if self.hashes.len() > KEPT {
            self.hashes.pop_front();
        }
    }

    /// A state of the past, as a backup holds it.
    pub fn some_past(&self, rng: &mut Rng) -> Option<State> {
        let kept = self.states.len();
        let recent = kept.saturating_sub(rng.index(kept.min(200) + 1));
        self.states.get(recent.min(kept.checked_sub(1)?)).map(|(_, state)| state.clone())
    }

    /// The history goes on from a backup, under another name: what came after it was never promised to anybody who asks now.
    pub fn restored(&mut self, backup: &State, state: State) {
        let end = self.events.partition_point(|event| event.position.index <= state.revision);
        self.events.truncate(end);
        self.expected = state.sandboxes.keys().cloned().collect();
        self.settings = state.sandboxes.iter().map(|(name, s)| (name.clone(), s.settings().clone())).collect();
        self.expected
            .retain(|name| state.sandboxes.get(name).is_some_and(|s| !matches!(s.life, Life::Stopping { .. })));
        let kept: BTreeSet<_> = state.requests.iter().map(|(scope, id, _)| (scope.tenant.clone(), id)).collect();
        self.answered.retain(|key, _| kept.contains(key));
        self.states.clear();
        self.outcomes.clear();
        self.hashes.clear();
        self.in_flight.clear();
        self.watchers.clear();
        self.generations.clear();
        self.lapses = Lapses::of(backup, &state);
        self.reported = state.nodes.values().map(|node| (node.id.clone(), node.report.capacity)).collect();
        self.told_revision = 0;
        self.state = state;
    }

    fn new_events(&mut self, before: &State) -> Vec<Event> {
        let last = self.events.last().map_or(Position::end_of(0), |event| event.position);
        match self.state.events.after(last, usize::MAX) {
            Ok(events) => events,
            Err(_compacted) => {
                self.wrong(11, format!("the ring lost events after {last:?} at revision {}", before.revision));
                Vec::new()
            }
        }
    }
}
