//! What people write of a sandbox's settings: egress, policies, deadlines, states, secrets.

use std::time::Duration;

use clap::{Args, ValueEnum};
use prost_types::Timestamp;
use warren_proto::v1::{Egress, EgressMode, OnIsolation, RestartPolicy, SandboxState};

use crate::failure::Failure;
use crate::names;

/// When a sandbox ends by itself.
#[derive(Debug, Clone, Args)]
pub struct Deadline {
    /// End it by itself this long from now, such as 30m
    #[arg(long, value_parser = names::duration, conflicts_with = "deadline")]
    ttl: Option<Duration>,
    /// End it by itself at this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    deadline: Option<Timestamp>,
}

impl Deadline {
    pub fn is_some(&self) -> bool {
        self.ttl.is_some() || self.deadline.is_some()
    }

    /// As the wire has it: one of the two.
    pub fn wire(&self) -> (Option<prost_types::Duration>, Option<Timestamp>) {
        (self.ttl.and_then(|ttl| ttl.try_into().ok()), self.deadline)
    }
}

/// When a sandbox is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    Never,
    OnFailure,
    Always,
}

impl From<Restart> for RestartPolicy {
    fn from(from: Restart) -> Self {
        match from {
            Restart::Never => Self::Never,
            Restart::OnFailure => Self::OnFailure,
            Restart::Always => Self::Always,
        }
    }
}

/// What happens on a node that is silent for longer than its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// It runs on, and nowhere else
    Keep,
    /// It is frozen, and started again elsewhere
    Freeze,
}

impl From<Isolation> for OnIsolation {
    fn from(from: Isolation) -> Self {
        match from {
            Isolation::Keep => Self::Keep,
            Isolation::Freeze => Self::Freeze,
        }
    }
}

/// `none`, `public`, or destinations separated by commas; the schedulers say what is wrong with one.
pub fn egress(text: &str) -> Egress {
    match text {
        "none" => Egress { mode: EgressMode::None.into(), allow: Vec::new() },
        "public" => Egress { mode: EgressMode::Public.into(), allow: Vec::new() },
        list => Egress {
            mode: EgressMode::List.into(),
            allow: list.split(',').map(|entry| entry.trim().to_owned()).filter(|entry| !entry.is_empty()).collect(),
        },
    }
}

/// `running`, `stopped` and the like.
pub fn state(text: &str) -> Result<SandboxState, String> {
    let name = format!("SANDBOX_STATE_{}", text.to_ascii_uppercase());
    let known = SandboxState::from_str_name(&name).filter(|state| *state != SandboxState::Unspecified);
    known.ok_or_else(|| format!("`{text}` is no state: expected pending, starting, running, stopped or the like"))
}

/// `NAME=VALUE` as it is, `NAME` from this program's own environment.
pub fn secret(text: &str) -> Result<(String, String), Failure> {
    if let Some((name, value)) = text.split_once('=') {
        return Ok((name.to_owned(), value.to_owned()));
    }
    let value = std::env::var(text).map_err(|_| Failure::Usage(format!("--secret {text}: not in the environment")))?;
    Ok((text.to_owned(), value))
}
