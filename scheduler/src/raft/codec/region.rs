//! What the region has beside its entities, as commands and checkpoints hold it.

use warren_proto::units::{Bytes, Gpus, MilliCpu};
use warren_proto::v1 as pb;

use super::CodecError;
use super::part::{self, u128_bytes, u128_of};
use crate::state::State;
use crate::state::command::{LedgerId, LogTime};
use crate::state::event::{Event, EventKind, Position};
use crate::state::level::Level;
use crate::state::region::{Pauses, Region};
use crate::state::tenant::Quota;
use std::sync::Arc;
use warren_proto::ids::Epoch;
use warren_proto::v1::stored_event::Kind;

pub(super) fn quota_to(from: &Quota) -> pb::StoredQuota {
    pb::StoredQuota {
        cpu_milli: from.cpu.map(|n| n.0),
        memory_bytes: from.memory.map(|n| n.0),
        disk_bytes: from.disk.map(|n| n.0),
        gpus: from.gpus.map(|n| n.0),
        sandboxes: from.sandboxes,
        creates_per_minute: from.creates_per_minute,
    }
}

pub(super) fn quota(from: pb::StoredQuota) -> Quota {
    Quota {
        cpu: from.cpu_milli.map(MilliCpu),
        memory: from.memory_bytes.map(Bytes),
        disk: from.disk_bytes.map(Bytes),
        gpus: from.gpus.map(Gpus),
        sandboxes: from.sandboxes,
        creates_per_minute: from.creates_per_minute,
    }
}

/// `events_after`: the position after which the events are there.
pub fn region_to(state: &State, events_after: Position) -> pb::StoredRegion {
    let Region { pauses, lapses, brake_since, hold_until, default_quota } = &state.region;
    pb::StoredRegion {
        level: state.level.0,
        predecessors: state.predecessors.iter().map(|id| u128_bytes(id.0)).collect(),
        pauses: Some(pb::StoredSetPause {
            creates: Some(pauses.creates),
            placement: Some(pauses.placement),
            moves: Some(pauses.moves),
        }),
        lapses: lapses.iter().map(|(at, node)| pb::StoredLapse { at_ms: at.0, node: node.to_string() }).collect(),
        brake_since_ms: brake_since.map(|at| at.0),
        hold_until_ms: hold_until.0,
        default_quota: default_quota.as_ref().map(quota_to),
        events_after_index: events_after.index,
        events_after_ordinal: events_after.ordinal,
        restored_floor: state.restored_floor.0,
    }
}

/// Writes what `from` says into `state`; answers the position after which the events are there.
pub fn region_from(state: &mut State, from: pb::StoredRegion) -> Result<Position, CodecError> {
    let pauses = from.pauses.unwrap_or_default();
    let lapse = |lapse: &pb::StoredLapse| Ok((LogTime(lapse.at_ms), part::node(&lapse.node, "region.lapses")?));
    let level = Level(from.level);
    // Its rules are not known here: to go on would be to guess what the others apply.
    if level > Level::MAX {
        return Err(CodecError::Level { got: level });
    }
    state.level = level;
    let predecessors = from.predecessors.iter().map(|id| u128_of(id, "region.predecessors").map(LedgerId));
    state.predecessors = predecessors.collect::<Result<_, _>>()?;
    state.restored_floor = Epoch(from.restored_floor);
    state.region = Region {
        pauses: Pauses {
            creates: pauses.creates.unwrap_or_default(),
            placement: pauses.placement.unwrap_or_default(),
            moves: pauses.moves.unwrap_or_default(),
        },
        lapses: from.lapses.iter().map(lapse).collect::<Result<_, CodecError>>()?,
        brake_since: from.brake_since_ms.map(LogTime),
        hold_until: LogTime(from.hold_until_ms),
        default_quota: from.default_quota.map(quota),
    };
    Ok(Position { index: from.events_after_index, ordinal: from.events_after_ordinal })
}

pub fn event_to(from: &Event) -> pb::StoredEvent {
    let kind = match from.kind {
        EventKind::Created => Kind::Created,
        EventKind::Updated => Kind::Updated,
        EventKind::Deleted => Kind::Deleted,
    };
    pb::StoredEvent {
        index: from.position.index,
        ordinal: from.position.ordinal,
        kind: kind.into(),
        sandbox: Some(from.sandbox.as_ref().into()),
        before: from.before.as_deref().map(Into::into),
        unreachable: from.unreachable,
        unreachable_before: from.unreachable_before,
    }
}

pub fn event_from(from: pb::StoredEvent) -> Result<Event, CodecError> {
    let kind = match from.kind() {
        Kind::Created => EventKind::Created,
        Kind::Updated => EventKind::Updated,
        Kind::Deleted => EventKind::Deleted,
        Kind::Unspecified => return Err(CodecError::Missing { field: "event.kind" }),
    };
    let sandbox = super::require(from.sandbox, "event.sandbox")?.try_into()?;
    let before = from.before.map(TryInto::try_into).transpose()?.map(Arc::new);
    Ok(Event {
        position: Position { index: from.index, ordinal: from.ordinal },
        kind,
        sandbox: Arc::new(sandbox),
        before,
        unreachable: from.unreachable,
        unreachable_before: from.unreachable_before,
    })
}
