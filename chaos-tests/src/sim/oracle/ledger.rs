//! What must hold of every committed state and every step between two.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use warren_proto::ids::{Epoch, NodeId, SandboxName};
use warren_proto::units::Resources;
use warren_scheduler::state::command::{Body, Command};
use warren_scheduler::state::event::{Event, EventKind};
use warren_scheduler::state::invariants;
use warren_scheduler::state::sandbox::{Life, Sandbox};
use warren_scheduler::state::{MAX_TIME_STEP_MS, State};

use super::super::clock::{MS, true_wall};
use super::super::log::Outcome;
use super::super::session::wanted;
use super::Oracle;

impl Oracle {
    pub(super) fn check_command(&mut self, before: &State, command: &Command, outcome: &Outcome, events: &[Event]) {
        if let Some(wrong) = invariants::check(&self.state).into_iter().next() {
            self.wrong(1, wrong);
        }
        self.check_capacity(before, command, outcome);
        self.check_changes(before, outcome, events);
        for event in events {
            self.check_placement(event);
        }
        self.note_removals(before, command, outcome);
        self.check_generations(before, events);
        self.check_expected(command, outcome, events);
        self.check_time(before, command);
        self.check_silence(before, command, outcome);
        self.check_update(before, command, outcome, events);
        self.check_batch(before, command, outcome, events);
        self.check_request(command, outcome, events);
        self.check_pending(events);
        self.check_bounds(command);
    }

    /// Rule 1, by sums of its own: what holds a node never grows beyond what the node said it has.
    fn check_capacity(&mut self, before: &State, command: &Command, outcome: &Outcome) {
        if let (Body::RegisterNode { node, report }, Ok(_)) = (&command.body, outcome) {
            self.reported.insert(node.clone(), report.capacity);
        }
        let mut held: BTreeMap<NodeId, Resources> = BTreeMap::new();
        for sandbox in self.state.sandboxes.values() {
            let Some(node) = sandbox.life.node() else { continue };
            let sum = held.entry(node.clone()).or_default();
            *sum = sum.checked_add(sandbox.spec.resources).unwrap_or(*sum);
        }
        for (id, node) in &self.state.nodes {
            let sum = held.entry(id.clone()).or_default();
            *sum = node.leftovers.values().try_fold(*sum, |sum, left| sum.checked_add(left.resources)).unwrap_or(*sum);
        }
        for (node, sum) in held {
            let was = before.nodes.get(&node).map(|node| node.assigned).unwrap_or_default();
            let grew = !sum.fits_in(was);
            let fits = self.reported.get(&node).is_some_and(|capacity| sum.fits_in(*capacity));
            if grew && !fits {
                let has = self.reported.get(&node).copied().unwrap_or_default();
                self.wrong(1, format!("node {node} is given {sum:?} and said that it has {has:?}"));
            }
        }
    }

    /// A rejection changes no entity; what changes is told by an event with the last word on it.
    fn check_changes(&mut self, before: &State, outcome: &Outcome, events: &[Event]) {
        let mut last: BTreeMap<&SandboxName, &Event> = BTreeMap::new();
        for event in events {
            last.insert(&event.sandbox.name, event);
        }
        let mut wrong = Vec::new();
        for change in before.sandboxes.diff(&self.state.sandboxes) {
            let (name, now): (&SandboxName, Option<&Arc<Sandbox>>) = match change {
                DiffItem::Add(name, sandbox) | DiffItem::Update { new: (name, sandbox), .. } => (name, Some(sandbox)),
                DiffItem::Remove(name, _) => (name, None),
            };
            let told = match (last.get(name), now) {
                (Some(event), Some(now)) => event.kind != EventKind::Deleted && event.sandbox == *now,
                (Some(event), None) => event.kind == EventKind::Deleted,
                (None, _) => false,
            };
            if !told {
                wrong.push((11, format!("{name} changed and no event tells it as it is")));
            }
            if outcome.is_err() {
                wrong.push((4, format!("a rejected command changed {name}")));
            }
        }
        if outcome.is_err() && before.nodes.diff(&self.state.nodes).next().is_some() {
            wrong.push((4, "a rejected command changed a node".to_owned()));
        }
        for (rule, what) in wrong {
            self.wrong(rule, what);
        }
    }

