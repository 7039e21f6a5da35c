//! Raises the level of the rules as soon as every member of the group supports the next.

use super::Planned;
use crate::state::State;
use crate::state::command::Body;
use crate::state::level;

/// One step up, if it can be made.
pub fn plan(state: &State) -> Option<Planned> {
    let next = state.level.next();
    let possible = next <= level::Level::MAX && level::supported(state).is_some_and(|supported| next <= supported);
    possible.then_some(Body::SetLevel { level: next })
}
