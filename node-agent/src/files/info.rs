//! What a file is, from a descriptor or from a name in an open directory.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use prost_types::Timestamp;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, readlinkat, statx};
use warren_proto::v1::{FileInfo, FileKind};

use super::Fault;

/// What `name` in `directory` is, or with an empty name what `directory` itself is; `path` is how it is called. `first_id` is the
/// host's id of the sandbox's user 0.
pub fn of(directory: BorrowedFd<'_>, name: &CStr, path: &[u8], first_id: u32) -> Result<FileInfo, Fault> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    let stat = statx(directory, name, flags, StatxFlags::BASIC_STATS)?;
    let kind = kind(&stat);
    let target = match kind {
        FileKind::Symlink => {
            let target = readlinkat(directory, name, Vec::new())?;
            String::from_utf8_lossy(target.as_bytes()).into_owned()
        }
        _ => String::new(),
    };
    let (path, path_bytes) = text_or_bytes(path);
    Ok(FileInfo {
        path,
        path_bytes,
        kind: kind.into(),
        size_bytes: signed(stat.stx_size),
        allocated_bytes: signed(stat.stx_blocks.saturating_mul(512)),
        mode: u32::from(stat.stx_mode) & 0o7777,
        uid: inside(stat.stx_uid, first_id),
        gid: inside(stat.stx_gid, first_id),
        modify_time: Some(Timestamp { seconds: stat.stx_mtime.tv_sec, nanos: stat.stx_mtime.tv_nsec as i32 }),
        symlink_target: target,
    })
}

fn kind(stat: &Statx) -> FileKind {
    match FileType::from_raw_mode(u32::from(stat.stx_mode)) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    }
}

/// An id as the sandbox sees it: those that it does not have are `nobody`.
fn inside(id: u32, first_id: u32) -> u32 {
    const NOBODY: u32 = 65_534;
    id.checked_sub(first_id).filter(|id| *id <= 0xffff).unwrap_or(NOBODY)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The two fields that carry a path on the wire: text, or the bytes where they are none.
pub fn text_or_bytes(path: &[u8]) -> (String, Vec<u8>) {
    match std::str::from_utf8(path) {
        Ok(text) => (text.to_owned(), Vec::new()),
        Err(_) => (String::new(), path.to_vec()),
    }
}
