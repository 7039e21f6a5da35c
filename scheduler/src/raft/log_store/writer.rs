//! The one thread that writes.
//!
//! A failed sync is fatal: after it nobody knows what is on disk, and to go on would be to acknowledge what may be lost.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};

use ::metrics::histogram;
use openraft::storage::IOFlushed;
use tokio::sync::oneshot;
use tracing::error;

use super::{Inner, index_of, key, sled_error};
use crate::clock;
use crate::metrics::names;
use crate::raft::types::TypeConfig;

/// Operations that one sync covers at most: more would only delay the first of them.
const MAX_DRAINED: usize = 1024;

/// Entries that are removed at a time, so that no removal holds up appends for long.
const REMOVED_AT_ONCE: usize = 4000;

/// What the writer is asked to do.
pub(super) enum Operation {
    Append {
        entries: Vec<(u64, Vec<u8>)>,
        callback: IOFlushed<TypeConfig>,
        store: Weak<Inner>,
    },
    /// `done` absent: goes to disk with the next sync.
    Meta {
        key: &'static [u8],
        value: Vec<u8>,
        done: Option<oneshot::Sender<()>>,
    },
    /// Removes every entry from `first` on.
    Truncate {
        first: u64,
        done: oneshot::Sender<()>,
    },
    /// Removes entries that a purge has left behind; the purge itself is durable already.
    Remove {
        up_to: u64,
    },
}

pub(super) struct Writer {
    pub db: sled::Db,
    pub log: sled::Tree,
    pub meta: sled::Tree,
    /// Our own handle of sled's file: its own flush does not sync durably. `None` in one test.
    pub file: Option<File>,
    pub syncs: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread; it ends when every sender is gone.
    pub(super) fn start(self, queue: usize) -> io::Result<SyncSender<Operation>> {
        let (sender, receiver) = sync_channel(queue);
        std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || self.run(&receiver))?;
        Ok(sender)
    }

    fn run(self, queue: &Receiver<Operation>) {
        while let Ok(first) = queue.recv() {
            let mut operations = vec![first];
            operations.extend(queue.try_iter().take(MAX_DRAINED));
            if let Err(error) = self.write(operations) {
                error!(%error, "write log: this replica cannot go on");
                std::process::abort();
            }
        }
    }

    fn write(&self, operations: Vec<Operation>) -> io::Result<()> {
        let mut finish: Vec<Box<dyn FnOnce()>> = Vec::new();
        let mut late: BTreeMap<&'static [u8], Vec<u8>> = BTreeMap::new();
        for operation in operations {
            match operation {
                Operation::Append { entries, callback, store } => {
                    let last = entries.last().map(|(index, _)| *index);
                    self.append(entries)?;
                    finish.push(Box::new(move || completed(callback, &store, last)));
                }
                Operation::Meta { key, value, done: None } => {
                    late.insert(key, value);
                }
                Operation::Meta { key, value, done: Some(done) } => {
                    self.meta.insert(key, value).map_err(sled_error)?;
                    finish.push(Box::new(move || {
                        let _nobody_waits = done.send(());
                    }));
                }
                Operation::Truncate { first, done } => {
                    self.truncate(first)?;
                    finish.push(Box::new(move || {
                        let _nobody_waits = done.send(());
                    }));
                }
                Operation::Remove { up_to } => self.remove_up_to(up_to)?,
            }
        }
        // Never ahead of what was queued before it: a `committed` whose entries a power cut took would keep this replica from
        // starting. Of several only the newest counts.
        for (key, value) in late {
            self.meta.insert(key, value).map_err(sled_error)?;
        }
        // What nobody waits for goes to disk with the next sync.
        if !finish.is_empty() {
            self.sync()?;
        }
        finish.into_iter().for_each(|complete| complete());
        Ok(())
    }

    /// In order, so that a log that was cut half-way has no hole. One by one: a batch of sled's costs two more writes to the
    /// disk and a dozen wake-ups of its threads, and its atomicity is worth nothing here.
    fn append(&self, entries: Vec<(u64, Vec<u8>)>) -> io::Result<()> {
        for (index, bytes) in entries {
            self.log.insert(key(index), bytes).map_err(sled_error)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let began = clock::monotonic();
        self.db.flush().map_err(sled_error)?;
        if let Some(file) = &self.file {
            file.sync_data()?;
            self.syncs.fetch_add(1, Ordering::Relaxed);
            histogram!(names::SYNC_SECONDS).record(began.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// From the end backwards: a log that was cut half-way still has no hole.
    fn truncate(&self, first: u64) -> io::Result<()> {
        loop {
            let keys = self.log.range(key(first)..).keys().rev().take(REMOVED_AT_ONCE);
            let keys = keys.collect::<Result<Vec<_>, _>>().map_err(sled_error)?;
            if keys.is_empty() {
                return Ok(());
            }
            self.remove(keys)?;
        }
    }

    fn remove_up_to(&self, last: u64) -> io::Result<()> {
        loop {
            let keys = self.log.range(..=key(last)).keys().take(REMOVED_AT_ONCE);
            let keys = keys.collect::<Result<Vec<_>, _>>().map_err(sled_error)?;
            if keys.is_empty() {
                return Ok(());
            }
            self.remove(keys)?;
        }
    }

    fn remove(&self, keys: Vec<sled::IVec>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for key in keys {
            debug_assert!(index_of(&key).is_ok());
            batch.remove(key);
        }
        self.log.apply_batch(batch).map_err(sled_error)
    }
}

fn completed(callback: IOFlushed<TypeConfig>, store: &Weak<Inner>, last: Option<u64>) {
    callback.io_completed(Ok(()));
    if let (Some(store), Some(last)) = (store.upgrade(), last) {
        store.forget_synced(last);
    }
}
