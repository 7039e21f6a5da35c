//! The log and the vote on sled, made safe against power cuts.
//!
//! sled's own `flush` is not a durable sync (`docs/adr/0002-sled-guards.md`), so one writer thread owns every write: it drains
//! what is queued, applies it in order, flushes once, syncs the tree's file once, and only then completes what waited.
//! Nothing overtakes anything, and a burst of appends costs one sync.
//!
//! Entries can be read as soon as `append` returns: they stand in memory until they are synced, and the newest stay there for
//! the followers.

mod writer;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use prost::Message;
use tokio::sync::oneshot;
use warren_proto::v1 as pb;

use super::codec::log::{decode_entry, entry_to, log_id_from, log_id_to, vote_from, vote_to};
use super::types::{Entry, LogId, TypeConfig, Vote};
use writer::{Operation, Writer};

/// Largest value that the guards were tested with (`docs/adr/0002-sled-guards.md`); batches close well below.
const MAX_ENTRY_BYTES: usize = 64 * 1024;

/// Operations that wait for the writer: more than openraft keeps under way.
const QUEUE: usize = 4096;

/// sled's page cache. The live log is short: what followers need stands in memory.
const CACHE_BYTES: u64 = 64 << 20;

/// Part of the recipe that survives power cuts (`docs/adr/0002-sled-guards.md`).
const SEGMENT_BYTES: usize = 8 << 20;

const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const LAST_PURGED: &[u8] = b"last_purged";

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("open log store {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "open log store {path}: {reason}. Treat this replica's disk as lost: keep a copy of the directory, and let the \
         replica join again, empty and under a new id"
    )]
    Damaged { path: PathBuf, reason: String },
}

/// The store of one replica. Clones share it; all of them read, openraft's writes.
#[derive(Debug, Clone)]
pub struct LogStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    log: sled::Tree,
    meta: sled::Tree,
    /// Entries that are not synced yet, and the newest that are.
    recent: Mutex<BTreeMap<u64, Entry>>,
    queue: SyncSender<Operation>,
    syncs: Arc<AtomicU64>,
    /// First index that is not purged: what lies below is removed lazily, and must not be read meanwhile.
    first: AtomicU64,
    // Last: everything above is done with the database when it closes.
    _db: sled::Db,
}

fn key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

fn index_of(key: &[u8]) -> io::Result<u64> {
    let bytes = key.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a log key has not 8 bytes"))?;
    Ok(u64::from_be_bytes(bytes))
}

fn sled_error(error: sled::Error) -> io::Error {
    io::Error::other(error)
}

