//! Into a sandbox.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use futures::stream::{self, Stream, StreamExt};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use warren_proto::v1::sandbox_file_service_client::SandboxFileServiceClient;
use warren_proto::v1::write_file_request::Message as Piece;
use warren_proto::v1::{FileKind, MakeSymlinkRequest, WriteFileHeader, WriteFileRequest};

use super::progress::Progress;
use super::{PARALLEL, PIECE_BYTES};
use crate::create::all_of;
use crate::failure::Failure;
use crate::inside::files::{make_directory, remove, stat};
use crate::inside::link::{Again, Agent, Link};
use crate::inside::place::Place;

/// Pieces read ahead of the network.
const READ_AHEAD: usize = 2;

const PERMISSIONS: u32 = 0o7777;

/// A file or directory from here.
pub async fn copy(link: &Link<'_>, from: &Path, to: &Place, user: &str) -> Result<(), Failure> {
    let found = std::fs::metadata(from).map_err(failed(from))?;
    let there = match stat(link, &to.path, true).await {
        Ok(info) => Some(info.kind()),
        Err(failure)
            if failure.status().is_some_and(|status| status.code() == tonic::Code::NotFound)
                && !is_sandbox(&failure) =>
        {
            None
        }
        Err(failure) => return Err(failure),
    };
    let name =
        from.canonicalize().ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    let contents = from.as_os_str().as_encoded_bytes().ends_with(b"/.");
    let place = match (there, name) {
        (Some(FileKind::Directory), Some(name)) if !contents => to.below(&name),
        (None, _) if to.directory && !found.is_dir() => {
            return Err(Failure::NotFound(format!(
                "{} has no directory {}: `warrenctl sandbox mkdir` makes it",
                link.name, to.path
            )));
        }
        _ => to.clone(),
    };
    if found.is_dir() {
        return directory(link, from, &place, user).await;
    }
    if !found.is_file() {
        return Err(Failure::Usage(format!(
            "{} is a device, a socket or a pipe: expected a file or directory",
            from.display()
        )));
    }
    let progress = Progress::new(place.file_name().unwrap_or_default(), Some(found.len()));
    file(link, from, &found, &place.path, user, &progress).await?;
    progress.finish(1);
    Ok(())
}

/// The sandbox is missing, not a file in it.
fn is_sandbox(failure: &Failure) -> bool {
    failure.reason() == Some(warren_proto::v1::ErrorReason::SandboxNotFound)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    Failure::io(format!("read {}", path.display()))
}

/// One thing below a directory here.
struct Item {
    path: PathBuf,
    there: String,
    found: Metadata,
}

async fn directory(link: &Link<'_>, from: &Path, to: &Place, user: &str) -> Result<(), Failure> {
    let mode = |found: &Metadata| found.permissions().mode() & PERMISSIONS;
    let mut failures = Vec::new();
    let items = walk(from, to, &mut failures);
    let top = std::fs::metadata(from).map_err(failed(from))?;
    make_directory(link, &to.path, true, mode(&top), user).await?;
    for item in items.iter().filter(|item| item.found.is_dir()) {
        // Nothing can be put into one that is missing.
        make_directory(link, &item.there, true, mode(&item.found), user).await?;
    }
    let files: Vec<&Item> = items.iter().filter(|item| item.found.is_file()).collect();
    let progress = Progress::new(&from.display().to_string(), Some(files.iter().map(|item| item.found.len()).sum()));
    let progress = &progress;
    let sending = files.into_iter().map(|item| file(link, &item.path, &item.found, &item.there, user, progress));
    let mut sending = stream::iter(sending).buffer_unordered(PARALLEL);
    let mut count = 0;
    while let Some(sent) = sending.next().await {
        count += usize::from(sent.is_ok());
        failures.extend(sent.err());
    }
    for item in items.iter().filter(|item| item.found.is_symlink()) {
        let target = std::fs::read_link(&item.path).map_err(failed(&item.path));
        let linked = match target.map(|target| target.to_str().map(str::to_owned)) {
            Ok(Some(target)) => symlink(link, &item.there, &target).await,
            Ok(None) => Err(unspeakable(&item.path)),
            Err(failure) => Err(failure),
        };
        failures.extend(linked.err());
    }
    progress.finish(count);
    all_of(failures, "not everything was copied")
}

