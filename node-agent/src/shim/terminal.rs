//! A process's terminal: the runtime opens it inside the instance and sends the controlling end over a Unix socket.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::driver::process::TerminalSize;
use crate::sys;

/// The terminal is on its way before the runtime ends, so this passes only if a runtime never sends one.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Where the runtime delivers the terminal. Its path goes when this goes.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    pub fn listen(path: PathBuf) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(&path)?, path })
    }

    /// Receives the terminal.
    pub fn receive(&self) -> io::Result<OwnedFd> {
        let arrived = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&PATIENCE))?;
        if arrived == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (stream, _) = self.listener.accept()?;
        sys::receive_descriptor(stream.as_fd())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // What is left goes with the instance.
        let _ = fs::remove_file(&self.path);
    }
}

/// Changes the size; the kernel tells the foreground processes with SIGWINCH.
pub fn resize(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let TerminalSize { columns, rows } = size;
    Ok(tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}
