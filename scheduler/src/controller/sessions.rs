//! Which agents have a session with this replica, and waking those whose assignment changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use imbl::ordmap::DiffItem;
use tokio::sync::Notify;
use warren_proto::ids::{Generation, NodeId, SandboxName};

use super::{Controller, lock};
use crate::state::State;
use crate::state::event::{Event, Position};

/// What one session hears.
#[derive(Debug, Default)]
pub struct Signals {
    /// The node's assignment, or the replicas' keys, may have changed.
    pub changed: Notify,
    /// A newer session of the same node took over.
    pub superseded: Notify,
    concerned: Mutex<Concerned>,
}

impl Signals {
    /// What has changed since the last call. Take it before the state that it is used with: then that state is not older.
    pub fn take_concerned(&self) -> Concerned {
        std::mem::take(&mut lock(&self.concerned))
    }
}

/// The sandboxes whose place in a node's assignment may have changed, so that a session need not look at all that its node holds.
#[derive(Debug, Default)]
pub struct Concerned {
    names: BTreeSet<SandboxName>,
    /// The assignment's generation up to which they are known.
    generation: Option<Generation>,
    /// Some are not known: events were forgotten before they were looked at.
    lost: bool,
}

impl Concerned {
    /// Whether every change up to this generation is of one of the names, or of what is left over there.
    pub fn are_all_up_to(&self, generation: Generation) -> bool {
        !self.lost && self.generation == Some(generation)
    }

    /// What the events say of a node, up to this generation of its assignment.
    #[cfg(test)]
    pub(crate) fn of(events: &[Event], node: &NodeId, generation: Generation) -> Self {
        let own = events.iter().filter(|event| concerns(event).any(|id| id == node));
        Self { names: own.map(|event| event.sandbox.name.clone()).collect(), generation: Some(generation), lost: false }
    }

    pub fn names(&self) -> impl Iterator<Item = &SandboxName> {
        self.names.iter()
    }
}

/// The sessions of this replica, one a node. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Sessions(Arc<Mutex<BTreeMap<NodeId, Arc<Signals>>>>);

/// A registered session; dropping it takes it out.
#[derive(Debug)]
pub struct Registration {
    sessions: Sessions,
    node: NodeId,
    signals: Arc<Signals>,
}

impl Registration {
    pub fn signals(&self) -> &Signals {
        &self.signals
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut map = lock(&self.sessions.0);
        if map.get(&self.node).is_some_and(|current| Arc::ptr_eq(current, &self.signals)) {
            map.remove(&self.node);
        }
    }
}

impl Sessions {
    /// Enters a session; an older one of the same node is told that it is superseded.
    pub fn register(&self, node: NodeId) -> Registration {
        let signals = Arc::new(Signals::default());
        if let Some(older) = lock(&self.0).insert(node.clone(), signals.clone()) {
            older.superseded.notify_one();
        }
        Registration { sessions: self.clone(), node, signals }
    }

    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// Notes what the events say of the nodes that they concern; `None`: they were forgotten.
    fn note(&self, events: Option<&[Event]>) {
        let sessions = lock(&self.0);
        let Some(events) = events else {
            sessions.values().for_each(|signals| lock(&signals.concerned).lost = true);
            return;
        };
        for event in events {
            for signals in concerns(event).filter_map(|node| sessions.get(node)) {
                lock(&signals.concerned).names.insert(event.sandbox.name.clone());
            }
        }
    }

    fn wake(&self, node: &NodeId, generation: Generation) {
        if let Some(signals) = lock(&self.0).get(node) {
            lock(&signals.concerned).generation = Some(generation);
            signals.changed.notify_one();
        }
    }

    fn wake_all(&self) {
        for signals in lock(&self.0).values() {
            signals.changed.notify_one();
        }
    }
}

/// The nodes whose assignments an event may have changed.
fn concerns(event: &Event) -> impl Iterator<Item = &NodeId> {
    let before = event.before.as_ref().and_then(|sandbox| sandbox.life.node());
    let after = event.sandbox.life.node().filter(|node| before != Some(*node));
    before.into_iter().chain(after)
}

/// Wakes the sessions that a change of state concerns: as many as there are changes, not as there are nodes.
pub(super) async fn notify_changes(controller: Controller) {
    let mut states = controller.replica().watch_state();
    let mut seen = states.borrow_and_update().clone();
    let mut position = last_event(&seen);
    while states.changed().await.is_ok() {
        let state = states.borrow_and_update().clone();
        if state.replicas != seen.replicas {
            controller.sessions().wake_all();
        }
        // A session that begins meanwhile tells its whole assignment first, from a state that is not older than this one.
        if controller.sessions().count() > 0 {
            controller.sessions().note(state.events.after(position, usize::MAX).ok().as_deref());
        }
        position = last_event(&state);
        for change in seen.nodes.diff(&state.nodes) {
            if let DiffItem::Add(id, node) | DiffItem::Update { new: (id, node), .. } = change {
                controller.sessions().wake(id, node.generation);
            }
        }
        seen = state;
    }
}

fn last_event(state: &State) -> Position {
    state.events.iter().next_back().map_or(state.events.floor(), |event| event.position)
}
