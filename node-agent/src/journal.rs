//! What must survive the agent: for each sandbox the newest epoch seen here and how far its start got.
//!
//! The intent to start is on disk before the driver is asked, so an agent that was killed at any moment knows what may be on
//! the host, and never starts an epoch twice. One small file a sandbox, replaced atomically; a record is forgotten once the
//! assignment no longer names its sandbox and nothing of it is left.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use warren_proto::ids::{Epoch, SandboxName};

use crate::reconcile::{Reason, Record, Stage};
use crate::storage;

const VERSION: u32 = 1;
const SUFFIX: &str = ".record";

/// Why the journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("journal {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("journal record {path} is damaged: {what}")]
    Damaged { path: PathBuf, what: String },
    #[error("journal record {path} has version {version}; this agent reads {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// What stands on disk.
#[derive(Clone, PartialEq, Message)]
struct StoredRecord {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(string, tag = "2")]
    sandbox: String,
    #[prost(uint64, tag = "3")]
    epoch: u64,
    #[prost(enumeration = "StoredStage", tag = "4")]
    stage: i32,
    #[prost(string, tag = "5")]
    reason_code: String,
    #[prost(string, tag = "6")]
    reason_message: String,
    /// Epochs up to this one are of a ledger that this node's was restored from.
    #[prost(uint64, tag = "7")]
    foreign: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum StoredStage {
    Unspecified = 0,
    Starting = 1,
    Started = 2,
    Failed = 3,
    Removed = 4,
}

/// What is kept of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub record: Record,
    /// As in `Held`.
    pub foreign: Option<Epoch>,
}

/// The directory `<data_dir>/journal`. Calls block: they sync.
#[derive(Debug, Clone)]
pub struct Journal {
    /// `None`: nothing is kept, for agents whose sandboxes end with their process.
    directory: Option<PathBuf>,
}

impl Journal {
    pub fn open(data_dir: &Path) -> Result<Self, JournalError> {
        let directory = data_dir.join("journal");
        storage::create_private_directory(&directory)
            .map_err(|source| JournalError::Io { path: directory.clone(), source })?;
        Ok(Self { directory: Some(directory) })
    }

    /// Keeps nothing: for simulated sandboxes, which end with their agent.
    pub fn of_nothing() -> Self {
        Self { directory: None }
    }

    /// Whether calls may block.
    pub fn is_on_disk(&self) -> bool {
        self.directory.is_some()
    }

    /// Every record. One that cannot be read is an error: to go on without it could start a sandbox twice.
    pub fn load(&self) -> Result<BTreeMap<SandboxName, Entry>, JournalError> {
        let mut records = BTreeMap::new();
        let Some(directory) = &self.directory else { return Ok(records) };
        let io = |source| JournalError::Io { path: directory.clone(), source };
        for entry in fs::read_dir(directory).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.to_string_lossy().ends_with(SUFFIX) {
                let bytes = fs::read(&path).map_err(|source| JournalError::Io { path: path.clone(), source })?;
                let (name, entry) = decode(&path, &bytes)?;
                records.insert(name, entry);
            }
        }
        Ok(records)
    }

    pub fn put(&self, sandbox: &SandboxName, entry: &Entry) -> Result<(), JournalError> {
        let Some(path) = self.path_of(sandbox) else { return Ok(()) };
        storage::write_atomically(&path, &encode(sandbox, entry)).map_err(|source| JournalError::Io { path, source })
    }

    pub fn forget(&self, sandbox: &SandboxName) -> Result<(), JournalError> {
        let Some(path) = self.path_of(sandbox) else { return Ok(()) };
        storage::remove_durably(&path).map_err(|source| JournalError::Io { path, source })
    }

    /// Ids hold no dot, so no two sandboxes share a file.
    fn path_of(&self, sandbox: &SandboxName) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(format!("{}.{}{SUFFIX}", sandbox.tenant, sandbox.id)))
    }
}

