//! The id of this agent process, which orders after those of all earlier ones on this data directory.
//!
//! It is a UUIDv7, so the clock orders it. A clock that was set back would make the next agent look older than the one before,
//! and its sessions would be refused: so the last one's time is kept, and the next one's is at least a millisecond later.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use uuid::{Builder, Uuid};

use crate::storage;

const FILE: &str = "incarnation";
const VERSION: u32 = 1;

/// Why there is no incarnation.
#[derive(Debug, thiserror::Error)]
pub enum IncarnationError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {source}")]
    Damaged { path: PathBuf, source: prost::DecodeError },
    #[error("{path} has version {version}; this agent reads {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// What stands on disk.
#[derive(Clone, PartialEq, Message)]
struct StoredIncarnation {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// Of the last incarnation, in milliseconds since the Unix epoch.
    #[prost(uint64, tag = "2")]
    unix_ms: u64,
}

/// The next incarnation at `now_ms` (Unix time); on disk once this returns.
pub fn next(data_dir: &Path, now_ms: i64) -> Result<Uuid, IncarnationError> {
    let path = data_dir.join(FILE);
    let last = read(&path)?;
    let unix_ms = u64::try_from(now_ms).unwrap_or(0).max(last.map_or(0, |last| last + 1));
    let stored = StoredIncarnation { version: VERSION, unix_ms };
    storage::write_atomically(&path, &stored.encode_to_vec())
        .map_err(|source| IncarnationError::Io { path, source })?;
    Ok(at(unix_ms))
}

/// An incarnation that nobody remembers, for an agent without a data directory.
pub fn unremembered(now_ms: i64) -> Uuid {
    at(u64::try_from(now_ms).unwrap_or(0))
}

fn at(unix_ms: u64) -> Uuid {
    Builder::from_unix_timestamp_millis(unix_ms, &rand::random()).into_uuid()
}

fn read(path: &Path) -> Result<Option<u64>, IncarnationError> {
    let path = || path.to_owned();
    let bytes = match fs::read(path()) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(IncarnationError::Io { path: path(), source }),
    };
    let stored = StoredIncarnation::decode(bytes.as_slice())
        .map_err(|source| IncarnationError::Damaged { path: path(), source })?;
    match stored.version {
        VERSION => Ok(Some(stored.unix_ms)),
        version => Err(IncarnationError::Version { path: path(), version }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_orders_after_the_last_whatever_the_clock_says() {
        let directory = tempfile::tempdir().expect("directory");
        let clock = [1_700_000_000_000, 1_700_000_000_000, 1_600_000_000_000, -5, 1_700_000_000_001];
        let all: Vec<Uuid> = clock.map(|now| next(directory.path(), now).expect("next")).to_vec();
        assert!(all.is_sorted() && all.iter().all(|id| id.get_version_num() == 7), "{all:?}");
        let later = next(directory.path(), 1_800_000_000_000).expect("next");
        assert_eq!(later.get_timestamp().expect("v7").to_unix().0, 1_800_000_000);
    }

    #[test]
    fn the_bytes_on_disk_stay_as_they_are_and_others_are_refused() {
        let stored = StoredIncarnation { version: VERSION, unix_ms: 300 };
        assert_eq!(stored.encode_to_vec(), b"\x08\x01\x10\xac\x02");
        let directory = tempfile::tempdir().expect("directory");
        fs::write(directory.path().join(FILE), [0x08, 2]).expect("write");
        assert!(matches!(next(directory.path(), 1), Err(IncarnationError::Version { version: 2, .. })));
        fs::write(directory.path().join(FILE), [0xff]).expect("write");
        assert!(matches!(next(directory.path(), 1), Err(IncarnationError::Damaged { .. })));
    }
}
