//! Rule 11: what a watch gets is what happened, all of it, in order.

use warren_scheduler::state::event::{Event, Position};

use super::Oracle;

impl Oracle {
    /// A watcher that had everything up to `position` was given `events`.
    pub fn watched(&mut self, watcher: usize, position: Position, events: &[Event]) {
        let begin = self.events.partition_point(|event| event.position <= position);
        let next = self.events.get(begin..).unwrap_or_default();
        if next.get(..events.len()) != Some(events) {
            let wanted = next.first().map(|event| event.position);
            let got = events.first().map(|event| event.position);
            self.wrong(11, format!("watcher {watcher} at {position:?} got {got:?}, and {wanted:?} was next"));
        }
    }
}