fn unspeakable(path: &Path) -> Failure {
    Failure::Failed(format!("not copied: {} is not UTF-8", path.display()))
}

/// All that lies below a directory, parents first. What cannot be read is told at the end.
fn walk(from: &Path, to: &Place, failures: &mut Vec<Failure>) -> Vec<Item> {
    let mut items = Vec::new();
    let mut directories = vec![(from.to_owned(), to.path.clone())];
    while let Some((directory, there)) = directories.pop() {
        let entries = match std::fs::read_dir(&directory).map_err(failed(&directory)) {
            Ok(entries) => entries,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        for entry in entries {
            match entry.map_err(failed(&directory)).and_then(|entry| item(entry.path(), &there)) {
                Ok(Some(item)) => {
                    if item.found.is_dir() {
                        directories.push((item.path.clone(), item.there.clone()));
                    }
                    items.push(item);
                }
                Ok(None) => {}
                Err(failure) => failures.push(failure),
            }
        }
    }
    items
}

fn item(path: PathBuf, parent: &str) -> Result<Option<Item>, Failure> {
    let found = path.symlink_metadata().map_err(failed(&path))?;
    if !(found.is_dir() || found.is_file() || found.is_symlink()) {
        eprintln!("left out: {} is a device, a socket or a pipe", path.display());
        return Ok(None);
    }
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| unspeakable(&path))?;
    let there = format!("{}/{name}", parent.trim_end_matches('/'));
    Ok(Some(Item { path, there, found }))
}

/// A link, instead of a link or file that is there.
pub async fn symlink(link: &Link<'_>, path: &str, target: &str) -> Result<(), Failure> {
    let request =
        MakeSymlinkRequest { path: path.to_owned(), target: target.to_owned(), ..MakeSymlinkRequest::default() };
    let make = || {
        link.call(Again::Unstarted, |agent| {
            let request = agent.asking(request.clone());
            async move { Ok(SandboxFileServiceClient::new(agent.channel).make_symlink(request?).await?) }
        })
    };
    match make().await {
        Err(failure) if failure.status().is_some_and(|status| status.code() == tonic::Code::AlreadyExists) => {
            remove(link, path, false, true).await?;
            make().await.map(drop)
        }
        made => made.map(drop),
    }
}

/// One file, whole or not at all; again from its beginning where that breaks.
async fn file(
    link: &Link<'_>,
    from: &Path,
    found: &Metadata,
    to: &str,
    user: &str,
    progress: &Progress,
) -> Result<(), Failure> {
    let header = header(to, found.permissions().mode() & PERMISSIONS, user);
    link.call(Again::Always, |agent| {
        let opened = File::open(from).map_err(failed(from));
        let (header, failing) = (header.clone(), failed(from));
        async move { send(agent, header, opened?, progress.clone()).await?.map_err(failing) }
    })
    .await
}

pub fn header(path: &str, mode: u32, user: &str) -> WriteFileHeader {
    WriteFileHeader { path: path.to_owned(), mode, user: user.to_owned(), ..WriteFileHeader::default() }
}

/// Sends one file; the inner failure is one of reading it here, after which nothing is there.
async fn send(
    agent: Agent,
    header: WriteFileHeader,
    file: File,
    progress: Progress,
) -> Result<io::Result<()>, Failure> {
    let (to, pieces) = mpsc::channel(READ_AHEAD);
    let reading = progress.clone();
    let reader = tokio::task::spawn_blocking(move || read_pieces(file, &to, &reading));
    write(agent, header, pieces).await.inspect_err(|_| drop(reader))
}

