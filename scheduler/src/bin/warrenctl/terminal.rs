//! The caller's terminal: its size, raw mode that is given back whatever happens, and the signals that end this program.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use rustix::termios::tcgetwinsize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use warren_proto::v1::TerminalSize;

use crate::failure::Failure;

/// Raw mode until it is dropped.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` where standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _untold = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Number of the signal that says that the terminal is gone.
pub const HANGUP: u8 = 1;

/// Signals that would end this program without a chance to tidy up.
#[derive(Debug)]
pub struct Endings {
    hangup: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
}

impl Endings {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The number of the first that comes.
    pub async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.hangup.recv() => HANGUP,
            _ = self.interrupt.recv() => 2,
            _ = self.quit.recv() => 3,
            _ = self.terminate.recv() => 15,
        }
    }
}

/// Asks before something that cannot be undone. Without a terminal to ask on, `yes` must have been said.
pub fn confirm(what: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::Usage(format!("{what}: say --yes, there is no terminal to ask on")));
    }
    eprint!("{what}. Go on? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(Failure::io("read the answer"))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::Failed("not done".to_owned())),
    }
}

/// The terminal's size; 80 × 24 where there is none.
pub fn size() -> TerminalSize {
    let size =
        tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).or_else(|_| tcgetwinsize(io::stderr()));
    match size {
        Ok(size) if size.ws_col > 0 => TerminalSize { columns: u32::from(size.ws_col), rows: u32::from(size.ws_row) },
        _ => TerminalSize { columns: 80, rows: 24 },
    }
}
