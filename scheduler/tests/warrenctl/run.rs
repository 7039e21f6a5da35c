//! Runs the binary and keeps what it said.

use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::fake::Fake;

/// What a run left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Stdout of a run that went well.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// Lines of stdout, sorted.
    pub fn lines(&self) -> Vec<&str> {
        let mut lines: Vec<&str> = self.stdout.lines().collect();
        lines.sort_unstable();
        lines
    }
}

/// The binary, with nothing of this process's environment that it reads.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warrenctl"));
    command.args(args).env_clear().env("HOME", "/nonexistent").kill_on_drop(true);
    command
}

/// Runs it with input until it ends.
pub async fn run(mut command: Command, input: &[u8]) -> Ran {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("warrenctl starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    let feeding = tokio::spawn(async move {
        let _may_not_read = stdin.write_all(&input).await;
    });
    let output = child.wait_with_output().await.expect("warrenctl ends");
    feeding.abort();
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs it against the region.
pub async fn ctl(fake: &Fake, args: &[&str]) -> Ran {
    ctl_with(fake, args, b"").await
}

pub async fn ctl_with(fake: &Fake, args: &[&str], input: &[u8]) -> Ran {
    let mut command = command(args);
    command.env("WARREN_ENDPOINTS", &fake.address);
    run(command, input).await
}

/// A time that is shown as `2d3h` for the next half hour.
pub fn two_days_ago() -> prost_types::Timestamp {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = now.saturating_sub(Duration::from_secs(51 * 3600 + 60));
    prost_types::Timestamp { seconds: i64::try_from(then.as_secs()).unwrap_or_default(), nanos: 0 }
}
