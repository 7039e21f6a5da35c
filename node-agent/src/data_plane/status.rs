//! From what went wrong to what a client is told: the only place of the agent that makes a status.

use std::time::Duration;

use tonic::{Code, Status};
use warren_proto::error::ErrorBuilder;
use warren_proto::token::TokenError;
use warren_proto::v1::ErrorReason;

use super::auth::AuthError;
use crate::driver::{DriverError, InstanceKey};
use crate::files::{Fault, FileError};
use crate::templates::TemplateError;
use crate::templates::image::ImageError;

/// When a full node is worth another try.
const RETRY_WHEN_FULL: Duration = Duration::from_secs(1);

/// When a new leader's key is likely to have come: sessions follow a leader within a few seconds.
const RETRY_FOR_KEY: Duration = Duration::from_millis(500);

/// Everything that the data plane refuses.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("this node does not hold {} at epoch {}", .0.sandbox, .0.epoch)]
    Moved(InstanceKey),
    #[error("{what}")]
    Field { field: &'static str, what: String },
    #[error("{0} are under way on this node")]
    Overloaded(&'static str),
    #[error("the node agent is stopping")]
    Stopping,
    /// The client's stream itself is broken.
    #[error("{0}")]
    Stream(Box<Status>),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let status = |code, reason| ErrorBuilder::new(code, reason, message.clone());
        match refusal {
            Refusal::Auth(error) => of_auth(&error).build(),
            Refusal::Driver(error) => of_driver(&error).build(),
            Refusal::Template(error) => of_template(&error).build(),
            Refusal::File(error) => of_file(&error).build(),
            Refusal::Moved(key) => {
                let moved = status(Code::FailedPrecondition, ErrorReason::SandboxMoved);
                moved.with("sandbox", &key.sandbox).with("epoch", key.epoch).build()
            }
            Refusal::Field { field, what } => ErrorBuilder::invalid_field(field, what).build(),
            Refusal::Overloaded(what) => status(Code::ResourceExhausted, ErrorReason::Overloaded)
                .with("queue", what)
                .retry_after(RETRY_WHEN_FULL)
                .build(),
            Refusal::Stopping => status(Code::Unavailable, ErrorReason::NodeUnreachable).build(),
            Refusal::Stream(status) => *status,
        }
    }
}

fn of_auth(error: &AuthError) -> ErrorBuilder {
    let (code, reason) = match error {
        // The agent may only not have heard of a new leader's key yet.
        AuthError::Token(TokenError::UnknownKey(key)) => {
            let unknown = ErrorBuilder::new(Code::Unavailable, ErrorReason::TokenKeyUnknown, error.to_string());
            return unknown.with("key_id", key).retry_after(RETRY_FOR_KEY);
        }
        AuthError::Missing | AuthError::Token(_) | AuthError::Claims(_) => {
            (Code::Unauthenticated, ErrorReason::TokenInvalid)
        }
        AuthError::OtherPlace { .. } | AuthError::OtherScope | AuthError::OtherTemplate { .. } => {
            (Code::PermissionDenied, ErrorReason::PermissionDenied)
        }
    };
    ErrorBuilder::new(code, reason, error.to_string())
}

fn of_driver(error: &DriverError) -> ErrorBuilder {
    let (code, reason) = match error {
        DriverError::NotFound(_) => (Code::FailedPrecondition, ErrorReason::SandboxMoved),
        DriverError::NotRunning { .. } | DriverError::MemoryInUse { .. } => {
            (Code::FailedPrecondition, ErrorReason::SandboxState)
        }
        DriverError::UserNotFound { .. } => return ErrorBuilder::invalid_field("start.user", error.to_string()),
        DriverError::ProcessNotFound { .. } => (Code::NotFound, ErrorReason::ProcessNotFound),
        DriverError::ProcessExists { .. } => (Code::AlreadyExists, ErrorReason::ProcessAlreadyExists),
        DriverError::TooManyProcesses { .. } => {
            let full = ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, error.to_string());
            return full.with("queue", "processes of the sandbox").retry_after(RETRY_WHEN_FULL);
        }
        DriverError::CommandNotFound { .. } => (Code::InvalidArgument, ErrorReason::CommandNotFound),
        DriverError::PortClosed(port) => {
            let closed = ErrorBuilder::new(Code::Unavailable, ErrorReason::PortClosed, error.to_string());
            return closed.with("port", port);
        }
        DriverError::Unsupported { .. } => (Code::Unimplemented, ErrorReason::DriverUnsupported),
        DriverError::Runtime { .. }
        | DriverError::Io { .. }
        | DriverError::Gpu(_)
        | DriverError::HostDiskFull { .. } => (Code::Internal, ErrorReason::DriverFailed),
    };
    ErrorBuilder::new(code, reason, error.to_string())
}

