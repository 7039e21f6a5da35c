//! `-`: a directory as a tar, a file as its bytes.
//!
//! The `tar` crate reads and writes in its own time, so it runs where blocking is allowed and waits there for the network.

use std::io::{self, IsTerminal, Read, Write, stdin, stdout};
use std::path::{Component, Path};

use tar::{Archive, Builder, Entry, EntryType, Header};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tonic::Streaming;
use warren_proto::v1::read_file_response::Message as Down;
use warren_proto::v1::write_file_request::Message as Piece;
use warren_proto::v1::{FileInfo, FileKind, ReadFileResponse};

use super::PIECE_BYTES;
use super::into::{header, symlink};
use crate::create::all_of;
use crate::failure::Failure;
use crate::inside::files::{list, make_directory, read as read_file, shown_path, stat};
use crate::inside::link::{Again, Link};
use crate::inside::place::{Place, beneath};

/// Permission bits that are taken over.
const PERMISSIONS: u32 = 0o7777;

/// Pieces read ahead of the network.
const READ_AHEAD: usize = 2;

/// To standard output.
pub async fn write(link: &Link<'_>, from: &Place) -> Result<(), Failure> {
    let source = stat(link, &from.path, true).await?;
    if source.kind() != FileKind::Directory {
        let (_, pieces) = read_file(link, &from.path, 0, 0).await?;
        let copied = block_in_place(|| io::copy(&mut Pieces::new(pieces), &mut stdout().lock()));
        return copied.map(drop).map_err(Failure::io(format!("copy {}", from.path)));
    }
    if stdout().is_terminal() {
        return Err(Failure::Usage("a tar is no text: send standard output elsewhere than to a terminal".to_owned()));
    }
    let mut builder = Builder::new(stdout());
    let top = Path::new(from.file_name().unwrap_or("."));
    let mut failures = Vec::new();
    append(&mut builder, &source, top, io::empty())?;
    for entry in list(link, &from.path, true).await? {
        let Some(relative) = beneath(&from.path, &entry.path) else {
            failures.push(Failure::Failed(format!("not copied: `{}` is no name for a file", shown_path(&entry))));
            continue;
        };
        let name = top.join(relative);
        match entry.kind() {
            FileKind::File => match read_file(link, &entry.path, 0, 0).await {
                Ok((info, pieces)) => append(&mut builder, &info, &name, Pieces::new(pieces))?,
                Err(failure) => failures.push(failure),
            },
            FileKind::Directory | FileKind::Symlink => append(&mut builder, &entry, &name, io::empty())?,
            _ => eprintln!("left out: {} is a device, a socket or a pipe", shown_path(&entry)),
        }
    }
    builder.into_inner().and_then(|mut out| out.flush()).map_err(Failure::io("write to stdout"))?;
    all_of(failures, "not everything was copied")
}

/// One member. A file that shrinks meanwhile is filled up with zeros: its size stands before it.
fn append(builder: &mut Builder<io::Stdout>, info: &FileInfo, name: &Path, content: impl Read) -> Result<(), Failure> {
    let size = if info.kind() == FileKind::File { u64::try_from(info.size_bytes).unwrap_or(0) } else { 0 };
    let mut header = Header::new_gnu();
    header.set_mode(info.mode & PERMISSIONS);
    header.set_uid(info.uid.into());
    header.set_gid(info.gid.into());
    header.set_mtime(info.modify_time.map_or(0, |time| u64::try_from(time.seconds).unwrap_or(0)));
    header.set_size(size);
    let appended = block_in_place(|| match info.kind() {
        FileKind::Symlink => {
            header.set_entry_type(EntryType::Symlink);
            builder.append_link(&mut header, name, &info.symlink_target)
        }
        FileKind::Directory => {
            header.set_entry_type(EntryType::Directory);
            builder.append_data(&mut header, name, io::empty())
        }
        _ => builder.append_data(&mut header, name, content.chain(io::repeat(0)).take(size)),
    });
    appended.map_err(Failure::io(format!("copy {}", shown_path(info))))
}

/// The pieces of a file as one reader.
struct Pieces {
    stream: Streaming<ReadFileResponse>,
    bytes: io::Cursor<Vec<u8>>,
    hole: u64,
}

