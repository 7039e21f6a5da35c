//! Rule 15: when many nodes fall silent together, none of them is declared down.

use std::collections::BTreeMap;

use warren_proto::ids::NodeId;
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Command, LogTime};
use warren_scheduler::state::level::Level;
use warren_scheduler::state::node::Condition;

use super::Oracle;

/// Lapses this close together count together, in ms of log time.
const WINDOW_MS: u64 = 60_000;

/// Which nodes fell silent when, as the oracle counts it.
#[derive(Debug, Default)]
pub(super) struct Lapses {
    /// Silent nodes that have not returned since.
    silent: BTreeMap<NodeId, LogTime>,
    /// More fell silent within the window than is believed, and nobody has settled it.
    braked: bool,
}

impl Lapses {
    /// What a restored ledger knows of it.
    pub fn of(state: &State) -> Self {
        let silent = state.region.lapses.iter().map(|(at, id)| (id.clone(), *at)).collect();
        Self { silent, braked: state.region.brake_since.is_some() }
    }
}

impl Oracle {
    pub(super) fn check_silence(&mut self, before: &State, command: &Command) {
        if self.state.level == Level::FIRST {
            return;
        }
        let believed = (self.state.nodes.len() / 5).max(2);
        if matches!(command.body, Body::ReleaseBrake) {
            self.lapses = Lapses::default();
        }
        let condition = |state: &State, id: &NodeId| state.nodes.get(id).map(|node| node.condition);
        let ids: Vec<NodeId> = before.nodes.keys().chain(self.state.nodes.keys()).cloned().collect();
        for id in ids {
            let (was, is) = (condition(before, &id), condition(&self.state, &id));
            if was == is {
                continue;
            }
            match is {
                Some(Condition::Suspect) => self.falls_silent(&id, believed),
                Some(Condition::Down) if self.lapses.braked => {
                    self.wrong(15, format!("{id} is declared down although {} fell silent", self.lapses.silent.len()));
                }
                Some(Condition::Down) => {}
                Some(Condition::Ready) | None => self.returns(&id, believed),
            }
        }
    }

    fn falls_silent(&mut self, id: &NodeId, believed: usize) {
        let now = self.state.log_time;
        self.lapses.silent.insert(id.clone(), now);
        let together = self.lapses.silent.values().filter(|at| at.plus_ms(WINDOW_MS) >= now).count();
        self.lapses.braked |= together > believed;
    }

    fn returns(&mut self, id: &NodeId, believed: usize) {
        self.lapses.silent.remove(id);
        let suspects = self.state.nodes.values().filter(|node| node.condition == Condition::Suspect).count();
        if suspects <= believed && self.lapses.braked {
            self.lapses = Lapses::default();
        }
    }
}
