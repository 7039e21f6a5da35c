//! What an instance's main process wrote, in two files that take turns: its shim writes, any agent reads.
//!
//! ```text
//! logs/<offset of its first byte, 20 digits>    entries: length 4 · stream 1 · milliseconds since the epoch 8 · offset 8 · bytes
//! ```
//! Numbers are little-endian. Offsets count the bytes of stdout and stderr together, also those that could not be kept, so a
//! gap says what is lost. Not synced; an entry that is torn at the end of a file is none.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::driver::process::Stream;
use crate::driver::{LogEvent, LogQuery};

/// Size at which a file has had its turn. Two of them are what a sandbox's log costs at most, beside the sandbox's own disk.
pub const MAX_FILE: u64 = 4 << 20;
const FILES: usize = 2;

/// Before an entry's bytes.
const HEADER: usize = 21;

/// Longest entry that is taken: more than a shim reads at a time.
const MAX_ENTRY: usize = 1 << 20;

/// The shim's end.
#[derive(Debug)]
pub struct LogWriter {
    directory: PathBuf,
    file: Option<File>,
    size: u64,
    offset: u64,
}

impl LogWriter {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, file: None, size: 0, offset: 0 }
    }

    /// Appends an entry. What cannot be kept, as on a full disk, is left out: the process goes on.
    pub fn write(&mut self, stream: Stream, unix_ms: i64, data: &[u8]) {
        if self.size >= MAX_FILE {
            self.file = None;
        }
        if self.append(stream, unix_ms, data).is_err()
            && let Some(file) = &self.file
            && file.set_len(self.size).is_err()
        {
            // What is torn stays the end of this file.
            self.file = None;
        }
        self.offset += data.len() as u64;
    }

    fn append(&mut self, stream: Stream, unix_ms: i64, data: &[u8]) -> io::Result<()> {
        let mut entry = Vec::with_capacity(HEADER + data.len());
        entry.extend(u32::try_from(data.len()).map_err(io::Error::other)?.to_le_bytes());
        entry.push(match stream {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        });
        entry.extend(unix_ms.to_le_bytes());
        entry.extend(self.offset.to_le_bytes());
        entry.extend(data);
        if self.file.is_none() {
            self.file = Some(self.next_file()?);
            self.size = 0;
        }
        if let Some(file) = &mut self.file {
            file.write_all(&entry)?;
        }
        self.size += entry.len() as u64;
        Ok(())
    }

    fn next_file(&self) -> io::Result<File> {
        let path = self.directory.join(format!("{:020}", self.offset));
        let file = File::options().create(true).append(true).mode(0o600).open(path)?;
        let files = files(&self.directory)?;
        for start in files.iter().take(files.len().saturating_sub(FILES)) {
            fs::remove_file(self.directory.join(format!("{start:020}")))?;
        }
        Ok(file)
    }
}

/// Offsets at which the files begin, the oldest first.
fn files(directory: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut starts: Vec<u64> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    starts.sort_unstable();
    Ok(starts)
}

/// An entry as it lies in a file.
#[derive(Debug)]
struct Entry {
    offset: u64,
    unix_ms: i64,
    stream: Stream,
    data: Vec<u8>,
}

#[derive(Debug)]
struct Current {
    start: u64,
    file: File,
    at: u64,
    /// A later file is there: nothing more is written to this one.
    full: bool,
}

/// Reads on from an offset.
#[derive(Debug)]
pub struct LogReader {
    directory: PathBuf,
    next: u64,
    current: Option<Current>,
}

impl LogReader {
    pub fn new(directory: PathBuf, query: &LogQuery) -> io::Result<Self> {
        let next = if query.since_ms.is_some() || query.tail_lines.is_some() {
            first_of(&directory, query)?
        } else {
            query.offset
        };
        Ok(Self { directory, next, current: None })
    }

    /// What comes next; `None`: nothing more is there now.
    pub fn next(&mut self) -> io::Result<Option<LogEvent>> {
        let Some(entry) = self.entry()? else { return Ok(None) };
        if entry.offset > self.next {
            let from = std::mem::replace(&mut self.next, entry.offset);
            // The entry is read again.
            if let Some(current) = &mut self.current {
                current.at -= (HEADER + entry.data.len()) as u64;
            }
            return Ok(Some(LogEvent::Dropped { from, to: entry.offset }));
        }
        let skipped = usize::try_from(self.next - entry.offset).map_err(io::Error::other)?;
        let Entry { unix_ms, stream, mut data, .. } = entry;
        data.drain(..skipped);
        let offset = self.next;
        self.next += data.len() as u64;
        Ok(Some(LogEvent::Entry { offset, unix_ms, stream, data }))
    }

