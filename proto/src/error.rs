//! Errors on the wire: a gRPC code, a message for people, and a reason for programs (google.aip.dev/193).

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::v1::ErrorReason;

/// Domain of every `ErrorInfo` of Warren.
pub const ERROR_DOMAIN: &str = "warren.dev";

const PREFIX: &str = "ERROR_REASON_";

/// A status under construction: what every Warren error carries.
#[derive(Debug, Clone)]
pub struct ErrorBuilder {
    code: Code,
    reason: ErrorReason,
    message: String,
    metadata: HashMap<String, String>,
    retry_after: Option<Duration>,
    violations: Vec<FieldViolation>,
}

impl ErrorBuilder {
    pub fn new(code: Code, reason: ErrorReason, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            metadata: HashMap::new(),
            retry_after: None,
            violations: Vec::new(),
        }
    }

    /// `INVALID_ARGUMENT` about one field: `field` is its path in the request, `message` says what would be right.
    pub fn invalid_field(field: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        let mut error = Self::new(Code::InvalidArgument, ErrorReason::InvalidField, format!("{field}: {message}"));
        error.violations.push(FieldViolation::new(field, message));
        error
    }

    /// Adds a key and value that a program may need, such as `sandbox`.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// Says when a retry is worth it (`RetryInfo`).
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    pub fn build(self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(reason_text(self.reason), ERROR_DOMAIN, self.metadata);
        if let Some(delay) = self.retry_after {
            details.set_retry_info(Some(delay));
        }
        if !self.violations.is_empty() {
            details.set_bad_request(self.violations);
        }
        Status::with_error_details(self.code, self.message, details)
    }
}

impl From<ErrorBuilder> for Status {
    fn from(error: ErrorBuilder) -> Status {
        error.build()
    }
}

/// The reason as it stands in `ErrorInfo`: without the enum's prefix.
pub fn reason_text(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix(PREFIX).unwrap_or(name)
}

/// The reason that a status carries, if it is one of Warren's.
pub fn reason_of(status: &Status) -> Option<ErrorReason> {
    let details = status.get_error_details();
    let info = details.error_info()?;
    (info.domain == ERROR_DOMAIN).then(|| ErrorReason::from_str_name(&format!("{PREFIX}{}", info.reason)))?
}

/// A value of the status's `ErrorInfo` metadata.
pub fn metadata_of(status: &Status, key: &str) -> Option<String> {
    status.get_error_details().error_info()?.metadata.get(key).cloned()
}

/// How long the status asks to wait before a retry.
pub fn retry_after_of(status: &Status) -> Option<Duration> {
    status.get_error_details().retry_info()?.retry_delay
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_survives_the_wire() {
        let status = ErrorBuilder::new(Code::Unavailable, ErrorReason::NotLeader, "replica 2 leads")
            .with("leader", "127.0.0.1:7001")
            .retry_after(Duration::from_millis(50))
            .build();
        assert_eq!(reason_of(&status), Some(ErrorReason::NotLeader));
        assert_eq!(metadata_of(&status, "leader").as_deref(), Some("127.0.0.1:7001"));
        assert_eq!(retry_after_of(&status), Some(Duration::from_millis(50)));
        assert_eq!(reason_of(&Status::unknown("foreign")), None);
    }

    #[test]
    fn an_invalid_field_names_the_field_and_what_is_right() {
        let status = ErrorBuilder::invalid_field("sandbox.template", "must be `templates/{template}`").build();
        let details = status.get_error_details();
        let violation = &details.bad_request().expect("bad request").field_violations[0];
        assert_eq!(violation.field, "sandbox.template");
        assert_eq!(status.code(), Code::InvalidArgument);
    }
}
