//! PURE. What the leader should propose next, from state, the view of the fleet, and who is heard of.
//!
//! Each pass is bounded and starts from committed state alone, so a new leader needs nothing of the old one's memory.

pub mod due;
pub mod ended;
pub mod level;
pub mod liveness;
pub mod moves;
pub mod pending;
mod shares;
pub mod tick;

use crate::state::State;
use crate::state::command::{Body, LogTime};

/// Most commands of one pass. They commit as one log entry or two; the next pass goes on from there.
pub const MAX_COMMANDS: usize = 256;

/// One command to propose.
pub type Planned = Body;

/// What follows from state and time alone, without a view of the fleet.
pub fn from_state(state: &State, now: LogTime, searched: &mut moves::Searched) -> Vec<Planned> {
    let mut bodies: Vec<Planned> = level::plan(state).into_iter().collect();
    bodies.extend(ended::plan(state, now));
    bodies.extend(due::plan(state, now));
    bodies.extend(tick::plan(state, now));
    bodies.extend(moves::plan(state, searched));
    bodies
}
