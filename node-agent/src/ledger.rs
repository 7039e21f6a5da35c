//! Which ledger this node belongs to, remembered across restarts.
//!
//! A node that served one ledger must not quietly serve another: what it runs would be unknown there. The file is written
//! when a leader first welcomes the node, and never changed afterwards.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::storage;

const FILE: &str = "ledger";
const VERSION: u32 = 1;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {source}")]
    Damaged { path: PathBuf, source: prost::DecodeError },
    #[error("{path} has version {version}; this agent reads {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// What stands on disk.
#[derive(Clone, PartialEq, Message)]
struct StoredLedger {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(string, tag = "2")]
    ledger_id: String,
}

/// The file `<data_dir>/ledger`, or none: an agent without a data directory belongs to whichever ledger welcomes it.
#[derive(Debug, Clone, Default)]
pub struct LedgerFile {
    path: Option<PathBuf>,
}

impl LedgerFile {
    pub fn new(data_dir: &Path) -> Self {
        Self { path: Some(data_dir.join(FILE)) }
    }

    /// The ledger's id; `None` on a node that no ledger has welcomed yet.
    pub fn read(&self) -> Result<Option<String>, LedgerFileError> {
        let Some(file) = &self.path else { return Ok(None) };
        let path = || file.clone();
        let bytes = match fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(LedgerFileError::Io { path: path(), source }),
        };
        let stored = StoredLedger::decode(bytes.as_slice())
            .map_err(|source| LedgerFileError::Damaged { path: path(), source })?;
        match stored.version {
            VERSION => Ok(Some(stored.ledger_id)),
            version => Err(LedgerFileError::Version { path: path(), version }),
        }
    }

    pub fn write(&self, ledger_id: &str) -> Result<(), LedgerFileError> {
        let stored = StoredLedger { version: VERSION, ledger_id: ledger_id.to_owned() };
        let Some(path) = &self.path else { return Ok(()) };
        storage::write_atomically(path, &stored.encode_to_vec())
            .map_err(|source| LedgerFileError::Io { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_is_remembered_and_a_newer_file_is_refused() {
        let directory = tempfile::tempdir().expect("directory");
        let file = LedgerFile::new(directory.path());
        assert_eq!(file.read().expect("read"), None);
        file.write("l-1").expect("write");
        assert_eq!(file.read().expect("read").as_deref(), Some("l-1"));
        fs::write(directory.path().join(FILE), [0x08, 2]).expect("write");
        assert!(matches!(file.read(), Err(LedgerFileError::Version { version: 2, .. })));
    }

    #[test]
    fn the_bytes_on_disk_stay_as_they_are() {
        let stored = StoredLedger { version: VERSION, ledger_id: "abc".into() };
        assert_eq!(stored.encode_to_vec(), b"\x08\x01\x12\x03abc");
    }
}
