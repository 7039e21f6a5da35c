//! What can be wrong with a path, in words that a client can act upon.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Fault {
    #[error("there is no such file or directory")]
    Missing,
    #[error("something is there already")]
    Exists,
    #[error("it is a directory; a file is wanted")]
    Directory,
    #[error("it is not a directory, or something above it is not")]
    NotDirectory,
    #[error("the directory is not empty; `recursive` removes what is in it")]
    NotEmpty,
    #[error("it leads through too many symbolic links, or is one where none may be")]
    Link,
    #[error("it is a device, a socket or a named pipe, which are never opened")]
    Special,
    #[error("it is the kernel's (/proc, /sys, a terminal), which is neither read nor written from outside")]
    Kernel,
    #[error("the sandbox's root user may not do this")]
    Denied,
    #[error("it lies on a file system that is mounted read-only")]
    ReadOnly,
    #[error("the sandbox's disk, or the number of files on it, is used up")]
    Full,
    #[error("the two paths lie on different file systems of the sandbox; copy and remove instead")]
    OtherMount,
    #[error("it is in use: a mount point, or a program that runs")]
    Busy,
    #[error("it is not a path: absolute, at most 4,095 bytes, names of at most 255, no zero byte, a name at its end")]
    Name,
    #[error("directories are nested too deeply for one call")]
    TooDeep,
    #[error("it changes faster than it can be followed; try again")]
    Unstable,
    #[error("this file system cannot do it")]
    Unsupported,
    #[error("a directory cannot be moved into itself")]
    Inside,
    #[error("error {0} of the operating system")]
    Os(i32),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::STALE => Self::Missing,
            Errno::EXIST => Self::Exists,
            Errno::ISDIR => Self::Directory,
            Errno::NOTDIR => Self::NotDirectory,
            Errno::NOTEMPTY => Self::NotEmpty,
            Errno::LOOP => Self::Link,
            Errno::NXIO | Errno::NODEV => Self::Special,
            Errno::ACCESS | Errno::PERM => Self::Denied,
            Errno::ROFS => Self::ReadOnly,
            Errno::NOSPC | Errno::DQUOT | Errno::MLINK => Self::Full,
            Errno::XDEV => Self::OtherMount,
            Errno::BUSY | Errno::TXTBSY => Self::Busy,
            Errno::NAMETOOLONG | Errno::INVAL => Self::Name,
            Errno::AGAIN => Self::Unstable,
            Errno::OPNOTSUPP => Self::Unsupported,
            other => Self::Os(other.raw_os_error()),
        }
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Errno::from_io_error(&error).map_or(Self::Os(libc::EIO), Self::from)
    }
}

/// What is wrong with which path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {fault}")]
pub struct FileError {
    pub path: String,
    pub fault: Fault,
}

impl FileError {
    pub fn new(path: &[u8], fault: impl Into<Fault>) -> Self {
        Self { path: String::from_utf8_lossy(path).into_owned(), fault: fault.into() }
    }
}
