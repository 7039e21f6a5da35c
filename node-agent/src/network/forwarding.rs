//! Whether the host forwards packets at all: a setting that agents, and others, share.
//!
//! The agent that finds it off sets it and leaves a mark; the last agent to be cleaned away puts it back where there is one.
//! Call both under the lock on the root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::range::{Claim, namespace};

const SETTING: &str = "/proc/sys/net/ipv4/ip_forward";

pub fn enable(root: &Path) -> io::Result<()> {
    if fs::read_to_string(SETTING)?.trim() != "0" {
        return Ok(());
    }
    fs::write(mark(root)?, "")?;
    fs::write(SETTING, "1")
}

/// Once this agent's claim is gone.
pub fn disable(root: &Path) -> io::Result<()> {
    let mark = mark(root)?;
    if !mark.exists() || Claim::any(root)? {
        return Ok(());
    }
    fs::write(SETTING, "0")?;
    fs::remove_file(mark)
}

/// Each network namespace has a setting of its own.
fn mark(root: &Path) -> io::Result<PathBuf> {
    Ok(root.join(format!("set-ip-forward-{}", namespace()?)))
}
