//! The only module that reads time. Everything else is told.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::state::command::LogTime;

/// This machine's wall clock, as a proposal for log time. A clock before 1970 counts as 1970.
#[allow(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn log_time() -> LogTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    LogTime(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// This machine's monotonic clock, for deadlines and latencies.
#[allow(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn monotonic() -> Instant {
    Instant::now()
}
