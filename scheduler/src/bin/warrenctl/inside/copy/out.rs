//! Out of a sandbox.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::stream::{self, StreamExt};
use warren_proto::v1::read_file_response::Message as Piece;
use warren_proto::v1::{FileInfo, FileKind};

use super::PARALLEL;
use super::progress::Progress;
use crate::create::all_of;
use crate::failure::Failure;
use crate::inside::files::{list, read, shown_path, stat};
use crate::inside::link::{HELD, Link};
use crate::inside::place::{Place, beneath};
use crate::inside::tree::Tree;
use crate::retry::{Backoff, is_transient};

/// A file or a directory, to a path here.
pub async fn copy(link: &Link<'_>, from: &Place, to: &Path) -> Result<(), Failure> {
    let source = stat(link, &from.path, true).await?;
    match source.kind() {
        FileKind::Directory => directory(link, from, to).await,
        FileKind::File if from.directory => Err(Failure::Usage(format!("{} is no directory", from.path))),
        FileKind::File => {
            let to = if to.is_dir() { to.join(name(from)?) } else { to.to_owned() };
            let progress = Progress::new(name(from)?, u64::try_from(source.size_bytes).ok());
            let (parent, last) = parent_and_name(&to)?;
            let tree = Tree::open(parent).map_err(failed(parent))?;
            file(link, &from.path, &tree, Path::new(last), &progress).await?;
            progress.finish(1);
            Ok(())
        }
        _ => {
            Err(Failure::Usage(format!("{} is a device, a socket or a pipe: expected a file or directory", from.path)))
        }
    }
}

fn name(from: &Place) -> Result<&str, Failure> {
    from.file_name().ok_or_else(|| Failure::Usage("the root has no name: name a file or directory in it".to_owned()))
}

fn parent_and_name(path: &Path) -> Result<(&Path, &std::ffi::OsStr), Failure> {
    let name = path.file_name().ok_or_else(|| Failure::Usage(format!("{} names no file", path.display())))?;
    Ok((path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")), name))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    Failure::io(format!("write {}", path.display()))
}

/// Where a directory goes: into one that is there, under its own name, or to a new one.
fn target(from: &Place, to: &Path) -> Result<PathBuf, Failure> {
    match (to.is_dir(), from.directory, from.file_name()) {
        (true, false, Some(name)) => Ok(to.join(name)),
        _ => Ok(to.to_owned()),
    }
}

async fn directory(link: &Link<'_>, from: &Place, to: &Path) -> Result<(), Failure> {
    let to = target(from, to)?;
    match std::fs::create_dir(&to) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(&to)(error)),
        _ => {}
    }
    let tree = Tree::open(&to).map_err(failed(&to))?;
    let entries = list(link, &from.path, true).await?;
    let mut failures = Vec::new();
    let entries: Vec<(&Path, &FileInfo)> =
        entries.iter().filter_map(|entry| usable(&from.path, entry, &mut failures)).collect();
    let of = |kind| entries.iter().filter(move |(_, entry)| entry.kind() == kind);
    for (relative, _) in of(FileKind::Directory) {
        keep(&mut failures, tree.directory(relative).map_err(failed(&to.join(relative))));
    }
    let bytes = of(FileKind::File).map(|(_, entry)| u64::try_from(entry.size_bytes).unwrap_or(0)).sum();
    let progress = Progress::new(&to.display().to_string(), Some(bytes));
    let files = of(FileKind::File).map(|(relative, entry)| file(link, &entry.path, &tree, relative, &progress));
    let mut copying = stream::iter(files).buffer_unordered(PARALLEL);
    let mut count = 0;
    while let Some(copied) = copying.next().await {
        count += usize::from(copied.is_ok());
        keep(&mut failures, copied);
    }
    for (relative, entry) in of(FileKind::Symlink) {
        keep(&mut failures, tree.symlink(relative, &entry.symlink_target).map_err(failed(&to.join(relative))));
    }
    // What is in them first: they may become read-only.
    for (relative, entry) in of(FileKind::Directory).rev() {
        keep(&mut failures, tree.settle(relative, entry.mode).map_err(failed(&to.join(relative))));
    }
    progress.finish(count);
    all_of(failures, "not everything was copied")
}

fn keep(failures: &mut Vec<Failure>, result: Result<(), Failure>) {
    failures.extend(result.err());
}

/// An entry that may be written here, by its path below the directory.
fn usable<'a>(root: &str, entry: &'a FileInfo, failures: &mut Vec<Failure>) -> Option<(&'a Path, &'a FileInfo)> {
    if entry.kind() == FileKind::Other {
        eprintln!("left out: {} is a device, a socket or a pipe", shown_path(entry));
        return None;
    }
    let relative = beneath(root, &entry.path);
    if relative.is_none() {
        failures.push(Failure::Failed(format!("not copied: `{}` is no name for a file here", shown_path(entry))));
    }
    relative.map(|relative| (relative, entry))
}

/// One file, whole or not at all. A stream that breaks goes on where it broke, unless the file is another by then.
async fn file(link: &Link<'_>, path: &str, tree: &Tree, relative: &Path, progress: &Progress) -> Result<(), Failure> {
    let mut patience = Backoff::new(1, link.client.deadline());
    let mut begun: Option<(FileInfo, crate::inside::tree::NewFile)> = None;
    let mut offset = 0u64;
    loop {
        let (since, before) = (Instant::now(), offset);
        let (info, mut pieces) = read(link, path, i64::try_from(offset).unwrap_or(i64::MAX), 0).await?;
        if begun.as_ref().is_some_and(|(first, _)| !same(first, &info)) {
            progress.take_back(offset);
            (begun, offset) = (None, 0);
            if before > 0 {
                continue;
            }
        }
        if begun.is_none() {
            let new = tree.file(relative, info.mode).map_err(failed(relative))?;
            begun = Some((info, new));
        }
        let Some((_, new)) = &mut begun else { continue };
        let broken = loop {
            match pieces.message().await {
                Ok(Some(piece)) => offset += take(&mut new.file, piece.message, progress).map_err(failed(relative))?,
                Ok(None) => break None,
                Err(status) if is_transient(&status) => break Some(status),
                Err(status) => return Err(status.into()),
            }
        };
        let Some(status) = broken else { break };
        link.forget();
        if offset > before || since.elapsed() > HELD {
            patience = Backoff::new(1, link.client.deadline());
        }
        let Some(pause) = patience.pause(&status) else { return Err(status.into()) };
        tokio::time::sleep(pause).await;
    }
    let Some((_, new)) = begun else { return Ok(()) };
    new.file.set_len(offset).and_then(|()| new.commit()).map_err(failed(relative))
}

fn same(first: &FileInfo, now: &FileInfo) -> bool {
    (first.size_bytes, first.modify_time) == (now.size_bytes, now.modify_time)
}

/// Writes a piece; its length.
fn take(file: &mut File, piece: Option<Piece>, progress: &Progress) -> std::io::Result<u64> {
    let length = match piece {
        Some(Piece::Data(bytes)) => file.write_all(&bytes).map(|()| bytes.len() as u64)?,
        Some(Piece::Hole(length)) => {
            let length = u64::try_from(length).unwrap_or(0);
            file.seek(SeekFrom::Current(i64::try_from(length).unwrap_or(0))).map(|_| length)?
        }
        Some(Piece::File(_)) | None => 0,
    };
    progress.add(length);
    Ok(length)
}
