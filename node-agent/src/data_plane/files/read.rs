//! What is streamed out: a file's bytes, a directory's entries. Read only as fast as the client takes it.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use warren_proto::v1::read_file_response::Message;
use warren_proto::v1::{ListDirectoryRequest, ListDirectoryResponse, ReadFileRequest, ReadFileResponse};

use super::{Answers, Call, OUTBOUND, Responses, info, one_path};
use crate::data_plane::held::blocking;
use crate::data_plane::status::Refusal;
use crate::files::content::{Piece, Reader};
use crate::files::list::Lister;
use crate::files::{Fault, FileError, How};

pub async fn read(call: Call, request: ReadFileRequest) -> Result<Answers<ReadFileResponse>, Refusal> {
    let ReadFileRequest { path, offset, length, path_bytes } = request;
    let (offset, length) = (not_negative("offset", offset)?, not_negative("length", length)?);
    let path = one_path(path, path_bytes);
    let (file, first_id) = call.open(&path, How::Read).await?;
    let mut first = Some(info(&file, &path, first_id)?);
    let mut reader = Reader::new(file, offset, (length > 0).then_some(length));
    let next = move || {
        if let Some(file) = first.take() {
            return Ok(Some(ReadFileResponse { message: Some(Message::File(file)) }));
        }
        let message = match reader.take().map_err(|e| FileError::new(&path, Fault::from(e)))? {
            Some(Piece::Data(bytes)) => Message::Data(bytes),
            Some(Piece::Hole(count)) => Message::Hole(i64::try_from(count).unwrap_or(i64::MAX)),
            None => return Ok(None),
        };
        Ok(Some(ReadFileResponse { message: Some(message) }))
    };
    Ok(stream(call, next))
}

pub async fn list(call: Call, request: ListDirectoryRequest) -> Result<Answers<ListDirectoryResponse>, Refusal> {
    let ListDirectoryRequest { path, recursive, path_bytes } = request;
    let path = one_path(path, path_bytes);
    let (top, first_id) = call.open(&path, How::Directory).await?;
    let mut lister = Lister::new(top, path.clone(), first_id, recursive);
    let next = move || {
        let entries = lister.take().map_err(|fault| FileError::new(&path, fault))?;
        Ok((!entries.is_empty()).then_some(ListDirectoryResponse { entries }))
    };
    Ok(stream(call, next))
}

/// A length or position that a client names.
pub fn not_negative(field: &'static str, value: i64) -> Result<u64, Refusal> {
    u64::try_from(value).map_err(|_| Refusal::Field { field, what: format!("{value} is negative") })
}

/// Streams what `next` answers until it answers `None`; it may block.
fn stream<T: Send + 'static>(
    call: Call,
    next: impl FnMut() -> Result<Option<T>, FileError> + Send + 'static,
) -> Answers<T> {
    let (responses, rx) = mpsc::channel(OUTBOUND);
    tokio::spawn(pump(call, responses, next));
    Box::pin(ReceiverStream::new(rx))
}

async fn pump<T: Send + 'static>(
    call: Call,
    responses: Responses<T>,
    mut next: impl FnMut() -> Result<Option<T>, FileError> + Send + 'static,
) {
    loop {
        let looked = blocking(move || {
            let answer = next();
            Ok((next, answer))
        });
        let answer = match looked.await {
            Ok((same, answer)) => {
                next = same;
                answer.map_err(Refusal::from)
            }
            // The closure is lost, and with it the file.
            Err(refusal) => return drop(responses.send(Err(refusal.into())).await),
        };
        let (message, last) = match answer {
            Ok(Some(message)) => (Ok(message), false),
            Ok(None) => return,
            Err(refusal) => (Err(refusal.into()), true),
        };
        tokio::select! {
            sent = responses.send(message) => if last || sent.is_err() { return },
            refusal = call.held.ended() => return drop(responses.try_send(Err(refusal.into()))),
        }
    }
}
