//! A connection to a process's shim.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixStream;

use super::files;
use super::wire::{Down, NotStarted, PIECE, Up};
use super::{open_directory, socket_path};
use crate::driver::{Attachment, DriverError, Event, ProcessInput, ProcessOutput, ProcessStatus};

/// Frames that come in, and the way back.
#[derive(Debug)]
pub struct Connection {
    stream: Arc<UnixStream>,
    input: Vec<u8>,
    used: usize,
}

impl Connection {
    /// Connects and says what for.
    pub async fn open(directory: &Path, first: &Up) -> io::Result<Self> {
        let directory = open_directory(directory)?;
        let stream = UnixStream::connect(socket_path(&directory)).await?;
        let mut frame = Vec::new();
        first.encode(&mut frame);
        write_all(&stream, &frame).await?;
        Ok(Self { stream: Arc::new(stream), input: Vec::new(), used: 0 })
    }

    /// The first answer: how the process is, or why it did not start.
    pub async fn status(&mut self) -> io::Result<Result<ProcessStatus, NotStarted>> {
        match self.next().await? {
            Down::Status(status) => Ok(Ok(*status)),
            Down::Failed(why) => Ok(Err(why)),
            Down::Output { .. } | Down::Dropped { .. } | Down::Exited(_) => Err(ErrorKind::InvalidData.into()),
        }
    }

    /// The next frame. Cancel safe.
    pub async fn next(&mut self) -> io::Result<Down> {
        loop {
            if let Some(down) = Down::decode(&self.input, &mut self.used)? {
                return Ok(down);
            }
            self.input.drain(..self.used);
            self.used = 0;
            self.stream.readable().await?;
            self.input.reserve(PIECE);
            match self.stream.try_read_buf(&mut self.input) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    pub fn attachment(self, status: ProcessStatus) -> Attachment {
        let input = Input { stream: Arc::clone(&self.stream) };
        Attachment { status, output: Box::new(self), input: Box::new(input) }
    }
}

#[async_trait]
impl ProcessOutput for Connection {
    async fn next(&mut self) -> Result<Event, DriverError> {
        let lost = |source| DriverError::Io { what: "read a process's output".to_owned(), source };
        match Connection::next(self).await.map_err(lost)? {
            Down::Output { offset, stream, data } => Ok(Event::Output { offset, stream, data }),
            Down::Dropped { from, to } => Ok(Event::Dropped { from, to }),
            Down::Exited(status) => Ok(Event::Exited(status)),
            Down::Status(_) | Down::Failed(_) => Err(lost(ErrorKind::InvalidData.into())),
        }
    }
}

struct Input {
    stream: Arc<UnixStream>,
}

#[async_trait]
impl ProcessInput for Input {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(PIECE) {
            let mut frame = Vec::new();
            Up::Stdin(piece.to_vec()).encode(&mut frame);
            write_all(&self.stream, &frame).await?;
        }
        Ok(())
    }

    async fn close(&mut self) -> io::Result<()> {
        let mut frame = Vec::new();
        Up::CloseStdin.encode(&mut frame);
        write_all(&self.stream, &frame).await
    }
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether nobody is behind a process's directory, nor ever ended there: its agent died before it started the shim, or the
/// shim was killed.
pub fn is_abandoned(directory: &Path) -> bool {
    if directory.join(files::END).exists() {
        return false;
    }
    let connected = open_directory(directory).and_then(|directory| StdUnixStream::connect(socket_path(&directory)));
    // Gone, or ended since we looked.
    connected.is_err() && !directory.join(files::END).exists()
}
