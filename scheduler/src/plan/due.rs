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
    let sandboxes: Vec<_> = due.take(MAX_COMMANDS).map(|(_, name)| name.clone()).collect();
    (!sandboxes.is_empty()).then_some(Body::EndDue { sandboxes })
}

/// When the next one is due, or may be placed, if that is later than `now`.
pub fn next(state: &State, now: LogTime) -> Option<LogTime> {
    let first = state.indexes.due.iter().map(|(at, _)| *at).find(|at| *at > now);
    let due = first.map(|at| at.max(state.region.hold_until));
    // Those whose time has passed and that still wait are skipped, however many.
    let placeable = state.indexes.backing_off.range((now.plus_ms(1), None)..).next().map(|(at, _)| *at);
    [due, placeable].into_iter().flatten().min()
}
