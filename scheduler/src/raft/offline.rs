//! What an operator does to a data directory while no replica runs on it: restore a backup, or go on from one surviving replica
//! when the quorum is lost for good.
//!
//! Both make a new ledger. Its history differs from what agents, clients and bills may have seen, so it has an id of its own, and
//! nothing old is taken for new: agents of the ledger before are let in, what they run and the new ledger does not know stays
//! frozen until somebody decides, placements get epochs above all that may have been given out, and nothing is placed or moved
//! until an operator has looked and resumes it.
//!
//! ```text
//! renewing.tmp/   the new ledger, being written: a crash leaves the directory as it was
//! renewing/       the new ledger, whole: what was before is moved aside, and it is moved into its place, a part at a time
//! ```
//!
//! A crash meanwhile leaves `renewing/` where it is: the same command again moves what is left, and no replica starts before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::RaftLogReader;
use warren_proto::ids::{Epoch, ReplicaId};

use super::checkpoint::{self, CheckpointDirectory, CheckpointError};
use super::identity::{Identity, IdentityError};
use super::log_store::{LogStore, OpenError, make_directory};
use super::state_machine::StateMachine;
use super::types::{CheckpointMeta, LogId, Member, Membership, StoredMembership, Vote};
use crate::state::State;
use crate::state::command::LedgerId;
use crate::state::node;
use crate::state::sandbox::{Life, Sandbox};

/// How far the epochs of a new ledger lie above those of the one before: more placements than a lost history can hold.
const EPOCH_GAP: u64 = 1 << 20;

/// What a ledger has in a data directory.
const PARTS: [&str; 3] = ["log", "checkpoints", "identity"];

/// The new ledger, whole, on its way into its place.
const RENEWING: &str = "renewing";

/// The new ledger, being written.
const UNFINISHED: &str = "renewing.tmp";

/// Why it was not done. The directory is as it was, or the same command again goes on.
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
    if is_unfinished(data_dir) {
        return finish(data_dir);
    }
    if PARTS.iter().any(|part| data_dir.join(part).exists()) {
        return Err(OfflineError::NotEmpty(data_dir.to_owned()));
    }
    let last = LogId::new_term_index(1, loaded.state.revision);
    prepare(loaded.state, last, data_dir, id, member)?;
    finish(data_dir)
}

/// The state that a backup or a checkpoint holds, for who wants to look at it without a replica.
pub fn read_backup(file: &Path) -> Result<State, CheckpointError> {
    checkpoint::read(file).map(|loaded| loaded.state)
}

/// Makes a new ledger of one replica out of all that one surviving replica has, committed or not: what was acknowledged and lies
/// on its disk is not lost. Its earlier content is kept beside.
pub fn recover_quorum(data_dir: &Path, id: ReplicaId, member: Member) -> Result<Renewed, OfflineError> {
    if is_unfinished(data_dir) {
        return finish(data_dir);
    }
    if !data_dir.join("log").exists() {
        return Err(OfflineError::Nothing(data_dir.to_owned()));
    }
    Identity::load_or_create(data_dir, id)?;
    let (state, last) = all_that_is_there(data_dir)?;
    let Some(last) = last else { return Err(OfflineError::Nothing(data_dir.to_owned())) };
    prepare(state, last, data_dir, id, member)?;
    finish(data_dir)
}

