//! PURE. What the leader should propose next, from state, the view of the fleet, and who is heard of.
//!
//! Each pass is bounded and starts from committed state alone, so a new leader needs nothing of the old one's memory.

pub mod due;
pub mod ended;
pub mod level;
pub mod liveness;
pub mod moves;
pub mod pending;
pub mod tick;

use crate::state::command::Body;

/// Most commands of one pass. They commit as one log entry or two; the next pass goes on from there.
pub const MAX_COMMANDS: usize = 256;

/// One command to propose.
pub type Planned = Body;
