//! Executions: one shim each, which is steered and heard over a socket.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::process::{Child, ChildStderr};
use tokio::sync::{Mutex, watch};

use super::launch::{self, Arguments, Reports, Shim, Stdios};
use super::pty::{Console, Terminal};
use super::record::Record;
use super::{OciDriver, config, host, io_error, layout, runtime};
use crate::driver::{DriverError, ExecControl, ExecSpec, Execution, Exit, InstanceKey, TerminalSize};
use crate::shim::Report;

/// Tries of a start that the runtime refuses for no lasting reason.
const ATTEMPTS: u32 = 3;

/// What crun 1.8 says when its helper process inside died before it executed anything: EPERM to about one first execution
/// in 40, the other to about one in 500 on a busy host. The next try works.
const PASSING: [&str; 2] = ["operation not permitted", "fail startup"];

/// The terminal is on its way before the shim reports, so this passes only if a runtime never sends one.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Most of a runtime's complaint that is read.
const MAX_COMPLAINT: u64 = 4096;

/// Highest signal number on Linux.
const MAX_SIGNAL: i32 = 64;

pub(super) async fn exec(
    driver: &OciDriver,
    key: &InstanceKey,
    record: &Record,
    spec: &ExecSpec,
) -> Result<Execution, DriverError> {
    let mut attempt = 1;
    loop {
        match start(driver, key, record, spec).await {
            Err(DriverError::Runtime { output, .. }) if attempt < ATTEMPTS && is_passing(&output) => attempt += 1,
            other => return other,
        }
    }
}

fn is_passing(output: &str) -> bool {
    let output = output.to_lowercase();
    PASSING.iter().any(|complaint| output.contains(complaint))
}

async fn start(
    driver: &OciDriver,
    key: &InstanceKey,
    record: &Record,
    spec: &ExecSpec,
) -> Result<Execution, DriverError> {
    let what = || format!("execute in {}", key.sandbox);
    let id = uuid::Uuid::new_v4().simple().to_string();
    let directory = driver.layout().instance(key);
    let process = config::exec_process(record, spec, host::open_files()).to_string();
    let file = directory.join(layout::EXEC).join(format!("{id}.json"));
    tokio::fs::write(file, process).await.map_err(io_error("write process.json"))?;
    let console = match spec.terminal {
        // Half of an id is unique enough for the moment that the socket is there, and leaves room in its path.
        Some(_) => {
            Some(Console::listen(driver.layout().short.join(&id[..16])).map_err(io_error("open a console socket"))?)
        }
        None => None,
    };
    let slot = driver.runtime().slot().await;
    // Pipes also where a terminal takes their place: see the shim about /dev/null.
    let stdio = Stdios(Stdio::piped(), Stdio::piped(), Stdio::piped());
    let arguments = Arguments::Exec { directory: &directory, id: &id, console: console.as_ref().map(Console::path) };
    let mut shim = launch::launch(driver.shim_exe(), &arguments, stdio).map_err(io_error("start a shim"))?;
    let first = shim.reports.first().await;
    drop(slot);
    match first {
        Ok(Report::Started) => {}
        Ok(Report::Failed { what, output }) => return Err(refused(shim, what, output, spec).await),
        Ok(Report::Exited { .. }) => return Err(io_error(&what())(io::ErrorKind::InvalidData.into())),
        Err(source) => {
            launch::reap(shim.child);
            return Err(DriverError::Io { what: what(), source });
        }
    }
    match console {
        Some(console) => with_terminal(&console, shim, spec.terminal).await,
        None => Ok(with_pipes(shim)),
    }
}

/// The error for a start that failed: the log's words, and what the runtime wrote to its standard error.
async fn refused(shim: Shim, what: String, mut output: String, spec: &ExecSpec) -> DriverError {
    let Shim { mut child, .. } = shim;
    output.push('\n');
    output.push_str(&printed(child.stderr.take()).await);
    launch::reap(child);
    let output = runtime::last_lines(output.as_bytes());
    let command = spec.command.first().cloned().unwrap_or_default();
    if runtime::says_command_not_found(&output, &command) {
        return DriverError::CommandNotFound { command };
    }
    DriverError::Runtime { what, output }
}

