//! Ends what is due by itself: deadlines of sandboxes, and those that waited too long for a node.

use super::{MAX_COMMANDS, Planned};
use crate::state::State;
use crate::state::command::{Body, LogTime};

/// One command for the first that are due at `now`. Nothing while a jump of the clock is being slept on.
pub fn plan(state: &State, now: LogTime) -> Option<Planned> {
    if now < state.region.hold_until {
        return None;
    }
    let due = state.indexes.due.iter().take_while(|(at, _)| *at <= now);
    let ends = |at: Option<LogTime>| at.is_some_and(|at| at <= now);
    let sandboxes: Vec<_> = due
        .filter_map(|(_, name)| state.sandboxes.get(name))
        .filter(|sandbox| ends(sandbox.deadline()) || ends(sandbox.queue_deadline()))
        .take(MAX_COMMANDS)
        .map(|sandbox| sandbox.name.clone())
        .collect();
    (!sandboxes.is_empty()).then_some(Body::EndDue { sandboxes })
}

/// When the next one is due, if that is later than `now`.
pub fn next(state: &State, now: LogTime) -> Option<LogTime> {
    let first = state.indexes.due.iter().map(|(at, _)| *at).find(|at| *at > now);
    first.map(|at| at.max(state.region.hold_until))
}
