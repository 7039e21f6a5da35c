//! How full the data directory's disk is. A full disk stops a replica; so creates are refused before, and deletes never.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// How often it is looked at. A log that fills a tenth of a disk within this is beyond what disks write.
const EVERY: Duration = Duration::from_secs(1);

/// The share that is used, in percent. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct DiskUse {
    percent: Arc<AtomicU64>,
    /// From this share on creates are refused.
    full_at: u64,
}

impl DiskUse {
    /// Looks at the disk of `path` now, and again and again until `stop`.
    pub fn watch(path: &Path, full_at: u64, stop: CancellationToken) -> Self {
        let used = Self { percent: Arc::default(), full_at };
        used.look(path);
        let (watched, path) = (used.clone(), path.to_owned());
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(EVERY);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => watched.look(&path),
                }
            }
        });
        used
    }

    /// A share that stays as it is: for tests.
    #[doc(hidden)]
    pub fn fixed(percent: u64, full_at: u64) -> Self {
        Self { percent: Arc::new(AtomicU64::new(percent)), full_at }
    }

    /// Of one that is [`fixed`](Self::fixed).
    #[doc(hidden)]
    pub fn set(&self, percent: u64) {
        self.percent.store(percent, Ordering::Relaxed);
    }

    fn look(&self, path: &Path) {
        match rustix::fs::statvfs(path) {
            Ok(stat) => {
                let available = u128::from(stat.f_bavail);
                let used = u128::from(stat.f_blocks.saturating_sub(stat.f_bfree));
                let percent = (used * 100).div_ceil((used + available).max(1));
                let now = u64::try_from(percent).unwrap_or(100);
                let before = self.percent.swap(now, Ordering::Relaxed);
                if now >= self.full_at && before < self.full_at {
                    warn!(used_percent = now, "the disk is nearly full: creates are refused until there is room");
                }
            }
            Err(error) => error!(%error, path = %path.display(), "look at the disk"),
        }
    }

    /// As `df` shows it.
    pub fn percent(&self) -> u64 {
        self.percent.load(Ordering::Relaxed)
    }

    pub fn is_full(&self) -> bool {
        self.would_be_full(self.percent())
    }

    /// Whether creates are refused at this share, of this disk or another replica's.
    pub fn would_be_full(&self, percent: u64) -> bool {
        percent >= self.full_at && self.full_at > 0
    }
}
