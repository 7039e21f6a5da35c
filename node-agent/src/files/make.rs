//! What makes and moves: directories, links, files that appear whole.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Uid, fchmod, fchown, linkat, mkdirat, openat, renameat,
    renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::Fault;
use super::message::{How, Ownership};
use super::resolve::{check_not_mount, open, parent, split};

const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Most levels that `make_parents` makes: as many as a path can name.
const MAX_LEVELS: usize = 2048;

/// Names tried for a file on its way to one that is taken; another is tried only where somebody had the same idea.
const NAME_ATTEMPTS: u32 = 16;

/// Begins a file without a name: it goes by itself with whoever holds it.
pub fn begin(
    root: BorrowedFd<'_>,
    path: &[u8],
    make_parents: bool,
    exclusive: bool,
    ownership: Ownership,
) -> Result<[OwnedFd; 2], Fault> {
    let (directory, name) = match parent(root, path) {
        Err(Fault::Missing) if make_parents => {
            make_directories(root, split(path)?.0, ownership.owner.unwrap_or_default())?;
            parent(root, path)?
        }
        other => other?,
    };
    let old = match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) if exclusive => return Err(Fault::Exists),
        Ok(old) => match FileType::from_raw_mode(old.st_mode) {
            FileType::Directory => return Err(Fault::Directory),
            FileType::RegularFile => Some(old),
            _ => None,
        },
        Err(Errno::NOENT) => None,
        Err(errno) => return Err(errno.into()),
    };
    let file = openat(&directory, ".", OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    let owner = ownership.owner.or(old.map(|old| (old.st_uid, old.st_gid))).unwrap_or_default();
    let mode = ownership.mode.or(old.map(|old| old.st_mode & 0o7777)).unwrap_or(FILE_MODE);
    own(file.as_fd(), mode, owner)?;
    Ok([directory, file])
}

/// Owner first: changing it takes set-user bits away.
fn own(fd: BorrowedFd<'_>, mode: u32, (user, group): (u32, u32)) -> Result<(), Fault> {
    fchown(fd, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
    Ok(fchmod(fd, Mode::from_raw_mode(mode))?)
}

/// Gives a begun file its name.
pub fn commit(directory: BorrowedFd<'_>, file: BorrowedFd<'_>, path: &[u8], exclusive: bool) -> Result<(), Fault> {
    let name = OsStr::from_bytes(split(path)?.1);
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |name: &OsStr| linkat(CWD, own.as_str(), directory, name, AtFlags::SYMLINK_FOLLOW);
    match link(name) {
        Err(Errno::EXIST) if !exclusive => {}
        other => return Ok(other?),
    }
    check_not_mount(directory, name)?;
    for attempt in 0..NAME_ATTEMPTS {
        let passing = format!(".warren-{}-{attempt}", std::process::id());
        match link(OsStr::new(&passing)) {
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
            Ok(()) => {
                let moved = renameat(directory, passing.as_str(), directory, name);
                if moved.is_err() {
                    // The error that matters is the other one.
                    let _ = unlinkat(directory, passing.as_str(), AtFlags::empty());
                }
                return Ok(moved?);
            }
        }
    }
    Err(Fault::Unstable)
}

pub fn make_directory(
    root: BorrowedFd<'_>,
    path: &[u8],
    make_parents: bool,
    ownership: Ownership,
) -> Result<(), Fault> {
    let owner = ownership.owner.unwrap_or_default();
    let (directory, name) = match (parent(root, path), make_parents) {
        // The root itself is there.
        (Err(Fault::Name), true) if !path.is_empty() && path.iter().all(|byte| *byte == b'/') => return Ok(()),
        (Err(Fault::Missing), true) => {
            make_directories(root, split(path)?.0, owner)?;
            parent(root, path)?
        }
        (other, _) => other?,
    };
    match make_one(directory.as_fd(), &name, ownership.mode.unwrap_or(DIRECTORY_MODE), owner) {
        Err(Fault::Exists) if make_parents => open(root, path, How::Directory).map(drop),
        other => other,
    }
}

fn make_one(directory: BorrowedFd<'_>, name: &OsStr, mode: u32, owner: (u32, u32)) -> Result<(), Fault> {
    mkdirat(directory, name, Mode::from_raw_mode(0o700))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(directory, name, flags, Mode::empty())?;
    own(made.as_fd(), mode, owner)
}

/// Makes what is missing of a path of directories. Each level is resolved from the root again, so that links on the way lead
/// where they lead for a process inside.
fn make_directories(root: BorrowedFd<'_>, path: &[u8], owner: (u32, u32)) -> Result<(), Fault> {
    let mut missing = Vec::new();
    let mut rest = path;
    while let Err(fault) = open(root, rest, How::Directory) {
        if fault != Fault::Missing || missing.len() == MAX_LEVELS {
            return Err(fault);
        }
        missing.push(rest);
        rest = split(rest)?.0;
    }
    for path in missing.into_iter().rev() {
        let (directory, name) = parent(root, path)?;
        match make_one(directory.as_fd(), &name, DIRECTORY_MODE, owner) {
            Err(Fault::Exists) | Ok(()) => {}
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}

pub fn make_symlink(root: BorrowedFd<'_>, path: &[u8], target: &[u8]) -> Result<(), Fault> {
    let (directory, name) = parent(root, path)?;
    Ok(symlinkat(OsStr::from_bytes(target), directory, name)?)
}

pub fn rename(root: BorrowedFd<'_>, from: &[u8], to: &[u8], replace: bool) -> Result<(), Fault> {
    let (old_directory, old_name) = parent(root, from)?;
    let (new_directory, new_name) = parent(root, to)?;
    check_not_mount(old_directory.as_fd(), &old_name)?;
    check_not_mount(new_directory.as_fd(), &new_name)?;
    let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
    match renameat_with(old_directory, old_name, new_directory, new_name, flags) {
        Err(Errno::INVAL) => Err(Fault::Inside),
        other => Ok(other?),
    }
}
