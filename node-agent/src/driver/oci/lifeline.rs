//! How one process learns that another ended, though it is not its child and may have been started by an agent long gone.
//!
//! A lifeline is a FIFO. Whoever must be outlived holds it open for writing; a reader gets end of file once the last holder
//! is gone, however it went. The kernel keeps the books: no pid that could be reused, no lock file that could be stale, no
//! polling, no thread for each waiter.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::io::Interest;

use crate::sys;

/// Makes a lifeline that nobody holds yet.
pub fn create(path: &Path) -> io::Result<()> {
    Ok(mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?)
}

/// Holds a lifeline until the file is dropped or the process ends.
pub fn hold(path: &Path) -> io::Result<File> {
    // For reading too: opening a FIFO for writing alone waits for a reader.
    File::options().read(true).write(true).open(path)
}

/// Whether somebody holds it. One that does not exist is held by nobody.
pub fn is_held(path: &Path) -> io::Result<bool> {
    match open(path) {
        Ok(mut end) => look(&mut end),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Waits until nobody holds it.
pub async fn released(path: &Path) -> io::Result<()> {
    let mut end = match open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // A FIFO that had no writer when it was opened never reports a hang-up: look first.
    if !look(&mut end)? {
        return Ok(());
    }
    let end = sys::watch(end.into(), Interest::READABLE)?;
    loop {
        let mut ready = end.readable().await?;
        if let Ok(count) = ready.try_io(|end| Ok(rustix::io::read(end, &mut [0u8; 1])?))
            && count? == 0
        {
            return Ok(());
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn look(end: &mut File) -> io::Result<bool> {
    match end.read(&mut [0u8; 1]) {
        Ok(count) => Ok(count > 0),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn is_released_when_the_last_holder_goes_and_not_before() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("line");
        create(&path).expect("create");
        assert!(!is_held(&path).expect("look"));
        released(&path).await.expect("nobody ever held it");
        let first = hold(&path).expect("hold");
        let second = hold(&path).expect("hold");
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { released(&path).await }
        });
        drop(first);
        assert!(is_held(&path).expect("look"));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.expect("task").expect("released");
        assert!(!is_held(&path).expect("look"));
    }

    #[tokio::test]
    async fn one_that_does_not_exist_is_released() {
        let path = Path::new("/nonexistent/line");
        assert!(!is_held(path).expect("look"));
        released(path).await.expect("released");
    }
}
