//! Whoever connected to a process's shim: what it asked for, and how far it got.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::ring::Ring;
use crate::driver::oci::process::wire::{self, Down, NotStarted, PIECE, Up};
use crate::driver::process::{AttachFrom, ProcessStatus};

/// What it is here for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It has not said yet.
    New,
    Attached {
        next: u64,
        lossless: bool,
    },
    Watching,
    /// It gets what is on its way to it, and no more.
    Leaving,
}

/// One connection.
#[derive(Debug)]
pub struct Attached {
    stream: UnixStream,
    role: Role,
    input: Vec<u8>,
    /// On its way out, and how much of it has gone.
    output: Vec<u8>,
    sent: usize,
}

impl Attached {
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, role: Role::New, input: Vec::new(), output: Vec::new(), sent: 0 })
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn is_attached(&self) -> bool {
        matches!(self.role, Role::Attached { .. })
    }

    /// From which offset on nothing may be dropped.
    pub fn needs(&self) -> Option<u64> {
        match self.role {
            Role::Attached { next, lossless: true } => Some(next),
            _ => None,
        }
    }

    /// What came in; `Err`: it is gone, or talks nonsense.
    pub fn receive(&mut self) -> Result<Vec<Up>, ()> {
        let mut buffer = [0; PIECE];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(()),
            Ok(count) => self.input.extend_from_slice(&buffer[..count]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Err(()),
        }
        let (mut frames, mut used) = (Vec::new(), 0);
        while let Some(up) = Up::decode(&self.input, &mut used).map_err(|_| ())? {
            frames.push(up);
        }
        self.input.drain(..used);
        Ok(frames)
    }

    pub fn attach(&mut self, from: AttachFrom, status: &ProcessStatus) {
        self.tell(&Down::Status(Box::new(status.clone())));
        self.role = Role::Attached { next: from.offset, lossless: from.lossless };
    }

    pub fn watch(&mut self, status: &ProcessStatus) {
        self.tell(&Down::Status(Box::new(status.clone())));
        self.role = Role::Watching;
    }

    /// Answers and wants nothing more of it.
    pub fn answer(&mut self, status: &ProcessStatus) {
        self.tell(&Down::Status(Box::new(status.clone())));
        self.role = Role::Leaving;
    }

    fn tell(&mut self, down: &Down) {
        down.encode(&mut self.output);
    }

    /// Whether something waits to be sent.
    pub fn is_behind(&self, ring: &Ring, end: Option<&ProcessStatus>) -> bool {
        let more = match self.role {
            Role::Attached { next, .. } => next < ring.end() || end.is_some(),
            Role::Watching => end.is_some(),
            Role::New | Role::Leaving => false,
        };
        more || self.sent < self.output.len()
    }

    /// Sends what it takes now. `end`: how the process ended, once all of its output is in `ring`. `Err`: it is gone, or has
    /// all that it came for.
    pub fn send(&mut self, ring: &Ring, end: Option<&ProcessStatus>) -> Result<(), ()> {
        loop {
            if self.sent == self.output.len() {
                self.output.clear();
                self.sent = 0;
                if self.role == Role::Leaving {
                    return Err(());
                }
                self.next_frame(ring, end);
                if self.output.is_empty() {
                    return Ok(());
                }
            }
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(()),
            }
        }
    }

    fn next_frame(&mut self, ring: &Ring, end: Option<&ProcessStatus>) {
        match &mut self.role {
            Role::Attached { next, .. } if *next < ring.start() => {
                Down::Dropped { from: *next, to: ring.start() }.encode(&mut self.output);
                *next = ring.start();
            }
            Role::Attached { next, .. } if *next < ring.end() => {
                if let Some((stream, parts)) = ring.read(*next, PIECE) {
                    wire::output(&mut self.output, *next, stream, parts);
                    *next += (parts.0.len() + parts.1.len()) as u64;
                }
            }
            Role::Attached { .. } | Role::Watching => {
                if let Some(status) = end {
                    Down::Exited(Box::new(status.clone())).encode(&mut self.output);
                    self.role = Role::Leaving;
                }
            }
            Role::New | Role::Leaving => {}
        }
    }
}

/// Tells everyone who waits for a process that it does not start.
pub fn refuse_all(listener: &UnixListener, why: &NotStarted) {
    let mut frame = Vec::new();
    Down::Failed(why.clone()).encode(&mut frame);
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    while let Ok((mut stream, _)) = listener.accept() {
        // It fits into the socket; who is gone is not interested.
        let _ = stream.write_all(&frame);
    }
}
