//! What goes to a process: standard input, its end, and the terminal's changes of size.

use std::io::Read;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::{CloseStdin, ExecRequest};

use crate::terminal::size;

/// Bytes of input in one message: a pipe's capacity.
const INPUT_BYTES: usize = 64 * 1024;

/// Pieces of input read ahead.
const READ_AHEAD: usize = 2;

/// Hands input on until the process is gone.
pub async fn feed(to: mpsc::Sender<ExecRequest>, interactive: bool, tty: bool) {
    let Ok(mut resized) = signal(SignalKind::window_change()) else { return };
    let mut stdin = interactive.then(read_stdin);
    if !interactive && send(&to, Up::CloseStdin(CloseStdin {})).await.is_none() {
        return;
    }
    loop {
        let message = tokio::select! {
            piece = next(&mut stdin) => piece.map_or_else(|| {
                stdin = None;
                Up::CloseStdin(CloseStdin {})
            }, Up::Stdin),
            _ = resized.recv(), if tty => Up::Resize(size()),
            () = to.closed() => return,
        };
        if send(&to, message).await.is_none() {
            return;
        }
    }
}

async fn send(to: &mpsc::Sender<ExecRequest>, message: Up) -> Option<()> {
    to.send(ExecRequest { message: Some(message) }).await.ok()
}

/// The next piece, `None` at the end of input; never, once that was said.
async fn next(stdin: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match stdin {
        Some(pieces) => pieces.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads on a thread of its own, which nobody waits for: a read from a terminal cannot be taken back, and the program must
/// end with the process, not with the next key.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (pieces, receiver) = mpsc::channel(READ_AHEAD);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0u8; INPUT_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if pieces.blocking_send(buffer[..count].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