fn encode(sandbox: &SandboxName, entry: &Entry) -> Vec<u8> {
    let record = &entry.record;
    let (stage, reason) = match &record.stage {
        Stage::Starting => (StoredStage::Starting, None),
        Stage::Started => (StoredStage::Started, None),
        Stage::Failed(reason) => (StoredStage::Failed, Some(reason)),
        Stage::Removed => (StoredStage::Removed, None),
    };
    let (reason_code, reason_message) = reason.map(|r| (r.code.clone(), r.message.clone())).unwrap_or_default();
    StoredRecord {
        version: VERSION,
        sandbox: sandbox.to_string(),
        epoch: record.epoch.0,
        stage: stage.into(),
        reason_code,
        reason_message,
        foreign: entry.foreign.map_or(0, |epoch| epoch.0),
    }
    .encode_to_vec()
}

fn decode(path: &Path, bytes: &[u8]) -> Result<(SandboxName, Entry), JournalError> {
    let damaged = |what: String| JournalError::Damaged { path: path.to_owned(), what };
    let stored = StoredRecord::decode(bytes).map_err(|error| damaged(error.to_string()))?;
    if stored.version != VERSION {
        return Err(JournalError::Version { path: path.to_owned(), version: stored.version });
    }
    let sandbox = SandboxName::parse(&stored.sandbox).map_err(|error| damaged(error.to_string()))?;
    let stage = match stored.stage() {
        StoredStage::Starting => Stage::Starting,
        StoredStage::Started => Stage::Started,
        StoredStage::Failed => Stage::Failed(Reason { code: stored.reason_code, message: stored.reason_message }),
        StoredStage::Removed => Stage::Removed,
        StoredStage::Unspecified => return Err(damaged(format!("stage {}", stored.stage))),
    };
    let foreign = (stored.foreign > 0).then_some(Epoch(stored.foreign));
    Ok((sandbox, Entry { record: Record { epoch: Epoch(stored.epoch), stage }, foreign }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(id: &str) -> SandboxName {
        SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).expect("name")
    }

    #[test]
    fn records_survive_and_are_forgotten() {
        let directory = tempfile::tempdir().expect("directory");
        let journal = Journal::open(directory.path()).expect("open");
        let entry = |epoch, stage, foreign| Entry { record: Record { epoch: Epoch(epoch), stage }, foreign };
        let failed = entry(2, Stage::Failed(Reason::new("START_FAILED", "no")), Some(Epoch(1)));
        let started = entry(1, Stage::Started, None);
        journal.put(&name("a"), &started).expect("put");
        journal.put(&name("a"), &failed).expect("put");
        journal.put(&name("b"), &started).expect("put");
        fs::write(directory.path().join("journal/t.c.record.tmp"), b"torn").expect("write");
        let again = Journal::open(directory.path()).expect("open");
        assert_eq!(again.load().expect("load"), BTreeMap::from([(name("a"), failed), (name("b"), started)]));
        again.forget(&name("a")).expect("forget");
        assert_eq!(again.load().expect("load").len(), 1);
    }

    #[test]
    fn the_bytes_on_disk_stay_as_they_are() {
        let record = Record { epoch: Epoch(300), stage: Stage::Failed(Reason::new("C", "m")) };
        let record = Entry { record, foreign: None };
        let golden = b"\x08\x01\x12\x17tenants/t/sandboxes/abc\x18\xac\x02\x20\x03\x2a\x01C\x32\x01m";
        assert_eq!(encode(&name("abc"), &record), golden);
        assert_eq!(decode(Path::new("x"), golden).expect("decode"), (name("abc"), record.clone()));
        let foreign = Entry { foreign: Some(Epoch(2)), ..record };
        assert_eq!(encode(&name("abc"), &foreign), [&golden[..], b"\x38\x02"].concat());
    }

    #[test]
    fn what_cannot_be_read_is_said_not_skipped() {
        let directory = tempfile::tempdir().expect("directory");
        let journal = Journal::open(directory.path()).expect("open");
        let path = directory.path().join("journal/t.a.record");
        fs::write(&path, b"\xff\xff").expect("write");
        assert!(matches!(journal.load(), Err(JournalError::Damaged { .. })));
        fs::write(&path, b"\x08\x02").expect("write");
        assert!(matches!(journal.load(), Err(JournalError::Version { version: 2, .. })));
    }
}
