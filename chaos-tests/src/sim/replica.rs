//! One scheduler replica: what it has applied, its clocks, its checkpoint, and what it believes of the leadership.

use std::collections::BTreeSet;

use warren_proto::ids::ReplicaId;
use warren_scheduler::placement::view::View;
use warren_scheduler::raft::testing::StateHash;
use warren_scheduler::state::State;
use warren_scheduler::state::level::Level;

use super::bug::Bug;
use super::clock::Clock;
use super::faulty;
use super::leader::Lead;
use super::log::{Entry, Outcome};
use super::oracle::HASHED_EVERY;
use super::queue::Event;
use super::world::World;

/// A replica.
#[derive(Debug)]
pub struct Replica {
    pub id: ReplicaId,
    pub state: State,
    /// Of `state`, kept as it changes.
    pub hash: StateHash,
    /// Index of the last entry that `state` holds.
    pub applied: u64,
    pub up: bool,
    /// Other replicas are out of reach; agents and clients may not be.
    pub cut: bool,
    pub clock: Clock,
    /// What its build supports.
    pub max_level: Level,
    /// What it would start from after a crash.
    pub checkpoint: Option<(u64, State)>,
    pub lead: Option<Lead>,
    pub view: View,
    pub known_leader: Option<usize>,
    /// How often it was started: what belongs to an earlier life is void.
    pub life: u32,
    pub catching_up: bool,
}

impl Replica {
    pub fn new(number: u64, clock: Clock) -> Self {
        Self {
            id: ReplicaId(number),
            state: empty(),
            hash: StateHash::default(),
            applied: 0,
            up: true,
            cut: false,
            clock,
            max_level: Level::MAX,
            checkpoint: None,
            lead: None,
            view: View::default(),
            known_leader: None,
            life: 0,
            catching_up: false,
        }
    }

    /// Its leadership, if it believes to lead in `term`.
    pub fn leads(&mut self, term: u64) -> Option<&mut Lead> {
        self.lead.as_mut().filter(|lead| lead.term == term)
    }

    /// Who proposed has the commands in memory; all others read them.
    fn apply(&mut self, index: u64, entry: &Entry, leads: bool, bug: Option<Bug>) -> Vec<Outcome> {
        self.applied = index;
        self.state.revision = index;
        if let Some(members) = &entry.members {
            self.state.set_members(members.clone(), BTreeSet::new());
        }
        let proposed = entry.proposals.iter().map(|proposal| &proposal.command);
        let commands = proposed.zip(&entry.stored).map(|(proposed, stored)| if leads { proposed } else { stored });
        commands.map(|command| faulty::apply(&mut self.state, index, command, bug)).collect()
    }
}

/// A ledger before its first entry.
pub fn empty() -> State {
    State { events: warren_scheduler::state::event::EventRing::starting_after(0), ..State::default() }
}