impl LogStore {
    /// Opens or makes the store in `directory`, and removes what a purge had not finished removing.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        Self::open_with(directory, true)
    }

    /// Makes a store that holds nothing but a vote, durably, and closes it.
    pub(super) fn make(directory: &Path, vote: &Vote) -> Result<(), OpenError> {
        let io = |source| OpenError::Io { path: directory.to_owned(), source };
        make_directory(directory).map_err(io)?;
        let Opened { db, meta, .. } = open_database(directory)?;
        meta.insert(VOTE, vote_to(vote).encode_to_vec()).map_err(|error| io(sled_error(error)))?;
        db.flush().map_err(|error| io(sled_error(error)))?;
        fs::File::open(directory.join("db")).and_then(|file| file.sync_all()).map_err(io)
    }

    /// Without the durable sync: for the test that shows what the sync is worth.
    #[doc(hidden)]
    pub fn open_without_sync(directory: &Path) -> Result<Self, OpenError> {
        Self::open_with(directory, false)
    }

    fn open_with(directory: &Path, sync: bool) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: directory.to_owned(), source };
        let damaged = |reason: String| OpenError::Damaged { path: directory.to_owned(), reason };
        make_directory(directory).map_err(io)?;
        // sled panics on some kinds of damage.
        let opened = catch_unwind(AssertUnwindSafe(|| open_database(directory)));
        let opened = opened.unwrap_or_else(|_panic| Err(damaged("sled cannot read its files".to_owned())));
        let Opened { db, log, meta, purged } = opened?;
        let file = sync.then(|| fs::File::open(directory.join("db"))).transpose().map_err(io)?;
        let syncs = Arc::new(AtomicU64::new(0));
        let writer = Writer { db: db.clone(), log: log.clone(), meta: meta.clone(), file, syncs: syncs.clone() };
        let queue = writer.start(QUEUE).map_err(io)?;
        let first = AtomicU64::new(after(purged.as_ref()));
        Ok(Self(Arc::new(Inner { log, meta, recent: Mutex::default(), queue, syncs, first, _db: db })))
    }

    /// Durable syncs since the store was opened.
    pub fn sync_count(&self) -> u64 {
        self.0.syncs.load(Ordering::Relaxed)
    }

    /// Whether nothing was ever promised on this disk: no vote, no entry.
    pub(super) fn is_empty(&self) -> io::Result<bool> {
        let voted = self.0.meta.get(VOTE).map_err(sled_error)?.is_some();
        Ok(!voted && self.0.log.is_empty() && self.last_purged()?.is_none())
    }

    /// Index up to which the log has been purged.
    pub(super) fn purged_index(&self) -> io::Result<Option<u64>> {
        Ok(self.last_purged()?.map(|log_id| log_id.index))
    }

    fn last_purged(&self) -> io::Result<Option<LogId>> {
        read_log_id(&self.0.meta, LAST_PURGED)
    }

    /// Nothing in the guarded sections panics half-way through a change.
    fn recent(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.0.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an operation and waits until it is on disk.
    async fn run(&self, make: impl FnOnce(oneshot::Sender<()>) -> Operation) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.queue(make(done))?;
        wait.await.map_err(|_| writer_gone())
    }

    fn queue(&self, operation: Operation) -> io::Result<()> {
        self.0.queue.send(operation).map_err(|_| writer_gone())
    }

    fn read_range(&self, range: impl RangeBounds<u64>) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        let start = start.max(self.0.first.load(Ordering::Acquire));
        if start >= end {
            return Ok(Vec::new());
        }
        let recent: Vec<Entry> = self.recent().range(start..end).map(|(_, entry)| entry.clone()).collect();
        let covered = recent.first().map_or(end, |first| first.log_id.index);
        let mut entries = Vec::new();
        for item in self.0.log.range(key(start)..key(covered)) {
            let (_, bytes) = item.map_err(sled_error)?;
            entries.push(decode_entry(&bytes)?);
        }
        entries.extend(recent);
        Ok(entries)
    }
}

/// Makes the directory, private to this user, and makes sure that a power cut leaves it where it is.
pub(super) fn make_directory(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    match directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// sled's files, open and readable.
struct Opened {
    db: sled::Db,
    log: sled::Tree,
    meta: sled::Tree,
    purged: Option<LogId>,
}

fn open_database(directory: &Path) -> Result<Opened, OpenError> {
    let damaged = |reason: String| OpenError::Damaged { path: directory.to_owned(), reason };
    let (db, log, meta) = open_trees(directory).map_err(|error| match error {
        sled::Error::Io(source) => OpenError::Io { path: directory.to_owned(), source },
        error => damaged(error.to_string()),
    })?;
    let purged = read_log_id(&meta, LAST_PURGED).map_err(|error| damaged(error.to_string()))?;
    remove_purged(&log, purged.as_ref()).map_err(|error| damaged(error.to_string()))?;
    Ok(Opened { db, log, meta, purged })
}

/// What a purge had not finished removing.
fn remove_purged(log: &sled::Tree, purged: Option<&LogId>) -> io::Result<()> {
    for item in log.range(..key(after(purged))).keys() {
        log.remove(item.map_err(sled_error)?).map_err(sled_error)?;
    }
    Ok(())
}

fn read_log_id(meta: &sled::Tree, key: &[u8]) -> io::Result<Option<LogId>> {
    let Some(bytes) = meta.get(key).map_err(sled_error)? else { return Ok(None) };
    let stored = pb::StoredLogId::decode(bytes.as_ref()).map_err(super::codec::CodecError::from)?;
    Ok(Some(log_id_from(&stored)))
}

/// The index that follows; 0 after nothing.
fn after(log_id: Option<&LogId>) -> u64 {
    log_id.map_or(0, |log_id| log_id.index.saturating_add(1))
}

fn open_trees(directory: &Path) -> sled::Result<(sled::Db, sled::Tree, sled::Tree)> {
    let db = sled::Config::new()
        .path(directory)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None)
        .mode(sled::Mode::LowSpace)
        .use_compression(false)
        .open()?;
    let (log, meta) = (db.open_tree("log")?, db.open_tree("meta")?);
    Ok((db, log, meta))
}

