//! The bytes of one record: protobuf with a version.

use prost::Message;
use warren_proto::ids::{Epoch, SandboxName};

use super::Entry;
use crate::reconcile::{Reason, Record, Stage};

pub const VERSION: u32 = 1;

/// Longest message of a reason that is kept: far below what sled keeps in its own file (`scheduler/docs/adr/0002`).
const MAX_MESSAGE: usize = 4096;

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("damaged: {0}")]
    Damaged(String),
    #[error("version {0}")]
    Version(u32),
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

pub fn encode(sandbox: &SandboxName, entry: &Entry) -> Vec<u8> {
    let record = &entry.record;
    let (stage, reason) = match &record.stage {
        Stage::Starting => (StoredStage::Starting, None),
        Stage::Started => (StoredStage::Started, None),
        Stage::Failed(reason) => (StoredStage::Failed, Some(reason)),
        Stage::Removed => (StoredStage::Removed, None),
    };
    let (reason_code, mut reason_message) = reason.map(|r| (r.code.clone(), r.message.clone())).unwrap_or_default();
    reason_message.truncate(reason_message.floor_char_boundary(MAX_MESSAGE));
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

pub fn decode(bytes: &[u8]) -> Result<(SandboxName, Entry), DecodeError> {
    let damaged = |what: String| DecodeError::Damaged(what);
    let stored = StoredRecord::decode(bytes).map_err(|error| damaged(error.to_string()))?;
    if stored.version != VERSION {
        return Err(DecodeError::Version(stored.version));
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

    #[test]
    fn the_bytes_on_disk_stay_as_they_are() {
        let name = SandboxName::parse("tenants/t/sandboxes/abc").expect("name");
        let record = Record { epoch: Epoch(300), stage: Stage::Failed(Reason::new("C", "m")) };
        let record = Entry { record, foreign: None };
        let golden = b"\x08\x01\x12\x17tenants/t/sandboxes/abc\x18\xac\x02\x20\x03\x2a\x01C\x32\x01m";
        assert_eq!(encode(&name, &record), golden);
        assert_eq!(decode(golden).expect("decode"), (name.clone(), record.clone()));
        let foreign = Entry { foreign: Some(Epoch(2)), ..record };
        assert_eq!(encode(&name, &foreign), [&golden[..], b"\x38\x02"].concat());
    }

    #[test]
    fn what_is_not_a_record_is_said() {
        assert!(matches!(decode(b"\xff\xff"), Err(DecodeError::Damaged(_))));
        assert!(matches!(decode(b"\x08\x01"), Err(DecodeError::Damaged(_))));
        assert!(matches!(decode(b"\x08\x02"), Err(DecodeError::Version(2))));
    }

    #[test]
    fn a_record_stays_small_whatever_a_runtime_printed() {
        let name = SandboxName::parse("tenants/t/sandboxes/abc").expect("name");
        let stage = Stage::Failed(Reason::new("C", "ä".repeat(1 << 20)));
        let bytes = encode(&name, &Entry { record: Record { epoch: Epoch(1), stage }, foreign: None });
        assert!(bytes.len() < 5000 && decode(&bytes).is_ok());
    }
}
