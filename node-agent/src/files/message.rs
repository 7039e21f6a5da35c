//! What is asked of a helper, and how it travels: one message a packet, JSON, with descriptors beside it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Fault;
use crate::sys;

/// Longest path, as everywhere in Linux, with its final zero byte.
pub const MAX_PATH: usize = 4096;

/// Two paths as lists of numbers, with room for the rest.
const MAX_MESSAGE: usize = 2 * 4 * MAX_PATH + 1024;

/// What to open a path for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// Only to look at it; a symbolic link itself unless `follow`.
    Look { follow: bool },
    /// A regular file, for reading.
    Read,
    /// A regular file that is there, for writing.
    Write { append: bool },
    /// To list it.
    Directory,
}

/// Permission bits and owner of what is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// `None`: those of what is replaced, or the usual.
    pub mode: Option<u32>,
    /// User and group inside; `None`: that of what is replaced, or root.
    pub owner: Option<(u32, u32)>,
}

/// Paths are bytes, absolute inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answers the descriptor.
    Open {
        path: Vec<u8>,
        how: How,
    },
    /// Begins a file that nobody sees: answers the directory that it is for and the file, open for writing.
    Begin {
        path: Vec<u8>,
        make_parents: bool,
        exclusive: bool,
        ownership: Ownership,
    },
    /// Puts a begun file in its place; comes with the two descriptors.
    Commit {
        path: Vec<u8>,
        exclusive: bool,
    },
    MakeDirectory {
        path: Vec<u8>,
        make_parents: bool,
        ownership: Ownership,
    },
    MakeSymlink {
        path: Vec<u8>,
        target: Vec<u8>,
    },
    Move {
        from: Vec<u8>,
        to: Vec<u8>,
        replace: bool,
    },
    Remove {
        path: Vec<u8>,
        recursive: bool,
        allow_missing: bool,
    },
}

/// What came of it.
pub type Reply = Result<(), Fault>;

/// Sends one message; blocks.
pub fn send(socket: BorrowedFd<'_>, message: &impl Serialize, fds: &[OwnedFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control: &[ControlMessage<'_>] = if numbers.is_empty() { &[] } else { &rights };
    let parts = [io::IoSlice::new(&bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message, `None` at the end; blocks.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let (count, fds) = sys::receive_message(socket, &mut bytes)?;
    if count == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..count])?, fds)))
}
