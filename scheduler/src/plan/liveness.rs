//! Turns the leader's verdicts about silent nodes into commands. A verdict is about what the leader heard; what the ledger says
//! of the node decides what follows from it.

use std::time::Duration;

use warren_proto::ids::NodeId;

use super::Planned;
use crate::state::State;
use crate::state::command::Body;
use crate::state::level::Level;
use crate::state::node::Condition;

/// What a leader that did not hear from a node thinks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub node: NodeId,
    /// [`Condition::Suspect`] or [`Condition::Down`].
    pub condition: Condition,
}

/// What a leader does about a verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Propose(Box<Planned>),
    /// The brake holds, or the level knows no such step: the node is judged again later.
    Wait,
    /// The ledger says so already, or nothing of the node.
    Nothing,
}

/// How long a verdict waits while the brake holds, or when it was refused.
pub const BRAKED_PAUSE: Duration = Duration::from_secs(2);

/// What follows from a verdict.
pub fn decide(state: &State, verdict: &Verdict) -> Step {
    match command(state, verdict) {
        Some(Body::SetNodeCondition { to: Condition::Down, .. }) if state.region.brake_since.is_some() => Step::Wait,
        Some(body) => Step::Propose(Box::new(body)),
        None if stands(state, verdict) => Step::Nothing,
        // At the first level a node that is suspect since a restore stays so: judged again at once, it would be for ever.
        None => Step::Wait,
    }
}

/// Whether the ledger says what the verdict says, or more; a node that it does not know needs no verdict.
pub fn stands(state: &State, verdict: &Verdict) -> bool {
    state.nodes.get(&verdict.node).is_none_or(|node| match verdict.condition {
        Condition::Down => node.condition == Condition::Down,
        Condition::Suspect | Condition::Ready => node.condition != Condition::Ready,
    })
}

fn command(state: &State, verdict: &Verdict) -> Option<Planned> {
    let node = state.nodes.get(&verdict.node)?;
    let incarnation = node.report.incarnation;
    let id = node.id.clone();
    if state.level == Level::FIRST {
        let lapsed = node.condition == Condition::Ready;
        return lapsed.then_some(Body::SetNodeReachable { node: id, incarnation, reachable: false });
    }
    let to = match (node.condition, verdict.condition) {
        (Condition::Ready, _) => Condition::Suspect,
        (Condition::Suspect, Condition::Down) => Condition::Down,
        _ => return None,
    };
    Some(Body::SetNodeCondition { node: id, incarnation, to })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{Caller, Command, LogTime};
    use crate::state::testing::{node, resources, with_node_and_template};

    fn decide_on(condition: Condition, verdict: Condition, level: Level, braked: bool) -> Step {
        let mut state = with_node_and_template("a", resources(1, 1));
        state.level = Level::SECOND;
        if condition == Condition::Suspect {
            let body = Body::SetNodeCondition { node: node("a"), incarnation: 1, to: condition };
            let command = Command { caller: Caller::system("test"), time: LogTime(0), body };
            state.apply(3, &command).unwrap();
        }
        state.level = level;
        state.region.brake_since = braked.then_some(LogTime(0));
        decide(&state, &Verdict { node: node("a"), condition: verdict })
    }

    #[test]
    fn the_brake_holds_up_who_would_go_down_and_nobody_else() {
        use Condition::{Down, Ready, Suspect};
        let to = |to| Step::Propose(Body::SetNodeCondition { node: node("a"), incarnation: 1, to }.into());
        assert_eq!(decide_on(Suspect, Down, Level::SECOND, false), to(Down));
        assert_eq!(decide_on(Suspect, Down, Level::SECOND, true), Step::Wait);
        assert_eq!(
            decide_on(Ready, Down, Level::SECOND, true),
            to(Suspect),
            "it returned meanwhile, and fell silent again"
        );
        assert_eq!(decide_on(Ready, Suspect, Level::SECOND, true), to(Suspect));
        assert_eq!(decide_on(Suspect, Suspect, Level::SECOND, false), Step::Nothing);
        assert_eq!(decide_on(Suspect, Down, Level::FIRST, false), Step::Wait, "suspect since a restore");
        let lapsed = Body::SetNodeReachable { node: node("a"), incarnation: 1, reachable: false };
        assert_eq!(
            decide_on(Ready, Suspect, Level::FIRST, true),
            Step::Propose(lapsed.into()),
            "the first level has no brake"
        );
    }
}
