//! What sessions went through, counted beside the metrics: for whoever runs many in one process.

use std::sync::atomic::{AtomicU64, Ordering};

/// Written by sessions, read by anybody.
#[derive(Debug, Default)]
pub struct Counters {
    sessions: AtomicU64,
    granted: AtomicU64,
    late: AtomicU64,
    lapses: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sessions that came to a Welcome.
    pub sessions: u64,
    /// Renewals that were granted.
    pub granted: u64,
    /// Of these, those that took longer than a third of the lease: then the next renewal is due.
    pub late: u64,
    /// Leases that lapsed.
    pub lapses: u64,
}

impl Counters {
    pub fn read(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            sessions: read(&self.sessions),
            granted: read(&self.granted),
            late: read(&self.late),
            lapses: read(&self.lapses),
        }
    }

    pub(super) fn opened(&self) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn granted(&self, late: bool) {
        self.granted.fetch_add(1, Ordering::Relaxed);
        self.late.fetch_add(u64::from(late), Ordering::Relaxed);
    }

    pub(super) fn lapsed(&self) {
        self.lapses.fetch_add(1, Ordering::Relaxed);
    }
}
