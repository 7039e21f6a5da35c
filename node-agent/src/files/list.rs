//! The entries of a directory, and of all below it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use warren_proto::v1::{FileInfo, FileKind};

use super::resolve::check_place;
use super::{Fault, info};

/// Most entries at a time, as the protocol says.
pub const BATCH: usize = 256;

/// Directories that wait to be listed: some megabytes of names.
const MAX_PENDING: usize = 65_536;

/// Opens a directory below `top` without following anything; `None` where it has gone or is not one for files.
pub(super) fn below(top: BorrowedFd<'_>, path: &[u8]) -> Result<Option<OwnedFd>, Fault> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = if path.is_empty() { b"." } else { path };
    match openat2(top, path, flags, Mode::empty(), here) {
        Ok(fd) if check_place(fd.as_fd()).is_ok() => Ok(Some(fd)),
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN) => Ok(None),
        Err(Errno::NAMETOOLONG) => Err(Fault::TooDeep),
        Err(errno) => Err(errno.into()),
    }
}

/// `a` and `b` as one path.
pub(super) fn join(a: &[u8], b: &[u8]) -> Vec<u8> {
    match a {
        [] => b.to_vec(),
        [.., b'/'] => [a, b].concat(),
        _ => [a, &b"/"[..], b].concat(),
    }
}

/// Lists in batches; parents before what is in them.
#[derive(Debug)]
pub struct Lister {
    top: OwnedFd,
    /// How `top` is called.
    path: Vec<u8>,
    first_id: u32,
    recursive: bool,
    /// Relative to `top`.
    pending: Vec<Vec<u8>>,
    current: Option<(Dir, Vec<u8>)>,
}

impl Lister {
    pub fn new(top: OwnedFd, path: Vec<u8>, first_id: u32, recursive: bool) -> Self {
        Self { top, path, first_id, recursive, pending: vec![Vec::new()], current: None }
    }

    /// The next entries; none at the end. Blocks.
    pub fn take(&mut self) -> Result<Vec<FileInfo>, Fault> {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            if self.current.is_none() && !self.descend()? {
                break;
            }
            if let Some(entry) = self.entry()? {
                batch.push(entry);
            }
        }
        Ok(batch)
    }

    /// Goes on to the next directory; false: there is none.
    fn descend(&mut self) -> Result<bool, Fault> {
        while let Some(path) = self.pending.pop() {
            if let Some(fd) = below(self.top.as_fd(), &path)? {
                self.current = Some((Dir::new(fd)?, path));
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One entry of the current directory; `None` where there was none worth telling.
    fn entry(&mut self) -> Result<Option<FileInfo>, Fault> {
        let Some((directory, path)) = &mut self.current else { return Ok(None) };
        let Some(entry) = directory.read() else {
            self.current = None;
            return Ok(None);
        };
        let entry = entry?;
        let name = entry.file_name();
        if [&b"."[..], b".."].contains(&name.to_bytes()) {
            return Ok(None);
        }
        let inside = join(path, name.to_bytes());
        let info = match info::of(directory.fd()?, name, &join(&self.path, &inside), self.first_id) {
            // It went meanwhile.
            Err(Fault::Missing) => return Ok(None),
            other => other?,
        };
        if self.recursive && info.kind() == FileKind::Directory {
            if self.pending.len() == MAX_PENDING {
                return Err(Fault::TooDeep);
            }
            self.pending.push(inside);
        }
        Ok(Some(info))
    }
}
