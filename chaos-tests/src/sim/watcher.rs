//! Watchers: each follows the events of all sandboxes from a token, on one replica after the other.

use warren_scheduler::state::command::LedgerId;
use warren_scheduler::state::event::Position;

use super::bug::Bug;
use super::clock::MS;
use super::queue::Event;
use super::world::World;

/// A watch and its token.
#[derive(Debug, Default)]
pub struct Watcher {
    pub replica: usize,
    /// Ledger and position: everything up to there was received. `None`: it must list first.
    token: Option<(LedgerId, Position)>,
}

impl World {
    pub fn watch(&mut self, watcher: usize) {
        let shortest = if self.calm { 500 } else { 5 };
        let at = self.now + self.rng.between(shortest * MS, self.plan.watch_pause.max(2 * shortest) * MS);
        self.queue.put(at, Event::Watch { watcher });
        if self.rng.per_mille(100) {
            self.watchers[watcher].replica = self.rng.index(self.replicas.len());
        }
        let limit = self.rng.between(1, 4);
        let this = &mut self.watchers[watcher];
        let replica = &self.replicas[this.replica];
        let Some(ledger_id) = replica.state.ledger_id.filter(|_| replica.up) else { return };
        let state = &replica.state;
        let begin = Position::end_of(state.revision);
        let Some((_, position)) = this.token.filter(|(ledger, _)| *ledger == ledger_id) else {
            this.token = Some((ledger_id, begin));
            return self.oracle.watch_begins(watcher, begin);
        };
        match state.events.after(position, usize::try_from(limit).unwrap_or(1)) {
            Ok(events) => {
                let Some(last) = events.last().map(|event| event.position) else { return };
                self.oracle.watched(watcher, &events);
                // Bug: as if an index had one event only.
                let next = if self.bug == Some(Bug::LostWatchEvent) { Position::end_of(last.index) } else { last };
                this.token = Some((ledger_id, next));
            }
            Err(_compacted) => {
                this.token = Some((ledger_id, begin));
                self.oracle.watch_begins(watcher, begin);
            }
        }
    }
}
