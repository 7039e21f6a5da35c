//! Keeps log time moving when nothing else does: deadlines come due and request ids stay fresh in an idle region too.

use super::Planned;
use crate::state::command::{Body, LogTime};
use crate::state::{MAX_TIME_STEP_MS, State};

/// How far log time may fall behind: well below what a request id may lie ahead of it (`request::MAX_AHEAD_MS`).
pub const MAX_BEHIND_MS: u64 = 15 * 1000;

/// A tick, if log time lies behind `now`. Further behind than a step, only the clocks of a quorum move it.
pub fn plan(state: &State, now: LogTime) -> Option<Planned> {
    let behind = now.0.saturating_sub(state.log_time.0);
    (MAX_BEHIND_MS..=MAX_TIME_STEP_MS).contains(&behind).then(|| Body::AdvanceTime { samples: Vec::new() })
}

/// Whether log time lies so far behind that only the clocks of a quorum may move it.
pub fn needs_quorum(state: &State, now: LogTime) -> bool {
    now.0.saturating_sub(state.log_time.0) > MAX_TIME_STEP_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_ledger_is_ticked_and_a_jump_is_left_to_a_quorum() {
        let state = State { log_time: LogTime(1000), ..State::default() };
        let at = |ms: u64| plan(&state, LogTime(1000 + ms)).is_some();
        assert!(!at(MAX_BEHIND_MS - 1) && at(MAX_BEHIND_MS) && at(MAX_TIME_STEP_MS) && !at(MAX_TIME_STEP_MS + 1));
        assert!(needs_quorum(&state, LogTime(1001 + MAX_TIME_STEP_MS)) && !needs_quorum(&state, LogTime(0)));
    }
}
