//! Virtual time: one true time that nobody in the simulated world can read, and a pair of clocks for each machine.
//!
//! A monotonic clock runs a little too fast or too slow and never jumps. A wall clock is kept right by a time service, but
//! for an offset that faults change. True time counts microseconds from the beginning of the world.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use warren_scheduler::state::command::LogTime;

/// True time in µs.
pub type At = u64;

pub const MS: u64 = 1_000;
pub const SECOND: u64 = 1_000 * MS;

/// Furthest that a clock's rate is off, in millionths. Two clocks differ by less than the 1 % that leases allow for
/// (section 6 of the design).
pub const MAX_DRIFT_PPM: u64 = 4_900;

/// When the world begins, in ms since the Unix epoch: 2026-01-01.
const BEGINNING_MS: u64 = 1_767_225_600_000;

/// The clocks of one machine.
#[derive(Debug, Clone)]
pub struct Clock {
    /// What the monotonic clock shows at true time 0, in µs: the machine has been up for a while.
    origin: u64,
    drift_ppm: i64,
    wall_offset_ms: i64,
}

impl Clock {
    pub fn new(origin: u64, drift_ppm: i64, wall_offset_ms: i64) -> Self {
        Self { origin, drift_ppm, wall_offset_ms }
    }

    fn local(&self, now: At) -> u64 {
        let off = i128::from(now) * i128::from(self.drift_ppm) / 1_000_000;
        u64::try_from(i128::from(now) + off).unwrap_or(0)
    }

    /// The monotonic clock.
    pub fn monotonic(&self, now: At) -> Duration {
        Duration::from_micros(self.origin + self.local(now))
    }

    /// The wall clock, as log time has it.
    pub fn wall(&self, now: At) -> LogTime {
        let ms = i128::from(BEGINNING_MS) + i128::from(now / MS) + i128::from(self.wall_offset_ms);
        LogTime(u64::try_from(ms).unwrap_or(0))
    }

    pub fn jump(&mut self, by_ms: i64) {
        self.wall_offset_ms = self.wall_offset_ms.saturating_add(by_ms);
    }

    /// Back to about right, as a time service brings it.
    pub fn settle(&mut self, offset_ms: i64) {
        self.wall_offset_ms = offset_ms;
    }

    /// True time at which the monotonic clock will show `reading`, rounded up: never early.
    pub fn when(&self, reading: Duration) -> At {
        let local = reading.as_micros().saturating_sub(u128::from(self.origin));
        let rate = u128::try_from(1_000_000 + self.drift_ppm).unwrap_or(1_000_000);
        u64::try_from(local * 1_000_000 / rate + 2).unwrap_or(u64::MAX)
    }

    /// True time after which `span` of this machine's time has gone by.
    pub fn after(&self, now: At, span: Duration) -> At {
        self.when(self.monotonic(now) + span).max(now)
    }
}

/// A span in the units of [`At`].
pub fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

/// Right wall time.
pub fn true_wall(now: At) -> LogTime {
    LogTime(BEGINNING_MS + now / MS)
}

/// A reading of a monotonic clock in the form that the scheduler's modules take. An `Instant` cannot be made from nothing,
/// so one is taken once; only differences from it are ever used, and no result depends on it.
pub fn instant(reading: Duration) -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(warren_scheduler::clock::monotonic) + reading
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_never_early_and_hardly_late() {
        for drift in [-4_900, 0, 4_900] {
            let clock = Clock::new(123_456_789, drift, 0);
            for now in [0, 1, 999_999, 3_600 * SECOND] {
                let span = Duration::from_secs(10);
                let due = clock.after(now, span);
                assert!(clock.monotonic(due) >= clock.monotonic(now) + span);
                assert!(clock.monotonic(due - 10) < clock.monotonic(now) + span);
            }
        }
    }
}
