//! openraft's view of the state: applies what is committed, publishes it, writes and installs checkpoints.
//!
//! A new state is published before anybody who waits for it is answered, so an answer is never ahead of what can be read.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use ::metrics::histogram;
use futures::{Stream, TryStreamExt};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;
use tracing::{error, info};

use super::checkpoint::{self, CheckpointDirectory, CheckpointError, CheckpointFile, Loaded};
use super::hash::{self, Hasher, Hashes};
use super::types::{Batch, CheckpointMeta, LogId, Outcome, StoredMembership, TypeConfig, members};
use crate::clock;
use crate::metrics::names;
use crate::state::State;
use crate::state::command::{Body, Command};
use crate::state::event::EventRing;
use crate::state::level::{self, Level};

/// Entries that are applied between two publications: readers wait no longer for the first of them.
const PUBLISHED_AT_ONCE: usize = 64;

type Checkpoint = openraft::type_config::alias::SnapshotOf<TypeConfig, CheckpointFile>;
type Current = Arc<Mutex<Option<(CheckpointMeta, CheckpointFile)>>>;

/// The state, in memory; made anew from the newest checkpoint and the log.
#[derive(Debug)]
pub struct StateMachine {
    state: State,
    last_applied: Option<LogId>,
    membership: StoredMembership,
    published: watch::Sender<Arc<State>>,
    directory: CheckpointDirectory,
    current: Current,
    hasher: Hasher,
    hashes: Hashes,
}

impl From<CheckpointError> for io::Error {
    fn from(error: CheckpointError) -> Self {
        Self::other(error)
    }
}

impl StateMachine {
    /// Starts from the newest whole checkpoint, or from nothing.
    pub fn open(directory: CheckpointDirectory) -> Result<Self, CheckpointError> {
        let loaded = directory.load(|error| error!(%error, "checkpoint skipped; an older one is tried"))?;
        let mut machine = Self {
            state: State { events: EventRing::starting_after(0), ..State::default() },
            last_applied: None,
            membership: StoredMembership::default(),
            published: watch::Sender::new(Arc::new(State::default())),
            directory,
            current: Current::default(),
            hasher: Hasher::default(),
            hashes: Hashes::default(),
        };
        if let Some(loaded) = loaded {
            machine.adopt(loaded);
        }
        Ok(machine)
    }

    /// Follows the published states.
    pub fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.published.subscribe()
    }

    /// What it holds, and the last entry of that.
    pub(super) fn into_state(self) -> (State, Option<LogId>) {
        (self.state, self.last_applied)
    }

    /// Hashes of the states that it has had.
    pub fn hashes(&self) -> Hashes {
        self.hashes.clone()
    }

    /// Index of the last entry that the state holds.
    pub fn applied_index(&self) -> Option<u64> {
        self.last_applied.map(|log_id| log_id.index)
    }

    fn adopt(&mut self, loaded: Loaded) {
        self.state = loaded.state;
        self.last_applied = loaded.meta.last_log_id;
        self.membership = loaded.meta.last_membership.clone();
        replace_if_newer(&self.current, loaded.meta, loaded.file);
        self.publish();
    }

    fn take_hash(&mut self) {
        let hash = self.hasher.update(&self.state);
        self.hashes.put(self.state.revision, hash);
    }

    fn publish(&mut self) {
        self.take_hash();
        self.published.send_replace(Arc::new(self.state.clone()));
    }

    /// A command or a level that this build does not know stops the replica: it must not guess what others apply.
    pub(super) fn apply_entry(
        &mut self,
        log_id: LogId,
        payload: &EntryPayload<Batch, u64, super::types::Member>,
    ) -> Result<Vec<Outcome>, io::Error> {
        self.last_applied = Some(log_id);
        self.state.revision = log_id.index;
        match payload {
            EntryPayload::Blank => Ok(Vec::new()),
            EntryPayload::Normal(batch) => {
                if let Some(level) = batch.commands.iter().find_map(|command| unknown_level(&self.state, command)) {
                    return Err(too_new(log_id.index, level));
                }
                Ok(batch.commands.iter().map(|command| self.state.apply(log_id.index, command)).collect())
            }
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership.clone());
                let (voters, learners) = members(&self.membership);
                self.state.set_members(voters, learners);
                Ok(Vec::new())
            }
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = CheckpointFile;
    type SnapshotBuilder = CheckpointBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut waiting = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            let began = clock::monotonic();
            let outcomes = self.apply_entry(entry.log_id(), &entry.payload)?;
            histogram!(names::APPLY_SECONDS).record(began.elapsed().as_secs_f64());
            if entry.log_id().index % hash::EVERY == 0 {
                self.take_hash();
            }
            waiting.push((responder, outcomes));
            if waiting.len() >= PUBLISHED_AT_ONCE {
                self.publish();
                answer(&mut waiting);
            }
        }
        self.publish();
        answer(&mut waiting);
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> CheckpointBuilder {
        CheckpointBuilder {
            state: self.state.clone(),
            meta: CheckpointMeta { last_log_id: self.last_applied, last_membership: self.membership.clone() },
            directory: self.directory.clone(),
            current: self.current.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &CheckpointMeta, snapshot: CheckpointFile) -> Result<(), io::Error> {
        let directory = self.directory.clone();
        let wanted = meta.clone();
        let loaded = tokio::task::spawn_blocking(move || install(&directory, &wanted, &snapshot)).await;
        let loaded = loaded.map_err(io::Error::other)??;
        info!(index = loaded.state.revision, sandboxes = loaded.state.sandboxes.len(), "checkpoint installed");
        self.adopt(loaded);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Checkpoint>, io::Error> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(current.map(|(meta, file)| Snapshot { meta, snapshot: file }))
    }
}

