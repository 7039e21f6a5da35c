//! Forgets sandboxes that ended long enough ago.

use super::{MAX_COMMANDS, Planned};
use crate::state::State;
use crate::state::command::{Body, LogTime};
use crate::state::sandbox::ENDED_RETENTION_MS;

/// One command for the oldest that are due by log time; `now` is what log time will be when it is applied.
/// Nothing while a jump of the clock is being slept on.
pub fn plan(state: &State, now: LogTime) -> Option<Planned> {
    if now < state.region.hold_until {
        return None;
    }
    let sandboxes: Vec<_> = state
        .indexes
        .ended
        .iter()
        .take(MAX_COMMANDS)
        .take_while(|(at, _)| at.plus_ms(ENDED_RETENTION_MS) <= now)
        .map(|(_, name)| name.clone())
        .collect();
    (!sandboxes.is_empty()).then_some(Body::ForgetEnded { sandboxes })
}
