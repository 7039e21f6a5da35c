//! The tail of what happened to sandboxes: what watches read.
//!
//! Every replica derives the same events from the same log, so a position means the same on each of them.

use std::sync::Arc;

use super::sandbox::Sandbox;

/// Most events that are kept: at 1,000 changes a second, over a minute for a watcher to come back.
pub const MAX_EVENTS: usize = 1 << 16;

/// Most bytes of them ([`Sandbox::weight`]), as many as a checkpoint carries. Ordinary sandboxes weigh a quarter of a KiB, so their
/// events are bounded by their number; those with specifications of many KiB by this.
pub const MAX_EVENT_BYTES: u64 = 64 << 20;

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

/// One change of one sandbox. It says by itself how the sandbox looked before and after, so that a watch follows from the events
/// alone, whenever it reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub position: Position,
    pub kind: EventKind,
    /// As the change left it; for `Deleted`, its last state.
    pub sandbox: Arc<Sandbox>,
    /// As it was before; `None` for `Created`.
    pub before: Option<Arc<Sandbox>>,
    /// Whether its node was down after the change.
    pub unreachable: bool,
    /// Whether its node was down before.
    pub unreachable_before: bool,
}

impl Event {
    fn weight(&self) -> u64 {
        let before = self.before.as_deref().map_or(0, Sandbox::weight);
        self.sandbox.weight().saturating_add(before)
    }
}

/// The events that a watcher's position has been overtaken by are gone: it must list again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("events up to index {floor} are no longer kept", floor = .floor.index)]
pub struct Compacted {
    pub floor: Position,
}

/// The last events, at most [`MAX_EVENTS`] and [`MAX_EVENT_BYTES`].
#[derive(Debug, Clone, Default)]
pub struct EventRing {
    events: imbl::Vector<Event>,
    bytes: u64,
    /// Position after which everything is here.
    floor: Position,
}

impl EventRing {
    /// Nothing is known of what happened up to the end of `index`.
    pub fn starting_after(index: u64) -> Self {
        Self::after_position(Position::end_of(index))
    }

    /// Everything after `floor` is to follow.
    pub fn after_position(floor: Position) -> Self {
        Self { events: imbl::Vector::new(), bytes: 0, floor }
    }

    /// Puts back an event, as a checkpoint holds it; they come in order.
    pub fn restore(&mut self, event: Event) {
        self.bytes = self.bytes.saturating_add(event.weight());
        self.events.push_back(event);
        while self.events.len() > MAX_EVENTS || self.bytes > MAX_EVENT_BYTES {
            let Some(oldest) = self.events.pop_front() else { return };
            self.bytes = self.bytes.saturating_sub(oldest.weight());
            self.floor = oldest.position;
        }
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

    /// Adds an event of the entry at `index`; its position is the next there.
    pub(super) fn push(&mut self, index: u64, event: Event) {
        let ordinal = match self.events.back() {
            Some(last) if last.position.index == index => last.position.ordinal.saturating_add(1),
            _ => 1,
        };
        self.restore(Event { position: Position { index, ordinal }, ..event });
    }

    /// The events after `position`, in order, at most `limit` of them. Costs what it answers, however many older ones there are.
    pub fn after(&self, position: Position, limit: usize) -> Result<Vec<Event>, Compacted> {
        if position < self.floor {
            return Err(Compacted { floor: self.floor });
        }
        if self.events.back().is_none_or(|last| last.position <= position) {
            return Ok(Vec::new());
        }
        let start = match self.events.binary_search_by(|event| event.position.cmp(&position)) {
            Ok(found) => found.saturating_add(1),
            Err(insertion) => insertion,
        };
        let end = start.saturating_add(limit).min(self.events.len());
        // A part of the vector's focus: its iterator would walk to the part from the beginning.
        Ok(self.events.focus().narrow(start..end).into_iter().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::LogTime;
    use crate::state::gpu::GpuHolds;
    use crate::state::sandbox::{Life, PendingCode, PendingReason};
    use crate::state::testing::{name, spec};
    use warren_proto::ids::Epoch;

    fn event(bytes: usize) -> Event {
        let reason = PendingReason { code: PendingCode::NoNodes, message: String::new() };
        let sandbox = Sandbox {
            name: name("s"),
            spec: crate::state::sandbox::SandboxSpec { command: vec!["x".repeat(bytes)], ..spec(1, 1) }.into(),
            life: Life::Pending { reason, since: LogTime(0), not_before: LogTime(0) },
            epoch: Epoch(1),
            updated: None,
            failed_starts: 0,
            restarts: 0,
            gpus: GpuHolds::default(),
            avoid: None,
            created: LogTime(0),
            revision: 1,
        };
        Event {
            position: Position::default(),
            kind: EventKind::Updated,
            sandbox: Arc::new(sandbox),
            before: None,
            unreachable: false,
            unreachable_before: false,
        }
    }

    #[test]
    fn the_ring_is_bounded_by_number_and_by_bytes() {
        let (mut many, mut large) = (EventRing::default(), EventRing::default());
        let (small, heavy) = (event(0), event(1 << 20));
        for index in 1..=MAX_EVENTS as u64 + 10 {
            many.push(index, small.clone());
        }
        assert_eq!((many.len(), many.floor().index), (MAX_EVENTS, 10));
        for index in 1..=100 {
            large.push(index, heavy.clone());
        }
        assert!(large.len() < 64 && large.bytes <= MAX_EVENT_BYTES, "{} events, {} bytes", large.len(), large.bytes);
        assert_eq!(large.floor().index as usize, 100 - large.len());
        let sum: u64 = large.iter().map(Event::weight).sum();
        assert_eq!(large.bytes, sum, "the count of bytes is exact, or it would drift");
    }

    #[test]
    fn what_is_read_after_a_position_is_what_came_after_it() {
        let mut ring = EventRing::default();
        for index in [1, 1, 2, 5, 5, 5, 9] {
            ring.push(index, event(0));
        }
        let at = |index, ordinal| Position { index, ordinal };
        let read = |position, limit| {
            let events = ring.after(position, limit).unwrap();
            events.iter().map(|event| (event.position.index, event.position.ordinal)).collect::<Vec<_>>()
        };
        assert_eq!(read(Position::default(), 99).len(), 7);
        assert_eq!(read(at(1, 1), 2), [(1, 2), (2, 1)]);
        assert_eq!(read(Position::end_of(2), 2), [(5, 1), (5, 2)]);
        assert_eq!(read(at(5, 2), 9), [(5, 3), (9, 1)]);
        assert_eq!(read(at(9, 1), 9), []);
        assert_eq!(read(Position::end_of(20), 9), []);
        assert_eq!(read(at(5, 2), 0), []);
    }
}
