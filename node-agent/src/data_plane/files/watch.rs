//! `WatchFiles`: from the kernel's queue to the client's stream.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use warren_proto::v1::watch_files_response::Message;
use warren_proto::v1::{WatchFilesRequest, WatchFilesResponse, WatchOverflow, WatchReady};

use super::{Answers, Call, OUTBOUND, Responses, one_path};
use crate::data_plane::held::blocking;
use crate::data_plane::status::Refusal;
use crate::files::watch::{Change, WatchError, Watcher};
use crate::files::{FileError, How};
use crate::sys;

pub async fn watch(
    call: Call,
    request: WatchFilesRequest,
    budget: Arc<Semaphore>,
) -> Result<Answers<WatchFilesResponse>, Refusal> {
    let WatchFilesRequest { path, recursive, path_bytes } = request;
    let path = one_path(path, path_bytes);
    let (top, _) = call.open(&path, How::Look { follow: true }).await?;
    let name = path.clone();
    let watcher = blocking(move || Ok(Watcher::new(top, name, recursive, budget))).await?;
    let watcher = watcher.map_err(|error| refusal(&path, error))?;
    let (responses, rx) = mpsc::channel(OUTBOUND);
    let queue = watcher.descriptor().and_then(|fd| sys::watch(fd, Interest::READABLE));
    let queue = queue.map_err(|e| FileError::new(&path, e))?;
    tokio::spawn(run(call, path, watcher, queue, responses));
    Ok(Box::pin(ReceiverStream::new(rx)))
}

fn refusal(path: &[u8], error: WatchError) -> Refusal {
    match error {
        WatchError::Fault(fault) => FileError::new(path, fault).into(),
        WatchError::TooMany => Refusal::Overloaded("watched directories"),
    }
}

async fn run(
    call: Call,
    path: Vec<u8>,
    watcher: Watcher,
    queue: AsyncFd<OwnedFd>,
    responses: Responses<WatchFilesResponse>,
) {
    tokio::select! {
        // Nobody listens any more: then it need not be told how it ended.
        () = responses.closed() => {}
        refusal = call.held.ended() => drop(responses.try_send(Err(refusal.into()))),
        done = follow(&path, watcher, queue, &responses) => {
            if let Err(refusal) = done {
                let _ = responses.send(Err(refusal.into())).await;
            }
        }
    }
}

async fn follow(
    path: &[u8],
    mut watcher: Watcher,
    queue: AsyncFd<OwnedFd>,
    responses: &Responses<WatchFilesResponse>,
) -> Result<(), Refusal> {
    if send(responses, Message::Ready(WatchReady {})).await.is_err() {
        return Ok(());
    }
    loop {
        let mut ready = queue.readable().await.map_err(|e| FileError::new(path, e))?;
        let (same, taken) = blocking(move || {
            let taken = watcher.take();
            Ok((watcher, taken))
        })
        .await?;
        watcher = same;
        let changes = taken.map_err(|error| refusal(path, error))?;
        if changes.is_empty() {
            ready.clear_ready();
        }
        for change in changes {
            let message = match change {
                Change::Event(event) => Message::Event(event),
                Change::Overflow => Message::Overflow(WatchOverflow {}),
                Change::End => return Ok(()),
            };
            if send(responses, message).await.is_err() {
                return Ok(());
            }
        }
    }
}

async fn send(responses: &Responses<WatchFilesResponse>, message: Message) -> Result<(), ()> {
    responses.send(Ok(WatchFilesResponse { message: Some(message) })).await.map_err(drop)
}
