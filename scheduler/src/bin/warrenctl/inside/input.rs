//! What goes to a process: standard input, its end, and the terminal's changes of size.

use std::io::Read;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use warren_proto::v1::TerminalSize;

use crate::failure::Failure;
use crate::terminal::size;

/// Bytes of input in one message: a pipe's capacity.
const INPUT_BYTES: usize = 64 * 1024;

/// Pieces of input read ahead.
const READ_AHEAD: usize = 2;

/// Messages under way to the process; then input waits.
pub const OUTBOUND: usize = 8;

/// What docker detaches by: Ctrl-P, Ctrl-Q.
const DETACH: [u8; 2] = [0x10, 0x11];

/// One message to a process.
#[derive(Debug, Clone, PartialEq)]
pub enum Say {
    Stdin(Vec<u8>),
    CloseStdin,
    Resize(TerminalSize),
    Signal(i32),
}

/// Where input comes from, and what of it counts.
#[derive(Debug)]
pub struct Input {
    pieces: Option<mpsc::Receiver<Vec<u8>>>,
    /// Its end has to be told yet.
    closes: bool,
    resized: Option<Signal>,
    detach: Option<Detach>,
}

impl Input {
    /// Nothing is read before the first [`feed`](Self::feed), unless `interactive`.
    pub fn new(interactive: bool, tty: bool) -> Result<Self, Failure> {
        let window = || signal(SignalKind::window_change()).map_err(Failure::io("listen for changes of size"));
        Ok(Self {
            pieces: interactive.then(read_stdin),
            closes: !interactive,
            resized: if tty { Some(window()?) } else { None },
            detach: None,
        })
    }

    /// The input stays as it is: neither read nor ended.
    pub fn silent(mut self) -> Self {
        self.pieces = None;
        self.closes = false;
        self
    }

    /// Ctrl-P Ctrl-Q ends [`feed`](Self::feed), and goes nowhere.
    pub fn detachable(mut self) -> Self {
        self.detach = Some(Detach::default());
        self
    }

    /// Hands input on. Ends when the caller detaches; where nobody takes it any more, never. Nothing is lost when this is
    /// dropped: the next one goes on.
    pub async fn feed(&mut self, to: &mpsc::Sender<Say>) {
        while let Ok(room) = to.reserve().await {
            match self.next().await {
                Some(say) => room.send(say),
                None => return,
            }
        }
        std::future::pending().await
    }

    async fn next(&mut self) -> Option<Say> {
        if std::mem::take(&mut self.closes) {
            return Some(Say::CloseStdin);
        }
        loop {
            tokio::select! {
                piece = piece(&mut self.pieces) => match (piece, &mut self.detach) {
                    (None, _) => {
                        self.pieces = None;
                        return Some(Say::CloseStdin);
                    }
                    (Some(bytes), None) => return Some(Say::Stdin(bytes)),
                    (Some(bytes), Some(detach)) => match detach.pass(&bytes)? {
                        held if held.is_empty() => {}
                        bytes => return Some(Say::Stdin(bytes)),
                    },
                },
                () = changed(&mut self.resized) => return Some(Say::Resize(size())),
            }
        }
    }
}

/// The next piece, `None` at the end of input; never, once that was said.
async fn piece(pieces: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match pieces {
        Some(pieces) => pieces.recv().await,
        None => std::future::pending().await,
    }
}

async fn changed(resized: &mut Option<Signal>) {
    match resized {
        Some(resized) => drop(resized.recv().await),
        None => std::future::pending().await,
    }
}

/// Looks for the keys that detach. A Ctrl-P is held back until it is known what follows it.
#[derive(Debug, Default)]
struct Detach {
    held: bool,
}

impl Detach {
    /// What of the bytes is for the process; `None`: detach.
    fn pass(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            if std::mem::take(&mut self.held) {
                if byte == DETACH[1] {
                    return None;
                }
                passed.push(DETACH[0]);
            }
            if byte == DETACH[0] {
                self.held = true;
            } else {
                passed.push(byte);
            }
        }
        Some(passed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_detach_are_found_wherever_reads_part_them() {
        let mut detach = Detach::default();
        assert_eq!(detach.pass(b"ls\x10").as_deref(), Some(&b"ls"[..]));
        assert_eq!(detach.pass(b"\x11more"), None);
        assert_eq!(Detach::default().pass(b"a\x10\x11"), None);
    }

    #[test]
    fn other_keys_reach_the_process() {
        let mut detach = Detach::default();
        assert_eq!(detach.pass(b"\x11a\x10").as_deref(), Some(&b"\x11a"[..]));
        assert_eq!(detach.pass(b"b").as_deref(), Some(&b"\x10b"[..]));
        assert_eq!(detach.pass(b"\x10\x10\x10").as_deref(), Some(&b"\x10\x10"[..]));
        assert_eq!(detach.pass(b"\x11"), None);
    }
}
