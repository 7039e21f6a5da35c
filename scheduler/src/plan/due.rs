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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{Caller, Command, Decision};
    use crate::state::level::Level;
    use crate::state::sandbox::SandboxSpec;
    use crate::state::settings::{Expiry, Settings};
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    #[test]
    fn the_next_is_the_first_that_lies_ahead_however_many_are_overdue() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        state.level = Level::SECOND;
        for (id, at) in [("a", 100), ("b", 200), ("0", 201), ("c", 300)] {
            let settings = Settings { expiry: Expiry::At(LogTime(at)), ..Settings::default() };
            let spec = SandboxSpec { settings, ..spec(1, 1) }.into();
            let body = Body::CreateSandbox {
                sandbox: name(id),
                spec,
                decision: Decision::Place(node("a").into()),
                request: None,
            };
            let command = Command { caller: Caller::system("test"), time: LogTime(1), body };
            state.apply(state.revision + 1, &command).expect("accepted");
        }
        for (now, then) in [(0, Some(100)), (100, Some(200)), (200, Some(201)), (250, Some(300)), (300, None)] {
            assert_eq!(next(&state, LogTime(now)), then.map(LogTime), "at {now}");
        }
    }
}
