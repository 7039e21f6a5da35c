//! From the client to the process.
//!
//! Signals and sizes must get through while the process does not read its input, so a few pieces of input wait in a queue;
//! when it is full, nothing more is read from the client.

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tonic::Streaming;
use warren_proto::v1::ExecRequest;
use warren_proto::v1::exec_request::Message as Up;

use super::request::{field, terminal};
use crate::data_plane::status::Refusal;
use crate::driver::ExecControl;

/// Pieces of input, each at most 1 MiB, that wait for a process which does not read.
const QUEUE: usize = 4;

/// Feeds the process for as long as the stream lives; returns only why it must end.
pub async fn feed(
    mut inbound: Streaming<ExecRequest>,
    stdin: Box<dyn AsyncWrite + Send + Unpin>,
    control: &dyn ExecControl,
) -> Refusal {
    let (queue, pieces) = mpsc::channel(QUEUE);
    let steer = async move {
        let mut queue = Some(queue);
        loop {
            match inbound.message().await {
                Ok(Some(request)) => {
                    if let Err(refusal) = take(request, &mut queue, control).await {
                        return refusal;
                    }
                }
                // The client has said all that it will say, and still listens.
                Ok(None) => {
                    drop(queue);
                    return std::future::pending().await;
                }
                Err(status) => return Refusal::Stream(Box::new(status)),
            }
        }
    };
    let (refusal, ()) = tokio::join!(steer, write(stdin, pieces));
    refusal
}

async fn take(
    request: ExecRequest,
    queue: &mut Option<mpsc::Sender<Vec<u8>>>,
    control: &dyn ExecControl,
) -> Result<(), Refusal> {
    match request.message {
        Some(Up::Stdin(piece)) => match queue {
            // A process that closed its input is not the client's fault: the piece is dropped.
            Some(queue) => drop(queue.send(piece).await),
            None => return Err(field("stdin", "must not follow `close_stdin`")),
        },
        Some(Up::CloseStdin(_)) => *queue = None,
        Some(Up::Resize(size)) => control.resize(terminal("resize", size)?).await?,
        Some(Up::Signal(signal @ 1..=64)) => control.signal(signal).await?,
        Some(Up::Signal(_)) => return Err(field("signal", "must be 1 to 64")),
        Some(Up::Start(_)) => return Err(field("start", "must come once, first")),
        None => return Err(field("message", "must be set")),
    }
    Ok(())
}

/// Writes until the input is closed, then closes the process's.
async fn write(mut stdin: Box<dyn AsyncWrite + Send + Unpin>, mut pieces: mpsc::Receiver<Vec<u8>>) {
    while let Some(piece) = pieces.recv().await {
        if stdin.write_all(&piece).await.is_err() || stdin.flush().await.is_err() {
            return;
        }
    }
    let _ = stdin.shutdown().await;
}
