//! Ends what is due by itself: deadlines of sandboxes, and those that waited too long for a node.

use std::sync::LazyLock;

use warren_proto::ids::SandboxName;

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

/// A name that no other comes before: ids begin with a digit or letter, and `0` is the least.
static FIRST_NAME: LazyLock<SandboxName> =
    LazyLock::new(|| SandboxName::parse("tenants/0/sandboxes/0").expect("a legal name"));

/// When the next one is due, or may be placed, if that is later than `now`.
pub fn next(state: &State, now: LogTime) -> Option<LogTime> {
    // Those whose time has passed and that are still there are skipped, however many: a hold keeps them for minutes.
    let first = state.indexes.due.range((now.plus_ms(1), FIRST_NAME.clone())..).next().map(|(at, _)| *at);
    let due = first.map(|at| at.max(state.region.hold_until));
    let placeable = state.indexes.backing_off.range((now.plus_ms(1), None)..).next().map(|(at, _)| *at);
    [due, placeable].into_iter().flatten().min()
}
