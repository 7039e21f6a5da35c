//! What a client may try again, how often and how fast.

use std::time::Duration;

use tonic::{Code, Status};
use warren_proto::error::{reason_of, retry_after_of};
use warren_proto::v1::ErrorReason;

/// Longest that one attempt may take: a stopped process answers nothing, and another replica may.
pub(super) const ATTEMPT_PATIENCE: Duration = Duration::from_secs(5);
/// Attempts before giving up: at least 20 s, many elections long.
const MAX_ATTEMPTS: u32 = 200;
/// Pause where the server names none.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest pause that a server is believed.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Whether the same call, with the same `request_id`, may succeed later or elsewhere.
pub fn may_retry(status: &Status) -> bool {
    match (status.code(), reason_of(status)) {
        (Code::Unimplemented, _) => false,
        // Warren gives every error a reason, so this one is the connection's.
        (_, None) => true,
        (Code::Unavailable | Code::Aborted | Code::Unknown, Some(_)) => true,
        (_, Some(reason)) => {
            matches!(reason, ErrorReason::Overloaded | ErrorReason::RequestTableFull | ErrorReason::SandboxMoved)
        }
    }
}

/// Counts the attempts of one call.
#[derive(Debug, Default)]
pub struct Attempts {
    made: u32,
}

impl Attempts {
    /// Waits until the next attempt is due, or gives the status back as final.
    pub async fn after(&mut self, status: Status) -> Result<(), Status> {
        self.made += 1;
        if self.made >= MAX_ATTEMPTS || !may_retry(&status) {
            return Err(status);
        }
        tokio::time::sleep(retry_after_of(&status).unwrap_or(PAUSE).min(MAX_PAUSE)).await;
        Ok(())
    }
}

/// The outcome of one attempt, or DEADLINE_EXCEEDED.
pub(super) async fn in_time<T>(attempt: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    within(ATTEMPT_PATIENCE, attempt).await
}

/// As [`in_time`], for what may take longer.
pub(super) async fn within<T>(
    patience: Duration,
    attempt: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(patience, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {patience:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_proto::error::ErrorBuilder;

    #[test]
    fn a_break_is_retried_and_a_refusal_is_not() {
        let of = |code, reason| ErrorBuilder::new(code, reason, "").build();
        assert!(may_retry(&Status::unknown("h2 protocol error")));
        assert!(may_retry(&of(Code::Unavailable, ErrorReason::NoLeader)));
        assert!(may_retry(&of(Code::Unknown, ErrorReason::OutcomeUnknown)));
        assert!(!may_retry(&of(Code::InvalidArgument, ErrorReason::RequestIdReused)));
        assert!(!may_retry(&of(Code::NotFound, ErrorReason::SandboxNotFound)));
        assert!(!may_retry(&Status::unimplemented("old server")));
    }
}
