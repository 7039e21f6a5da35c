//! Persisted bytes: Warren's own versioned protobuf, never a library's layout (rule 13 of the design).
//!
//! children: `log` (votes, entries, membership), `command`, `entity` and `region` (what checkpoints hold), `part` and `settings`
//! (what they share).
//! Decoding never panics: what a disk or a peer sent is checked once, here.

pub mod command;
pub mod entity;
pub mod log;
mod part;
pub mod region;
#[cfg(test)]
pub(crate) mod samples;
mod settings;
#[cfg(test)]
pub(crate) mod tests;

use crate::state::level::Level;

/// Version of every message on disk. Raised when an older build could misread a newer one's bytes.
pub const VERSION: u32 = 1;

/// What helps where bytes are of a build that knows more.
pub const RUN_NEWER: &str = "run a newer build of the scheduler on this replica";

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("`{field}` is missing: written by a newer build, or damaged")]
    Missing { field: &'static str },
    #[error("`{field}` is malformed")]
    Malformed { field: &'static str },
    #[error("`{field}` has version {got}; this build reads {VERSION}")]
    Version { field: &'static str, got: u32 },
    #[error("the ledger follows level {got} of its rules, this build knows up to {known}", known = Level::MAX)]
    Level { got: Level },
    #[error("not protobuf: {0}")]
    Wire(#[from] prost::DecodeError),
}

impl From<CodecError> for std::io::Error {
    fn from(error: CodecError) -> Self {
        let kind = match error {
            CodecError::Version { .. } | CodecError::Level { .. } => std::io::ErrorKind::Unsupported,
            CodecError::Missing { .. } | CodecError::Malformed { .. } | CodecError::Wire(_) => {
                std::io::ErrorKind::InvalidData
            }
        };
        Self::new(kind, error)
    }
}

fn require<T>(value: Option<T>, field: &'static str) -> Result<T, CodecError> {
    value.ok_or(CodecError::Missing { field })
}

pub(super) fn check_version(got: u32, field: &'static str) -> Result<(), CodecError> {
    if got == VERSION { Ok(()) } else { Err(CodecError::Version { field, got }) }
}