impl World {
    /// Applies what this replica lacks up to `index`; answers the outcomes of the last entry.
    pub fn catch_up_to(&mut self, replica: usize, index: u64) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let (bug, leads) = (self.bug, self.log.leader == Some(replica));
        let from = self.replicas[replica].applied;
        while self.replicas[replica].applied < index {
            let next = self.replicas[replica].applied + 1;
            let Some(entry) = self.log.entry(next).cloned() else { break };
            outcomes = self.replicas[replica].apply(next, &entry, leads, bug);
            self.oracle.same_outcomes(next, replica, &outcomes);
            self.keep_checkpoint(replica);
            let this = &mut self.replicas[replica];
            if next.is_multiple_of(HASHED_EVERY) {
                self.oracle.same_hash(replica, next, this.hash.update(&this.state));
            }
        }
        if from < self.replicas[replica].applied {
            self.oracle.same_state(replica, from, &self.replicas[replica].state);
        }
        outcomes
    }

    fn keep_checkpoint(&mut self, replica: usize) {
        let every = self.checkpoint_every;
        let this = &mut self.replicas[replica];
        if this.applied.is_multiple_of(every) {
            this.checkpoint = Some((this.applied, this.state.clone()));
        }
    }

    pub fn schedule_catch_up(&mut self, replica: usize) {
        let delay = self.latency() + if self.rng.per_mille(50) { self.rng.below(2_000_000) } else { 300 };
        let this = &mut self.replicas[replica];
        if this.up && !this.cut && !std::mem::replace(&mut this.catching_up, true) {
            self.queue.put(self.now + delay, Event::CatchUp { replica, life: this.life });
        }
    }

    /// A follower applies what was committed; one that lags far may be given a checkpoint instead.
    pub fn catch_up(&mut self, replica: usize, life: u32) {
        let this = &mut self.replicas[replica];
        if this.life != life {
            return;
        }
        this.catching_up = false;
        if !this.up || this.cut {
            return;
        }
        let term = self.log.term;
        if this.lead.as_ref().is_some_and(|lead| lead.term < term) {
            // Who hears from a newer leader no longer leads.
            self.lose_leadership(replica);
        }
        let this = &self.replicas[replica];
        let lag = self.log.last().saturating_sub(this.applied);
        if (lag > self.checkpoint_every && self.rng.per_mille(700)) || self.rng.per_mille(5) {
            self.install_from_leader(replica);
        }
        let target = if self.rng.per_mille(800) {
            self.log.last()
        } else {
            let applied = self.replicas[replica].applied;
            self.rng.between(applied, self.log.last())
        };
        self.catch_up_to(replica, target);
        if target < self.log.last() {
            self.schedule_catch_up(replica);
        }
    }

    fn install_from_leader(&mut self, replica: usize) {
        let Some(leader) = self.log.leader.filter(|leader| *leader != replica && self.replicas[*leader].up) else {
            return;
        };
        let (index, state) = match &self.replicas[leader].checkpoint {
            Some((index, state)) => (*index, state.clone()),
            None => return,
        };
        if index > self.replicas[replica].applied {
            self.trace.note(self.now, format_args!("replica {replica} installs checkpoint {index}"));
            self.load_checkpoint(replica, index, &state);
        }
    }

    fn load_checkpoint(&mut self, replica: usize, index: u64, written: &State) {
        let state = faulty::checkpoint(written, self.bug);
        self.oracle.checkpoint_read(replica, written, &state);
        let this = &mut self.replicas[replica];
        this.state = state;
        this.applied = index;
        this.view = View::default();
        this.checkpoint = Some((index, written.clone()));
    }

    /// The process is gone, and with it all that stood in memory.
    pub fn crash_replica(&mut self, replica: usize) {
        self.trace.note(self.now, format_args!("replica {replica} crashes"));
        if self.log.leader == Some(replica) {
            let lead = self.replicas[replica].lead.as_ref();
            let sent = |lead: &Lead| lead.under_way.iter().take_while(|batch| batch.sent).cloned().collect();
            self.log.left_behind = lead.map(sent).unwrap_or_default();
            self.schedule_election();
        }
        let this = &mut self.replicas[replica];
        this.up = false;
        this.life += 1;
        this.catching_up = false;
        self.lose_leadership(replica);
    }

    /// A new process starts from the newest checkpoint.
    pub fn start_replica(&mut self, replica: usize) {
        if self.replicas[replica].up {
            return;
        }
        self.trace.note(self.now, format_args!("replica {replica} starts"));
        let this = &mut self.replicas[replica];
        this.up = true;
        this.hash = StateHash::default();
        this.known_leader = None;
        let (index, written) = this.checkpoint.clone().unwrap_or((0, empty()));
        self.load_checkpoint(replica, index, &written);
        self.schedule_catch_up(replica);
        if self.log.leader.is_none_or(|leader| self.replicas[leader].lead.is_none()) {
            self.schedule_election();
        }
        self.send_again();
    }
}
