//! Rule 15: "When more than max(2, 20 %) of the nodes lapse within a minute, nothing further is declared `Down` until an operator
//! or their return settles it."
//!
//! Written from these words, not from the code: each time that more lapse within a minute than is believed is an outage of its
//! own, with the nodes that it is made of. It is settled by an operator, or when so many of its own nodes are back that no more
//! than are believed are left. While there is one, nothing may be declared down.

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::NodeId;
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Command, LogTime};
use warren_scheduler::state::level::Level;
use warren_scheduler::state::node::Condition;

use super::super::log::Outcome;
use super::Oracle;

/// Lapses this close together count together, in ms of log time.
const MINUTE_MS: u64 = 60_000;

/// Who is silent, and which of that is not settled.
#[derive(Debug, Default)]
pub(super) struct Lapses {
    /// Silent nodes, suspect or down, by when they lapsed; not those that an operator has settled.
    silent: BTreeMap<NodeId, LogTime>,
    /// Too many at once, each time: those that are not back.
    outages: Vec<BTreeSet<NodeId>>,
}

impl Lapses {
    /// In a restored ledger everybody lapses at once whom the backup does not show silent: nobody was heard of yet. Of those that
    /// were silent already nothing is known.
    pub fn of(backup: &State, restored: &State) -> Self {
        let ready = |node: &&NodeId| backup.nodes.get(*node).is_some_and(|node| node.is_ready());
        let mut lapses = Self::default();
        for id in restored.nodes.keys().filter(ready) {
            lapses.fell_silent(id, restored.log_time, believed(restored));
        }
        lapses
    }

    fn fell_silent(&mut self, id: &NodeId, now: LogTime, believed: usize) {
        self.silent.insert(id.clone(), now);
        let within = self.silent.iter().filter(|(_, at)| at.plus_ms(MINUTE_MS) >= now);
        let within: BTreeSet<NodeId> = within.map(|(id, _)| id.clone()).collect();
        if within.len() > believed {
            self.outages.push(within);
        }
    }

    fn returned(&mut self, id: &NodeId, believed: usize) {
        self.silent.remove(id);
        for outage in &mut self.outages {
            outage.remove(id);
        }
        self.outages.retain(|left| left.len() > believed);
    }
}

fn believed(state: &State) -> usize {
    (state.nodes.len() * 20 / 100).max(2)
}

impl Oracle {
    /// The first level has no brake; who returns then, after a restore, has returned.
    pub(super) fn check_silence(&mut self, before: &State, command: &Command, outcome: &Outcome) {
        let first = self.state.level == Level::FIRST;
        let believed = believed(&self.state);
        if matches!(command.body, Body::ReleaseBrake) && outcome.is_ok() {
            self.lapses = Lapses::default();
        }
        let condition = |state: &State, id: &NodeId| state.nodes.get(id).map(|node| node.condition);
        let ids: BTreeSet<NodeId> = before.nodes.keys().chain(self.state.nodes.keys()).cloned().collect();
        for id in ids {
            let (was, is) = (condition(before, &id), condition(&self.state, &id));
            if was == is {
                continue;
            }
            match is {
                Some(Condition::Suspect | Condition::Down) if first => {}
                Some(Condition::Suspect) => self.lapses.fell_silent(&id, self.state.log_time, believed),
                Some(Condition::Down) => self.check_declared_down(&id),
                Some(Condition::Ready) | None => self.lapses.returned(&id, believed),
            }
        }
    }

    fn check_declared_down(&mut self, id: &NodeId) {
        if let Some(outage) = self.lapses.outages.first() {
            let left: Vec<String> = outage.iter().map(ToString::to_string).collect();
            self.wrong(15, format!("{id} is declared down although {} fell silent together", left.join(", ")));
        }
    }
}
