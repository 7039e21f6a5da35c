//! `WriteFile`: a file that appears whole, or bytes put into one that is there.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::timeout;
use tonic::Streaming;
use warren_proto::v1::write_file_request::Message;
use warren_proto::v1::{FileInfo, WriteFileHeader, WriteFileRequest};

use super::read::not_negative;
use super::{Call, info, one_path, ownership};
use crate::data_plane::held::blocking;
use crate::data_plane::status::Refusal;
use crate::files::content::{Place, Writer};
use crate::files::{Fault, FileError, How, Request as Ask};

/// A client that sends nothing for so long has forgotten its call.
const SILENCE: Duration = Duration::from_secs(60);

/// Where the bytes go.
struct Target {
    path: Vec<u8>,
    writer: Writer,
    first_id: u32,
    /// The directory that a new file is for, and whether it may replace.
    new_in: Option<(OwnedFd, bool)>,
}

pub async fn write(call: Call, mut inbound: Streaming<WriteFileRequest>) -> Result<FileInfo, Refusal> {
    let Some(Message::Header(header)) = message(&call, &mut inbound).await? else {
        return Err(Refusal::Field { field: "header", what: "must come first".to_owned() });
    };
    let mut target = open(&call, header).await?;
    while let Some(message) = message(&call, &mut inbound).await? {
        target = put(target, message).await?;
    }
    let Target { path, writer, first_id, new_in } = target;
    let name = path.clone();
    let file = blocking(move || Ok(writer.finish())).await?.map_err(|e| fault(&path, e))?;
    if let Some((directory, exclusive)) = new_in {
        let copy = file.try_clone().map_err(|e| fault(&name, e))?;
        let commit = Ask::Commit { path: name.clone(), exclusive };
        call.held.call(&name, commit, vec![directory, copy]).await?;
    }
    info(&file, &name, first_id)
}

async fn message(call: &Call, inbound: &mut Streaming<WriteFileRequest>) -> Result<Option<Message>, Refusal> {
    let request = tokio::select! {
        request = timeout(SILENCE, inbound.message()) => request,
        refusal = call.held.ended() => return Err(refusal),
    };
    match request {
        Ok(Ok(Some(WriteFileRequest { message: None }))) => {
            Err(Refusal::Field { field: "message", what: "must be `header`, `data` or `hole`".to_owned() })
        }
        Ok(Ok(request)) => Ok(request.and_then(|request| request.message)),
        Ok(Err(status)) => Err(Refusal::Stream(Box::new(status))),
        Err(_) => Err(Refusal::Field { field: "data", what: "must come within 60 s of the last message".to_owned() }),
    }
}

async fn open(call: &Call, header: WriteFileHeader) -> Result<Target, Refusal> {
    let WriteFileHeader { path, offset, append, mode, user, make_parents, exclusive, path_bytes } = header;
    let path = one_path(path, path_bytes);
    let place = match offset {
        Some(_) if append => {
            return Err(Refusal::Field { field: "header.append", what: "cannot be with `offset`".to_owned() });
        }
        Some(offset) => Place::From(not_negative("header.offset", offset)?),
        None if append => Place::End,
        None => {
            let ownership = ownership(mode, &user)?;
            let begin = Ask::Begin { path: path.clone(), make_parents, exclusive, ownership };
            let (fds, first_id) = call.ask(&path, begin).await?;
            let [directory, file] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| fault(&path, Fault::Os(libc::EBADF)))?;
            let writer = Writer::new(file, Place::From(0));
            return Ok(Target { path, writer, first_id, new_in: Some((directory, exclusive)) });
        }
    };
    if exclusive {
        return Err(Refusal::Field { field: "header.exclusive", what: "is for new files".to_owned() });
    }
    let (file, first_id) = call.open(&path, How::Write { append }).await?;
    Ok(Target { path, writer: Writer::new(file, place), first_id, new_in: None })
}

async fn put(mut target: Target, message: Message) -> Result<Target, Refusal> {
    let piece = match message {
        Message::Header(_) => {
            return Err(Refusal::Field { field: "header", what: "must come once, first".to_owned() });
        }
        Message::Hole(count) => {
            let count = not_negative("hole", count)?;
            target.writer.skip(count).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => Refusal::Field { field: "hole", what: "cannot be appended".to_owned() },
                _ => Refusal::Field { field: "hole", what: "makes the file longer than any can be".to_owned() },
            })?;
            return Ok(target);
        }
        Message::Data(bytes) => bytes,
    };
    let (target, written) = blocking(move || {
        let written = target.writer.write(&piece);
        Ok((target, written))
    })
    .await?;
    written.map_err(|e| fault(&target.path, e))?;
    Ok(target)
}

fn fault(path: &[u8], fault: impl Into<Fault>) -> Refusal {
    FileError::new(path, fault).into()
}
