//! `sandbox exec -it` on a real terminal: sizes go to the process, and the terminal is as it was afterwards.

use std::os::fd::OwnedFd;
use std::process::Stdio;

use nix::libc;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::{Pid, write};
use rustix::termios::tcsetwinsize;
use tokio::process::Child;
use warren_proto::v1::TerminalSize;

use crate::fake::Fake;
use crate::run::command;

struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

fn terminal() -> Terminal {
    let size = Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("a terminal");
    Terminal { master, slave }
}

impl Terminal {
    fn is_raw(&self) -> bool {
        let now = tcgetattr(&self.slave).expect("settings");
        !now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn stdio(&self) -> Stdio {
        self.slave.try_clone().expect("a descriptor").into()
    }

    fn exec(&self, fake: &Fake, program: &str) -> Child {
        let mut command = command(&["sandbox", "exec", "-it", "x", "--", program]);
        command.env("WARREN_ENDPOINTS", &fake.address).env("TERM", "vt100");
        command.stdin(self.stdio()).stdout(self.stdio()).stderr(Stdio::null());
        command.spawn().expect("warrenctl starts")
    }
}

/// Waits until the process was told of a size: by then it has started, and the terminal is raw.
async fn resized(fake: &Fake, child: &Child, terminal: &Terminal, columns: u16) {
    let pid = Pid::from_raw(i32::try_from(child.id().expect("it runs")).expect("a pid"));
    loop {
        let changed = fake.region.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let wanted = TerminalSize { columns: u32::from(columns), rows: 50 };
        if fake.book().resizes.contains(&wanted) {
            return;
        }
        // The size that it starts with is the first one: raw means that it has started.
        if terminal.is_raw() {
            let size = rustix::termios::Winsize { ws_row: 50, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            tcsetwinsize(&terminal.master, size).expect("a size");
            // The terminal controls no session here, so the kernel signals nobody.
            kill(pid, Signal::SIGWINCH).expect("a signal");
        }
        let _again = tokio::time::timeout(std::time::Duration::from_millis(50), changed).await;
    }
}

#[tokio::test]
async fn the_process_gets_the_terminal_and_its_changes() {
    let (fake, terminal) = (Fake::start().await, terminal());
    let mut child = terminal.exec(&fake, "hang");
    resized(&fake, &child, &terminal, 132).await;
    assert!(terminal.is_raw());
    let start = fake.book().execs[0].clone();
    assert_eq!(start.terminal, Some(TerminalSize { columns: 100, rows: 40 }));
    assert_eq!(start.environment["TERM"], "vt100");
    assert_eq!(child.try_wait().expect("a child"), None);
    kill(Pid::from_raw(i32::try_from(child.id().expect("it runs")).expect("a pid")), Signal::SIGTERM)
        .expect("a signal");
    let status = child.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(128 + libc::SIGTERM));
    assert!(!terminal.is_raw(), "given back after a signal");
}

#[tokio::test]
async fn it_ends_with_the_process_and_not_with_the_next_key() {
    let (fake, terminal) = (Fake::start().await, terminal());
    let status = terminal.exec(&fake, "say").wait().await.expect("it ends");
    assert_eq!(status.code(), Some(0));
    assert!(!terminal.is_raw(), "given back at the end");
}

#[tokio::test]
async fn keys_reach_the_process_as_they_are() {
    let (fake, terminal) = (Fake::start().await, terminal());
    let mut child = terminal.exec(&fake, "echo");
    resized(&fake, &child, &terminal, 80).await;
    // In raw mode Ctrl-C is a byte like any other.
    write(&terminal.master, b"\x03").expect("a key");
    let mut seen = [0u8; 1];
    let master = terminal.master.try_clone().expect("a descriptor");
    let read = tokio::task::spawn_blocking(move || nix::unistd::read(&master, &mut seen).map(|count| (count, seen)));
    assert_eq!(read.await.expect("a read").expect("a key"), (1, *b"\x03"));
    assert_eq!(child.try_wait().expect("a child"), None);
    child.kill().await.expect("it ends");
}
