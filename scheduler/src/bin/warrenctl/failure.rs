//! What went wrong, for a person on stderr and for a script in the exit code.

use std::process::ExitCode;

use tonic::{Code, Status};
use warren_proto::error::{reason_of, reason_text};
use warren_proto::v1::ErrorReason;

/// Exit code of `sandbox exec` when Warren itself failed: as docker's.
pub const EXEC_FAILED: u8 = 125;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A scheduler or an agent said no.
    #[error("{}", .0.message())]
    Status(Box<Status>),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("{0}")]
    TimedOut(String),
    /// Done, and it did not end well.
    #[error("{0}")]
    Failed(String),
    /// As another failure, but of `sandbox exec`.
    #[error("{0}")]
    Exec(Box<Failure>),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Failure {
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// 1 failed, 2 usage, 3 not found, 4 conflict or precondition, 5 unavailable or timed out, 6 permission,
    /// 7 resource exhausted, 125 `sandbox exec` failed before or beside the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exec(_) => EXEC_FAILED,
            Self::Usage(_) => 2,
            Self::TimedOut(_) => 5,
            Self::Io { .. } | Self::Failed(_) => 1,
            Self::Status(status) => match status.code() {
                Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => 2,
                Code::NotFound => 3,
                Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => 4,
                Code::Unavailable | Code::DeadlineExceeded | Code::Unknown => 5,
                Code::PermissionDenied | Code::Unauthenticated => 6,
                Code::ResourceExhausted => 7,
                _ => 1,
            },
        }
    }

    /// Tells the person, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        eprintln!("error: {self}");
        let status = match self {
            Self::Status(status) => Some(status),
            Self::Exec(inner) => match inner.as_ref() {
                Self::Status(status) => Some(status),
                _ => None,
            },
            _ => None,
        };
        if let Some(reason) = status.and_then(|status| reason_of(status)) {
            eprintln!("reason: {}", reason_text(reason));
            if let Some(hint) = hint(reason) {
                eprintln!("hint: {hint}");
            }
        }
        ExitCode::from(self.exit_code())
    }
}

fn hint(reason: ErrorReason) -> Option<&'static str> {
    Some(match reason {
        ErrorReason::SandboxNotFound => "`warrenctl sandbox list` shows the sandboxes of a tenant",
        ErrorReason::TemplateNotFound => "`warrenctl template list` shows what there is, `template import` adds one",
        ErrorReason::NodeNotFound => "`warrenctl node list` shows the nodes",
        ErrorReason::SandboxState => "`warrenctl sandbox show` says what state it is in, and why",
        ErrorReason::NoLeader => "`warrenctl status` shows which replicas answer; a majority of them must",
        ErrorReason::NoNodeAvailable | ErrorReason::NodeUnreachable => "`warrenctl node list` shows which nodes answer",
        ErrorReason::SandboxAlreadyExists => "choose another id, or leave it out",
        _ => return None,
    })
}
