//! What the region has beside its entities: pauses, the brake, the hold after a jump of the clock, the default quota.
//!
//! The brake (rule 15 of the design): when more nodes fall silent within a minute than is believed, it is more likely that the
//! leader or its network is ill than that all of them died. Nothing further is declared down until they return or an operator
//! says that it is true.

use imbl::OrdSet;
use warren_proto::ids::NodeId;

use super::State;
use super::command::LogTime;
use super::node::Condition;
use super::outcome::{Rejected, Reply};
use super::tenant::Quota;

/// Lapses within this long count together, in ms.
const LAPSE_WINDOW_MS: u64 = 60 * 1000;

/// Lapses that are believed however small the region is.
const LEAST_BELIEVED: u64 = 2;

/// One in this many nodes is believed to fail within a minute: 20 %.
const BELIEVED_SHARE: u64 = 5;

/// How long nothing is ended by a deadline after log time was set by more than a step, in ms (rule 14 of the design).
pub const HOLD_MS: u64 = 10 * 60 * 1000;

/// What an operator stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pauses {
    pub creates: bool,
    pub placement: bool,
    pub moves: bool,
}

/// One of these a ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Region {
    pub pauses: Pauses,
    /// Nodes that became suspect within the window, or since the brake holds, and have not returned; and when they did.
    pub lapses: OrdSet<(LogTime, NodeId)>,
    /// Since when nothing is declared down.
    pub brake_since: Option<LogTime>,
    /// Until then nothing is ended by a deadline.
    pub hold_until: LogTime,
    pub default_quota: Option<Quota>,
}

impl Region {
    pub(super) fn pause(&mut self, creates: Option<bool>, placement: Option<bool>, moves: Option<bool>) {
        self.pauses.creates = creates.unwrap_or(self.pauses.creates);
        self.pauses.placement = placement.unwrap_or(self.pauses.placement);
        self.pauses.moves = moves.unwrap_or(self.pauses.moves);
    }
}

/// How many nodes may fall silent within a minute and be believed.
pub fn believed(state: &State) -> u64 {
    LEAST_BELIEVED.max(state.nodes.len() as u64 / BELIEVED_SHARE)
}

/// How many did, and have not returned.
pub fn lapsed(state: &State) -> u64 {
    state.region.lapses.len() as u64
}

/// A node became suspect now; `before` is when it last did. While the brake holds nothing grows old: those that it was set for
/// count until they return.
pub(super) fn lapse(state: &mut State, node: &NodeId, before: LogTime) {
    let now = state.log_time;
    let region = &mut state.region;
    if region.brake_since.is_none() {
        forget_old(region, now);
    }
    region.lapses.remove(&(before, node.clone()));
    region.lapses.insert((now, node.clone()));
    if lapsed(state) > believed(state) && state.region.brake_since.is_none() {
        state.region.brake_since = Some(now);
    }
}

fn forget_old(region: &mut Region, now: LogTime) {
    while let Some(oldest) = region.lapses.get_min().filter(|(at, _)| at.plus_ms(LAPSE_WINDOW_MS) < now).cloned() {
        region.lapses.remove(&oldest);
    }
}

/// A node that became suspect at `since` returned, or is no longer ours: it no longer counts. The brake is released when few
/// enough are left, suspect or down; those go on counting, so that others that fall silent within the minute are added to them.
pub(super) fn settle(state: &mut State, node: &NodeId, since: LogTime) {
    state.region.lapses.remove(&(since, node.clone()));
    if lapsed(state) <= believed(state) {
        state.region.brake_since = None;
    }
}

/// An operator says that those that are silent are: they no longer count.
pub(super) fn release(state: &mut State) {
    state.region.brake_since = None;
    state.region.lapses = OrdSet::new();
}

/// Whether a node may be declared down now.
pub(super) fn check_brake(state: &State, to: Condition) -> Result<(), Rejected> {
    match state.region.brake_since {
        Some(_) if to == Condition::Down => Err(Rejected::Braked { lapsed: lapsed(state), believed: believed(state) }),
        _ => Ok(()),
    }
}

pub(super) fn release_brake(state: &mut State) -> Result<Reply, Rejected> {
    release(state);
    Ok(Reply::Done)
}
