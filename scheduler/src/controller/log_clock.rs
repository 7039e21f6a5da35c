//! The leader's log time within its term: it follows the machine's monotonic clock, so nothing that is done to the wall clock
//! moves it (rule 14 of the design).

use std::time::Instant;

use crate::state::command::LogTime;

/// Log time as it was at one moment of the term.
#[derive(Debug, Clone, Copy)]
pub struct LogClock {
    at: LogTime,
    since: Instant,
}

impl LogClock {
    /// Log time is `at` now.
    pub fn starting(at: LogTime, now: Instant) -> Self {
        Self { at, since: now }
    }

    pub fn read(&self, now: Instant) -> LogTime {
        let passed = now.saturating_duration_since(self.since).as_millis();
        self.at.plus_ms(u64::try_from(passed).unwrap_or(u64::MAX))
    }
}
