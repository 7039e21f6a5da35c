//! The model of the replicated log: a committed prefix that is the same for all, a leader, and what it has under way.
//!
//! It keeps what Raft promises and no more. An entry is committed when its leader leads and reaches a majority at that moment.
//! When a leader is replaced, some prefix of what it had sent is carried over by its successor, the rest is lost, and its
//! proposers cannot tell. A leader that was cut off goes on thinking that it leads until somebody tells it.

use std::collections::{BTreeSet, VecDeque};
use std::fmt::{self, Write};
use std::sync::Arc;

use warren_proto::ids::ReplicaId;
use warren_scheduler::state::command::{Body, Caller, Command};
use warren_scheduler::state::outcome::{Rejected, Reply};

use super::faulty;
use super::leader::{Lead, Origin};
use super::queue::Event;
use super::world::World;

/// Most commands of one entry, as in `raft::batcher`.
const MAX_BATCH: usize = 256;

pub type Outcome = Result<Reply, Rejected>;

/// One command on its way into the log.
#[derive(Debug, Clone)]
pub struct Proposal {
    pub command: Command,
    pub origin: Origin,
}

/// One entry. An empty one opens a term.
#[derive(Debug)]
pub struct Entry {
    pub proposals: Vec<Proposal>,
    /// Its commands as they are read from their stored bytes: what every replica but the leader applies.
    pub stored: Vec<Command>,
    /// It says who is in the group.
    pub members: Option<BTreeSet<ReplicaId>>,
}

/// Proposals that were flushed together.
#[derive(Debug, Clone)]
pub struct Batch {
    pub proposals: Vec<Proposal>,
    /// It was sent while the leader reached a majority: a successor may have it.
    pub sent: bool,
}

/// What is true of the log, whoever believes what. Entry `i` has index `base + i + 1`.
#[derive(Debug, Default)]
pub struct Log {
    pub base: u64,
    pub entries: Vec<Arc<Entry>>,
    pub term: u64,
    pub leader: Option<usize>,
    /// What a leader that crashed had sent.
    pub left_behind: VecDeque<Batch>,
    pub electing: bool,
}

impl Log {
    pub fn last(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    pub fn entry(&self, index: u64) -> Option<&Arc<Entry>> {
        let at = index.checked_sub(self.base + 1)?;
        self.entries.get(usize::try_from(at).ok()?)
    }
}

impl World {
    /// Whether this replica really leads in `term` and reaches a majority now.
    pub fn really_leads(&self, replica: usize, term: u64) -> bool {
        self.log.leader == Some(replica) && self.log.term == term && self.reaches_majority(replica)
    }

    fn reaches_majority(&self, replica: usize) -> bool {
        let reachable = |i: &usize| self.replicas[*i].up && !self.replicas[*i].cut;
        reachable(&replica) && (0..self.replicas.len()).filter(reachable).count() * 2 > self.replicas.len()
    }

    /// Hands a command to a replica that thinks that it leads.
    pub fn propose(&mut self, replica: usize, caller: Caller, body: Body, origin: Origin) {
        let time = self.log_now(replica);
        let delay = self.rng.between(20, self.plan.longest_flush);
        let (now, this) = (self.now, &mut self.replicas[replica]);
        let Some(lead) = &mut this.lead else {
            return self.settle(replica, origin, Err(Unsettled::NotLeader));
        };
        lead.waiting.push(Proposal { command: Command { caller, time, body }, origin });
        if !std::mem::replace(&mut lead.flushing, true) {
            let term = lead.term;
            self.queue.put(now + delay, Event::Flush { replica, term });
        }
    }

    pub fn flush(&mut self, replica: usize, term: u64) {
        let connected = self.really_leads(replica, term);
        let slow = !self.calm && self.rng.per_mille(self.plan.slow_commits);
        let longest = if slow { 1_500_000 } else { 3_000 };
        let delay = self.latency() + self.rng.between(200, longest);
        let now = self.now;
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        lead.flushing = false;
        let rest = lead.waiting.split_off(lead.waiting.len().min(MAX_BATCH));
        let proposals = std::mem::replace(&mut lead.waiting, rest);
        if !lead.waiting.is_empty() {
            lead.flushing = true;
            self.queue.put(now + 50, Event::Flush { replica, term });
        }
        lead.under_way.push_back(Batch { proposals, sent: connected });
        if connected {
            lead.acks += 1;
            self.queue.put(now + delay, Event::Committed { replica, term });
        }
    }

    /// The oldest batch of this leader has reached a majority, if it still can.
    pub fn committed(&mut self, replica: usize, term: u64) {
        let really = self.really_leads(replica, term);
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        lead.acks = lead.acks.saturating_sub(1);
        if !really {
            return;
        }
        let Some(batch) = lead.under_way.pop_front() else { return };
        let origins: Vec<Origin> = batch.proposals.iter().map(|p| p.origin.clone()).collect();
        self.append(batch.proposals);
        let outcomes = self.catch_up_to(replica, self.log.last());
        self.after_leader_applied(replica);
        for (origin, outcome) in origins.into_iter().zip(outcomes) {
            self.settle(replica, origin, Ok(outcome));
        }
        self.push_all(replica);
        self.send_again();
    }

