//! Starts shims and hears from them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};

use crate::failpoint;
use crate::shim::Report;
use crate::sys;

/// Longest that a start may take: the slowest seen under load took about 5 s.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A shim that runs.
#[derive(Debug)]
pub struct Shim {
    pub child: Child,
    pub reports: Reports,
    /// Each byte is a signal; dropping it ends an execution.
    pub steering: OwnedWriteHalf,
}

/// What a shim says.
#[derive(Debug)]
pub struct Reports(Lines<BufReader<OwnedReadHalf>>);

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

/// Standard input, output and error of a shim.
#[derive(Debug)]
pub struct Stdios(pub Stdio, pub Stdio, pub Stdio);

impl Stdios {
    pub fn none() -> Self {
        Self(Stdio::null(), Stdio::null(), Stdio::null())
    }
}

/// Starts `exe shim <command> <directory> [<id>] <socket> [<console>]`. The shim gets nothing of this process's environment
/// but PATH.
pub fn launch(exe: &Path, command: &Arguments<'_>, stdio: Stdios) -> io::Result<Shim> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut line = std::process::Command::new(exe);
    let number = sys::inherit(&mut line, OwnedFd::from(theirs)).to_string();
    match command {
        Arguments::Run { directory } => line.arg("shim").arg("run").arg(directory).arg(number),
        Arguments::Exec { directory, id, console } => {
            line.arg("shim").arg("exec").arg(directory).arg(id).arg(number).args(*console)
        }
    };
    line.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    line.envs(failpoint::inherited());
    line.stdin(stdio.0).stdout(stdio.1).stderr(stdio.2).current_dir("/");
    // Dropping the command closes our copy of the shim's end: else we would never see that it let go.
    let child = Command::from(line).spawn()?;
    let (read, steering) = UnixStream::from_std(ours)?.into_split();
    Ok(Shim { child, reports: Reports(BufReader::new(read).lines()), steering })
}

/// What a shim is to do.
#[derive(Debug)]
pub enum Arguments<'a> {
    Run { directory: &'a Path },
    Exec { directory: &'a Path, id: &'a str, console: Option<&'a Path> },
}

/// Waits for a shim in the background, so that it does not stay as a zombie.
pub fn reap(mut child: Child) {
    tokio::spawn(async move { drop(child.wait().await) });
}
