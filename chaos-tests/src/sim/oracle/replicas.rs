//! Rule 5: replicas that applied the same prefix are in the same state, whichever way they came there.

use warren_scheduler::state::State;
use warren_scheduler::state::event::Position;

use super::super::log::{Entry, Outcome};
use super::Oracle;

/// What two states differ in. Of events, how many: what they say is compared once, as they come, and is most of a state.
fn difference(a: &State, b: &State) -> Option<&'static str> {
    let checks = [
        (a.ledger_id == b.ledger_id, "ledger id"),
        (a.revision == b.revision, "revision"),
        (a.log_time == b.log_time, "log time"),
        (a.epoch_floor == b.epoch_floor, "epoch floor"),
        (a.replicas == b.replicas, "replicas"),
        (a.nodes == b.nodes, "nodes"),
        (a.templates == b.templates, "templates"),
        (a.tenants == b.tenants, "tenants"),
        (a.sandboxes == b.sandboxes, "sandboxes"),
        (a.indexes == b.indexes, "indexes"),
        (a.region == b.region, "region"),
        (a.suspects == b.suspects && a.down == b.down, "silent nodes"),
        (a.level == b.level, "level"),
        (a.voters == b.voters && a.learners == b.learners, "members"),
        (a.predecessors == b.predecessors && a.restored_floor == b.restored_floor, "ancestry"),
        (a.events.floor() == b.events.floor() && a.events.len() == b.events.len(), "events"),
        (a.requests.iter().eq(b.requests.iter()), "request ids"),
    ];
    checks.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
}

impl Oracle {
    /// A replica has applied more.
    pub fn same_state(&mut self, replica: usize, from: u64, state: &State) {
        let known = self.states.iter().rev().find(|(index, _)| *index == state.revision);
        if let Some(what) = known.and_then(|(_, known)| difference(known, state)) {
            self.wrong(5, format!("replica {replica} differs at index {} in its {what}", state.revision));
        }
        let begin = self.events.partition_point(|event| event.position <= Position::end_of(from));
        let end = self.events.partition_point(|event| event.position <= Position::end_of(state.revision));
        let same = match state.events.after(Position::end_of(from), usize::MAX) {
            Ok(events) => self.events.get(begin..end).is_some_and(|known| known == events.as_slice()),
            Err(_compacted) => false,
        };
        if !same {
            self.wrong(11, format!("replica {replica}'s events from {from} to {} differ", state.revision));
        }
    }

    /// The hash that replicas compare while they serve, each kept by its own steps, is the same at the same index.
    pub fn same_hash(&mut self, replica: usize, index: u64, hash: u128) {
        let known = self.hashes.iter().rev().find(|(at, _)| *at == index);
        if known.is_some_and(|(_, known)| *known != hash) {
            self.wrong(5, format!("replica {replica} has another hash at index {index}"));
        }
    }

    /// Rule 13: what a command says survives its way through the log's bytes.
    pub fn stored_as_proposed(&mut self, entry: &Entry) {
        let mut both = entry.proposals.iter().map(|proposal| &proposal.command).zip(&entry.stored);
        if let Some((proposed, stored)) = both.find(|(proposed, stored)| proposed != stored) {
            self.wrong(13, format!("{proposed:?} is read from the log as {stored:?}"));
        }
    }

    pub fn same_outcomes(&mut self, index: u64, replica: usize, outcomes: &[Outcome]) {
        let known = self.outcomes.iter().rev().find(|(at, _)| *at == index);
        if known.is_some_and(|(_, known)| known.as_slice() != outcomes) {
            self.wrong(5, format!("replica {replica} answers entry {index} differently"));
        }
    }

    /// Rule 13: what is read back is what was written.
    pub fn checkpoint_read(&mut self, replica: usize, written: &State, read: &State) {
        let same_events = written.events.iter().eq(read.events.iter());
        if let Some(what) = difference(written, read).or_else(|| (!same_events).then_some("events")) {
            self.wrong(
                13,
                format!("replica {replica} read a checkpoint of index {} with other {what}", written.revision),
            );
        }
    }
}
