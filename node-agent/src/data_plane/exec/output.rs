//! From the process to the client: all of its output, then how it ended.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use warren_proto::v1::exec_response::Message as Down;

use super::{Responses, response};
use crate::clock::BootInstant;
use crate::data_plane::status::Refusal;
use crate::driver::{ExecControl, Exit};

/// One read: the size of a pipe.
const BUFFER: usize = 64 << 10;

/// After the process ended its output is at an end once nothing comes for so long: a child that it left behind may hold the
/// pipe open for ever.
const QUIET: Duration = Duration::from_millis(500);

/// Such a child may also go on writing for ever. What the process itself wrote was in the pipe when it ended, so no more is
/// read than a pipe can hold (1 MiB, pipe(7)), and waited for no longer than this. Waiting for the client does not count.
const MAX_AFTER_END: usize = 1 << 20;
const LINGER: Duration = Duration::from_secs(2);

type Output = Box<dyn AsyncRead + Send + Unpin>;

/// Sends all output; returns how the process ended.
pub async fn until_end(
    stdout: Output,
    stderr: Option<Output>,
    control: &dyn ExecControl,
    responses: &Responses,
) -> Result<Exit, Refusal> {
    let ended = CancellationToken::new();
    let stdout = pump(stdout, responses, Down::Stdout, &ended);
    let stderr = async {
        if let Some(stderr) = stderr {
            pump(stderr, responses, Down::Stderr, &ended).await;
        }
    };
    let wait = async {
        let exit = control.wait().await;
        ended.cancel();
        exit
    };
    let (exit, (), ()) = tokio::join!(wait, stdout, stderr);
    Ok(exit?)
}

async fn pump(mut from: Output, to: &Responses, wrap: fn(Vec<u8>) -> Down, ended: &CancellationToken) {
    let mut buffer = vec![0; BUFFER];
    let (mut room, mut patience) = (MAX_AFTER_END, LINGER);
    loop {
        let read = if ended.is_cancelled() {
            let most = room.min(BUFFER);
            let begun = BootInstant::now();
            let read = timeout(QUIET.min(patience), from.read(&mut buffer[..most])).await.ok().and_then(Result::ok);
            patience = patience.saturating_sub(BootInstant::now().since(begun));
            room -= read.unwrap_or(0);
            read
        } else {
            tokio::select! {
                read = from.read(&mut buffer) => read.ok(),
                () = ended.cancelled() => continue,
            }
        };
        // A terminal answers an error where a pipe answers its end. Without room nothing is read.
        let Some(length @ 1..) = read else { return };
        if to.send(Ok(response(wrap(buffer[..length].to_vec())))).await.is_err() {
            return;
        }
    }
}
