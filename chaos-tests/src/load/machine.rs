//! Where and when a figure was taken: without it a figure is a rumour.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use serde::Serialize;

/// The machine, the command, the day.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    pub file_system: String,
    /// Runnable processes when the run began: others may have been at work.
    pub load_average: String,
    /// UTC.
    pub date: String,
    pub command: String,
}

impl Machine {
    /// As it is now; `root` is where the data directories lie.
    pub fn look(root: &Path) -> anyhow::Result<Self> {
        let text = |path: &str| std::fs::read_to_string(path).with_context(|| format!("read {path}"));
        let total = text("/proc/meminfo")?;
        let kib = total.lines().next().and_then(|line| line.split_whitespace().nth(1)).context("MemTotal")?;
        let load_average = text("/proc/loadavg")?.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            memory_mib: kib.parse::<u64>()? / 1024,
            kernel: text("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system: file_system(root)?,
            load_average,
            date: today(),
            command: std::env::args().skip(1).fold("load".to_owned(), |all, word| format!("{all} {word}")),
        })
    }

    pub fn print(&self) {
        let Self { cores, memory_mib, kernel, file_system, load_average, date, command } = self;
        println!("{date}  {command}");
        println!("{cores} cores, {memory_mib} MiB, Linux {kernel}, {file_system}, load {load_average} before");
    }
}

#[allow(clippy::disallowed_methods, reason = "the date of a report, for people; nothing is decided by it")]
fn today() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (now.as_secs() / 86_400, now.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60)
}

/// The date that is so many days after 1970-01-01, counted in years and months of their own lengths.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

/// Kind of the file system that holds `path`: that of the longest mount point above it.
pub fn file_system(path: &Path) -> anyhow::Result<String> {
    let path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let kinds = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((PathBuf::from(words.next()?), words.next()?))
    });
    let holding = kinds.filter(|(point, _)| path.starts_with(point));
    // Of two mounts on one point the later hides the earlier; `max_by_key` takes the last.
    let (_, kind) = holding.max_by_key(|(point, _)| point.components().count()).context("no mount holds it")?;
    Ok(kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(31 + 28), (1970, 3, 1));
        // 2024-02-29 and the day after: 54 years with 13 leap days before them.
        assert_eq!(civil(54 * 365 + 13 + 59), (2024, 2, 29));
        assert_eq!(civil(54 * 365 + 13 + 60), (2024, 3, 1));
    }

    #[test]
    fn memory_is_told_from_a_disk() {
        assert_eq!(file_system(Path::new("/proc")).unwrap(), "proc");
    }
}
