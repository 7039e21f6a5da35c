//! Between a client and a process that it is attached to: input one way, output the other, until the process ended, the
//! client is gone, or the agent stops.
//!
//! Signals and sizes must get through while the process does not read its input: they go past it, and a few pieces of input
//! wait in a queue; when that is full, nothing more is read from the client.

use std::fmt;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::request::field;
use crate::data_plane::status::Refusal;
use crate::driver::{Attachment, Driver, Event, InstanceKey, ProcessInput, ProcessOutput, TerminalSize};

/// Responses under way to a client, each about 64 KiB.
pub const OUTBOUND: usize = 8;

/// Pieces of input, each at most 1 MiB, that wait for a process which does not read.
const QUEUE: usize = 4;

/// A process that a client deals with.
#[derive(Clone)]
pub struct Target {
    pub driver: Arc<dyn Driver>,
    pub key: InstanceKey,
    pub id: String,
}

/// What a client sends.
#[derive(Debug)]
pub enum Input {
    Stdin(Vec<u8>),
    CloseStdin,
    Resize(TerminalSize),
    Signal(u8),
}

impl Input {
    /// The client's messages; that it says no more means nothing.
    pub fn open_ended<T: Send + 'static>(
        inbound: Streaming<T>,
        parse: fn(T) -> Result<Self, Refusal>,
    ) -> impl Stream<Item = Result<Self, Refusal>> + Send + Unpin {
        inbound.map(move |message| match message {
            Ok(message) => parse(message),
            Err(status) => Err(Refusal::Stream(Box::new(status))),
        })
    }

    /// The client's messages; after the last one its input is at its end.
    pub fn closing_at_end<T: Send + 'static>(
        inbound: Streaming<T>,
        parse: fn(T) -> Result<Self, Refusal>,
    ) -> impl Stream<Item = Result<Self, Refusal>> + Send + Unpin {
        let end = futures::stream::iter([Ok(Self::CloseStdin)]);
        Self::open_ended(inbound, parse).chain(end)
    }
}

/// Carries until one side is at its end; says how it went.
pub async fn carry<T>(
    attachment: Attachment,
    inbound: impl Stream<Item = Result<Input, Refusal>> + Send + Unpin,
    responses: &mpsc::Sender<Result<T, Status>>,
    stop: CancellationToken,
    target: &Target,
    wrap: fn(Event) -> Option<T>,
) -> &'static str {
    let Attachment { output, input, .. } = attachment;
    let last = tokio::select! {
        ended = pump(output, responses, wrap) => ended,
        refusal = feed(inbound, input, target) => Err(refusal),
        () = responses.closed() => return "abandoned",
        () = stop.cancelled() => Err(Refusal::Stopping),
    };
    match last {
        Ok(()) => "ended",
        Err(refusal) => {
            // It may be gone.
            let _ = responses.send(Err(refusal.into())).await;
            "failed"
        }
    }
}

/// Sends all output, and how the process ended.
async fn pump<T>(
    mut output: Box<dyn ProcessOutput>,
    responses: &mpsc::Sender<Result<T, Status>>,
    wrap: fn(Event) -> Option<T>,
) -> Result<(), Refusal> {
    loop {
        let event = output.next().await?;
        let last = matches!(event, Event::Exited(_));
        if let Some(response) = wrap(event) {
            // A client that is gone is noticed elsewhere.
            let _ = responses.send(Ok(response)).await;
        }
        if last {
            return Ok(());
        }
    }
}

/// Feeds the process for as long as the stream lives; returns only why it must end.
async fn feed(
    mut inbound: impl Stream<Item = Result<Input, Refusal>> + Send + Unpin,
    input: Box<dyn ProcessInput>,
    target: &Target,
) -> Refusal {
    let (queue, pieces) = mpsc::channel(QUEUE);
    let steer = async move {
        let mut closed = false;
        while let Some(message) = inbound.next().await {
            let taken = match message {
                Ok(Input::Stdin(_)) if closed => Err(field("stdin", "must not follow `close_stdin`")),
                Ok(Input::Stdin(piece)) => {
                    // A process that reads no more is not the client's fault: the piece is dropped.
                    drop(queue.send(Some(piece)).await);
                    Ok(())
                }
                Ok(Input::CloseStdin) => {
                    closed = true;
                    drop(queue.send(None).await);
                    Ok(())
                }
                Ok(Input::Resize(size)) => {
                    target.driver.resize_process(&target.key, &target.id, size).await.map_err(Refusal::from)
                }
                Ok(Input::Signal(signal)) => {
                    target.driver.signal_process(&target.key, &target.id, signal).await.map_err(Refusal::from)
                }
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = taken {
                return refusal;
            }
        }
        // The client has said all that it will say, and still listens.
        drop(queue);
        std::future::pending().await
    };
    let (refusal, ()) = tokio::join!(steer, write(input, pieces));
    refusal
}

/// Writes pieces; `None` is the end of the input.
async fn write(mut input: Box<dyn ProcessInput>, mut pieces: mpsc::Receiver<Option<Vec<u8>>>) {
    while let Some(piece) = pieces.recv().await {
        let written = match piece {
            Some(piece) => input.write(&piece).await,
            None => input.close().await,
        };
        // Its shim is gone: the output says so.
        if written.is_err() {
            return;
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("key", &self.key).field("id", &self.id).finish_non_exhaustive()
    }
}