    /// The next entry of which something is wanted.
    fn entry(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let Some(current) = &mut self.current else {
                let files = files(&self.directory)?;
                let before = files.partition_point(|start| *start <= self.next);
                let Some(start) = files.get(before.saturating_sub(1)) else { return Ok(None) };
                self.open(*start)?;
                continue;
            };
            if let Some(entry) = read_entry(&current.file, current.at)? {
                current.at += (HEADER + entry.data.len()) as u64;
                if entry.offset + entry.data.len() as u64 > self.next {
                    return Ok(Some(entry));
                }
                continue;
            }
            let here = current.start;
            let Some(later) = files(&self.directory)?.into_iter().find(|start| *start > here) else { return Ok(None) };
            if current.full {
                self.open(later)?;
            }
            // Something may have been written between the two looks.
            else {
                current.full = true;
            }
        }
    }

    fn open(&mut self, start: u64) -> io::Result<()> {
        self.current = match File::open(self.directory.join(format!("{start:020}"))) {
            Ok(file) => Some(Current { start, file, at: 0, full: false }),
            // Its turn came again meanwhile: look anew.
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        Ok(())
    }
}

/// `None`: there is no whole one.
fn read_entry(file: &File, at: u64) -> io::Result<Option<Entry>> {
    let mut header = [0; HEADER];
    let whole = |result: io::Result<()>| match result {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    };
    if !whole(file.read_exact_at(&mut header, at))? {
        return Ok(None);
    }
    let number = |from: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[from..from + 8]);
        u64::from_le_bytes(bytes)
    };
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let stream = match header[4] {
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        _ => return Err(ErrorKind::InvalidData.into()),
    };
    if length > MAX_ENTRY {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut data = vec![0; length];
    if !whole(file.read_exact_at(&mut data, at + HEADER as u64))? {
        return Ok(None);
    }
    Ok(Some(Entry { offset: number(13), unix_ms: number(5).cast_signed(), stream, data }))
}

