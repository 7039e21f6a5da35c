//! All that is known of an instance's use: its control group's, its disk's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use warren_proto::units::Bytes;

use super::cgroup::Cgroups;
use super::layout;
use super::record::Record;
use super::usage::Usage;
use crate::driver::stats::Stats;

/// Of the running instance in `directory`. Blocks.
pub fn stats(cgroups: &Cgroups, group: &str, directory: &Path, record: &Record) -> io::Result<Stats> {
    let usage = Usage::read(cgroups, group);
    let disk = Disk::of(directory, record)?;
    Ok(Stats {
        limits: record.limits(),
        cpu_usage_ns: usage.cpu_ns,
        cpu_throttled_periods: usage.throttled_periods,
        cpu_throttled_ns: usage.throttled_ns,
        memory_usage: Bytes(usage.memory),
        memory_working_set: Bytes(usage.memory.saturating_sub(usage.memory_inactive_file)),
        memory_peak: Bytes(usage.memory_peak),
        oom_kills: usage.oom_kills,
        disk_used: Bytes(disk.used),
        disk_limit: Bytes(disk.limit),
        inodes_used: disk.inodes_used,
        inodes_limit: disk.inodes_limit,
        pids: usage.pids,
        started: fs::metadata(directory.join(layout::STARTED)).and_then(|metadata| metadata.modified()).ok(),
    })
}

#[derive(Debug, Default)]
struct Disk {
    used: u64,
    limit: u64,
    inodes_used: u64,
    inodes_limit: u64,
}

impl Disk {
    /// Without a disk of its own only the size that was asked for is known.
    fn of(directory: &Path, record: &Record) -> io::Result<Self> {
        if !directory.join(layout::IMAGE).exists() {
            return Ok(Self { limit: record.disk_bytes, ..Self::default() });
        }
        let stat = rustix::fs::statvfs(mounted_disk(directory)?)?;
        let blocks = |count: u64| count.saturating_mul(stat.f_frsize);
        Ok(Self {
            used: blocks(stat.f_blocks.saturating_sub(stat.f_bfree)),
            limit: blocks(stat.f_blocks),
            inodes_used: stat.f_files.saturating_sub(stat.f_ffree),
            inodes_limit: stat.f_files,
        })
    }
}

/// Where the shim sees the disk, if the pid that it wrote down is still its own: it stands in the instance's directory.
fn mounted_disk(directory: &Path) -> io::Result<PathBuf> {
    let pid = fs::read_to_string(directory.join(layout::SHIM))?;
    let process = Path::new("/proc").join(pid.trim());
    if fs::read_link(process.join("cwd"))? != directory {
        return Err(io::Error::new(io::ErrorKind::NotFound, "its shim has ended"));
    }
    // Its working directory leads there, in its own mount namespace.
    Ok(process.join("cwd").join(layout::DISK))
}
