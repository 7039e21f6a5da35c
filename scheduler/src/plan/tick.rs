//! Keeps log time moving when nothing else does: deadlines come due and request ids stay fresh in an idle region too.

use super::Planned;
use crate::state::State;
use crate::state::command::{Body, LogTime};

/// How far log time may fall behind: well below what a request id may lie ahead of it (`request::MAX_AHEAD_MS`).
pub const MAX_BEHIND_MS: u64 = 15 * 1000;

/// A tick, if log time lies too far behind `now`. One moves it by a bounded step; the next pass plans another.
pub fn plan(state: &State, now: LogTime) -> Option<Planned> {
    let due = state.log_time.plus_ms(MAX_BEHIND_MS) <= now;
    due.then(|| Body::AdvanceTime { samples: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MAX_TIME_STEP_MS;
    use crate::state::command::{Caller, Command};

    #[test]
    fn ticks_catch_up_with_a_clock_far_ahead_and_then_stop() {
        let now = LogTime(10 * MAX_TIME_STEP_MS);
        let mut state = State::default();
        let mut ticks = 0;
        while let Some(body) = plan(&state, now) {
            let command = Command { caller: Caller::system("test"), time: now, body };
            let index = state.revision + 1;
            state.apply(index, &command).unwrap();
            ticks += 1;
            assert!(ticks <= 10, "each tick is a whole step");
        }
        assert_eq!(state.log_time, now);
    }
}
