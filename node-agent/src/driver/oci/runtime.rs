//! Calls of the OCI runtime's command line, bounded in number and in time.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::driver::DriverError;

/// Longest that one call of the runtime may take. The slowest seen under load was 1.7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// Most of a runtime's output that goes into an error.
const MAX_OUTPUT: usize = 1024;

/// Runtime processes at a time for each processor. They are bound by processors; more of them only hold more memory
/// (about 12 MiB each for one written in Go).
const CALLS_A_CPU: usize = 3;

/// An OCI runtime.
#[derive(Debug, Clone)]
pub struct Runtime {
    program: String,
    root: PathBuf,
    slots: Arc<Semaphore>,
}

impl Runtime {
    pub fn new(program: String, root: PathBuf) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { program, root, slots: Arc::new(Semaphore::new(cpus * CALLS_A_CPU)) }
    }

    pub fn program(&self) -> &str {
        &self.program
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directory in which runtimes keep an instance's state.
    pub fn state(&self, container_id: &str) -> PathBuf {
        self.root.join(container_id)
    }

    /// Waits for the right to start a runtime process.
    pub async fn slot(&self) -> SemaphorePermit<'_> {
        self.slots.acquire().await.expect("the semaphore is never closed")
    }

    /// Asks the runtime what it is. Blocks.
    pub fn probe(&self) -> Result<String, DriverError> {
        let what = || format!("run `{} --version`", self.program);
        let output = std::process::Command::new(&self.program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| DriverError::Io { what: what(), source })?;
        if !output.status.success() {
            return Err(DriverError::Runtime { what: what(), output: last_lines(&output.stderr) });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `<program> --root <root> <arguments>` to its end with `program`, which may differ from the configured one for an
    /// instance of an earlier configuration.
    pub async fn call(&self, program: &str, arguments: &[&str]) -> Result<(), DriverError> {
        let what = || format!("{program} {}", arguments.join(" "));
        let _slot = self.slot().await;
        let mut command = Command::new(program);
        command.arg("--root").arg(&self.root).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(CALL_TIMEOUT, command.output())
            .await
            .map_err(|_| timed_out(what()))?
            .map_err(|source| DriverError::Io { what: what(), source })?;
        if output.status.success() {
            return Ok(());
        }
        Err(DriverError::Runtime { what: what(), output: last_lines(&[output.stdout, output.stderr].concat()) })
    }
}

/// The error for something that took too long.
pub fn timed_out(what: String) -> DriverError {
    DriverError::Io { what, source: std::io::ErrorKind::TimedOut.into() }
}

/// The end of what a runtime printed, as text.
pub fn last_lines(output: &[u8]) -> String {
    let tail = &output[output.len().saturating_sub(MAX_OUTPUT)..];
    String::from_utf8_lossy(tail).trim().to_owned()
}

/// Whether a runtime's complaint means that the program to execute is not there or cannot be executed. Runtimes say it in
/// words only; these are runc's (Go's `exec:` errors, and the kernel's after a path) and crun's.
pub fn says_command_not_found(output: &str, command: &str) -> bool {
    let output = output.to_lowercase();
    let reason = ["not found", "no such file or directory", "permission denied", "is a directory", "exec format error"]
        .iter()
        .any(|reason| output.contains(reason));
    let about_the_command = output.contains("executable file")
        || output.contains("open executable")
        || output.contains(&format!("exec: \\\"{}\\\"", command.to_lowercase()))
        || output.contains(&format!("exec: \"{}\"", command.to_lowercase()))
        || output.contains("exec /")
        || output.contains("exec user process");
    reason && about_the_command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_from_other_complaints() {
        let missing = [
            "exec failed: unable to start container process: exec: \"nope\": executable file not found in $PATH",
            "exec failed: unable to start container process: exec: \"/nope\": stat /nope: no such file or directory",
            "error executing setns: executable file `nope` not found in $PATH: No such file or directory",
        ];
        for output in missing {
            assert!(says_command_not_found(output, "nope") || says_command_not_found(output, "/nope"), "{output}");
        }
        let other = [
            "chdir to cwd (\"/nope\") set in config.json failed: no such file or directory",
            "container \"x\" does not exist",
            "resource temporarily unavailable",
        ];
        for output in other {
            assert!(!says_command_not_found(output, "nope"), "{output}");
        }
    }

    #[test]
    fn only_the_end_of_the_output_is_kept() {
        let long = format!("{}the end\n", "x".repeat(10 * MAX_OUTPUT));
        let kept = last_lines(long.as_bytes());
        assert!(kept.ends_with("the end") && kept.len() <= MAX_OUTPUT);
    }
}
