//! Turns the leader's verdicts about silent nodes into commands. A verdict is about what the leader heard; what the ledger says
//! of the node decides what follows from it.

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

/// A command for each verdict that still says something.
pub fn plan(state: &State, verdicts: &[Verdict]) -> Vec<Planned> {
    verdicts.iter().filter_map(|verdict| command(state, verdict)).collect()
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
