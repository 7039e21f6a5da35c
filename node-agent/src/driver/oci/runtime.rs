//! Calls of the OCI runtime's command line, bounded in number and in time.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::kind::{self, Kind};
use crate::driver::DriverError;

/// Longest that one call of the runtime may take. The slowest seen under load was 1.7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// Most of a runtime's output that goes into an error.
const MAX_OUTPUT: usize = 1024;

/// Runtime processes at a time for each processor. They are bound by processors; more of them only hold more memory
/// (about 12 MiB each for one written in Go).
const CALLS_A_CPU: usize = 3;

/// A runtime that this host has.
#[derive(Debug, Clone)]
pub struct Offer {
    pub program: String,
    pub kind: Kind,
    /// Its first line.
    pub version: String,
}

impl Offer {
    pub fn name(&self) -> &str {
        kind::name_of(&self.program)
    }
}

/// The OCI runtimes of this host, which share a directory for their state.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// The default first; at least one.
    offers: Vec<Offer>,
    root: PathBuf,
    slots: Arc<Semaphore>,
}

impl Runtime {
    /// Asks each of the `programs`, with commas between them, what it is. The first must answer; of the others those count that
    /// do. Blocks.
    pub fn probe(programs: &str, root: PathBuf) -> Result<Self, DriverError> {
        let mut offers: Vec<Offer> = Vec::new();
        for program in programs.split(',').map(str::trim).filter(|program| !program.is_empty()) {
            if offers.iter().any(|offer| offer.name() == kind::name_of(program)) {
                continue;
            }
            match probe(program) {
                Ok(offer) => {
                    tracing::info!(runtime = offer.name(), version = %offer.version, "runtime offered");
                    offers.push(offer);
                }
                Err(error) if offers.is_empty() => return Err(error),
                Err(error) => tracing::warn!(runtime = program, %error, "runtime not offered"),
            }
        }
        if offers.is_empty() {
            let output = "none is configured; name at least one, e.g. runc".to_owned();
            return Err(DriverError::Runtime { what: "find an OCI runtime".to_owned(), output });
        }
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self { offers, root, slots: Arc::new(Semaphore::new(cpus * CALLS_A_CPU)) })
    }

    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// The one of that name, or the default.
    pub fn offer(&self, name: Option<&str>) -> Option<&Offer> {
        match name {
            Some(name) => self.offers.iter().find(|offer| offer.name() == name),
            None => self.offers.first(),
        }
    }

    /// The default's.
    pub fn program(&self) -> &str {
        &self.offers[0].program
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What runtimes keep of an instance: a directory named after it, or files whose names begin so.
    pub fn states(&self, container_id: &str) -> io::Result<Vec<PathBuf>> {
        let names = self.names()?.into_iter();
        Ok(names.filter(|name| container_of(name) == container_id).map(|name| self.root.join(name)).collect())
    }

    /// Every instance that runtimes keep something of.
    pub fn containers(&self) -> io::Result<BTreeSet<String>> {
        Ok(self.names()?.iter().map(|name| container_of(name).to_owned()).collect())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.root)?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// Waits for the right to start a runtime process.
    pub async fn slot(&self) -> SemaphorePermit<'_> {
        self.slots.acquire().await.expect("the semaphore is never closed")
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

/// Asks a runtime what it is.
fn probe(program: &str) -> Result<Offer, DriverError> {
    let what = || format!("run `{program} --version`");
    let output = std::process::Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| DriverError::Io { what: what(), source })?;
    if !output.status.success() {
        return Err(DriverError::Runtime { what: what(), output: last_lines(&output.stderr) });
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.lines().next().unwrap_or_default().to_owned();
    Ok(Offer { program: program.to_owned(), kind: Kind::of_version(&said), version })
}

/// The instance's part of a state's name: `<id>`, or gVisor's `<id>.lock`, `<id>_sandbox:<id>.state` and `runsc-<id>.sock`.
fn container_of(name: &str) -> &str {
    name.strip_prefix("runsc-").unwrap_or(name).split(['.', '_']).next().unwrap_or(name)
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
        || output.contains(&format!("failed to load {}:", command.to_lowercase()))
        || output.contains(&format!("finding executable \"{}\"", command.to_lowercase()))
        || output.contains(&format!("executing command \"{}\"", command.to_lowercase()))
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
    fn all_that_a_runtime_keeps_is_known_by_its_instance() {
        for name in ["c0ffee", "c0ffee.lock", "c0ffee_sandbox:c0ffee.state", "runsc-c0ffee.sock"] {
            assert_eq!(container_of(name), "c0ffee");
        }
    }

    #[test]
    fn the_default_must_be_here_and_others_may_be() {
        let probe = |programs| Runtime::probe(programs, PathBuf::from("/nowhere"));
        assert!(probe("no-such-runtime,true").is_err() && probe(" , ").is_err());
        let offered = probe("true, no-such-runtime,/bin/true,echo").expect("the first answers");
        assert_eq!(offered.offers().iter().map(Offer::name).collect::<Vec<_>>(), ["true", "echo"]);
        assert!(offered.offer(Some("echo")).is_some() && offered.offer(Some("runc")).is_none());
        assert_eq!(offered.offer(None).expect("a default").name(), "true");
    }

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
        let of_gvisor = "executing command \"nope\" in sandbox: error finding executable \"nope\" in PATH [/bin]: no such file or directory";
        assert!(says_command_not_found(of_gvisor, "nope"));
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