    /// Rule 2: each placement has an epoch of its own, greater than all before, also of an earlier bearer of the name.
    fn check_placement(&mut self, event: &Event) {
        let sandbox = &event.sandbox;
        if let Some(node) = sandbox.life.node() {
            let placement = (sandbox.epoch, node.clone());
            match self.placed.get(&sandbox.name) {
                _ if event.kind != EventKind::Created
                    && self.all_placed.contains(&(sandbox.name.clone(), placement.0, placement.1.clone())) => {}
                Some((epoch, _)) if *epoch >= sandbox.epoch => {
                    let what = format!(
                        "{} is placed on {node} at epoch {}, after epoch {epoch} was used",
                        sandbox.name, sandbox.epoch
                    );
                    self.wrong(2, what);
                }
                _ if sandbox.epoch == Epoch(0) => self.wrong(2, format!("{} is placed at epoch 0", sandbox.name)),
                _ => {
                    self.all_placed.insert((sandbox.name.clone(), placement.0, placement.1.clone()));
                    self.placed.insert(sandbox.name.clone(), placement);
                }
            }
            if matches!(sandbox.life, Life::Stopping { .. } | Life::Stopped { .. }) {
                self.removable.insert((node.clone(), sandbox.name.clone()), sandbox.epoch);
            }
        }
    }

    /// What the ledger wants gone besides what is deleted or has ended.
    fn note_removals(&mut self, before: &State, command: &Command, outcome: &Outcome) {
        let (node, sandbox, epoch) = match &command.body {
            _ if outcome.is_err() => return,
            Body::StopOrphan { node, sandbox, epoch } => (Some(node), sandbox, epoch),
            Body::RequeueSandbox { sandbox, epoch } => {
                (before.sandboxes.get(sandbox).and_then(|s| s.life.node()), sandbox, epoch)
            }
            _ => return,
        };
        if let Some(node) = node {
            self.removable.insert((node.clone(), sandbox.clone()), *epoch);
        }
    }

    /// What a node should do changed: so must the generation of its assignment.
    fn check_generations(&mut self, before: &State, events: &[Event]) {
        let mut wrong = Vec::new();
        for event in events {
            let name = &event.sandbox.name;
            let node_in = |state: &State| state.sandboxes.get(name).and_then(|s| s.life.node().cloned());
            for id in [node_in(before), node_in(&self.state)].into_iter().flatten() {
                let (Some(old), Some(new)) = (before.nodes.get(&id), self.state.nodes.get(&id)) else { continue };
                if new.generation <= old.generation && wanted(before, old) != wanted(&self.state, new) {
                    wrong.push(format!("the assignment of {id} changed and kept generation {}", new.generation.0));
                }
            }
        }
        for change in before.nodes.diff(&self.state.nodes) {
            let (DiffItem::Add(id, node) | DiffItem::Update { new: (id, node), .. }) = change else { continue };
            let newest = self.generations.entry(id.clone()).or_default();
            if node.generation < *newest {
                wrong.push(format!("{id} goes back to generation {} from {}", node.generation.0, newest.0));
            }
            *newest = node.generation.max(*newest);
        }
        for what in wrong {
            self.wrong(6, what);
        }
    }

    /// Rule 3: what was created is there until it was deleted, or ended long enough ago.
    fn check_expected(&mut self, command: &Command, outcome: &Outcome, events: &[Event]) {
        for event in events {
            let name = &event.sandbox.name;
            match (event.kind, &command.body) {
                (EventKind::Created, _) => {
                    self.expected.insert(name.clone());
                }
                (_, Body::DeleteSandbox { sandbox, .. }) if sandbox == name => {
                    self.expected.remove(name);
                }
                (_, Body::EndDue { .. }) if !matches!(event.sandbox.life, Life::Failed { .. }) => {
                    self.expected.remove(name);
                }
                _ => {}
            }
        }
        if let (Body::ForgetEnded { sandboxes }, Ok(_)) = (&command.body, outcome) {
            for name in sandboxes {
                self.expected.remove(name);
            }
        }
        let missing = self.expected.iter().find(|name| !self.state.sandboxes.contains_key(*name)).cloned();
        if let Some(name) = missing {
            self.wrong(3, format!("{name} was created, nobody deleted it, and it is gone"));
        }
    }

    /// Rule 14.
    fn check_time(&mut self, before: &State, command: &Command) {
        let (was, is) = (before.log_time, self.state.log_time);
        if is < was {
            self.wrong(14, format!("log time went back from {was:?} to {is:?}"));
        }
        let sampled = matches!(&command.body, Body::AdvanceTime { samples } if !samples.is_empty());
        if !sampled && is.0.saturating_sub(was.0) > MAX_TIME_STEP_MS {
            self.wrong(14, format!("log time went from {was:?} to {is:?} at one step"));
        }
        self.check_honesty();
    }

    /// Rule 14: log time follows honest clocks, whatever any one clock shows.
    fn check_honesty(&mut self) {
        /// What clocks may be off, in ms, besides a rate that is off by half a percent since the world began.
        const SLACK_MS: u64 = 1_000;
        let honest = true_wall(self.now).0 + self.now / MS / 200 + SLACK_MS;
        if self.state.log_time.0 > honest {
            let ahead = self.state.log_time.0 - honest;
            self.wrong(14, format!("log time is {ahead} ms ahead of every honest clock"));
        }
    }
}