/// The first offset that a query wants: after all that it leaves out.
fn first_of(directory: &Path, query: &LogQuery) -> io::Result<u64> {
    let mut reader = LogReader { directory: directory.to_owned(), next: 0, current: None };
    let mut since = None;
    let mut end = 0;
    let lines_wanted = query.tail_lines.unwrap_or(usize::MAX);
    // Where the last lines begin, one more than are wanted: the last may be empty.
    let mut lines = VecDeque::from([0]);
    while let Some(entry) = reader.entry()? {
        if query.since_ms.is_none_or(|since_ms| entry.unix_ms >= since_ms) {
            since.get_or_insert(entry.offset);
        }
        if reader.next == 0 {
            lines[0] = entry.offset;
        }
        end = entry.offset + entry.data.len() as u64;
        reader.next = end;
        if query.tail_lines.is_some() {
            let breaks = entry.data.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            lines.extend(breaks.map(|(at, _)| entry.offset + at as u64 + 1));
            let excess = lines.len().saturating_sub(lines_wanted.saturating_add(1));
            lines.drain(..excess);
        }
    }
    if lines.back() == Some(&end) {
        lines.pop_back();
    }
    let excess = lines.len().saturating_sub(lines_wanted);
    let tail = query.tail_lines.map_or(0, |_| lines.get(excess).copied().unwrap_or(end));
    Ok(query.offset.max(since.unwrap_or(end)).max(tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(directory: &Path, query: &LogQuery) -> Vec<LogEvent> {
        let mut reader = LogReader::new(directory.to_owned(), query).expect("opens");
        std::iter::from_fn(|| reader.next().expect("reads")).collect()
    }

    fn text(directory: &Path, query: &LogQuery) -> String {
        let piece = |event| match event {
            LogEvent::Entry { data, .. } => String::from_utf8(data).expect("text"),
            LogEvent::Dropped { from, to } => format!("[{from}..{to}]"),
        };
        all(directory, query).into_iter().map(piece).collect()
    }

    #[test]
    fn a_query_begins_where_it_says() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut writer = LogWriter::new(dir.path().to_owned());
        let query = LogQuery::default();
        assert_eq!(text(dir.path(), &query), "");
        for (ms, line) in [(10, "one\n"), (20, "two\nthree\n"), (30, "four")] {
            writer.write(if ms == 20 { Stream::Stderr } else { Stream::Stdout }, ms, line.as_bytes());
        }
        assert_eq!(text(dir.path(), &query), "one\ntwo\nthree\nfour");
        assert_eq!(text(dir.path(), &LogQuery { offset: 6, ..query.clone() }), "o\nthree\nfour");
        assert_eq!(text(dir.path(), &LogQuery { since_ms: Some(20), ..query.clone() }), "two\nthree\nfour");
        assert_eq!(text(dir.path(), &LogQuery { since_ms: Some(31), ..query.clone() }), "");
        for (lines, wanted) in [(0, ""), (1, "four"), (2, "three\nfour"), (9, "one\ntwo\nthree\nfour")] {
            assert_eq!(text(dir.path(), &LogQuery { tail_lines: Some(lines), ..query.clone() }), wanted, "{lines}");
        }
        writer.write(Stream::Stdout, 40, b"\n");
        assert_eq!(text(dir.path(), &LogQuery { tail_lines: Some(1), ..query.clone() }), "four\n");
        let second = LogEvent::Entry { offset: 4, unix_ms: 20, stream: Stream::Stderr, data: b"two\nthree\n".to_vec() };
        assert_eq!(all(dir.path(), &query)[1], second);
    }

    #[test]
    fn two_files_take_turns_and_what_is_gone_is_said() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut writer = LogWriter::new(dir.path().to_owned());
        let mut follower = LogReader::new(dir.path().to_owned(), &LogQuery::default()).expect("opens");
        let piece = vec![b'x'; 64 << 10];
        let mut followed = 0;
        for n in 0..300 {
            writer.write(Stream::Stdout, n, &piece);
            while let Some(event) = follower.next().expect("reads") {
                let LogEvent::Entry { offset, data, .. } = event else { panic!("{event:?}") };
                assert_eq!(offset, followed);
                followed += data.len() as u64;
            }
        }
        let total = 300 * piece.len() as u64;
        assert_eq!(followed, total, "who keeps up misses nothing");
        let on_disk: u64 =
            fs::read_dir(dir.path()).expect("lists").flatten().map(|e| e.metadata().expect("size").len()).sum();
        assert!(on_disk <= 2 * MAX_FILE + (1 << 20), "{on_disk}");
        let late = all(dir.path(), &LogQuery::default());
        let LogEvent::Dropped { from: 0, to } = late[0] else { panic!("{:?}", late[0]) };
        assert_eq!(to + (late.len() as u64 - 1) * piece.len() as u64, total);
        assert!(total - to >= MAX_FILE);
    }

    #[test]
    fn a_torn_entry_is_none_until_it_is_whole() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut writer = LogWriter::new(dir.path().to_owned());
        writer.write(Stream::Stdout, 1, b"whole");
        writer.write(Stream::Stdout, 2, b"torn");
        let path = dir.path().join(format!("{:020}", 0));
        let bytes = fs::read(&path).expect("reads");
        fs::write(&path, &bytes[..bytes.len() - 1]).expect("writes");
        assert_eq!(text(dir.path(), &LogQuery::default()), "whole");
        fs::write(&path, bytes).expect("writes");
        assert_eq!(text(dir.path(), &LogQuery::default()), "wholetorn");
    }

    /// What this build wrote to disk when the format was fixed.
    #[test]
    fn the_format_on_disk_stays_readable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let entry = [3, 0, 0, 0, 2, 7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, b'a', b'b', b'c'];
        fs::write(dir.path().join(format!("{:020}", 5)), entry).expect("writes");
        let wanted = LogEvent::Entry { offset: 5, unix_ms: 7, stream: Stream::Stderr, data: b"abc".to_vec() };
        assert_eq!(all(dir.path(), &LogQuery { offset: 5, ..LogQuery::default() }), [wanted]);
    }
}
