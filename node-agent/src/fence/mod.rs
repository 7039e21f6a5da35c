//! The fence: a process beside the agent that freezes sandboxes when the node's lease lapses, whatever became of the agent.
//!
//! ```text
//!  agent ── pwrite: runs until T ──▶ channel (a file) ◀── read at T ── warren-fence ── FROZEN / THAWED ──▶ switch of a group
//!    └───────── a byte: look now ──▶ wake (a FIFO) ────────────────────┘
//! ```
//! Drivers keep the sandboxes that freeze at isolation in one group with one switch, so to freeze them all is one write, no
//! list can be out of date, and what is just being started is frozen too. The channel says one thing: until which moment of
//! the boot-time clock the group may run. The fence lets it run before and freezes it from then on; there is no other state.
//! The fence alone moves a switch while it lives: a late write of a stopped agent can only name a moment that is over.
//!
//! Who says what: `supervisor::gate` decides which moment to publish, `keeper` (in the agent) publishes it and keeps a fence
//! alive, `guard` is the fence's process. Children: `channel`, `switch`, `guard`, `keeper`.

pub mod channel;
pub mod guard;
pub mod keeper;
mod switch;

pub use keeper::Fence;
pub use switch::{Kind, Switch};

/// Files below `<data_dir>/fence`.
const CHANNEL: &str = "channel";
/// FIFO: a byte wakes the fence, [`END`] ends it.
const WAKE: &str = "wake";
/// Lifeline that a fence holds.
const ALIVE: &str = "alive";
/// Locked by the fence: there is one at most.
const LOCK: &str = "lock";
/// What a living fence was started for, and what protects it.
const STATUS: &str = "status.json";

/// Byte that says: look at the channel.
const LOOK: u8 = b'l';
/// Byte that says: end. Whatever is frozen stays frozen.
const END: u8 = b'e';
