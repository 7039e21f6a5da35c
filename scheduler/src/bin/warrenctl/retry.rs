//! Which failures are worth another try, and when.

use std::time::{Duration, Instant};

use rand::Rng;
use tonic::{Code, Status};
use warren_proto::error::{reason_of, retry_after_of};
use warren_proto::v1::ErrorReason;

/// Pause once every endpoint has failed; doubles up to the last. An election takes about half a second.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LAST_PAUSE: Duration = Duration::from_millis(1000);

/// Nothing was done, or it is safe to do again with the same request id, or the server says itself that a retry is worth it.
pub fn is_transient(status: &Status) -> bool {
    if reason_of(status).is_some_and(is_decided) {
        return false;
    }
    let code = matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Aborted | Code::Cancelled | Code::DeadlineExceeded
    );
    code || retry_after_of(status).is_some() || is_broken_connection(status)
}

/// The same again would be answered the same until a person does something, whatever the code says of other requests.
fn is_decided(reason: ErrorReason) -> bool {
    matches!(reason, ErrorReason::EtagMismatch | ErrorReason::BatchRejected | ErrorReason::Paused)
}

/// The transport failed in mid-call: the status was made here, not there.
pub fn is_broken_connection(status: &Status) -> bool {
    status.code() == Code::Internal && std::error::Error::source(status).is_some()
}

/// Pauses between tries, until a deadline.
#[derive(Debug)]
pub struct Backoff {
    endpoints: usize,
    failures: usize,
    pause: Duration,
    deadline: Instant,
}

impl Backoff {
    pub fn new(endpoints: usize, deadline: Instant) -> Self {
        Self { endpoints: endpoints.max(1), failures: 0, pause: FIRST_PAUSE, deadline }
    }

    /// How long to wait after this failure; `None` when time is up before that.
    pub fn pause(&mut self, status: &Status) -> Option<Duration> {
        self.failures += 1;
        let pause = match retry_after_of(status) {
            // Many clients are told the same: they must not come back as one.
            Some(asked) => asked.mul_f64(rand::rng().random_range(1.0..1.25)),
            // Another endpoint may know better at once.
            None if !self.failures.is_multiple_of(self.endpoints) => Duration::ZERO,
            None => self.own(),
        };
        (Instant::now() + pause < self.deadline).then_some(pause)
    }

    fn own(&mut self) -> Duration {
        let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.0));
        self.pause = LAST_PAUSE.min(self.pause * 2);
        pause
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::error::ErrorBuilder;

    use super::*;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(3600)
    }

    #[test]
    fn the_next_endpoint_is_tried_at_once_and_then_ever_more_slowly() {
        let mut backoff = Backoff::new(3, far());
        let broken = Status::unavailable("gone");
        let pauses: Vec<_> = (0..60).filter_map(|_| backoff.pause(&broken)).collect();
        assert_eq!(pauses.len(), 60);
        assert_eq!(pauses[..2], [Duration::ZERO, Duration::ZERO]);
        assert!(pauses[2] >= FIRST_PAUSE / 2 && pauses[2] <= FIRST_PAUSE);
        assert!(pauses[59] >= LAST_PAUSE / 2 && pauses[59] <= LAST_PAUSE);
    }

    #[test]
    fn what_the_server_asks_for_is_honoured() {
        let asked = Duration::from_secs(2);
        let busy = ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, "").retry_after(asked).build();
        assert!(is_transient(&busy));
        assert!(Backoff::new(3, far()).pause(&busy).is_some_and(|pause| pause >= asked));
        assert_eq!(Backoff::new(3, Instant::now() + asked / 2).pause(&busy), None);
    }

    #[test]
    fn a_refusal_is_not_tried_again() {
        for code in [Code::InvalidArgument, Code::NotFound, Code::AlreadyExists, Code::FailedPrecondition] {
            assert!(!is_transient(&Status::new(code, "no")), "{code:?}");
        }
        for code in [Code::Unavailable, Code::Unknown, Code::Aborted] {
            assert!(is_transient(&Status::new(code, "later")), "{code:?}");
        }
    }

    #[test]
    fn what_only_a_person_can_change_is_not_tried_again() {
        let aborted = |reason| ErrorBuilder::new(Code::Aborted, reason, "").build();
        assert!(is_transient(&aborted(ErrorReason::Conflict)));
        assert!(!is_transient(&aborted(ErrorReason::EtagMismatch)));
        assert!(!is_transient(&aborted(ErrorReason::BatchRejected)));
        let paused = ErrorBuilder::new(Code::Unavailable, ErrorReason::Paused, "").retry_after(Duration::from_secs(5));
        assert!(!is_transient(&paused.build()));
    }
}
