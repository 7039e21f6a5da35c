//! Removes, and follows nothing on the way.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

use super::Fault;
use super::resolve::{check_not_mount, parent};

/// Deepest nesting that one call removes: each level keeps a descriptor open.
const MAX_DEPTH: usize = 256;

/// Rounds over a directory that is being filled meanwhile.
const ROUNDS: u32 = 16;

pub fn remove(root: BorrowedFd<'_>, path: &[u8], recursive: bool, allow_missing: bool) -> Result<(), Fault> {
    let missing = |fault: Fault| if allow_missing && fault == Fault::Missing { Ok(()) } else { Err(fault) };
    let (directory, name) = match parent(root, path) {
        Ok(found) => found,
        Err(fault) => return missing(fault),
    };
    let name = CString::new(name.into_encoded_bytes()).map_err(|_| Fault::Name)?;
    remove_entry(directory.as_fd(), &name, recursive.then_some(0)).or_else(missing)
}

/// `depth`: how deep it is already; `None`: an empty directory at most.
fn remove_entry(directory: BorrowedFd<'_>, name: &CStr, depth: Option<usize>) -> Result<(), Fault> {
    check_not_mount(directory, name)?;
    match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        other => return Ok(other?),
    }
    for _ in 0..ROUNDS {
        match unlinkat(directory, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            other => return Ok(other?),
        }
        let Some(depth) = depth else { return Err(Fault::NotEmpty) };
        if depth == MAX_DEPTH {
            return Err(Fault::TooDeep);
        }
        empty(&descend(directory, name)?, depth + 1)?;
    }
    Err(Fault::Unstable)
}

/// Opens a directory here, which may be neither a link nor a mount.
fn descend(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Fault> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    match openat2(directory, name, flags, Mode::empty(), here) {
        Err(Errno::XDEV) => Err(Fault::Busy),
        other => Ok(other?),
    }
}

fn empty(directory: &OwnedFd, depth: usize) -> Result<(), Fault> {
    let mut entries = Dir::read_from(directory)?;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        let name = entry.file_name();
        if [&b"."[..], b".."].contains(&name.to_bytes()) {
            continue;
        }
        match remove_entry(directory.as_fd(), name, Some(depth)) {
            // Somebody else removed it.
            Err(Fault::Missing) | Ok(()) => {}
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn all_below_goes_and_nothing_that_a_link_leads_to() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("a/b/c")).expect("directories");
        fs::create_dir_all(root.join("kept/deep")).expect("directories");
        std::os::unix::fs::symlink("/kept", root.join("a/b/link")).expect("link");
        std::os::unix::fs::symlink(root.join("kept"), root.join("a/out")).expect("link");
        for n in 0..1000 {
            fs::write(root.join(format!("a/b/{n}")), "x").expect("file");
        }
        let fd = OwnedFd::from(fs::File::open(&root).expect("root"));
        assert_eq!(remove(fd.as_fd(), b"/a", false, false), Err(Fault::NotEmpty));
        assert_eq!(remove(fd.as_fd(), b"/a", true, false), Ok(()));
        assert!(!root.join("a").exists() && root.join("kept/deep").exists());
        assert_eq!(remove(fd.as_fd(), b"/a", true, false), Err(Fault::Missing));
        assert_eq!(remove(fd.as_fd(), b"/a/b", true, true), Ok(()));
        assert_eq!(remove(fd.as_fd(), b"/", true, true), Err(Fault::Name));
        let mut deep = root.join("d");
        for _ in 0..300 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).expect("directories");
        assert_eq!(remove(fd.as_fd(), b"/d", true, false), Err(Fault::TooDeep));
    }
}
