//! From a path inside to a descriptor: resolved by the kernel below the sandbox's root, checked before it is opened.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, fstat, fstatfs, openat, openat2,
    statx,
};
use rustix::io::Errno;
use rustix::path::Arg;

use super::Fault;
use super::message::{How, MAX_PATH};

/// Tries of a resolution that a rename or mount crosses: the kernel asks for another when it cannot rule out an escape.
const ATTEMPTS: u32 = 128;

/// Longest name of one file.
const MAX_NAME: usize = 255;

/// File systems that hold files: overlay, tmpfs, ext, XFS, btrfs. All others are the kernel's, or unknown.
const FOR_FILES: [u32; 5] = [0x794c_7630, 0x0102_1994, 0xef53, 0x5846_5342, 0x9123_683e];

/// Opens `path` below `root`, for nothing but to hold on to it.
fn hold(root: BorrowedFd<'_>, path: &[u8], follow: bool) -> Result<OwnedFd, Fault> {
    if path.first() != Some(&b'/') || path.len() >= MAX_PATH || path.contains(&0) {
        return Err(Fault::Name);
    }
    let last = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
    let flags = OFlags::PATH | OFlags::CLOEXEC | last;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match openat2(root, OsStr::from_bytes(path), flags, Mode::empty(), inside) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
    Err(Fault::Unstable)
}

/// Refuses what is on a file system of the kernel's.
pub fn check_place(fd: BorrowedFd<'_>) -> Result<(), Fault> {
    let kind = fstatfs(fd)?.f_type;
    if FOR_FILES.iter().any(|known| i64::from(*known) == kind) { Ok(()) } else { Err(Fault::Kernel) }
}

/// Opens `path` for `how`.
pub fn open(root: BorrowedFd<'_>, path: &[u8], how: How) -> Result<OwnedFd, Fault> {
    let follow = !matches!(how, How::Look { follow: false });
    let held = hold(root, path, follow)?;
    check_place(held.as_fd())?;
    let kind = FileType::from_raw_mode(fstat(&held)?.st_mode);
    let flags = match how {
        How::Look { .. } => return Ok(held),
        How::Read => OFlags::RDONLY,
        How::Write { append: false } => OFlags::WRONLY,
        How::Write { append: true } => OFlags::WRONLY | OFlags::APPEND,
        How::Directory => OFlags::RDONLY | OFlags::DIRECTORY,
    };
    match (kind, how) {
        (FileType::Directory, How::Directory) => {}
        (FileType::Directory, _) => return Err(Fault::Directory),
        (_, How::Directory) => return Err(Fault::NotDirectory),
        (FileType::RegularFile, _) => {}
        _ => return Err(Fault::Special),
    }
    reopen(held.as_fd(), flags)
}

/// Opens the very file that is held, whatever lies at its path by now.
fn reopen(held: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Fault> {
    let own = format!("/proc/self/fd/{}", held.as_raw_fd());
    Ok(openat(CWD, own, flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())?)
}

/// Refuses a mount point. In its own mount namespace the kernel would; from outside, removing one takes the mount away.
pub fn check_not_mount(directory: BorrowedFd<'_>, name: impl Arg) -> Result<(), Fault> {
    match statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::TYPE) {
        Ok(stat) if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) => Err(Fault::Busy),
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The directory that `path` lies in, and its name there. The name is never looked up here.
pub fn parent(root: BorrowedFd<'_>, path: &[u8]) -> Result<(OwnedFd, OsString), Fault> {
    let (above, name) = split(path)?;
    let directory = open(root, above, How::Directory)?;
    Ok((directory, OsString::from_vec(name.to_vec())))
}

/// The path of what a path lies in, and the name.
pub fn split(path: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    let end = path.iter().rposition(|byte| *byte != b'/').ok_or(Fault::Name)? + 1;
    let start = path[..end].iter().rposition(|byte| *byte == b'/').ok_or(Fault::Name)? + 1;
    let name = &path[start..end];
    if name == b"." || name == b".." || name.len() > MAX_NAME || name.contains(&0) {
        return Err(Fault::Name);
    }
    Ok((&path[..start], name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_at_its_last_name() {
        assert_eq!(split(b"/a"), Ok((&b"/"[..], &b"a"[..])));
        assert_eq!(split(b"/a//b/"), Ok((&b"/a//"[..], &b"b"[..])));
        let long = [b"/".to_vec(), vec![b'x'; 256]].concat();
        for bad in [&b""[..], b"/", b"//", b"a", b"/.", b"/a/..", b"/a\0b", &long] {
            assert_eq!(split(bad), Err(Fault::Name), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn links_lead_nowhere_but_below_the_root() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).expect("directories");
        std::fs::write(root.join("etc/passwd"), "inside").expect("file");
        std::fs::write(dir.path().join("secret"), "outside").expect("file");
        let outside = dir.path().join("secret");
        for (name, target) in [("up", "../secret"), ("far", "../../../../etc/passwd"), ("abs", "/etc/passwd")] {
            std::os::unix::fs::symlink(target, root.join(name)).expect("link");
        }
        std::os::unix::fs::symlink(&outside, root.join("out")).expect("link");
        std::os::unix::fs::symlink("loop", root.join("loop")).expect("link");
        let fd = OwnedFd::from(std::fs::File::open(&root).expect("root"));
        let read = |path: &str| {
            let file = open(fd.as_fd(), path.as_bytes(), How::Read)?;
            std::io::read_to_string(std::fs::File::from(file)).map_err(Fault::from)
        };
        assert_eq!(read("/abs").as_deref(), Ok("inside"));
        assert_eq!(read("/far").as_deref(), Ok("inside"));
        assert_eq!(read("/../../etc/passwd").as_deref(), Ok("inside"));
        assert_eq!(read("/up"), Err(Fault::Missing));
        assert_eq!(read("/out"), Err(Fault::Missing));
        assert_eq!(read("/loop"), Err(Fault::Link));
        assert_eq!(read("/etc"), Err(Fault::Directory));
        assert_eq!(read("etc/passwd"), Err(Fault::Name));
    }
}
