//! Writes a large file beside work that must not wait for it.
//!
//! A checkpoint of a million sandboxes is over 100 MiB. Written as fast as it goes, it takes a core from those who apply and serve,
//! and leaves a sync of the log to wait for all of its dirty pages.

use std::fs::File;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;

/// After as much it pauses: some 3 ms of work, so that others wait no longer for its core.
const SLICE_BYTES: usize = 256 << 10;

/// After as much it is synced: a sync of the log beside it waits for no more.
const SYNC_BYTES: usize = 4 << 20;

/// Longest pause: a slice that waited for a slow disk says nothing about the processor.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// A file that is written slice by slice, with a pause after each as long as it took: at most half of a core.
#[derive(Debug)]
pub(super) struct Paced {
    file: File,
    in_slice: usize,
    since_sync: usize,
    began: Instant,
}

impl Paced {
    pub fn new(file: File) -> Self {
        Self { file, in_slice: 0, since_sync: 0, began: clock::monotonic() }
    }

    /// Syncs what is left, and gives the file back.
    pub fn finish(self) -> io::Result<File> {
        self.file.sync_all()?;
        Ok(self.file)
    }

    fn pause(&mut self) -> io::Result<()> {
        let worked = self.began.elapsed();
        if self.since_sync >= SYNC_BYTES {
            self.file.sync_data()?;
            self.since_sync = 0;
        }
        thread::sleep(worked.min(MAX_PAUSE));
        self.in_slice = 0;
        self.began = clock::monotonic();
        Ok(())
    }
}

impl Write for Paced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.in_slice = self.in_slice.saturating_add(written);
        self.since_sync = self.since_sync.saturating_add(written);
        if self.in_slice >= SLICE_BYTES {
            self.pause()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
