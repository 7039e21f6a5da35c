//! The agent's end of a helper process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::process::{Child, Command};

use super::Fault;
use super::message::{Reply, Request, receive, send};
use crate::driver::InsideRoot;
use crate::sys;

/// Why a helper gave no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("the helper process for the sandbox's files: {0}")]
    Io(#[from] io::Error),
}

/// A helper that answers one request at a time. Dropping it ends the process.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    /// Reaped by the runtime once it is dropped and the process has ended.
    _child: Child,
}

impl Helper {
    /// Starts one for the sandbox whose root it is.
    pub fn start(root: InsideRoot) -> io::Result<Self> {
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let InsideRoot { directory, users, program, .. } = root;
        let mut line = std::process::Command::new(program);
        let numbers = [theirs, directory, users].map(|fd| sys::inherit(&mut line, fd).to_string());
        line.arg("files").args(numbers).env_clear().current_dir("/");
        line.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Dropping the command closes our copies.
        let child = Command::from(line).spawn()?;
        Ok(Self { socket, _child: child })
    }

    /// Asks, and waits for the answer; blocks. After an error of IO the helper is of no more use.
    pub fn call(&self, request: &Request, fds: &[OwnedFd]) -> Result<Vec<OwnedFd>, HelperError> {
        send(self.socket.as_fd(), request, fds)?;
        let (reply, fds): (Reply, _) =
            receive(self.socket.as_fd())?.ok_or_else(|| io::Error::other("it ended without an answer"))?;
        reply?;
        Ok(fds)
    }
}