fn of_file(error: &FileError) -> ErrorBuilder {
    let (code, reason) = match error.fault {
        Fault::Missing => (Code::NotFound, ErrorReason::FileNotFound),
        Fault::Exists => (Code::AlreadyExists, ErrorReason::FileAlreadyExists),
        Fault::Denied | Fault::ReadOnly | Fault::Kernel => (Code::PermissionDenied, ErrorReason::FileDenied),
        Fault::Full => (Code::ResourceExhausted, ErrorReason::SandboxDiskFull),
        Fault::Name => return ErrorBuilder::invalid_field("path", error.to_string()),
        Fault::Os(_) => (Code::Internal, ErrorReason::DriverFailed),
        Fault::Directory
        | Fault::NotDirectory
        | Fault::NotEmpty
        | Fault::Link
        | Fault::Special
        | Fault::OtherMount
        | Fault::Busy
        | Fault::TooDeep
        | Fault::Inside
        | Fault::Unstable
        | Fault::Unsupported => (Code::FailedPrecondition, ErrorReason::FileKind),
    };
    let told = ErrorBuilder::new(code, reason, error.to_string()).with("path", &error.path);
    match error.fault {
        Fault::Unstable => told.retry_after(RETRY_WHEN_FULL),
        _ => told,
    }
}

fn of_template(error: &TemplateError) -> ErrorBuilder {
    let message = error.to_string();
    match error {
        TemplateError::NotHeld(_) => ErrorBuilder::new(Code::NotFound, ErrorReason::TemplateNotFound, message),
        TemplateError::Size { .. } | TemplateError::ArchiveSize { .. } | TemplateError::Digest { .. } => {
            ErrorBuilder::new(Code::DataLoss, ErrorReason::DigestMismatch, message)
        }
        TemplateError::Unpack { .. } => ErrorBuilder::invalid_field("chunk", message),
        TemplateError::NoSpace { .. } => {
            ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, message).with("queue", "disk")
        }
        TemplateError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, message).with("queue", "disk")
        }
        TemplateError::Image(error) => of_image(error),
        TemplateError::Silent(_) | TemplateError::Slow => ErrorBuilder::invalid_field("chunk", message),
        TemplateError::Io { .. }
        | TemplateError::Unavailable { .. }
        | TemplateError::Channel(_)
        | TemplateError::Peer(_) => ErrorBuilder::new(Code::Internal, ErrorReason::Internal, message),
    }
}

fn of_image(error: &ImageError) -> ErrorBuilder {
    let message = error.to_string();
    match error {
        ImageError::Invalid(_) | ImageError::TooLarge { .. } => {
            ErrorBuilder::new(Code::InvalidArgument, ErrorReason::ImageInvalid, message)
        }
        ImageError::NotFound { registry, .. } => {
            ErrorBuilder::new(Code::NotFound, ErrorReason::ImageNotFound, message).with("registry", registry)
        }
        ImageError::Registry { registry, .. } => {
            let unavailable = ErrorBuilder::new(Code::Unavailable, ErrorReason::RegistryUnavailable, message);
            unavailable.with("registry", registry).retry_after(RETRY_WHEN_FULL)
        }
        ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, message).with("queue", "disk")
        }
        ImageError::Io { .. } => ErrorBuilder::new(Code::Internal, ErrorReason::Internal, message),
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::error::reason_of;

    use super::*;

    #[test]
    fn what_a_driver_cannot_do_differs_from_what_it_failed_at() {
        let told = |error| {
            let status = Status::from(Refusal::Driver(error));
            (status.code(), reason_of(&status))
        };
        let unsupported = DriverError::Unsupported { driver: "sim", what: "execute processes" };
        assert_eq!(told(unsupported), (Code::Unimplemented, Some(ErrorReason::DriverUnsupported)));
        let failed = DriverError::Io { what: "write".into(), source: std::io::ErrorKind::StorageFull.into() };
        assert_eq!(told(failed), (Code::Internal, Some(ErrorReason::DriverFailed)));
    }
}