/// The shim and all that it started have ended, so this ends too.
async fn printed(stderr: Option<ChildStderr>) -> String {
    let mut bytes = Vec::new();
    if let Some(stderr) = stderr {
        // What could be read is worth showing, whatever comes after it.
        let _ = stderr.take(MAX_COMPLAINT).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The process may look at its terminal before crun set the size, and is told by SIGWINCH then; once this returns the size
/// is set.
async fn with_terminal(
    console: &Console,
    mut shim: Shim,
    size: Option<TerminalSize>,
) -> Result<Execution, DriverError> {
    // The terminal took their place.
    drop((shim.child.stdin.take(), shim.child.stdout.take(), shim.child.stderr.take()));
    let received = tokio::time::timeout(CONSOLE_TIMEOUT, console.receive()).await;
    let terminal = received
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .and_then(|terminal| size.map_or(Ok(()), |size| terminal.resize(size)).map(|()| terminal))
        .map_err(io_error("receive the terminal"))?;
    Ok(Execution {
        stdin: Box::new(terminal.clone()),
        stdout: Box::new(terminal.clone()),
        stderr: None,
        control: Box::new(Control::new(shim, Some(terminal))),
    })
}

fn with_pipes(mut shim: Shim) -> Execution {
    let child = &mut shim.child;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    Execution {
        stdin: Box::new(stdin.expect("piped at start")),
        stdout: Box::new(stdout.expect("piped at start")),
        stderr: Some(Box::new(stderr.expect("piped at start"))),
        control: Box::new(Control::new(shim, None)),
    }
}

/// What `wait` answers, once it is known; an error as its text, since errors cannot be cloned.
type Outcome = Option<Result<Exit, String>>;

/// Dropping it closes the socket's sending side, upon which the shim kills the process.
struct Control {
    steering: Mutex<OwnedWriteHalf>,
    outcome: watch::Receiver<Outcome>,
    terminal: Option<Terminal>,
}

impl Control {
    fn new(shim: Shim, terminal: Option<Terminal>) -> Self {
        let Shim { child, reports, steering } = shim;
        let (sender, outcome) = watch::channel(None);
        tokio::spawn(follow(child, reports, sender));
        Self { steering: Mutex::new(steering), outcome, terminal }
    }
}

async fn follow(mut child: Child, mut reports: Reports, outcome: watch::Sender<Outcome>) {
    let result = match reports.next().await {
        Ok(Some(Report::Exited { code, signal, oom_killed })) => Ok(Exit { code, signal, oom_killed }),
        Ok(_) => Err("the shim died".to_owned()),
        Err(e) => Err(e.to_string()),
    };
    // Nobody listens where the execution was dropped.
    let _ = outcome.send(Some(result));
    let _ = child.wait().await;
}

#[async_trait]
impl ExecControl for Control {
    async fn wait(&self) -> Result<Exit, DriverError> {
        let failed = |output: String| DriverError::Runtime { what: "wait for an execution".to_owned(), output };
        let mut outcome = self.outcome.clone();
        let known = outcome.wait_for(Option::is_some).await.map_err(|_| failed("the agent is ending".to_owned()))?;
        known.clone().expect("waited for").map_err(failed)
    }

    async fn signal(&self, signal: i32) -> Result<(), DriverError> {
        let byte = match u8::try_from(signal) {
            Ok(byte) if (1..=MAX_SIGNAL).contains(&signal) => byte,
            _ => return Err(DriverError::Unsupported { driver: super::NAME, what: "send a signal outside 1 to 64" }),
        };
        match self.steering.lock().await.write_all(&[byte]).await {
            // It ended.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(io_error("signal an execution")),
        }
    }

    async fn resize(&self, size: TerminalSize) -> Result<(), DriverError> {
        match &self.terminal {
            Some(terminal) => terminal.resize(size).map_err(io_error("resize a terminal")),
            None => Ok(()),
        }
    }
}
