//! What is going to happen, in the order of its time; what falls on the same microsecond happens in the order of its making.

use std::collections::BTreeMap;

use warren_node_agent::reconcile::Action;
use warren_proto::ids::{Epoch, SandboxName};

use super::agent::Timer;
use super::client::{Answer, CallId};
use super::clock::At;
use super::session::{Down, SessionId, Up};
use super::supervise::Done;

/// Something that is due.
#[derive(Debug, Clone)]
pub enum Event {
    /// Proposals that waited together become an entry.
    Flush {
        replica: usize,
        term: u64,
    },
    /// A quorum has the oldest entry under way.
    Committed {
        replica: usize,
        term: u64,
    },
    /// A follower hears of what was committed.
    CatchUp {
        replica: usize,
        life: u32,
    },
    /// The voters miss their leader.
    Elect,
    /// A leader hears of a newer term.
    StepDown {
        replica: usize,
        term: u64,
    },
    /// A leader tries again to open its term.
    OpenTerm {
        replica: usize,
        term: u64,
    },
    /// A leader looks for what is to be done.
    Pass {
        replica: usize,
        term: u64,
    },
    /// A round of hearing from a quorum is over.
    Confirmed {
        replica: usize,
        term: u64,
        what: Confirmation,
    },
    ToReplica {
        session: SessionId,
        message: Up,
    },
    ToAgent {
        session: SessionId,
        message: Down,
    },
    /// The scheduler's end learns that the stream is gone.
    ReplicaLearns {
        session: SessionId,
    },
    Agent {
        agent: usize,
        life: u32,
        timer: Timer,
    },
    /// A step of what an agent does to its host.
    Doing {
        agent: usize,
        life: u32,
        sandbox: SandboxName,
        action: Action,
        stage: u8,
    },
    /// An agent hears how an action ended.
    Done {
        agent: usize,
        life: u32,
        sandbox: SandboxName,
        action: Action,
        done: Done,
    },
    /// The fence looks at its clock.
    Fence {
        agent: usize,
    },
    /// A main process ends by itself.
    Ends {
        agent: usize,
        boot: u32,
        sandbox: SandboxName,
        epoch: Epoch,
    },
    AgentStarts {
        agent: usize,
        life: u32,
    },
    AgentWakes {
        agent: usize,
    },
    Client {
        client: usize,
    },
    Arrives {
        call: CallId,
        replica: usize,
        hops: u8,
    },
    Answered {
        call: CallId,
        answer: Answer,
    },
    GivesUp {
        call: CallId,
    },
    Watch {
        watcher: usize,
    },
    Fault,
    Operator,
    CalmOperator,
    /// A replica tells the ledger what it is.
    Announce {
        replica: usize,
    },
    ReplicaStarts {
        replica: usize,
    },
    Heals {
        replica: usize,
    },
    ClockSettles {
        replica: usize,
    },
}

/// What waits for a quorum's word that this leader still leads.
#[derive(Debug, Clone)]
pub enum Confirmation {
    Renewal { session: SessionId, sequence: u64, received: std::time::Duration },
    Read { call: CallId },
}

/// All that is due.
#[derive(Debug, Default)]
pub struct Queue {
    events: BTreeMap<(At, u64), Event>,
    made: u64,
}

impl Queue {
    pub fn put(&mut self, at: At, event: Event) {
        self.made += 1;
        self.events.insert((at, self.made), event);
    }

    pub fn next(&mut self) -> Option<(At, Event)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}
