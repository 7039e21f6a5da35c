//! What a sandbox costs in memory while it does nothing: its processes, and what the kernel keeps for its control group.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::host::{Traces, groups_of};

/// Sums over all sandboxes of a cluster, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Processes of Warren's that stand beside sandboxes, shared pages counted by share.
    pub shims_kib: u64,
    /// Processes in sandboxes, likewise.
    pub inside_kib: u64,
    /// What the kernel charges to the sandboxes' control groups beside the processes' own pages.
    pub kernel_kib: u64,
    pub processes: usize,
}

impl Memory {
    /// As it is now. A process that ends meanwhile counts nothing.
    pub fn of(traces: &Traces) -> Self {
        let mut sum = Self::default();
        for process in traces.sandbox_processes() {
            let pss = pss_kib(&process.path);
            if process.is_inside {
                sum.inside_kib += pss;
            } else {
                sum.shims_kib += pss;
            }
            sum.processes += 1;
        }
        let groups = traces.nodes.iter().flat_map(|(node, _)| groups_of(node)).flat_map(subdirectories);
        sum.kernel_kib = groups.map(|group| kernel_bytes(&group)).sum::<u64>() / 1024;
        sum
    }

    /// Mean of so many, in KiB.
    pub fn each_kib(&self, sandboxes: usize) -> f64 {
        (self.shims_kib + self.inside_kib + self.kernel_kib) as f64 / sandboxes.max(1) as f64
    }
}

fn subdirectories(group: PathBuf) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(group).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir())
}

/// proc_pid_smaps(5): the line `Pss:` of the roll-up.
fn pss_kib(process: &Path) -> u64 {
    let text = fs::read_to_string(process.join("smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or_default();
    line.trim_end_matches("kB").trim().parse().unwrap_or(0)
}

/// Version 1 has a file of its own, version 2 a line.
fn kernel_bytes(group: &Path) -> u64 {
    if let Ok(text) = fs::read_to_string(group.join("memory.kmem.usage_in_bytes")) {
        return text.trim().parse().unwrap_or(0);
    }
    let text = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("kernel ")?.trim().parse().ok()).unwrap_or(0)
}
