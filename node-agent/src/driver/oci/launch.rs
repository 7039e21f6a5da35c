//! Starts shims and hears from them.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::failpoint;
use crate::shim::Report;
use crate::sys;

/// Longest that a start may take: the slowest seen under load took about 5 s.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);

/// An instance's shim that runs.
#[derive(Debug)]
pub struct Shim {
    pub child: Child,
    pub reports: Reports,
}

/// What a shim says.
#[derive(Debug)]
pub struct Reports(Lines<BufReader<UnixStream>>);

impl Reports {
    /// The next report; `None` once the shim is gone or has let go of the socket.
    pub async fn next(&mut self) -> io::Result<Option<Report>> {
        match self.0.next_line().await? {
            Some(line) => Ok(Some(serde_json::from_str(&line)?)),
            None => Ok(None),
        }
    }

    /// The first one, or why there is none.
    pub async fn first(&mut self) -> io::Result<Report> {
        let first = tokio::time::timeout(START_TIMEOUT, self.next()).await.map_err(|_| io::ErrorKind::TimedOut)?;
        first?.ok_or_else(|| io::Error::other("the shim died"))
    }
}

/// Starts `exe shim run <directory> <socket>`.
pub fn launch(exe: &Path, directory: &Path) -> io::Result<Shim> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let child = start(exe, theirs.into(), [OsStr::new("run"), directory.as_os_str()])?;
    Ok(Shim { child, reports: Reports(BufReader::new(UnixStream::from_std(ours)?).lines()) })
}

/// Starts `exe shim exec <directory> <id> <listener>`.
pub fn launch_process(exe: &Path, directory: &Path, id: &str, listener: OwnedFd) -> io::Result<Child> {
    start(exe, listener, [OsStr::new("exec"), directory.as_os_str(), OsStr::new(id)])
}

/// Starts `exe shim <arguments> <descriptor>`. The shim gets nothing of this process's environment but PATH, and of its
/// descriptors only `inherited`.
fn start<const N: usize>(exe: &Path, inherited: OwnedFd, arguments: [&OsStr; N]) -> io::Result<Child> {
    let mut line = std::process::Command::new(exe);
    let number = sys::inherit(&mut line, inherited).to_string();
    line.arg("shim").args(arguments).arg(number);
    line.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    line.envs(failpoint::inherited());
    line.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    // Dropping the command closes our copy of the shim's end: else we would never see that it let go.
    Command::from(line).spawn()
}

/// Waits for a shim in the background, so that it does not stay as a zombie.
pub fn reap(mut child: Child) {
    tokio::spawn(async move { drop(child.wait().await) });
}
