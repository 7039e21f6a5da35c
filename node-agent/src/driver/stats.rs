//! What an instance uses, and what it may.

use std::time::SystemTime;

use warren_proto::units::{Bytes, MilliCpu};

/// What can be changed of a running instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    /// Processes and threads.
    pub pids: u64,
}

/// Counters begin with the instance, gauges are of this moment. What a host cannot tell is 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    pub limits: Limits,
    pub cpu_usage_ns: u64,
    /// Periods in which the limit held it back, and for how long in all.
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_ns: u64,
    pub memory_usage: Bytes,
    /// Without what the kernel gives back when asked: file pages that were not used of late.
    pub memory_working_set: Bytes,
    pub memory_peak: Bytes,
    pub oom_kills: u64,
    pub disk_used: Bytes,
    pub disk_limit: Bytes,
    pub inodes_used: u64,
    pub inodes_limit: u64,
    pub pids: u64,
    pub started: Option<SystemTime>,
}
