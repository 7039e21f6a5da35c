//! What a control group says of its use, in either version's files.

use std::fs;
use std::path::Path;

use super::cgroup::{self, Cgroups};

/// Counters and gauges of one group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ns: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
    pub memory: u64,
    pub memory_inactive_file: u64,
    pub memory_peak: u64,
    pub oom_kills: u64,
    pub pids: u64,
}

impl Usage {
    /// What is not there counts as 0.
    pub fn read(cgroups: &Cgroups, group: &str) -> Self {
        let file = |controller, v1, v2| cgroups.file(controller, group, v1, v2);
        let cpu = text(&file("cpu", "cpu.stat", "cpu.stat"));
        let memory = text(&file("memory", "memory.stat", "memory.stat"));
        Self {
            cpu_ns: match cgroups.has_controller("cpuacct") {
                true => number(&file("cpuacct", "cpuacct.usage", "")),
                false => field(&cpu, "usage_usec") * 1000,
            },
            throttled_periods: field(&cpu, "nr_throttled"),
            throttled_ns: field(&cpu, "throttled_time") + field(&cpu, "throttled_usec") * 1000,
            memory: number(&file("memory", "memory.usage_in_bytes", "memory.current")),
            // Version 1 has both: of the group, and of it with its children. Version 2 has the latter by the shorter name.
            memory_inactive_file: if cgroups.has_controller("memory") {
                field(&memory, "total_inactive_file")
            } else {
                field(&memory, "inactive_file")
            },
            memory_peak: number(&file("memory", "memory.max_usage_in_bytes", "memory.peak")),
            oom_kills: cgroup::oom_kills(&cgroups.oom_file(group)),
            pids: number(&file("pids", "pids.current", "pids.current")),
        }
    }
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

fn number(file: &Path) -> u64 {
    text(file).trim().parse().unwrap_or(0)
}

/// The value of a line `<name> <value>`.
fn field(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let file = dir.join(name);
            fs::create_dir_all(file.parent().expect("a parent")).expect("directory");
            fs::write(file, text).expect("write");
        }
    }

    #[test]
    fn version_2_is_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        write(
            dir.path(),
            &[
                ("g/cpu.stat", "usage_usec 1500\nuser_usec 1000\nnr_periods 9\nnr_throttled 4\nthrottled_usec 70\n"),
                ("g/memory.current", "4096\n"),
                ("g/memory.peak", "8192\n"),
                ("g/memory.stat", "anon 10\ninactive_file_other 7\ninactive_file 1024\n"),
                ("g/memory.events", "oom 3\noom_kill 2\n"),
                ("g/pids.current", "5\n"),
            ],
        );
        let expected = Usage {
            cpu_ns: 1_500_000,
            throttled_periods: 4,
            throttled_ns: 70_000,
            memory: 4096,
            memory_inactive_file: 1024,
            memory_peak: 8192,
            oom_kills: 2,
            pids: 5,
        };
        assert_eq!(Usage::read(&Cgroups::unified(dir.path()), "/g"), expected);
        assert_eq!(Usage::read(&Cgroups::unified(dir.path()), "/none"), Usage::default());
    }

    #[test]
    fn version_1_is_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        write(
            dir.path(),
            &[
                ("cpu/g/cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 70000\n"),
                ("cpuacct/g/cpuacct.usage", "1500000\n"),
                ("memory/g/memory.usage_in_bytes", "4096\n"),
                ("memory/g/memory.max_usage_in_bytes", "8192\n"),
                ("memory/g/memory.stat", "inactive_file 1\ntotal_inactive_file 1024\n"),
                ("memory/g/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
                ("pids/g/pids.current", "5\n"),
            ],
        );
        let usage = Usage::read(&Cgroups::separate(dir.path(), &["cpu", "cpuacct", "memory", "pids"]), "/g");
        assert_eq!((usage.cpu_ns, usage.throttled_ns, usage.throttled_periods), (1_500_000, 70_000, 4));
        assert_eq!((usage.memory, usage.memory_peak, usage.memory_inactive_file), (4096, 8192, 1024));
        assert_eq!((usage.oom_kills, usage.pids), (2, 5));
    }
}
