//! Calls of `nft`, each one transaction: all of it happens or nothing.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::NetworkError;

/// Most of a complaint that is passed on.
const MAX_COMPLAINT: usize = 512;

/// Has the kernel do what `script` says. Blocks for some milliseconds.
pub fn apply(script: &str) -> Result<(), NetworkError> {
    run(&["-f", "-"], script).map(drop)
}

/// Answers what the arguments ask for.
pub fn list(arguments: &[&str]) -> Result<Vec<u8>, NetworkError> {
    run(arguments, "")
}

fn run(arguments: &[&str], input: &str) -> Result<Vec<u8>, NetworkError> {
    let failed = |source: io::Error| NetworkError::Io { what: "run nft (Debian: nftables)".to_owned(), source };
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // It says why itself where it does not read to the end.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = &output.stderr[..output.stderr.len().min(MAX_COMPLAINT)];
    Err(NetworkError::Nft { output: String::from_utf8_lossy(complaint).trim().to_owned() })
}
