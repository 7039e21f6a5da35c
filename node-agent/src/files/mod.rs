//! Files of a sandbox, reached from outside without trusting anything that is inside.
//!
//! ```text
//!  data plane ── Request, descriptors ──▶ helper process        one each call at a time; it has joined the sandbox's user
//!      │      ◀── Reply, descriptors ───  (`helper`, `resolve`,  namespace as its root user, and has no other right
//!      │                                   `make`, `remove`)
//!      └─ reads, writes and watches through the descriptors (`info`, `content`, `list`, `watch`)
//! ```
//!
//! Whatever needs a decision about rights or a path is done by the helper, so the kernel decides as it would for the sandbox's
//! own root: a helper that was talked into something could do no more than a process inside. Paths are resolved by
//! `openat2` below the sandbox's root. A descriptor that comes out of a helper names a regular file, a directory or a link
//! on a file system for files; from then on no path is looked at again.

mod client;
pub mod content;
mod error;
pub mod helper;
pub mod info;
pub mod list;
mod make;
mod message;
mod remove;
mod resolve;
pub mod watch;

pub use client::{Helper, HelperError};
pub use error::{Fault, FileError};
pub use message::{How, Ownership, Request};