/// The level that this build does not know and a command needs. One that would be raised to a level that some member does not
/// support is rejected by every build alike: it stops nobody.
fn unknown_level(state: &State, command: &Command) -> Option<Level> {
    let needed = match &command.body {
        Body::SetLevel { level } if level::supported(state).is_none_or(|supported| supported < *level) => return None,
        Body::SetLevel { level } => *level,
        body => body.level(),
    };
    (needed > Level::MAX).then_some(needed)
}

fn too_new(index: u64, level: Level) -> io::Error {
    let known = Level::MAX;
    let what = format!(
        "entry {index} needs level {level} of the ledger's rules, this build knows up to {known}: run a newer build of the \
         scheduler on this replica"
    );
    error!("{what}");
    io::Error::new(io::ErrorKind::Unsupported, what)
}

/// A checkpoint that was being written may be done after a newer one was installed.
fn replace_if_newer(current: &Current, meta: CheckpointMeta, file: CheckpointFile) {
    let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
    if current.as_ref().is_none_or(|(known, _)| known.last_log_id <= meta.last_log_id) {
        *current = Some((meta, file));
    }
}

type Waiting = (Option<openraft::storage::ApplyResponder<TypeConfig>>, Vec<Outcome>);

fn answer(waiting: &mut Vec<Waiting>) {
    for (responder, outcomes) in waiting.drain(..) {
        if let Some(responder) = responder {
            responder.send(outcomes);
        }
    }
}

/// Checks a received file, makes it the newest on disk, and only then gives it out.
fn install(
    directory: &CheckpointDirectory,
    meta: &CheckpointMeta,
    received: &CheckpointFile,
) -> Result<Loaded, io::Error> {
    let loaded = checkpoint::read(&received.path)?;
    if loaded.meta.last_log_id != meta.last_log_id {
        let what = format!("checkpoint {} is not the one that was announced", received.path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let file = directory.adopt(&received.path, meta)?;
    Ok(Loaded { file, ..loaded })
}

/// Writes one checkpoint from an O(1) clone, while `apply` goes on.
#[derive(Debug)]
pub struct CheckpointBuilder {
    state: State,
    meta: CheckpointMeta,
    directory: CheckpointDirectory,
    current: Current,
}

impl RaftSnapshotBuilder<TypeConfig> for CheckpointBuilder {
    type SnapshotData = CheckpointFile;

    async fn build_snapshot(&mut self) -> Result<Checkpoint, io::Error> {
        let (directory, state, meta) = (self.directory.clone(), std::mem::take(&mut self.state), self.meta.clone());
        // The clone is dropped on the blocking thread too: it may be the last owner of much memory.
        let written = tokio::task::spawn_blocking(move || {
            let began = clock::monotonic();
            let written = directory.write(&state, &meta);
            histogram!(names::CHECKPOINT_SECONDS).record(began.elapsed().as_secs_f64());
            written
        })
        .await;
        let file = written.map_err(io::Error::other)??;
        let meta = self.meta.clone();
        replace_if_newer(&self.current, meta.clone(), file.clone());
        Ok(Snapshot { meta, snapshot: file })
    }
}
