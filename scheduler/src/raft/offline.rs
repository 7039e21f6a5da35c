//! What an operator does to a data directory while no replica runs on it: restore a backup, or go on from one surviving replica
//! when the quorum is lost for good.
//!
//! Both make a new ledger. Its history differs from what agents, clients and bills may have seen, so it has an id of its own, and
//! nothing old is taken for new: agents of the ledger before are let in, what they run and the new ledger does not know stays
//! frozen until somebody decides, placements get epochs above all that may have been given out, and nothing is placed or moved
//! until an operator has looked and resumes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::RaftLogReader;
use openraft::storage::RaftLogStorage;
use warren_proto::ids::{Epoch, ReplicaId};

use super::checkpoint::{self, CheckpointDirectory, CheckpointError};
use super::identity::{Identity, IdentityError};
use super::log_store::{LogStore, OpenError};
use super::state_machine::StateMachine;
use super::types::{CheckpointMeta, LogId, Member, Membership, StoredMembership, Vote};
use crate::state::State;
use crate::state::command::LedgerId;
use crate::state::node;
use crate::state::sandbox::{Life, Sandbox};

/// How far the epochs of a new ledger lie above those of the one before: more placements than a lost history can hold.
const EPOCH_GAP: u64 = 1 << 20;

/// Why it was not done. The directory is as it was.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Log(#[from] OpenError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} holds a ledger already: give a directory that does not exist or is empty")]
    NotEmpty(PathBuf),
    #[error("{0} holds no ledger: there is nothing to recover; restore a backup instead")]
    Nothing(PathBuf),
    #[error("the log ends with entry {index}, which cannot be applied: {what}")]
    Entry { index: u64, what: String },
}

/// What the new ledger is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    pub ledger_id: LedgerId,
    pub predecessor: Option<LedgerId>,
    /// Index up to which the history before is in it.
    pub revision: u64,
    pub sandboxes: usize,
    pub nodes: usize,
    /// Where the directory's earlier content is kept, if there was any.
    pub kept: Option<PathBuf>,
}

/// Makes a new ledger of one replica out of a backup, in an empty `data_dir`.
pub fn restore(backup: &Path, data_dir: &Path, id: ReplicaId, member: Member) -> Result<Renewed, OfflineError> {
    let loaded = checkpoint::read(backup)?;
    for part in ["log", "checkpoints", "identity"] {
        if data_dir.join(part).exists() {
            return Err(OfflineError::NotEmpty(data_dir.to_owned()));
        }
    }
    let last = LogId::new_term_index(1, loaded.state.revision);
    begin(loaded.state, last, data_dir, id, member, None)
}

/// The state that a backup or a checkpoint holds, for who wants to look at it without a replica.
pub fn read_backup(file: &Path) -> Result<State, CheckpointError> {
    checkpoint::read(file).map(|loaded| loaded.state)
}

/// Makes a new ledger of one replica out of all that one surviving replica has, committed or not: what was acknowledged and lies
/// on its disk is not lost. Its earlier content is kept beside.
pub fn recover_quorum(data_dir: &Path, id: ReplicaId, member: Member) -> Result<Renewed, OfflineError> {
    if !data_dir.join("log").exists() {
        return Err(OfflineError::Nothing(data_dir.to_owned()));
    }
    Identity::load_or_create(data_dir, id)?;
    let (state, last) = all_that_is_there(data_dir)?;
    let Some(last) = last else { return Err(OfflineError::Nothing(data_dir.to_owned())) };
    let kept = keep(data_dir)?;
    begin(state, last, data_dir, id, member, Some(kept))
}

