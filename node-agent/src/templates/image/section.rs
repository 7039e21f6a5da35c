//! Part of a file that many read at once: each reader has its own place.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

const BUFFER: usize = 256 << 10;

/// Bytes `start .. start + length` of a file. Clones share the file.
#[derive(Debug, Clone)]
pub struct Section {
    file: Arc<File>,
    start: u64,
    length: u64,
}

impl Section {
    /// All of a file.
    pub fn whole(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), start: 0, length })
    }

    pub fn size(&self) -> u64 {
        self.length
    }

    /// A part of this part; `None` where it would reach beyond the end.
    pub fn part(&self, at: u64, length: u64) -> Option<Self> {
        let end = at.checked_add(length)?;
        (end <= self.length).then(|| Self { file: self.file.clone(), start: self.start + at, length })
    }

    pub fn reader(&self) -> SectionReader {
        SectionReader { section: self.clone(), at: 0 }
    }

    pub fn read_all(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader().read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// As OCI writes it.
    pub fn sha256(&self) -> io::Result<String> {
        let (mut hasher, mut reader) = (Sha256::new(), self.reader());
        let mut buffer = vec![0; BUFFER];
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok(super::named(hasher.finalize().into())),
                count => hasher.update(&buffer[..count]),
            }
        }
    }
}

/// Reads a section.
#[derive(Debug)]
pub struct SectionReader {
    section: Section,
    at: u64,
}

impl Read for SectionReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.section.length.saturating_sub(self.at);
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.section.file.read_at(&mut buffer[..want], self.section.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for SectionReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.section.length, by),
            SeekFrom::Current(by) => (self.at, by),
        };
        self.at = base.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
