//! Changes below a path, from inotify: also those that the sandbox's own processes make.
//!
//! inotify watches one directory, so each directory below gets a watch of its own, also those that appear. A directory is
//! watched before it is looked into, so nothing in it goes unseen; it may be told twice.

use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Dir, FileType};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use warren_proto::v1::FileEvent;
use warren_proto::v1::file_event::Kind;

use super::list::{below, join};
use super::{Fault, info};

/// Directories that one call watches: the kernel takes about 1 KiB for each.
pub const MAX_WATCHES: usize = 8192;

/// Events taken at a time.
const BATCH: usize = 1024;

/// Room for some hundred events; one takes at most 16 bytes and a name.
const BUFFER: usize = 64 << 10;

/// Why a watch cannot begin or go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("watched directories")]
    TooMany,
}

impl From<Errno> for WatchError {
    fn from(errno: Errno) -> Self {
        match errno {
            // The kernel's own bounds for the agent's user.
            Errno::NOSPC | Errno::MFILE => Self::TooMany,
            other => Self::Fault(other.into()),
        }
    }
}

/// What a look at the kernel's queue brought.
#[derive(Debug, PartialEq)]
pub enum Change {
    Event(FileEvent),
    /// Some are lost.
    Overflow,
    /// What was watched is gone: nothing more comes.
    End,
}

/// One event as the kernel tells it.
#[derive(Debug)]
struct Raw {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Vec<u8>,
}

/// Watches one path.
#[derive(Debug)]
pub struct Watcher {
    inotify: OwnedFd,
    top: OwnedFd,
    /// How `top` is called.
    path: Vec<u8>,
    recursive: bool,
    /// Watched directories, relative to `top`.
    watches: BTreeMap<i32, Vec<u8>>,
    /// The node's bound for all.
    budget: Arc<Semaphore>,
    taken: Vec<OwnedSemaphorePermit>,
}

