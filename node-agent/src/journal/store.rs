//! Records in sled, made safe against power cuts: 8 MiB segments, no background flush, and a sync of our own after sled's
//! (`scheduler/docs/adr/0002-sled-guards.md`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use warren_proto::ids::SandboxName;

use super::record::{self, DecodeError};
use super::writer::Change;
use super::{Entry, JournalError};
use crate::storage;

/// Part of the recipe that survives power cuts.
const SEGMENT_BYTES: usize = 8 << 20;
/// sled's page cache; a node's records are a few hundred kilobytes.
const CACHE_BYTES: u64 = 4 << 20;

/// Why there is no store.
#[derive(Debug)]
pub enum OpenError {
    /// The disk, or who may use it: the records may be whole.
    Io(io::Error),
    /// A newer build's record.
    Version(u32),
    Damaged(String),
}

impl OpenError {
    pub fn at(self, path: &Path) -> JournalError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => JournalError::Io { path, source: Arc::new(source) },
            Self::Version(version) => JournalError::Version { path, version },
            Self::Damaged(reason) => JournalError::Io { path, source: Arc::new(io::Error::other(reason)) },
        }
    }
}

/// What stands in a store.
#[derive(Debug, Default)]
pub struct Read {
    pub entries: BTreeMap<SandboxName, Entry>,
    /// Records that could not be read.
    pub damaged: usize,
}

impl Read {
    /// Takes a record in, or counts it; an error is a newer build's.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), u32> {
        match record::decode(bytes) {
            Ok((sandbox, entry)) => drop(self.entries.insert(sandbox, entry)),
            Err(DecodeError::Version(version)) => return Err(version),
            Err(DecodeError::Damaged(_)) => self.damaged += 1,
        }
        Ok(())
    }
}

/// sled's files, held by one thread at a time.
#[derive(Debug)]
pub struct Store {
    records: sled::Tree,
    /// Our own handle of sled's file: its own flush does not sync durably.
    file: File,
    // Last: everything above is done with it when it closes.
    db: sled::Db,
}

impl Store {
    pub fn open(directory: &Path) -> Result<(Self, Read), OpenError> {
        storage::create_private_directory(directory).map_err(OpenError::Io)?;
        // sled panics on some kinds of damage.
        let opened = catch_unwind(AssertUnwindSafe(|| open(directory)));
        let opened = opened.unwrap_or_else(|_panic| Err(OpenError::Damaged("sled cannot read its files".to_owned())));
        let (store, read) = opened?;
        // So that a power cut leaves its files where they are.
        for made in [directory.join("db"), directory.to_owned()] {
            storage::sync_parent(&made).map_err(OpenError::Io)?;
        }
        Ok((store, read))
    }

    /// Makes changes in order; on disk once this returns.
    pub fn write(&self, changes: impl IntoIterator<Item = Change>) -> io::Result<()> {
        let mut changed = false;
        for Change { key, value } in changes {
            match value {
                Some(value) => self.records.insert(key, value),
                None => self.records.remove(key),
            }
            .map_err(io::Error::other)?;
            changed = true;
        }
        if !changed {
            return Ok(());
        }
        self.db.flush().map_err(io::Error::other)?;
        self.file.sync_data()
    }
}

fn open(directory: &Path) -> Result<(Store, Read), OpenError> {
    let config = sled::Config::new()
        .path(directory)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None)
        .mode(sled::Mode::LowSpace)
        .use_compression(false);
    let db = config.open().map_err(why)?;
    let records = db.open_tree("records").map_err(why)?;
    let mut read = Read::default();
    for item in &records {
        let (key, bytes) = item.map_err(why)?;
        let before = read.damaged;
        read.take(&bytes).map_err(OpenError::Version)?;
        if read.damaged > before {
            // Said once; its sandbox is unknown from now on.
            records.remove(key).map_err(why)?;
        }
    }
    let file = fs::File::open(directory.join("db")).map_err(OpenError::Io)?;
    Ok((Store { records, file, db }, read))
}

fn why(error: sled::Error) -> OpenError {
    match error {
        sled::Error::Io(source)
            if !matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
        {
            OpenError::Io(source)
        }
        error => OpenError::Damaged(error.to_string()),
    }
}
