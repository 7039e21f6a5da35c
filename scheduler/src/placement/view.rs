//! The fleet as placement sees it: one row a node, kept from committed state, overlaid with what is in flight.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use warren_proto::ids::NodeId;
use warren_proto::units::Resources;

use crate::state::node::Node;

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub node: Arc<Node>,
    /// Decided, not applied yet.
    pub in_flight: Resources,
}

impl Row {
    /// What a decision may still use.
    pub fn free(&self) -> Resources {
        self.node.free().saturating_sub(self.in_flight)
    }
}

/// All nodes. Equal to one that is built anew from the same state and reservations.
#[derive(Debug, Clone, Default)]
pub struct View {
    rows: BTreeMap<NodeId, Row>,
    /// The nodes that the rows were last brought up to date with.
    seen: OrdMap<NodeId, Arc<Node>>,
}

impl View {
    /// Brings the rows up to date with committed state. Costs as much as there are changes: unchanged parts are shared
    /// between the two maps, and skipped.
    pub fn sync(&mut self, nodes: &OrdMap<NodeId, Arc<Node>>) {
        for change in self.seen.diff(nodes) {
            match change {
                DiffItem::Add(id, node) | DiffItem::Update { new: (id, node), .. } => {
                    let row = self.rows.entry(id.clone());
                    row.and_modify(|row| row.node = node.clone())
                        .or_insert_with(|| Row { node: node.clone(), in_flight: Resources::default() });
                }
                DiffItem::Remove(id, _) => {
                    self.rows.remove(id);
                }
            }
        }
        self.seen = nodes.clone();
    }

    /// Counts `resources` of a node as taken until [`release`](Self::release).
    pub fn reserve(&mut self, id: &NodeId, resources: Resources) {
        if let Some(row) = self.rows.get_mut(id)
            && let Some(sum) = row.in_flight.checked_add(resources)
        {
            row.in_flight = sum;
        }
    }

    /// The opposite, once the command was applied (and [`sync`](Self::sync) saw it) or rejected.
    pub fn release(&mut self, id: &NodeId, resources: Resources) {
        if let Some(row) = self.rows.get_mut(id) {
            row.in_flight = row.in_flight.saturating_sub(resources);
        }
    }

    /// Forgets what is in flight: leadership was lost, and with it the knowledge of what became of it.
    pub fn drop_overlay(&mut self) {
        for row in self.rows.values_mut() {
            row.in_flight = Resources::default();
        }
    }

    /// Every node, by id.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }
}
