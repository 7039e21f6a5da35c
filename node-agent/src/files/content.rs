//! The bytes of an open file, with its holes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// How much is read at a time: large enough that a call costs nothing beside it.
pub const PIECE: u64 = 256 << 10;

/// A part of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Vec<u8>),
    /// So many zero bytes that are not on disk.
    Hole(u64),
}

/// Reads a file from a position on.
#[derive(Debug)]
pub struct Reader {
    file: File,
    position: u64,
    end: u64,
}

impl Reader {
    /// `length`: at most so much; `None`: all.
    pub fn new(file: OwnedFd, offset: u64, length: Option<u64>) -> Self {
        let end = length.map_or(u64::MAX, |length| offset.saturating_add(length));
        Self { file: file.into(), position: offset, end }
    }

    /// The next part; `None` at the end. Blocks.
    pub fn take(&mut self) -> io::Result<Option<Piece>> {
        let end = self.end.min(self.file.metadata()?.len());
        if self.position >= end {
            return Ok(None);
        }
        let data = match seek(&self.file, SeekFrom::Data(self.position)) {
            Ok(data) => data.min(end),
            // No more of it, or a file system that knows no holes.
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL) => self.position,
            Err(errno) => return Err(errno.into()),
        };
        if data > self.position {
            let hole = data - self.position;
            self.position = data;
            return Ok(Some(Piece::Hole(hole)));
        }
        let hole = seek(&self.file, SeekFrom::Hole(self.position)).unwrap_or(end);
        let length = PIECE.min(hole.min(end).saturating_sub(self.position)).max(1);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let count = self.file.read_at(&mut bytes, self.position)?;
        bytes.truncate(count);
        self.position += count as u64;
        Ok((count > 0).then_some(Piece::Data(bytes)))
    }
}

/// Where a [`Writer`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    From(u64),
    /// The file was opened to append.
    End,
}

/// Writes a file piece by piece.
#[derive(Debug)]
pub struct Writer {
    file: File,
    place: Place,
}

impl Writer {
    pub fn new(file: OwnedFd, place: Place) -> Self {
        Self { file: file.into(), place }
    }

    /// Blocks.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.place {
            Place::From(position) => {
                self.file.write_all_at(bytes, *position)?;
                *position = position.saturating_add(bytes.len() as u64);
                Ok(())
            }
            Place::End => self.file.write_all(bytes),
        }
    }

    /// Leaves out so many bytes. At the end of a file that is appended to there is nothing to leave out.
    pub fn skip(&mut self, count: u64) -> io::Result<()> {
        match &mut self.place {
            Place::From(position) => {
                let beyond = position.checked_add(count).filter(|position| i64::try_from(*position).is_ok());
                *position = beyond.ok_or(io::ErrorKind::FileTooLarge)?;
                Ok(())
            }
            Place::End => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Makes the file as long as what was written and left out; gives it back.
    pub fn finish(self) -> io::Result<OwnedFd> {
        if let Place::From(position) = self.place
            && self.file.metadata()?.len() < position
        {
            self.file.set_len(position)?;
        }
        Ok(self.file.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_come_out_as_they_went_in() {
        let file = tempfile::tempfile().expect("temporary file");
        let mut writer = Writer::new(file.try_clone().expect("copy").into(), Place::From(0));
        writer.write(b"first").expect("writes");
        writer.skip((4 << 30) - 5).expect("skips");
        writer.write(b"last").expect("writes");
        writer.skip(1 << 20).expect("skips");
        let file = writer.finish().expect("finishes");
        let mut reader = Reader::new(file.try_clone().expect("copy"), 0, None);
        let (mut length, mut data) = (0, Vec::new());
        while let Some(piece) = reader.take().expect("reads") {
            match piece {
                Piece::Hole(hole) => length += hole,
                Piece::Data(bytes) => {
                    length += bytes.len() as u64;
                    data.extend(bytes.into_iter().filter(|byte| *byte != 0));
                }
            }
        }
        assert_eq!((length, data.as_slice()), ((4 << 30) + 4 + (1 << 20), &b"firstlast"[..]));
        let mut part = Reader::new(file, 1, Some(3));
        assert_eq!(part.take().expect("reads"), Some(Piece::Data(b"irs".to_vec())));
        assert_eq!(part.take().expect("reads"), None);
    }
}
