//! One server process: started, signalled and waited for by its id, its output in a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::TcpStream;

/// A server that was asked to end and runs on for longer is stuck.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at a readiness page. There is no event to wait for in a foreign process.
const READY_PAUSE: Duration = Duration::from_millis(25);
/// Looks before giving up: 60 s, since a full restart replays logs and adopts every sandbox on two cores.
const READY_LOOKS: u32 = 2400;
/// A readiness page answers at once or the process is stopped.
const PAGE_PATIENCE: Duration = Duration::from_millis(500);

/// A server, running or not.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    /// `host:port` of its readiness page, and the page, if it has one that can be read.
    http: String,
    ready_page: Option<&'static str>,
    log: PathBuf,
    group: Option<u32>,
    child: Option<Child>,
}

impl Process {
    pub fn new(name: String, program: PathBuf, arguments: Vec<String>, http: String, log: PathBuf) -> Self {
        Self { name, program, arguments, http, ready_page: Some("/readyz"), log, group: None, child: None }
    }

    /// Where a foreign server says whether it is ready.
    #[must_use]
    pub fn ready_at(self, page: &'static str) -> Self {
        Self { ready_page: Some(page), ..self }
    }

    /// Whether it is ready is seen elsewhere.
    #[must_use]
    pub fn without_page(self) -> Self {
        Self { ready_page: None, ..self }
    }

    /// With other group rights than this program's: packet filters tell processes apart by them.
    #[must_use]
    pub fn in_group(self, group: u32) -> Self {
        Self { group: Some(group), ..self }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// While it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it was started, and neither killed nor ended since.
    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// Starts it. It is killed when the thread that called this ends, so call from one that outlives the cluster.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            bail!("{} runs already", self.name);
        }
        let log = self.open_log().with_context(|| format!("open {}", self.log.display()))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(self.group.iter().flat_map(|group| ["--clear-groups".to_owned(), format!("--regid={group}")]))
            .arg(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.name))?;
        self.child = Some(child);
        Ok(())
    }

    fn open_log(&self) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).open(&self.log)
    }

    /// Sends a signal; an error when it does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        kill(pid_of(child)?, signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// SIGKILL, and waits until it is gone. Without effect when it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill().with_context(|| format!("kill {}", self.name))?;
        child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// SIGTERM, and waits until it ended as it should.
    pub async fn terminate(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = pid_of(&child)?;
        kill(pid, Signal::SIGTERM).with_context(|| format!("send SIGTERM to {}", self.name))?;
        let mut ending = tokio::task::spawn_blocking(move || child.wait());
        let ended = match tokio::time::timeout(STOP_PATIENCE, &mut ending).await {
            Ok(ended) => ended??,
            Err(_) => {
                kill(pid, Signal::SIGKILL)?;
                ending.await??;
                bail!("{} did not end within {STOP_PATIENCE:?} of SIGTERM\n{}", self.name, self.log_tail());
            }
        };
        if !ended.success() {
            bail!("{} ended with {} after SIGTERM\n{}", self.name, describe(ended), self.log_tail());
        }
        Ok(())
    }

    /// Waits until it says that it is ready.
    pub async fn await_ready(&mut self) -> anyhow::Result<()> {
        let Some(page) = self.ready_page else { return Ok(()) };
        let mut last = String::from("no connection");
        for _ in 0..READY_LOOKS {
            if let Some(ended) = self.child.as_mut().and_then(|child| child.try_wait().transpose()).transpose()? {
                self.child = None;
                bail!("{} ended with {} before it was ready\n{}", self.name, describe(ended), self.log_tail());
            }
            match tokio::time::timeout(PAGE_PATIENCE, status_line(&self.http, page)).await {
                Ok(Ok(line)) if line.contains(" 200 ") => return Ok(()),
                Ok(Ok(line)) => last = line,
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = "no answer".to_owned(),
            }
            tokio::time::sleep(READY_PAUSE).await;
        }
        bail!("{} is not ready ({last})\n{}", self.name, self.log_tail())
    }

    /// Sets a flag, or takes it away; it counts from the next start.
    pub fn set_flag(&mut self, key: &str, value: Option<&str>) {
        let flag = format!("--{key}");
        if let Some(at) = self.arguments.iter().position(|argument| *argument == flag) {
            self.arguments.drain(at..=at + 1);
        }
        if let Some(value) = value {
            self.arguments.extend([flag, value.to_owned()]);
        }
    }

    /// Another build of the program; it counts from the next start.
    pub fn set_program(&mut self, program: PathBuf) {
        self.program = program;
    }

    /// Runs the program with the server's flags and a subcommand, to its end; its output, or what it said was wrong.
    pub fn run(&self, subcommand: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.program).args(&self.arguments).args(subcommand).output();
        let output = output.with_context(|| format!("run {} {}", self.name, subcommand.join(" ")))?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Waits until it ended by itself, and answers the end of its log.
    pub async fn await_end(&mut self) -> anyhow::Result<String> {
        for _ in 0..READY_LOOKS {
            let ended = self.child.as_mut().map(Child::try_wait).transpose()?.flatten();
            if self.child.is_none() || ended.is_some() {
                self.child = None;
                return Ok(self.log_tail());
            }
            tokio::time::sleep(READY_PAUSE).await;
        }
        bail!("{} runs on\n{}", self.name, self.log_tail())
    }

    /// Whether it was started and has not ended by itself; one that ended with success was asked to.
    pub fn goes_on(&mut self) -> anyhow::Result<bool> {
        let Some(child) = &mut self.child else { return Ok(false) };
        let Some(ended) = child.try_wait()? else { return Ok(true) };
        self.child = None;
        if ended.success() {
            bail!("{} ended with success by itself", self.name);
        }
        Ok(false)
    }

    /// Waits until its log has these words so often. There is no event to wait for in a file.
    pub async fn await_log(&self, words: &str, times: usize) -> anyhow::Result<()> {
        for _ in 0..READY_LOOKS {
            if self.whole_log()?.matches(words).count() >= times {
                return Ok(());
            }
            tokio::time::sleep(READY_PAUSE).await;
        }
        bail!("{} never says `{words}`\n{}", self.name, self.log_tail())
    }

    /// Its log, from its first start on.
    pub fn whole_log(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("read the log of {}", self.name))
    }

    /// The end of its log, for people.
    pub fn log_tail(&self) -> String {
        const LINES: usize = 40;
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(LINES);
        format!("---- end of the log of {} ----\n{}\n", self.name, lines[from..].join("\n"))
    }

    pub fn program(&self) -> &Path {
        &self.program
    }
}

fn pid_of(child: &Child) -> anyhow::Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id()).context("process id")?))
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or_default()),
    }
}

/// The first line that a readiness page answers with, and its text.
async fn status_line(address: &str, page: &str) -> io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok(format!("{} {}", head.lines().next().unwrap_or_default(), body.trim()))
}
