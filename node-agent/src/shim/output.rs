//! A process's streams as its shim holds them: pipes, or a terminal.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::terminal;
use crate::driver::process::{Stream, TerminalSize};
use crate::sys;

/// One read: what a pipe holds.
pub const READ_SIZE: usize = 64 << 10;

/// Input that waits for a process which does not read; more is left where it comes from.
const MAX_WAITING: usize = 1 << 20;

/// What the shim reads from and writes to.
#[derive(Debug)]
pub struct Sources {
    terminal: Option<Arc<OwnedFd>>,
    stdin: Option<Arc<OwnedFd>>,
    waiting: VecDeque<u8>,
    /// Close it once nothing waits.
    closing: bool,
    outputs: Vec<(Stream, Arc<OwnedFd>)>,
    buffer: Vec<u8>,
}

impl Sources {
    pub fn pipes(stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd) -> io::Result<Self> {
        let outputs = vec![(Stream::Stdout, Arc::new(stdout)), (Stream::Stderr, Arc::new(stderr))];
        Self::new(None, stdin.map(Arc::new), outputs)
    }

    pub fn terminal(end: OwnedFd) -> io::Result<Self> {
        let end = Arc::new(end);
        Self::new(Some(Arc::clone(&end)), Some(Arc::clone(&end)), vec![(Stream::Stdout, end)])
    }

    fn new(
        terminal: Option<Arc<OwnedFd>>,
        stdin: Option<Arc<OwnedFd>>,
        outputs: Vec<(Stream, Arc<OwnedFd>)>,
    ) -> io::Result<Self> {
        for fd in stdin.iter().chain(outputs.iter().map(|(_, fd)| fd)) {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        let buffer = vec![0; READ_SIZE];
        Ok(Self { terminal, stdin, waiting: VecDeque::new(), closing: false, outputs, buffer })
    }

    /// The outputs that are still open.
    pub fn outputs(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.outputs.iter().map(|(_, fd)| fd.as_fd())
    }

    pub fn outputs_open(&self) -> usize {
        self.outputs.len()
    }

    /// Where input waits to be written to.
    pub fn thirsty(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().filter(|_| !self.waiting.is_empty()).map(|fd| fd.as_fd())
    }

    /// Whether more input may come.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
    }

    /// Reads at most `most` bytes of output `index`; `None`: it is at its end, and closed.
    pub fn read(&mut self, index: usize, most: usize) -> Option<(Stream, &[u8])> {
        let (stream, fd) = &self.outputs[index];
        let stream = *stream;
        let most = most.min(READ_SIZE);
        match rustix::io::read(&**fd, &mut self.buffer[..most]) {
            Ok(count @ 1..) => Some((stream, &self.buffer[..count])),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Some((stream, &[])),
            // A terminal answers EIO where a pipe answers its end.
            Ok(_) | Err(_) => {
                self.outputs.remove(index);
                None
            }
        }
    }

    pub fn close_outputs(&mut self) {
        self.outputs.clear();
    }

    /// Input for the process; dropped where it takes none any more.
    pub fn give(&mut self, bytes: &[u8]) {
        if self.stdin.is_some() && !self.closing {
            self.waiting.extend(bytes);
            self.write();
        }
    }

    /// End of input, after what waits. A terminal has none: it is typed.
    pub fn close_input(&mut self) {
        if self.terminal.is_none() {
            self.closing = true;
            self.write();
        }
    }

    /// Writes what the process takes now.
    pub fn write(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        while !self.waiting.is_empty() {
            match rustix::io::write(&**stdin, self.waiting.as_slices().0) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                // It reads no more.
                Err(_) => {
                    self.waiting.clear();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.closing {
            self.stdin = None;
        }
    }

    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        self.terminal.as_ref().map_or(Ok(()), |terminal| terminal::resize(terminal, size))
    }

    /// Sends what a key would send to the terminal's foreground processes; `false`: there is no terminal, or no such key.
    pub fn signal_foreground(&self, signal: i32) -> bool {
        let keyed = matches!(signal, libc::SIGINT | libc::SIGQUIT | libc::SIGTSTP);
        let Some(terminal) = self.terminal.as_ref().filter(|_| keyed) else { return false };
        sys::signal_foreground(terminal.as_fd(), signal).is_ok()
    }
}
