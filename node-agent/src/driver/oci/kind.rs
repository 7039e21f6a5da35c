//! What differs from one OCI runtime to the next, beside its name: all that there is of it is here.
//!
//! gVisor (`runsc`) runs an instance's processes on a kernel of its own, in an ordinary process of the host: the main process is
//! that kernel's, and an execution's is one that waits for it. Kata runs each in a virtual machine; it is taken by name, and
//! was never tried with this driver.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::driver::Exit;

/// Threads on the host that gVisor's kernel has beside those of the processes it runs: its own, of its Go runtime, and its file
/// server's. Seen: 12 when idle, 40 under load on 2 processors.
const GVISOR_THREADS: u64 = 128;

/// gVisor as a part of this driver: system call interception that works inside virtual machines; files written where the
/// instance's disk is, and seen by both sides; no network but loopback.
const GVISOR_ARGUMENTS: [&str; 5] =
    ["--platform=systrap", "--network=none", "--net-disconnect-ok", "--overlay2=none", "--file-access=shared"];

/// A runtime whose ways are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Crun,
    Runsc,
    Kata,
    /// runc, and whatever behaves like it.
    #[default]
    Runc,
}

impl Kind {
    /// By what it says of itself (`--version`).
    pub fn of_version(text: &str) -> Self {
        let text = text.to_lowercase();
        let starts = [("crun", Self::Crun), ("runsc", Self::Runsc), ("kata", Self::Kata)];
        starts.into_iter().find(|(start, _)| text.starts_with(start)).map_or(Self::Runc, |(_, kind)| kind)
    }

    /// Global options of every call.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Runsc => &GVISOR_ARGUMENTS,
            Self::Crun | Self::Kata | Self::Runc => &[],
        }
    }

    /// Whether its instances are on the node's network: they have loopback only where it cannot join namespaces of the shim's
    /// making.
    pub fn joins_network(self) -> bool {
        matches!(self, Self::Crun | Self::Runc)
    }

    /// Threads on the host that an instance may have beside its own.
    pub fn extra_pids(self) -> u64 {
        match self {
            Self::Runsc => GVISOR_THREADS,
            Self::Crun | Self::Kata | Self::Runc => 0,
        }
    }

    /// Whether it mounts memory over a `/tmp` that is empty.
    pub fn hides_empty_tmp(self) -> bool {
        self == Self::Runsc
    }

    /// Whether an execution's process on the host only waits for one that the host does not see.
    pub fn hides_processes(self) -> bool {
        self == Self::Runsc
    }

    /// How a process ended, by how the process that stands for it on the host did. gVisor says 128 + signal for what a signal
    /// ended, as shells do, and nothing else tells it from a process that ended with that code by itself. 128 alone is what its
    /// waiter says when its kernel was killed under it, and every process with it.
    ///
    /// `oom_killed`: the memory limit killed something of the instance. With gVisor that is its kernel, and all processes with it.
    pub fn exit(self, seen: Exit, oom_killed: bool) -> Exit {
        let seen = Exit { oom_killed: oom_killed && seen.code != 0, ..seen };
        match seen {
            _ if self == Self::Runsc && seen.oom_killed => Exit { code: 137, signal: 9, oom_killed: true },
            Exit { code: 128, signal: 0, .. } if self == Self::Runsc => Exit { code: 137, signal: 9, ..seen },
            Exit { code, signal: 0, .. } if self == Self::Runsc && (129..=128 + MAX_SIGNAL).contains(&code) => {
                Exit { signal: code - 128, ..seen }
            }
            _ => seen,
        }
    }
}

/// Highest signal number on Linux.
const MAX_SIGNAL: i32 = 64;

/// How a runtime is asked for and reported: the last part of its program's path, without what names it as Kata's runtime.
pub fn name_of(program: &str) -> &str {
    let name = Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or(program);
    if name == "kata-runtime" { "kata" } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_is_known_by_what_it_says() {
        for (said, kind) in [
            ("crun version 1.8.1\ncommit: f8a", Kind::Crun),
            ("runc version 1.1.5+ds1", Kind::Runc),
            ("runsc version release-20240729.0\nspec: 1.1.0-rc.1", Kind::Runsc),
            ("kata-runtime  : 3.2.0", Kind::Kata),
            ("youki version 0.3", Kind::Runc),
        ] {
            assert_eq!(Kind::of_version(said), kind, "{said}");
        }
        assert_eq!(["/usr/bin/crun", "runsc", "/opt/kata/bin/kata-runtime"].map(name_of), ["crun", "runsc", "kata"]);
    }

    #[test]
    fn gvisor_s_exit_codes_say_which_signal_it_was() {
        let seen = |code| Kind::Runsc.exit(Exit { code, ..Exit::default() }, false);
        assert_eq!((seen(143).signal, seen(143).code, seen(3).signal), (15, 143, 0));
        assert_eq!((seen(128).signal, seen(128).code), (9, 137), "its kernel was killed");
        assert_eq!(
            Kind::Runc.exit(Exit { code: 143, ..Exit::default() }, false).signal,
            0,
            "an exit code is an exit code"
        );
    }
}