/// Whether a restore or a recovery was begun here and is to be gone on with.
pub(super) fn is_unfinished(data_dir: &Path) -> bool {
    data_dir.join(RENEWING).exists()
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

/// Writes the new ledger beside what is there: its first checkpoint, and a vote that no earlier one contradicts.
fn prepare(state: State, last: LogId, data_dir: &Path, id: ReplicaId, member: Member) -> Result<(), OfflineError> {
    let new = data_dir.join(UNFINISHED);
    let io = |source| OfflineError::Io { action: "write", path: new.clone(), source };
    if new.exists() {
        fs::remove_dir_all(&new).map_err(io)?;
    }
    make_directory(&new).map_err(io)?;
    let state = renewed(state, id, LedgerId(rand::random()));
    let members = BTreeMap::from([(id.0, member)]);
    let membership = Membership::new(vec![BTreeSet::from([id.0])], members).map_err(|e| io(io::Error::other(e)))?;
    let last_membership = StoredMembership::new(Some(last), membership);
    let meta = CheckpointMeta { last_log_id: Some(last), last_membership };
    CheckpointDirectory::open(&new.join("checkpoints"))?.write(&state, &meta)?;
    LogStore::make(&new.join("log"), &Vote::new(last.leader_id.term.saturating_add(1), id.0))?;
    Identity::load_or_create(&new, id)?;
    sync(&new).map_err(io)?;
    fs::rename(&new, data_dir.join(RENEWING)).map_err(io)?;
    sync(data_dir).map_err(io)
}

/// Moves what is left to move, and says what the new ledger is.
fn finish(data_dir: &Path) -> Result<Renewed, OfflineError> {
    let new = data_dir.join(RENEWING);
    let kept = kept_beside(&new, data_dir)?;
    for part in PARTS {
        put_in_place(&new, &kept, data_dir, part)?;
    }
    let done = |source| OfflineError::Io { action: "remove", path: new.clone(), source };
    let state = newest(data_dir)?;
    fs::remove_dir(&new).and_then(|()| sync(data_dir)).map_err(done)?;
    Ok(Renewed {
        ledger_id: state.ledger_id.unwrap_or_default(),
        predecessor: state.predecessors.last().copied(),
        revision: state.revision,
        sandboxes: state.sandboxes.len(),
        nodes: state.nodes.len(),
        kept: Some(kept).filter(|kept| kept.exists()),
    })
}

/// One part: what was before goes aside, nothing is thrown away. A part that is in its place already stays.
fn put_in_place(new: &Path, kept: &Path, data_dir: &Path, part: &str) -> Result<(), OfflineError> {
    let (from, to, aside) = (new.join(part), data_dir.join(part), kept.join(part));
    let io = |source| OfflineError::Io { action: "move", path: to.clone(), source };
    if !from.exists() {
        return Ok(());
    }
    if to.exists() {
        make_directory(kept).map_err(io)?;
        fs::rename(&to, &aside).and_then(|()| sync(kept)).map_err(io)?;
    }
    fs::rename(&from, &to).and_then(|()| sync(data_dir)).map_err(io)
}

/// Where the earlier content goes: named after the new ledger, so that it is the same after a crash.
fn kept_beside(new: &Path, data_dir: &Path) -> Result<PathBuf, OfflineError> {
    let whole = if new.join("checkpoints").exists() { new } else { data_dir };
    let ledger = newest(whole)?.ledger_id.unwrap_or_default().to_string();
    Ok(data_dir.join(format!("before-recovery-{}", ledger.get(..8).unwrap_or(&ledger))))
}

/// The state in the newest checkpoint below `directory`.
fn newest(directory: &Path) -> Result<State, OfflineError> {
    let checkpoints = CheckpointDirectory::open(&directory.join("checkpoints"))?;
    let loaded = checkpoints.load(|_| ())?;
    Ok(loaded.ok_or_else(|| OfflineError::Nothing(directory.to_owned()))?.state)
}

fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::raft::codec::samples;
    use crate::raft::{Replica, ReplicaConfig, StartError};

    const ID: ReplicaId = ReplicaId(1);

    /// A directory that holds a ledger of one sandbox.
    fn ledger(data_dir: &Path) -> LedgerId {
        let mut state = State { ledger_id: Some(LedgerId(0xa11ce)), revision: 40, ..State::default() };
        let life = Life::Running { node: samples::node(), since: Default::default() };
        state.put_sandbox(Arc::new(samples::sandbox(life)));
        prepare(state, LogId::new_term_index(1, 40), data_dir, ID, Member::default()).unwrap();
        let made = finish(data_dir).unwrap();
        assert_eq!((made.kept, made.sandboxes), (None, 1));
        made.ledger_id
    }

    /// sled gives its lock back a moment after the last handle went; there is nothing to wait for.
    fn store(data_dir: &Path) -> LogStore {
        let looks = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(5));
            LogStore::open(&data_dir.join("log")).ok()
        });
        looks.take(2000).flatten().next().unwrap()
    }

    /// Wherever a crash stops it, the same command again ends as if there had been none.
    #[test]
    fn a_recovery_that_was_cut_off_goes_on_where_it_stopped() {
        for moves in 0..=2 * PARTS.len() {
            let directory = tempfile::tempdir().unwrap();
            let data_dir = directory.path();
            let before = ledger(data_dir);
            let old_identity = fs::read(data_dir.join("identity")).unwrap();
            prepare(newest(data_dir).unwrap(), LogId::new_term_index(1, 40), data_dir, ID, Member::default()).unwrap();
            cut_off(data_dir, moves);
            let done = recover_quorum(data_dir, ID, Member::default()).unwrap();
            assert_eq!((done.predecessor, done.sandboxes), (Some(before), 1), "after {moves} moves");
            let kept = done.kept.unwrap();
            assert_eq!(fs::read(kept.join("identity")).unwrap(), old_identity);
            assert!(PARTS.iter().all(|part| kept.join(part).exists() && data_dir.join(part).exists()));
            assert!(!is_unfinished(data_dir));
            assert_eq!(newest(data_dir).unwrap().ledger_id, Some(done.ledger_id));
            assert!(!store(data_dir).is_empty().unwrap(), "it has its vote");
        }
    }

    /// As a crash leaves it after so many moves.
    fn cut_off(data_dir: &Path, moves: usize) {
        let new = data_dir.join(RENEWING);
        let kept = kept_beside(&new, data_dir).unwrap();
        fs::create_dir(&kept).unwrap();
        let steps = PARTS
            .iter()
            .flat_map(|part| [(data_dir.join(part), kept.join(part)), (new.join(part), data_dir.join(part))]);
        for (from, to) in steps.take(moves) {
            fs::rename(from, to).unwrap();
        }
    }

    #[test]
    fn what_was_not_written_whole_is_thrown_away() {
        let directory = tempfile::tempdir().unwrap();
        let before = ledger(directory.path());
        fs::create_dir_all(directory.path().join(UNFINISHED).join("log")).unwrap();
        prepare(
            newest(directory.path()).unwrap(),
            LogId::new_term_index(1, 40),
            directory.path(),
            ID,
            Member::default(),
        )
        .unwrap();
        assert_eq!(finish(directory.path()).unwrap().predecessor, Some(before));
        assert!(!directory.path().join(UNFINISHED).exists());
    }

    #[tokio::test]
    async fn a_replica_does_not_start_on_half_a_recovery() {
        let directory = tempfile::tempdir().unwrap();
        ledger(directory.path());
        let state = newest(directory.path()).unwrap();
        prepare(state, LogId::new_term_index(1, 40), directory.path(), ID, Member::default()).unwrap();
        let config = ReplicaConfig {
            id: ID,
            data_dir: directory.path().to_owned(),
            initial_members: BTreeMap::new(),
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(500),
            tls: Default::default(),
            checkpoint_every: 1000,
        };
        let error = Replica::start(config).await.unwrap_err();
        assert!(matches!(error, StartError::Unfinished(_)), "{error}");
        assert!(error.to_string().contains("again"), "it says what to do");
    }
}
