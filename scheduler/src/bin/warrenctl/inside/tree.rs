//! A directory here that is filled from a sandbox. Names and links come from there and are hostile: every step below the
//! directory is taken by descriptor and follows no link, so nothing outside it is touched.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};

/// Permissions that are taken over: never set-user-id and the like, whose owner here would be the caller.
const MODES: u32 = 0o777;

/// What a directory needs while it is filled.
const FILLING: u32 = 0o700;

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

/// A file that is not at its place yet; gone when dropped before [`commit`](Self::commit).
#[derive(Debug)]
pub struct NewFile {
    pub file: File,
    parent: OwnedFd,
    temporary: OsString,
    name: OsString,
    committed: bool,
}

impl Tree {
    /// A directory that the caller named: links on the way to it are the caller's.
    pub fn open(root: &Path) -> io::Result<Self> {
        Ok(Self { root: fs::open(root, OPEN_DIRECTORY, Mode::empty())? })
    }

    /// Makes a directory, if it is not there.
    pub fn directory(&self, relative: &Path) -> io::Result<()> {
        let (parent, name) = self.parent(relative)?;
        match fs::mkdirat(&parent, name, Mode::from_raw_mode(FILLING)) {
            Err(rustix::io::Errno::EXIST) => step(&parent, name).map(drop),
            made => Ok(made?),
        }
    }

    /// Gives a directory its permissions.
    pub fn settle(&self, relative: &Path, mode: u32) -> io::Result<()> {
        let (parent, name) = self.parent(relative)?;
        Ok(fs::fchmod(step(&parent, name)?, Mode::from_raw_mode(mode & MODES))?)
    }

    /// A symbolic link, instead of a link or file that is there. It may point anywhere; nothing here follows it.
    pub fn symlink(&self, relative: &Path, target: &str) -> io::Result<()> {
        let (parent, name) = self.parent(relative)?;
        match fs::symlinkat(target, &parent, name) {
            Err(rustix::io::Errno::EXIST) => {
                fs::unlinkat(&parent, name, AtFlags::empty())?;
                Ok(fs::symlinkat(target, &parent, name)?)
            }
            made => Ok(made?),
        }
    }

    /// A file beside its place.
    pub fn file(&self, relative: &Path, mode: u32) -> io::Result<NewFile> {
        let (parent, name) = self.parent(relative)?;
        if is_directory(&parent, name) {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        let mut temporary = OsString::from(".warren-");
        temporary.push(uuid::Uuid::new_v4().simple().to_string());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(mode & MODES))?;
        Ok(NewFile { file: file.into(), parent, temporary, name: name.to_owned(), committed: false })
    }

    /// The directory that holds the last name of a path.
    fn parent<'a>(&self, relative: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let plain = |component: Component<'a>| match component {
            Component::Normal(name) => Ok(name),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        let mut names = relative.components().map(plain).collect::<io::Result<Vec<_>>>()?;
        let last = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let mut directory = self.root.try_clone()?;
        for name in names {
            directory = step(&directory, name)?;
        }
        Ok((directory, last))
    }
}

/// One directory down; a link is refused.
fn step(directory: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    Ok(fs::openat(directory, name, OPEN_DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
}

fn is_directory(parent: &OwnedFd, name: &OsStr) -> bool {
    let found = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

impl NewFile {
    /// Puts it at its place, instead of what is there.
    pub fn commit(mut self) -> io::Result<()> {
        fs::renameat(&self.parent, &self.temporary, &self.parent, &self.name)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.committed {
            let _left = fs::unlinkat(&self.parent, &self.temporary, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(tree: &Tree, path: &str) -> io::Result<()> {
        let mut new = tree.file(Path::new(path), 0o4755)?;
        new.file.write_all(b"new")?;
        new.commit()
    }

    #[test]
    fn nothing_outside_is_touched_whatever_links_lie_there() {
        let (outside, inside) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        std::fs::write(outside.path().join("victim"), "old").expect("a file");
        let tree = Tree::open(inside.path()).expect("a tree");
        tree.symlink(Path::new("out"), outside.path().to_str().expect("a path")).expect("a link");
        assert!(put(&tree, "out/victim").is_err());
        assert!(tree.directory(Path::new("out")).is_err());
        assert!(tree.directory(Path::new("out/new")).is_err());
        assert!(tree.symlink(Path::new("out/new"), "x").is_err());
        assert!(tree.settle(Path::new("out"), 0o777).is_err());
        assert!(put(&tree, "../victim").is_err());
        assert!(put(&tree, "/victim").is_err());
        // A link in the file's own place is replaced, not written through.
        let victim = outside.path().join("victim");
        tree.symlink(Path::new("file"), victim.to_str().expect("a path")).expect("a link");
        put(&tree, "file").expect("a file");
        assert_eq!(std::fs::read(inside.path().join("file")).expect("a file"), b"new");
        assert_eq!(std::fs::read(&victim).expect("a file"), b"old");
        assert_eq!(std::fs::read_dir(outside.path()).expect("a directory").count(), 1);
    }

    #[test]
    fn a_file_comes_whole_and_without_privileges_or_not_at_all() {
        let inside = tempfile::tempdir().expect("a directory");
        let tree = Tree::open(inside.path()).expect("a tree");
        drop(tree.file(Path::new("half"), 0o644).expect("a file"));
        assert_eq!(std::fs::read_dir(inside.path()).expect("a directory").count(), 0);
        tree.directory(Path::new("d")).expect("a directory");
        put(&tree, "d/whole").expect("a file");
        tree.settle(Path::new("d"), 0o2750).expect("permissions");
        let mode = |path: &str| inside.path().join(path).metadata().expect("a file").permissions().mode() & 0o7777;
        assert_eq!((mode("d/whole") & 0o6700, mode("d")), (0o700, 0o750));
        assert!(put(&tree, "d").is_err(), "a directory is not replaced");
    }
}