impl Watcher {
    /// Watches `top`, a directory or a file, from now on. Blocks.
    pub fn new(top: OwnedFd, path: Vec<u8>, recursive: bool, budget: Arc<Semaphore>) -> Result<Self, WatchError> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut watcher = Self { inotify, top, path, recursive, watches: BTreeMap::new(), budget, taken: Vec::new() };
        match below(watcher.top.as_fd(), b"") {
            Ok(Some(_)) => watcher.add_tree(Vec::new(), &mut Vec::new())?,
            _ => {
                let top = watcher.top.try_clone().map_err(Fault::from)?;
                watcher.add(top.as_fd(), Vec::new())?;
            }
        }
        Ok(watcher)
    }

    /// A descriptor that becomes readable when there is something to [`Self::take`].
    pub fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.inotify.try_clone()
    }

    /// What happened since the last look; empty: nothing. Blocks as little as the disk lets it.
    pub fn take(&mut self) -> Result<Vec<Change>, WatchError> {
        let mut raw = self.read()?;
        let mut changes = Vec::new();
        while let Some(event) = raw.pop_front() {
            if event.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                changes.push(Change::Overflow);
                continue;
            }
            if event.flags.contains(ReadFlags::IGNORED) {
                self.watches.remove(&event.watch);
                self.taken.pop();
                continue;
            }
            let Some(directory) = self.watches.get(&event.watch).cloned() else { continue };
            if event.name.is_empty() {
                changes.extend(self.of_itself(&directory, event.flags));
                continue;
            }
            let partner = match raw.front() {
                Some(next) if next.cookie == event.cookie && event.flags.contains(ReadFlags::MOVED_FROM) => {
                    raw.pop_front()
                }
                _ => None,
            };
            self.of_entry(&join(&directory, &event.name), event.flags, partner, &mut changes)?;
        }
        Ok(changes)
    }

    fn read(&self) -> Result<VecDeque<Raw>, WatchError> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(self.inotify.as_fd(), &mut buffer);
        let mut raw = VecDeque::new();
        // A buffer that is not empty is emptied: what is in it comes only once.
        while raw.len() < BATCH || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(event) => raw.push_back(Raw {
                    watch: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| name.to_bytes().to_vec()).unwrap_or_default(),
                }),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(raw)
    }

    /// What is told of a watched thing itself. Of a directory below, its parent's watch tells all.
    fn of_itself(&self, directory: &[u8], flags: ReadFlags) -> Vec<Change> {
        if !directory.is_empty() {
            return Vec::new();
        }
        if flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT) {
            return vec![self.event(Kind::Removed, b"", None, flags), Change::End];
        }
        let kind = if flags.contains(ReadFlags::MODIFY) { Kind::Modified } else { Kind::Attributes };
        vec![self.event(kind, b"", None, flags)]
    }

    fn of_entry(
        &mut self,
        path: &[u8],
        flags: ReadFlags,
        partner: Option<Raw>,
        changes: &mut Vec<Change>,
    ) -> Result<(), WatchError> {
        let directory = flags.contains(ReadFlags::ISDIR);
        if flags.contains(ReadFlags::MOVED_FROM) {
            let to = partner.and_then(|to| Some(join(self.watches.get(&to.watch)?, &to.name)));
            if directory {
                self.moved(path, to.as_deref());
            }
            changes.push(self.event(Kind::Moved, path, to.as_deref(), flags));
            return Ok(());
        }
        let kind = if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            Kind::Created
        } else if flags.contains(ReadFlags::DELETE) {
            Kind::Removed
        } else if flags.contains(ReadFlags::MODIFY) {
            Kind::Modified
        } else {
            Kind::Attributes
        };
        changes.push(self.event(kind, path, None, flags));
        if kind == Kind::Created && directory && self.recursive {
            let mut found = Vec::new();
            self.add_tree(path.to_vec(), &mut found)?;
            changes.extend(found.into_iter().map(|(path, directory)| {
                let flags = if directory { ReadFlags::ISDIR } else { ReadFlags::empty() };
                self.event(Kind::Created, &path, None, flags)
            }));
        }
        Ok(())
    }

    /// Watches follow the directory, not its name: those that stay below `top` get the new one, others go.
    fn moved(&mut self, from: &[u8], to: Option<&[u8]>) {
        let inside =
            |path: &[u8]| path.strip_prefix(from).filter(|rest| rest.is_empty() || rest[0] == b'/').map(<[u8]>::to_vec);
        let mut gone = Vec::new();
        for (watch, path) in &mut self.watches {
            match (inside(path), to) {
                (Some(rest), Some(to)) => *path = [to, &rest].concat(),
                (Some(_), None) => gone.push(*watch),
                (None, _) => {}
            }
        }
        for watch in gone {
            // Told by `IGNORED`, which takes it out of the books.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    /// Watches a directory and, where asked to, all below it; `found` gets what is in it, except at the start.
    fn add_tree(&mut self, path: Vec<u8>, found: &mut Vec<(Vec<u8>, bool)>) -> Result<(), WatchError> {
        let mut pending = vec![path];
        while let Some(path) = pending.pop() {
            let Some(directory) = below(self.top.as_fd(), &path)? else { continue };
            self.add(directory.as_fd(), path.clone())?;
            if !self.recursive {
                return Ok(());
            }
            let mut entries = Dir::new(directory).map_err(Fault::from)?;
            while let Some(entry) = entries.read() {
                let entry = entry.map_err(Fault::from)?;
                let name = entry.file_name().to_bytes();
                if [&b"."[..], b".."].contains(&name) {
                    continue;
                }
                let is_directory = entry.file_type() == FileType::Directory;
                if is_directory {
                    pending.push(join(&path, name));
                }
                found.push((join(&path, name), is_directory));
            }
        }
        Ok(())
    }

    fn add(&mut self, fd: BorrowedFd<'_>, path: Vec<u8>) -> Result<(), WatchError> {
        let flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        if self.watches.len() >= MAX_WATCHES {
            return Err(WatchError::TooMany);
        }
        let permit = Arc::clone(&self.budget).try_acquire_owned().map_err(|_| WatchError::TooMany)?;
        let watch = inotify::add_watch(&self.inotify, format!("/proc/self/fd/{}", fd.as_raw_fd()), flags)?;
        // Watched already where it was seen twice.
        if self.watches.insert(watch, path).is_none() {
            self.taken.push(permit);
        }
        Ok(())
    }

    fn event(&self, kind: Kind, path: &[u8], to: Option<&[u8]>, flags: ReadFlags) -> Change {
        let full = |path: &[u8]| if path.is_empty() { self.path.clone() } else { join(&self.path, path) };
        let (path, path_bytes) = info::text_or_bytes(&full(path));
        let (new_path, new_path_bytes) = to.map(|to| info::text_or_bytes(&full(to))).unwrap_or_default();
        let directory = flags.contains(ReadFlags::ISDIR);
        Change::Event(FileEvent { kind: kind.into(), path, new_path, directory, path_bytes, new_path_bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;

    use super::*;

    fn watch(path: &Path, recursive: bool, most: usize) -> Result<Watcher, WatchError> {
        let top = File::open(path).expect("a directory").into();
        Watcher::new(top, b"/w".to_vec(), recursive, Arc::new(Semaphore::new(most)))
    }

    fn told(watcher: &mut Watcher) -> Vec<(Kind, String, String)> {
        let changes = watcher.take().expect("takes");
        let event = |change| match change {
            Change::Event(event) => (event.kind(), event.path, event.new_path),
            Change::Overflow => panic!("overflow"),
            Change::End => (Kind::Unspecified, String::new(), String::new()),
        };
        changes.into_iter().map(event).collect()
    }

    fn plain(kind: Kind, path: &str) -> (Kind, String, String) {
        (kind, path.to_owned(), String::new())
    }

    #[test]
    fn what_happens_below_is_told_also_in_directories_that_appear_and_move() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut watcher = watch(dir.path(), true, 100).expect("watches");
        fs::create_dir_all(dir.path().join("a/b")).expect("directories");
        fs::write(dir.path().join("a/b/early"), "x").expect("file");
        let seen = told(&mut watcher);
        for path in ["/w/a", "/w/a/b", "/w/a/b/early"] {
            assert!(seen.contains(&plain(Kind::Created, path)), "{path}: {seen:?}");
        }
        fs::rename(dir.path().join("a"), dir.path().join("c")).expect("rename");
        assert_eq!(told(&mut watcher), [(Kind::Moved, "/w/a".into(), "/w/c".into())]);
        fs::write(dir.path().join("c/b/late"), "x").expect("file");
        let seen = told(&mut watcher);
        assert_eq!(seen, [plain(Kind::Created, "/w/c/b/late"), plain(Kind::Modified, "/w/c/b/late")]);
        fs::remove_dir_all(dir.path().join("c/b")).expect("removes");
        assert!(told(&mut watcher).contains(&plain(Kind::Removed, "/w/c/b")));
        let outside = tempfile::tempdir().expect("temporary directory");
        fs::rename(dir.path().join("c"), outside.path().join("c")).expect("rename");
        assert_eq!(told(&mut watcher), [plain(Kind::Moved, "/w/c")]);
        fs::write(outside.path().join("c/x"), "x").expect("file");
        assert_eq!(told(&mut watcher), []);
        assert_eq!(watcher.taken.len(), 1, "what is not watched any more takes no room");
        // Moved away, it is not what was asked for any more.
        fs::rename(dir.path(), outside.path().join("top")).expect("rename");
        assert_eq!(told(&mut watcher), [plain(Kind::Removed, "/w"), plain(Kind::Unspecified, "")]);
    }

    #[test]
    fn a_flat_watch_and_one_of_a_file_see_what_they_are_of() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("d")).expect("directory");
        fs::write(dir.path().join("f"), "x").expect("file");
        let mut flat = watch(dir.path(), false, 1).expect("watches");
        let mut file = watch(&dir.path().join("f"), false, 1).expect("watches");
        fs::write(dir.path().join("d/below"), "x").expect("file");
        assert_eq!(told(&mut flat), []);
        File::options()
            .append(true)
            .open(dir.path().join("f"))
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"y"))
            .expect("writes");
        assert_eq!(told(&mut file), [plain(Kind::Modified, "/w")]);
        assert_eq!(told(&mut flat), [plain(Kind::Modified, "/w/f")]);
    }

    #[test]
    fn the_node_s_bound_holds() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("directories");
        assert!(matches!(watch(dir.path(), true, 2), Err(WatchError::TooMany)));
        assert!(watch(dir.path(), true, 3).is_ok());
    }
}
