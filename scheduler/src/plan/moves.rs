//! Takes sandboxes that freeze on isolation off nodes that are down: by then they are frozen, so they may be placed elsewhere.

use std::collections::BTreeMap;

use warren_proto::ids::NodeId;

use super::{MAX_COMMANDS, Planned};
use crate::state::State;
use crate::state::command::Body;
use crate::state::sandbox::{Life, Sandbox};
use crate::state::settings::Isolation;

/// Nodes that were looked through, and the revision at which nothing was found on them: a node that is down for days is not
/// walked on every pass.
pub type Searched = BTreeMap<NodeId, u64>;

/// The next ones to take off.
pub fn plan(state: &State, searched: &mut Searched) -> Vec<Planned> {
    searched.retain(|id, _| state.down.contains(id));
    let mut commands = Vec::new();
    if state.region.pauses.moves {
        return commands;
    }
    for node in state.down.iter().filter_map(|id| state.nodes.get(id)).filter(|node| node.report.fence) {
        if searched.get(&node.id) == Some(&node.revision) {
            continue;
        }
        let before = commands.len();
        let here = node.sandboxes.iter().filter_map(|name| state.sandboxes.get(name));
        let moving = here.filter(|sandbox| moves(sandbox)).take(MAX_COMMANDS.saturating_sub(before));
        commands.extend(moving.map(|s| Body::RequeueSandbox { sandbox: s.name.clone(), epoch: s.epoch }));
        if commands.len() >= MAX_COMMANDS {
            break;
        }
        if commands.len() == before {
            searched.insert(node.id.clone(), node.revision);
        }
    }
    commands
}

fn moves(sandbox: &Sandbox) -> bool {
    sandbox.spec.isolation == Isolation::Freeze && matches!(sandbox.life, Life::Starting { .. } | Life::Running { .. })
}
