//! New limits for a group that is in use, in either version's files. What is taken away in memory must not be in use: the kernel
//! gives back what it can, and where that is not enough nothing is changed.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use super::cgroup::Cgroups;
use super::config;
use crate::driver::stats::Limits;

/// Memory first, which alone can be refused. `pids` is already with what the runtime needs for itself.
pub fn apply(cgroups: &Cgroups, group: &str, limits: &Limits) -> io::Result<()> {
    let file = |controller, v1, v2| cgroups.file(controller, group, v1, v2);
    if cgroups.has_controller("memory") {
        let with_swap = file("memory", "memory.memsw.limit_in_bytes", "");
        set_memory_v1(&file("memory", "memory.limit_in_bytes", ""), &with_swap, limits.memory.0)?;
    } else {
        let directory = file("memory", "", "memory.max");
        set_memory_v2(directory.parent().unwrap_or(&directory), limits.memory.0)?;
    }
    let (quota, shares) = (config::cpu_quota_us(limits.cpu), config::cpu_shares(limits.cpu));
    if cgroups.has_controller("cpu") {
        fs::write(file("cpu", "cpu.cfs_quota_us", ""), quota.to_string())?;
        fs::write(file("cpu", "cpu.shares", ""), shares.to_string())?;
    } else {
        fs::write(file("cpu", "", "cpu.max"), format!("{quota} {}", config::CPU_PERIOD_US))?;
        fs::write(file("cpu", "", "cpu.weight"), config::cpu_weight(shares).to_string())?;
    }
    fs::write(file("pids", "pids.max", "pids.max"), limits.pids.max(1).to_string())
}

/// Memory alone never exceeds memory with swap, so which goes first depends on the direction. The kernel says EBUSY where it
/// cannot give back enough.
fn set_memory_v1(alone: &Path, with_swap: &Path, bytes: u64) -> io::Result<()> {
    let has_swap_limit = with_swap.exists();
    let now: u64 = fs::read_to_string(alone)?.trim().parse().map_err(|_| ErrorKind::InvalidData)?;
    let value = bytes.to_string();
    if bytes > now && has_swap_limit {
        fs::write(with_swap, &value)?;
    }
    fs::write(alone, &value)?;
    if bytes <= now && has_swap_limit {
        fs::write(with_swap, &value)?;
    }
    Ok(())
}

/// A lower `memory.max` kills where the kernel cannot give back enough; a lower `memory.high` only tries.
fn set_memory_v2(group: &Path, bytes: u64) -> io::Result<()> {
    let value = bytes.to_string();
    let now = fs::read_to_string(group.join("memory.max"))?;
    // `max` is no number: no limit, so any is lower.
    if now.trim().parse::<u64>().is_ok_and(|now| now <= bytes) {
        return fs::write(group.join("memory.max"), value);
    }
    fs::write(group.join("memory.high"), &value)?;
    let used: u64 =
        fs::read_to_string(group.join("memory.current"))?.trim().parse().map_err(|_| ErrorKind::InvalidData)?;
    let fits = used <= bytes;
    if fits {
        fs::write(group.join("memory.max"), &value)?;
    }
    fs::write(group.join("memory.high"), "max")?;
    if fits { Ok(()) } else { Err(ErrorKind::ResourceBusy.into()) }
}

#[cfg(test)]
mod tests {
    use warren_proto::units::{Bytes, MilliCpu};

    use super::*;

    fn group(dir: &Path, used: u64) -> Cgroups {
        let group = dir.join("g");
        fs::create_dir(&group).expect("directory");
        for (name, text) in [("memory.max", "1000\n"), ("memory.high", "max\n"), ("memory.current", &used.to_string())]
        {
            fs::write(group.join(name), text).expect("write");
        }
        Cgroups::unified(dir)
    }

    fn limits(memory: u64) -> Limits {
        Limits { cpu: MilliCpu(500), memory: Bytes(memory), pids: 7 }
    }

    #[test]
    fn version_2_is_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cgroups = group(dir.path(), 400);
        apply(&cgroups, "/g", &limits(500)).expect("fits");
        let read = |name| fs::read_to_string(dir.path().join("g").join(name)).expect("there");
        assert_eq!((read("memory.max"), read("memory.high")), ("500".into(), "max".into()));
        assert_eq!(
            (read("cpu.max"), read("cpu.weight"), read("pids.max")),
            ("50000 100000".into(), "20".into(), "7".into())
        );
        apply(&cgroups, "/g", &limits(2000)).expect("grows");
        assert_eq!(read("memory.max"), "2000");
    }

    #[test]
    fn what_is_in_use_is_not_taken_and_nothing_else_changes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cgroups = group(dir.path(), 900);
        assert_eq!(apply(&cgroups, "/g", &limits(500)).expect_err("in use").kind(), ErrorKind::ResourceBusy);
        let read = |name| fs::read_to_string(dir.path().join("g").join(name)).expect("there");
        assert_eq!((read("memory.max"), read("memory.high")), ("1000\n".into(), "max".into()));
        assert!(!dir.path().join("g/cpu.max").exists());
    }
}
