//! The tail of what happened to sandboxes: what watches read.
//!
//! Every replica derives the same events from the same log, so a position means the same on each of them.

use std::sync::Arc;

use super::sandbox::Sandbox;

/// Most events that are kept: at 1,000 changes a second, over a minute for a watcher to come back.
pub const MAX_EVENTS: usize = 1 << 16;

/// Where an event stands in the ledger. Ordered as the events happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// Log index.
    pub index: u64,
    /// Ordinal of the event among those of its index, from 1; 0 stands before them all.
    pub ordinal: u32,
}

impl Position {
    /// After every event of `index`.
    pub fn end_of(index: u64) -> Self {
        Self { index, ordinal: u32::MAX }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Created,
    Updated,
    Deleted,
}

/// One change of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub position: Position,
    pub kind: EventKind,
    /// As the change left it; for `Deleted`, its last state.
    pub sandbox: Arc<Sandbox>,
    /// As it was before; `None` for `Created`.
    pub before: Option<Arc<Sandbox>>,
}

/// The events that a watcher's position has been overtaken by are gone: it must list again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("events up to index {floor} are no longer kept", floor = .floor.index)]
pub struct Compacted {
    pub floor: Position,
}

/// The last [`MAX_EVENTS`] events.
#[derive(Debug, Clone, Default)]
pub struct EventRing {
    events: imbl::Vector<Event>,
    /// Position after which everything is here.
    floor: Position,
}

impl EventRing {
    /// Nothing is known of what happened up to the end of `index`.
    pub fn starting_after(index: u64) -> Self {
        Self { events: imbl::Vector::new(), floor: Position::end_of(index) }
    }

    /// Everything after `floor` is to follow.
    pub fn after_position(floor: Position) -> Self {
        Self { events: imbl::Vector::new(), floor }
    }

    /// Puts back an event, as a checkpoint holds it; they come in order.
    pub fn restore(&mut self, event: Event) {
        self.events.push_back(event);
    }

    pub fn len(&self) -> usize {
        self.events.len()
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Position after which everything is here.
    pub fn floor(&self) -> Position {
        self.floor
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter()
    }

    pub(super) fn push(&mut self, index: u64, kind: EventKind, sandbox: Arc<Sandbox>, before: Option<Arc<Sandbox>>) {
        let ordinal = match self.events.back() {
            Some(last) if last.position.index == index => last.position.ordinal.saturating_add(1),
            _ => 1,
        };
        self.events.push_back(Event { position: Position { index, ordinal }, kind, sandbox, before });
        if self.events.len() > MAX_EVENTS
            && let Some(oldest) = self.events.pop_front()
        {
            self.floor = oldest.position;
        }
    }

    /// The events after `position`, in order, at most `limit` of them.
    pub fn after(&self, position: Position, limit: usize) -> Result<Vec<Event>, Compacted> {
        if position < self.floor {
            return Err(Compacted { floor: self.floor });
        }
        let start = match self.events.binary_search_by(|event| event.position.cmp(&position)) {
            Ok(found) => found.saturating_add(1),
            Err(insertion) => insertion,
        };
        Ok(self.events.iter().skip(start).take(limit).cloned().collect())
    }
}
