//! The output of a process that ended, out of what its shim left.

use std::io::{self, BufReader, Read};

use async_trait::async_trait;

use super::files::End;
use super::wire::PIECE;
use crate::driver::{DriverError, Event, ProcessOutput, ProcessStatus, Stream};

/// Reads on from an offset. The file is small and was just written: it is read without leaving the thread.
#[derive(Debug)]
pub struct EndedOutput {
    status: ProcessStatus,
    /// Reversed: the next one last.
    pieces: Vec<(Stream, u64)>,
    file: BufReader<std::fs::File>,
    /// Of the next byte in the file.
    at: u64,
    wanted: u64,
}

impl EndedOutput {
    pub fn new(end: End, from: u64) -> Self {
        let End { status, mut pieces, output } = end;
        pieces.reverse();
        Self { at: status.output_start, status, pieces, file: output, wanted: from }
    }

    fn read(&mut self) -> io::Result<Event> {
        if self.wanted < self.status.output_start {
            let from = std::mem::replace(&mut self.wanted, self.status.output_start);
            return Ok(Event::Dropped { from, to: self.wanted });
        }
        while let Some((stream, length)) = self.pieces.pop() {
            let skipped = self.wanted.saturating_sub(self.at).min(length);
            io::copy(&mut (&mut self.file).take(skipped), &mut io::sink())?;
            self.at += skipped;
            let taken = (length - skipped).min(PIECE as u64);
            if taken == 0 {
                continue;
            }
            if length - skipped > taken {
                self.pieces.push((stream, length - skipped - taken));
            }
            let mut data = vec![0; usize::try_from(taken).expect("at most a piece")];
            self.file.read_exact(&mut data)?;
            let offset = self.at;
            self.at += taken;
            return Ok(Event::Output { offset, stream, data });
        }
        Ok(Event::Exited(Box::new(self.status.clone())))
    }
}

#[async_trait]
impl ProcessOutput for EndedOutput {
    async fn next(&mut self) -> Result<Event, DriverError> {
        self.read().map_err(|source| DriverError::Io { what: "read an ended process's output".to_owned(), source })
    }
}
