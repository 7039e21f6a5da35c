//! What this host can give to sandboxes where the configuration does not say: all of it, less a reserve for the host itself.

use std::io;
use std::path::Path;

use warren_proto::units::{Bytes, MilliCpu, Resources};

/// A tenth of each dimension is the host's, and at least so much.
const RESERVE_SHARE: u64 = 10;
const RESERVE_CPU: MilliCpu = MilliCpu(100);
const RESERVE_MEMORY: Bytes = Bytes(512 * Bytes::MIB);
const RESERVE_DISK: Bytes = Bytes(2 * Bytes::GIB);

/// What the host has: its CPUs, its memory, and what is free where `data_dir` lies.
pub fn of_host(data_dir: &Path) -> io::Result<Resources> {
    let cpus = std::thread::available_parallelism()?.get() as u64;
    let info = rustix::system::sysinfo();
    let memory = u64::from(info.mem_unit).saturating_mul(info.totalram);
    let stat = rustix::fs::statvfs(data_dir)?;
    let disk = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok(Resources {
        cpu: MilliCpu(cpus.saturating_mul(1000)),
        memory: Bytes(memory),
        disk: Bytes(disk),
        ..Resources::default()
    })
}

/// What is left for sandboxes.
pub fn after_reserve(host: Resources) -> Resources {
    let reserve = Resources {
        cpu: MilliCpu((host.cpu.0 / RESERVE_SHARE).max(RESERVE_CPU.0)),
        memory: Bytes((host.memory.0 / RESERVE_SHARE).max(RESERVE_MEMORY.0)),
        disk: Bytes((host.disk.0 / RESERVE_SHARE).max(RESERVE_DISK.0)),
        ..Resources::default()
    };
    host.saturating_sub(reserve)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_its_reserve() {
        let host = Resources {
            cpu: MilliCpu(2000),
            memory: Bytes(Bytes::GIB),
            disk: Bytes(100 * Bytes::GIB),
            ..Resources::default()
        };
        let left = after_reserve(host);
        assert_eq!(left.cpu, MilliCpu(1800));
        assert_eq!(left.memory, Bytes(512 * Bytes::MIB));
        assert_eq!(left.disk, Bytes(90 * Bytes::GIB));
        assert_eq!(after_reserve(Resources::default()), Resources::default());
    }

    #[test]
    fn this_host_has_something() {
        let host = of_host(Path::new("/")).expect("host");
        assert!(host.cpu.0 >= 1000 && host.memory.0 > 0);
    }
}