fn writer_gone() -> io::Error {
    io::Error::other("the log's writer has stopped")
}

/// First index and the one after the last.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read_range(range)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let Some(bytes) = self.0.meta.get(VOTE).map_err(sled_error)? else { return Ok(None) };
        let stored = pb::StoredVote::decode(bytes.as_ref()).map_err(super::codec::CodecError::from)?;
        Ok(Some(vote_from(&stored)?))
    }

    /// At most what one message should carry; the rest comes with the next.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        const MAX_AT_ONCE: u64 = 64;
        let entries = self.read_range(start..end.min(start.saturating_add(MAX_AT_ONCE)))?;
        match entries.first() {
            Some(first) if first.log_id.index != start => {
                Err(io::Error::other(format!("the log has no entry {start}; the next is {}", first.log_id.index)))
            }
            _ => Ok(entries),
        }
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let last_purged_log_id = self.last_purged()?;
        let newest = self.recent().last_key_value().map(|(_, entry)| entry.log_id);
        let last_log_id = match newest {
            Some(log_id) => Some(log_id),
            // What a purge has not removed yet does not count.
            None => match self.0.log.range(key(after(last_purged_log_id.as_ref()))..).next_back() {
                Some(item) => Some(decode_entry(&item.map_err(sled_error)?.1)?.log_id),
                None => last_purged_log_id,
            },
        };
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let value = vote_to(vote).encode_to_vec();
        self.run(|done| Operation::Meta { key: VOTE, value, done: Some(done) }).await
    }

    /// Need not be durable by itself: it goes to disk with the next sync.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let Some(committed) = committed else { return Ok(()) };
        let value = log_id_to(&committed).encode_to_vec();
        self.queue(Operation::Meta { key: COMMITTED, value, done: None })
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        read_log_id(&self.0.meta, COMMITTED)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Vec::new();
        let mut kept = Vec::new();
        for entry in entries {
            let bytes = entry_to(&entry).encode_to_vec();
            if bytes.len() > MAX_ENTRY_BYTES {
                let what = format!("entry {} has {} bytes, the limit is {MAX_ENTRY_BYTES}", entry.log_id, bytes.len());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
            encoded.push((entry.log_id.index, bytes));
            kept.push((entry.log_id.index, entry));
        }
        self.recent().extend(kept);
        let store = Arc::downgrade(&self.0);
        self.queue(Operation::Append { entries: encoded, callback, store })
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let first = after(last_log_id.as_ref());
        let _cut_off = self.recent().split_off(&first);
        self.run(|done| Operation::Truncate { first, done }).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let value = log_id_to(&log_id).encode_to_vec();
        self.run(|done| Operation::Meta { key: LAST_PURGED, value, done: Some(done) }).await?;
        self.0.first.store(after(Some(&log_id)), Ordering::Release);
        let mut recent = self.recent();
        let kept = recent.split_off(&log_id.index.saturating_add(1));
        *recent = kept;
        drop(recent);
        self.queue(Operation::Remove { up_to: log_id.index })
    }
}

impl Inner {
    /// Entries up to `index` are on disk: the oldest of them need not stand in memory any longer.
    fn forget_synced(&self, index: u64) {
        /// Newest entries that stay in memory: what a follower that is a little behind asks for, 48 MiB at worst.
        const KEPT: u64 = 1024;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = recent.split_off(&index.saturating_sub(KEPT));
        *recent = kept;
    }
}