impl Pieces {
    fn new(stream: Streaming<ReadFileResponse>) -> Self {
        Self { stream, bytes: io::Cursor::default(), hole: 0 }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.bytes.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if self.hole > 0 {
                let count = buffer.len().min(usize::try_from(self.hole).unwrap_or(usize::MAX));
                buffer[..count].fill(0);
                self.hole -= count as u64;
                return Ok(count);
            }
            match Handle::current().block_on(self.stream.message()).map_err(io::Error::other)? {
                Some(response) => match response.message {
                    Some(Down::Data(bytes)) => self.bytes = io::Cursor::new(bytes),
                    Some(Down::Hole(length)) => self.hole = u64::try_from(length).unwrap_or(0),
                    Some(Down::File(_)) | None => {}
                },
                None => return Ok(0),
            }
        }
    }
}

/// From standard input: a tar into a directory, else the bytes of a file.
pub async fn read(link: &Link<'_>, to: &Place, user: &str) -> Result<(), Failure> {
    let directory =
        to.directory || stat(link, &to.path, true).await.is_ok_and(|info| info.kind() == FileKind::Directory);
    if !directory {
        let mut header = header(&to.path, 0, user);
        header.make_parents = true;
        return block_in_place(|| send(link, header, &mut stdin().lock()));
    }
    make_directory(link, &to.path, true, 0, user).await?;
    let failures = block_in_place(|| {
        let mut archive = Archive::new(stdin().lock());
        let mut failures = Vec::new();
        for entry in archive.entries().map_err(Failure::io("read the tar"))? {
            let mut entry = entry.map_err(Failure::io("read the tar"))?;
            failures.extend(unpack(link, to, user, &mut entry).err());
        }
        Ok::<_, Failure>(failures)
    })?;
    all_of(failures, "not everything was copied")
}

fn unpack(link: &Link<'_>, to: &Place, user: &str, entry: &mut Entry<'_, impl Read>) -> Result<(), Failure> {
    let damaged = || Failure::io("read the tar");
    let path = entry.path().map_err(damaged())?.into_owned();
    let told = || format!("not copied: `{}`", path.display());
    let Some(name) = plain(&path) else {
        return Err(Failure::Failed(format!("{} is no plain path below the directory", told())));
    };
    if name.is_empty() {
        return Ok(());
    }
    let there = to.below(&name).path;
    let mode = entry.header().mode().map_err(damaged())? & PERMISSIONS;
    let handle = Handle::current();
    match entry.header().entry_type() {
        EntryType::Directory => handle.block_on(make_directory(link, &there, true, mode, user)).map(drop),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let mut header = header(&there, mode, user);
            header.make_parents = true;
            send(link, header, entry)
        }
        EntryType::Symlink => {
            let target = entry.link_name().map_err(damaged())?.unwrap_or_default().into_owned();
            let target = target
                .to_str()
                .ok_or_else(|| Failure::Failed(format!("{}: it points to what is not UTF-8", told())))?;
            handle.block_on(symlink(link, &there, target))
        }
        EntryType::XGlobalHeader => Ok(()),
        kind => {
            Err(Failure::Failed(format!("{} is a {kind:?}: expected files, directories and symbolic links", told())))
        }
    }
}

/// The path without `.` and a `/` at its beginning; `None` where it leads elsewhere or is not UTF-8.
fn plain(path: &Path) -> Option<String> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_str()?),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(names.join("/"))
}

/// Writes a file out of a reader, which can be read only once: a stream that breaks fails.
fn send(link: &Link<'_>, header: warren_proto::v1::WriteFileHeader, content: &mut impl Read) -> Result<(), Failure> {
    let handle = Handle::current();
    let path = header.path.clone();
    let agent = handle.block_on(link.call(Again::Always, |agent| async move { Ok(agent) }))?;
    let (to, pieces) = mpsc::channel(READ_AHEAD);
    let writing = handle.spawn(super::into::write(agent, header, pieces));
    loop {
        let mut bytes = Vec::new();
        let read = content.take(PIECE_BYTES as u64).read_to_end(&mut bytes);
        let piece = match read {
            Ok(0) => break,
            Ok(_) => Ok(Piece::Data(bytes)),
            Err(error) => Err(error),
        };
        let ends = piece.is_err();
        if handle.block_on(to.send(piece)).is_err() || ends {
            break;
        }
    }
    drop(to);
    let written = handle.block_on(writing).map_err(|error| Failure::Failed(format!("write {path}: {error}")))?;
    written?.map_err(Failure::io(format!("read what becomes {path}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_lie_below_the_directory() {
        let name = |path: &str| plain(Path::new(path));
        assert_eq!(name("./a/b"), Some("a/b".to_owned()));
        assert_eq!(name("/etc/passwd"), Some("etc/passwd".to_owned()));
        assert_eq!((name("./"), name("a/../../b")), (Some(String::new()), None));
    }
}
