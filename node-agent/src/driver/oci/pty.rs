//! The agent's end of a terminal that a runtime made for an execution.
//!
//! The runtime opens the terminal inside the sandbox and sends the controlling end over a Unix socket.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixListener;

use crate::driver::TerminalSize;
use crate::sys;

/// Where the runtime delivers the terminal. Its path goes when this goes.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    pub fn listen(path: PathBuf) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(&path)?, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the terminal.
    pub async fn receive(&self) -> io::Result<Terminal> {
        let (stream, _) = self.listener.accept().await?;
        let end = stream.async_io(Interest::READABLE, || sys::receive_descriptor(stream.as_fd())).await?;
        Terminal::new(end)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // The next agent sweeps what is left.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The controlling end. Clones share it; it closes, and the terminal hangs up, with the last.
#[derive(Debug, Clone)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    fn new(end: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&end)?;
        rustix::fs::fcntl_setfl(&end, flags | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(sys::watch(end, Interest::READABLE | Interest::WRITABLE)?)))
    }

    /// Changes the size; the kernel tells the foreground processes with SIGWINCH.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let TerminalSize { columns, rows } = size;
        Ok(tcsetwinsize(self.0.get_ref(), Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
    }
}

impl AsyncRead for Terminal {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let Ok(result) = ready.try_io(|end| Ok(rustix::io::read(end.get_ref(), into.initialize_unfilled())?))
            else {
                continue;
            };
            return Poll::Ready(match result {
                Ok(count) => {
                    into.advance(count);
                    Ok(())
                }
                // The kernel's way to say that no process has the terminal open any more: end of file.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(()),
                Err(e) => Err(e),
            });
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            let Ok(result) = ready.try_io(|end| Ok(rustix::io::write(end.get_ref(), bytes)?)) else { continue };
            return Poll::Ready(match result {
                Err(e) if e.raw_os_error() == Some(libc::EIO) => Err(ErrorKind::BrokenPipe.into()),
                other => other,
            });
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