    /// What a leader could not send to a majority goes out once it reaches one again.
    pub fn send_again(&mut self) {
        let (Some(replica), term) = (self.log.leader, self.log.term) else { return };
        let at = self.now + self.latency();
        if !self.really_leads(replica, term) {
            return;
        }
        let Some(lead) = self.replicas[replica].leads(term) else { return };
        if lead.acks == 0 && !lead.under_way.is_empty() {
            lead.acks = 1;
            lead.under_way.iter_mut().for_each(|batch| batch.sent = true);
            self.queue.put(at, Event::Committed { replica, term });
        }
    }

    /// Commits an entry: from here on it is in the history, whatever anybody is told.
    fn append(&mut self, proposals: Vec<Proposal>) {
        let first = self.log.entries.is_empty();
        let members = first.then(|| self.replicas.iter().map(|replica| replica.id).collect());
        let stored = proposals.iter().map(|proposal| faulty::stored(&proposal.command)).collect();
        let entry = Arc::new(Entry { proposals, stored, members });
        self.log.entries.push(entry.clone());
        self.last_commit = self.now;
        let index = self.log.last();
        self.trace.note(self.now, format_args!("commit {index} term {} {}", self.log.term, kinds(&entry)));
        self.oracle.stored_as_proposed(&entry);
        self.oracle.committed(self.now, index, &entry, &mut self.trace);
        for proposal in &entry.proposals {
            if let Body::ForgetNode { node } = &proposal.command.body
                && !self.oracle.state().nodes.contains_key(node)
            {
                self.upheaval = true;
                self.disown(node);
            }
        }
        self.nothing_runs_on_what_is_down();
        for replica in 0..self.replicas.len() {
            if self.log.leader != Some(replica) {
                self.schedule_catch_up(replica);
            }
        }
    }

    /// The leader is missed: somebody stands for election a while later.
    pub fn schedule_election(&mut self) {
        if !std::mem::replace(&mut self.log.electing, true) {
            let at = self.now + self.rng.between(150_000, 1_200_000);
            self.queue.put(at, Event::Elect);
        }
    }

    pub fn elect(&mut self) {
        self.log.electing = false;
        if let Some(leader) = self.log.leader
            && self.reaches_majority(leader)
            && self.replicas[leader].lead.is_some()
        {
            return;
        }
        let able: Vec<usize> = (0..self.replicas.len()).filter(|i| self.reaches_majority(*i)).collect();
        match self.rng.pick(&able).copied() {
            Some(new) => self.take_over(new),
            None => self.schedule_election(),
        }
    }

    /// `new` leads from now on, and has applied the first entry of its term.
    pub fn take_over(&mut self, new: usize) {
        let old = self.log.leader;
        let inherited = old.map(|old| self.inherited(old)).unwrap_or_default();
        self.log.term += 1;
        self.log.leader = Some(new);
        let term = self.log.term;
        self.trace.note(self.now, format_args!("replica {new} leads term {term}, inherits {}", inherited.len()));
        for batch in inherited {
            self.append(batch.proposals);
        }
        self.append(Vec::new());
        self.lose_leadership(new);
        self.catch_up_to(new, self.log.last());
        self.replicas[new].lead = Some(Lead::new(term));
        for replica in 0..self.replicas.len() {
            let known = &mut self.replicas[replica];
            if !known.cut {
                known.known_leader = Some(new);
            }
        }
        if let Some(old) = old.filter(|old| *old != new)
            && !self.replicas[old].cut
        {
            let at = self.now + self.latency();
            self.queue.put(at, Event::StepDown { replica: old, term });
        }
        self.open_term(new, term);
    }

    /// What a successor has of the old leader's entries under way: some prefix of those that were sent.
    fn inherited(&mut self, old: usize) -> VecDeque<Batch> {
        let mut sent = std::mem::take(&mut self.log.left_behind);
        if let Some(lead) = &self.replicas[old].lead {
            sent = lead.under_way.iter().take_while(|batch| batch.sent).cloned().collect();
        }
        let kept = self.rng.index(sent.len() + 1);
        sent.into_iter().take(kept).collect()
    }

    /// This replica no longer leads and knows it: nobody learns what became of what it had under way.
    pub fn lose_leadership(&mut self, replica: usize) {
        let Some(lead) = self.replicas[replica].lead.take() else { return };
        self.trace.note(self.now, format_args!("replica {replica} no longer leads term {}", lead.term));
        self.replicas[replica].view.drop_overlay();
        self.oracle.overlay_dropped(replica);
        let under_way = lead.under_way.into_iter().flat_map(|batch| batch.proposals);
        let never_sent = lead.waiting.into_iter();
        for proposal in under_way.chain(never_sent) {
            self.settle(replica, proposal.origin, Err(Unsettled::Unknown));
        }
        self.close_sessions_of(replica);
    }
}

/// Why a proposal has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsettled {
    /// Nothing happened, for certain.
    NotLeader,
    Unknown,
}

/// The kinds of an entry's commands, for the trace.
fn kinds(entry: &Entry) -> String {
    let mut text = String::new();
    for proposal in &entry.proposals {
        let mut kind = Word(&mut text);
        // It stops by an error at the end of the first word.
        let _ = write!(kind, "{:?}", proposal.command.body);
        text.push(' ');
    }
    text
}

/// Takes one word and refuses the rest, so that the rest need not be formatted.
struct Word<'a>(&'a mut String);

impl Write for Word<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
        self.0.push_str(&text[..end]);
        if end == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
