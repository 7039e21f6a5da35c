//! Which agents have a session with this replica, and waking those whose assignment changed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use imbl::ordmap::DiffItem;
use tokio::sync::Notify;
use warren_proto::ids::NodeId;

use super::{Controller, lock};

/// What one session hears.
#[derive(Debug, Default)]
pub struct Signals {
    /// The node's assignment, or the replicas' keys, may have changed.
    pub changed: Notify,
    /// A newer session of the same node took over.
    pub superseded: Notify,
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

    fn wake(&self, node: &NodeId) {
        if let Some(signals) = lock(&self.0).get(node) {
            signals.changed.notify_one();
        }
    }

    fn wake_all(&self) {
        for signals in lock(&self.0).values() {
            signals.changed.notify_one();
        }
    }
}

/// Wakes the sessions that a change of state concerns: as many as there are changes, not as there are nodes.
pub(super) async fn notify_changes(controller: Controller) {
    let mut states = controller.replica().watch_state();
    let mut seen = states.borrow_and_update().clone();
    while states.changed().await.is_ok() {
        let state = states.borrow_and_update().clone();
        if state.replicas != seen.replicas {
            controller.sessions().wake_all();
        }
        for change in seen.nodes.diff(&state.nodes) {
            if let DiffItem::Add(id, _) | DiffItem::Update { new: (id, _), .. } = change {
                controller.sessions().wake(id);
            }
        }
        seen = state;
    }
}
