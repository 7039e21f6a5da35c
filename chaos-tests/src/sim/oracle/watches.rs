//! Rule 11: what a watch gets is what happened, all of it, in order.

use warren_scheduler::state::event::{Event, Position};

use super::Oracle;

impl Oracle {
    /// A watcher listed, and has everything up to `position`.
    pub fn watch_begins(&mut self, watcher: usize, position: Position) {
        self.watchers.insert(watcher, position);
    }

    /// A watcher was given `events`. Where it stands is kept here: its token may be wrong.
    pub fn watched(&mut self, watcher: usize, events: &[Event]) {
        let position = self.watchers.get(&watcher).copied().unwrap_or_default();
        if let Some(last) = events.last() {
            self.watchers.insert(watcher, last.position);
        }
        let begin = self.events.partition_point(|event| event.position <= position);
        let next = self.events.get(begin..).unwrap_or_default();
        if next.get(..events.len()) != Some(events) {
            let wanted = next.first().map(|event| event.position);
            let got = events.first().map(|event| event.position);
            self.wrong(11, format!("watcher {watcher} at {position:?} got {got:?}, and {wanted:?} was next"));
        }
    }
}
