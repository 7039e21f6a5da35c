//! Levels: which rules `apply` follows. A level is raised by a committed command, so every replica changes its rules at the
//! same entry, and only once all of them can.
//!
//! | level | brings |
//! | --- | --- |
//! | 1 | sandboxes, nodes that are reachable or not, templates, request ids |
//! | 2 | conditions of nodes with the brake, settings of sandboxes, quotas, pauses, batches; steps of time above a minute are rejected |

use super::State;
use super::command::ReplicaRecord;
use super::outcome::{Rejected, Reply};

/// A version of the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub u32);

impl Level {
    pub const FIRST: Self = Self(1);
    pub const SECOND: Self = Self(2);

    /// The highest that this build supports. A build with the feature `first-level` stands for the one before: it is what
    /// the tests of a rolling upgrade begin with.
    pub const MAX: Self = if cfg!(feature = "first-level") { Self::FIRST } else { Self::SECOND };

    /// The next one up.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A ledger begins at the first: it is raised as soon as its replicas have said what they support.
impl Default for Level {
    fn default() -> Self {
        Self::FIRST
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The highest level that every member of the group supports; `None` while one of them has not said.
pub fn supported(state: &State) -> Option<Level> {
    let mut members = state.voters.iter().chain(&state.learners).peekable();
    members.peek()?;
    members.map(|id| state.replicas.get(id).map(|record: &ReplicaRecord| record.max_level)).min().flatten()
}

pub(super) fn set(state: &mut State, level: Level) -> Result<Reply, Rejected> {
    let supported = supported(state).unwrap_or(Level::FIRST);
    if level == state.level {
        return Ok(Reply::Done);
    }
    if level != state.level.next() || level > supported {
        return Err(Rejected::LevelNotSupported { wanted: level, level: state.level, supported });
    }
    state.level = level;
    Ok(Reply::Done)
}
