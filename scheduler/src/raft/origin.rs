//! Where a call or an answer between replicas comes from: its ledger and its disk, as metadata beside the message.
//!
//! Both are checked before anything is done. Raft itself trusts whoever sends a term that is high enough: a replica of the
//! history before a restore or a recovery would overwrite the new one's log, and one whose disk was lost has forgotten what
//! it promised.

use std::sync::Arc;

use tokio::sync::watch;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::{Request, Response, Status};
use warren_proto::ids::ReplicaId;

use super::identity::Identity;
use crate::state::State;
use crate::state::command::LedgerId;

/// The disk that a message comes from.
const DISK: &str = "warren-disk";

/// The ledger that it belongs to; absent where the sender knows none yet: it has just joined, or the ledger is being formed.
const LEDGER: &str = "warren-ledger";

/// What this replica says of itself, and what its ledger knows of the others.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub identity: Identity,
    pub states: watch::Receiver<Arc<State>>,
}

impl Origin {
    pub fn ledger(&self) -> Option<LedgerId> {
        self.states.borrow().ledger_id
    }

    /// A call that says where it comes from.
    pub fn call<T>(&self, mut request: Request<T>) -> Request<T> {
        self.sign(request.metadata_mut());
        request
    }

    /// An answer that says where it comes from.
    pub fn answer<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.sign(response.metadata_mut());
        response
    }

    fn sign(&self, metadata: &mut MetadataMap) {
        metadata.insert(DISK, digits(self.identity.disk));
        if let Some(ledger) = self.ledger() {
            metadata.insert(LEDGER, digits(ledger.0));
        }
    }

    /// Refuses what comes from another ledger, or from a disk of `replica` that the ledger does not know.
    pub fn check(&self, replica: ReplicaId, metadata: &MetadataMap) -> Result<(), Status> {
        self.check_ledger(metadata)?;
        check_disk(&self.states.borrow(), replica, metadata)
    }

    /// Refuses what comes from another ledger.
    pub fn check_ledger(&self, metadata: &MetadataMap) -> Result<(), Status> {
        same_ledger(self.ledger(), told(metadata, LEDGER).map(LedgerId))
    }
}

/// Whether two replicas that know these ledgers may speak to each other: where one knows none, it is about to learn it.
pub(super) fn same_ledger(ours: Option<LedgerId>, theirs: Option<LedgerId>) -> Result<(), Status> {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(Status::failed_precondition(format!(
            "this replica belongs to ledger {ours}, the other one to ledger {theirs}: after a restore or a recovery the \
             replicas of before stay out. Stop the other one, and let it join again, empty and under a new id"
        ))),
        _ => Ok(()),
    }
}

/// Whether what comes from `replica` comes from the disk that the ledger knows.
fn check_disk(state: &State, replica: ReplicaId, metadata: &MetadataMap) -> Result<(), Status> {
    let known = state.replicas.get(&replica).map_or(0, |record| record.disk);
    let told = told(metadata, DISK).unwrap_or(0);
    if known == 0 || told == 0 || known == told {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "replica {replica} comes with another disk than the ledger knows: it must join anew"
    )))
}

fn digits(value: u128) -> MetadataValue<Ascii> {
    // Hexadecimal digits are always a legal value.
    format!("{value:032x}").parse().unwrap_or_else(|_| MetadataValue::from_static(""))
}

fn told(metadata: &MetadataMap, key: &str) -> Option<u128> {
    let text = metadata.get(key)?.to_str().ok()?;
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::codec::samples::full_record;

    fn origin(disk: u128, ledger: Option<u128>) -> Origin {
        let mut state = State { ledger_id: ledger.map(LedgerId), ..State::default() };
        state.replicas.insert(ReplicaId(2), full_record());
        let (_, states) = watch::channel(Arc::new(state));
        Origin { identity: Identity { replica: ReplicaId(1), disk }, states }
    }

    #[test]
    fn another_ledger_or_another_disk_is_refused_and_who_knows_none_is_let_in() {
        let ours = origin(7, Some(1));
        let from = |disk, ledger| origin(disk, ledger).call(Request::new(()));
        let known = full_record().disk;
        let ask = |disk, ledger| ours.check(ReplicaId(2), from(disk, ledger).metadata());
        assert!(ask(known, Some(1)).is_ok() && ask(known, None).is_ok());
        assert!(ask(known, Some(2)).unwrap_err().message().contains("ledger"));
        assert!(ask(8, Some(1)).unwrap_err().message().contains("disk"));
        assert!(ours.check(ReplicaId(9), from(8, Some(1)).metadata()).is_ok(), "of a stranger no disk is known");
        assert!(origin(7, None).check(ReplicaId(9), from(8, Some(1)).metadata()).is_ok());
    }
}
