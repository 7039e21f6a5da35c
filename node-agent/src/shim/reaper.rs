//! Forgets the processes that ended longest ago, so that what is remembered of an instance's processes is bounded.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::driver::oci::process::files;

/// Processes that ended and are remembered, for an instance; and the bytes of output that are held of them all.
pub const MAX_ENDED: usize = 256;
const MAX_ENDED_BYTES: u64 = 64 << 20;

/// Removes what is beyond the bounds. Others may do the same at the same time.
pub fn forget_oldest(processes: &Path) {
    let entries = fs::read_dir(processes).into_iter().flatten().flatten();
    let mut ended: Vec<(SystemTime, u64, PathBuf)> = entries
        .filter_map(|entry| {
            let end = fs::metadata(entry.path().join(files::END)).ok()?;
            Some((end.modified().ok()?, end.len(), entry.path()))
        })
        .collect();
    // The newest first.
    ended.sort_by(|a, b| b.cmp(a));
    let mut bytes = 0;
    for (index, (_, size, path)) in ended.into_iter().enumerate() {
        bytes += size;
        if index >= MAX_ENDED || bytes > MAX_ENDED_BYTES {
            // Gone already, or it goes with the instance.
            let _ = fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_newest_stay_and_those_that_run_are_not_touched() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let make = |name: &str, size: Option<u64>, second: u64| {
            fs::create_dir(dir.path().join(name)).expect("makes");
            if let Some(size) = size {
                let file = File::create(dir.path().join(name).join(files::END)).expect("makes");
                file.set_len(size).expect("grows");
                file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second)).expect("dates");
            }
        };
        for n in 0..MAX_ENDED as u64 + 3 {
            make(&format!("p{n}"), Some(10), n);
        }
        make("running", None, 0);
        forget_oldest(dir.path());
        let here = |name: &str| dir.path().join(name).exists();
        assert_eq!(["p0", "p1", "p2", "p3", "running"].map(here), [false, false, false, true, true]);
        make("large", Some(MAX_ENDED_BYTES - 15), 10_000);
        forget_oldest(dir.path());
        let left: Vec<bool> = ["large", "p258", "p257", "p3", "running"].map(here).to_vec();
        assert_eq!(left, [true, true, false, false, true]);
    }
}