/// Writes a file out of pieces. A failure among them ends the call before the file is at its place.
pub async fn write(
    agent: Agent,
    header: WriteFileHeader,
    pieces: mpsc::Receiver<io::Result<Piece>>,
) -> Result<io::Result<()>, Failure> {
    let (failed, failure) = oneshot::channel();
    let first = stream::iter([Piece::Header(header)]);
    let requests = first.chain(unfailing(pieces, failed)).map(|piece| WriteFileRequest { message: Some(piece) });
    let request = agent.bearing(requests)?;
    let mut client = SandboxFileServiceClient::new(agent.channel);
    tokio::select! {
        written = client.write_file(request) => written.map(|_| Ok(())).map_err(Failure::from),
        Ok(error) = failure => Ok(Err(error)),
    }
}

/// The pieces; at a failure the stream stands still, since its end would say that the file is whole.
fn unfailing(
    pieces: mpsc::Receiver<io::Result<Piece>>,
    failed: oneshot::Sender<io::Error>,
) -> impl Stream<Item = Piece> + Send {
    stream::unfold((pieces, failed), |(mut pieces, failed)| async move {
        match pieces.recv().await? {
            Ok(piece) => Some((piece, (pieces, failed))),
            Err(error) => {
                let _ended = failed.send(error);
                std::future::pending().await
            }
        }
    })
}

/// Reads a file, holes as holes.
fn read_pieces(mut file: File, to: &mpsc::Sender<io::Result<Piece>>, progress: &Progress) {
    let mut at = 0u64;
    loop {
        let piece = match next_piece(&mut file, at) {
            Ok(Some(piece)) => piece,
            Ok(None) => return,
            Err(error) => return drop(to.blocking_send(Err(error))),
        };
        let length = match &piece {
            Piece::Data(bytes) => bytes.len() as u64,
            Piece::Hole(length) => u64::try_from(*length).unwrap_or(0),
            Piece::Header(_) => 0,
        };
        at += length;
        progress.add(length);
        if to.blocking_send(Ok(piece)).is_err() {
            // It will be sent once more, or never.
            return progress.take_back(at);
        }
    }
}

fn next_piece(file: &mut File, at: u64) -> io::Result<Option<Piece>> {
    let data = match rustix::fs::seek(&*file, SeekFrom::Data(at)) {
        Ok(data) => data,
        // Nothing but a hole up to the end.
        Err(Errno::NXIO) => file.metadata()?.len(),
        Err(Errno::INVAL) => at,
        Err(error) => return Err(error.into()),
    };
    if data > at {
        return Ok(Some(Piece::Hole(i64::try_from(data - at).unwrap_or(i64::MAX))));
    }
    let hole = rustix::fs::seek(&*file, SeekFrom::Hole(at)).unwrap_or(u64::MAX);
    rustix::fs::seek(&*file, SeekFrom::Start(at))?;
    let most = (PIECE_BYTES as u64).min(hole.saturating_sub(at).max(1));
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok((!bytes.is_empty()).then_some(Piece::Data(bytes)))
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn a_file_is_read_with_its_holes() {
        let mut file = tempfile::tempfile().expect("a file");
        let far = 8 << 20;
        file.write_all(b"begin").expect("bytes");
        file.seek(io::SeekFrom::Start(far)).expect("a place");
        file.write_all(b"end").expect("bytes");
        file.set_len(far * 2).expect("a length");
        let (mut content, mut data, mut at) = (Vec::new(), 0, 0);
        while let Some(piece) = next_piece(&mut file, at).expect("a piece") {
            match piece {
                Piece::Data(bytes) => {
                    data += bytes.len();
                    content.extend(bytes);
                }
                Piece::Hole(length) => content.resize(content.len() + usize::try_from(length).expect("a length"), 0),
                Piece::Header(_) => panic!("no piece"),
            }
            at = content.len() as u64;
        }
        assert_eq!(
            (content.len() as u64, &content[..5], &content[far as usize..][..3]),
            (far * 2, &b"begin"[..], &b"end"[..])
        );
        assert!(data < 1 << 20, "{data} bytes of a file that holds 8");
    }
}