/// The newest checkpoint, with every entry of the log applied.
fn all_that_is_there(data_dir: &Path) -> Result<(State, Option<LogId>), OfflineError> {
    let mut machine = StateMachine::open(CheckpointDirectory::open(&data_dir.join("checkpoints"))?)?;
    let mut store = LogStore::open(&data_dir.join("log"))?;
    let from = machine.applied_index().map_or(0, |index| index.saturating_add(1));
    let reading = store.try_get_log_entries(from..);
    let entries = futures::executor::block_on(reading);
    let entries =
        entries.map_err(|source| OfflineError::Io { action: "read log", path: data_dir.to_owned(), source })?;
    for entry in entries {
        // As while serving: members count too, and what this build does not know ends it.
        let applied = machine.apply_entry(entry.log_id, &entry.payload);
        applied.map_err(|error| OfflineError::Entry { index: entry.log_id.index, what: error.to_string() })?;
    }
    Ok(machine.into_state())
}

/// Moves log and checkpoints aside: nothing is thrown away.
fn keep(data_dir: &Path) -> Result<PathBuf, OfflineError> {
    let kept = data_dir.join(format!("before-recovery-{:08x}", rand::random::<u32>()));
    let io = |source| OfflineError::Io { action: "move aside", path: kept.clone(), source };
    fs::create_dir(&kept).map_err(io)?;
    for part in ["log", "checkpoints", "identity"] {
        fs::rename(data_dir.join(part), kept.join(part)).map_err(io)?;
    }
    Ok(kept)
}

/// Writes the first checkpoint of the new ledger, and a vote that no earlier one contradicts.
fn begin(
    state: State,
    last: LogId,
    data_dir: &Path,
    id: ReplicaId,
    member: Member,
    kept: Option<PathBuf>,
) -> Result<Renewed, OfflineError> {
    let io = |source| OfflineError::Io { action: "write", path: data_dir.to_owned(), source };
    fs::create_dir_all(data_dir).map_err(io)?;
    Identity::load_or_create(data_dir, id)?;
    let predecessor = state.ledger_id;
    let state = renewed(state, id, LedgerId(rand::random()));
    let members = BTreeMap::from([(id.0, member)]);
    let membership = Membership::new(vec![BTreeSet::from([id.0])], members).map_err(|e| io(io::Error::other(e)))?;
    let last_membership = StoredMembership::new(Some(last), membership);
    let meta = CheckpointMeta { last_log_id: Some(last), last_membership };
    CheckpointDirectory::open(&data_dir.join("checkpoints"))?.write(&state, &meta)?;
    let mut store = LogStore::open(&data_dir.join("log"))?;
    let vote = Vote::new(last.leader_id.term.saturating_add(1), id.0);
    futures::executor::block_on(store.save_vote(&vote)).map_err(io)?;
    Ok(Renewed {
        ledger_id: state.ledger_id.unwrap_or_default(),
        predecessor,
        revision: state.revision,
        sandboxes: state.sandboxes.len(),
        nodes: state.nodes.len(),
        kept,
    })
}

/// The same facts as a new ledger.
pub fn renewed(mut state: State, id: ReplicaId, ledger_id: LedgerId) -> State {
    state.predecessors.extend(state.ledger_id);
    state.ledger_id = Some(ledger_id);
    let highest = state.sandboxes.values().map(|sandbox| sandbox.epoch).max().unwrap_or_default();
    let highest = highest.max(state.epoch_floor).max(state.restored_floor);
    state.restored_floor = Epoch(highest.0.saturating_add(EPOCH_GAP));
    state.region.pauses.placement = true;
    state.region.pauses.moves = true;
    // The other replicas are gone; this one announces itself anew, with its new disk.
    state.replicas.remove(&id);
    // Nobody has heard of the nodes yet: until they say hello to this ledger, nobody is sent to them.
    node::suspect_all(&mut state);
    // What was being started may have been started, and moved on in the history that is lost: the node says whether it has it. If it
    // does not, it is lost, and not started a second time.
    let starting: Vec<Arc<Sandbox>> =
        state.sandboxes.values().filter(|s| matches!(s.life, Life::Starting { .. })).cloned().collect();
    for sandbox in starting {
        if let Life::Starting { node, since } = sandbox.life.clone() {
            let life = Life::Running { node, since };
            state.put_sandbox(Arc::new(Sandbox { life, ..Sandbox::clone(&sandbox) }));
        }
    }
    state
}
