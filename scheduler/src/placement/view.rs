//! The fleet as placement sees it: one row a node, kept from committed state, overlaid with what is in flight.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use warren_proto::ids::NodeId;
use warren_proto::units::Resources;

use crate::state::State;
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

    /// All that would be taken with `wanted`; `None` where that cannot even be counted.
    pub fn taken_with(&self, wanted: Resources) -> Option<Resources> {
        self.node.assigned.checked_add(self.in_flight)?.checked_add(wanted)
    }
}

/// Room that a decision under way holds; given back with [`View::release`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    node: NodeId,
    resources: Resources,
    /// The overlay that it belongs to: one that was dropped since takes nothing back.
    overlay: u64,
}

/// All nodes. Equal to one that is built anew from the same state and reservations.
#[derive(Debug, Clone, Default)]
pub struct View {
    rows: BTreeMap<NodeId, Row>,
    /// The nodes that the rows were last brought up to date with, and the revision they are of.
    seen: OrdMap<NodeId, Arc<Node>>,
    revision: u64,
    /// How often the overlay was dropped.
    overlay: u64,
}

impl View {
    /// Brings the rows up to date with committed state; one that is older than what was seen changes nothing. Costs as much as
    /// there are changes: unchanged parts are shared between the two maps, and skipped.
    pub fn sync(&mut self, state: &State) {
        if state.revision < self.revision {
            return;
        }
        self.revision = state.revision;
        for change in self.seen.diff(&state.nodes) {
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
        self.seen = state.nodes.clone();
    }

    /// Counts `resources` of a node as taken until the reservation is released.
    pub fn reserve(&mut self, id: &NodeId, resources: Resources) -> Reservation {
        if let Some(row) = self.rows.get_mut(id)
            && let Some(sum) = row.in_flight.checked_add(resources)
        {
            row.in_flight = sum;
        }
        Reservation { node: id.clone(), resources, overlay: self.overlay }
    }

    /// The opposite, once the command was applied (and [`sync`](Self::sync) saw it) or rejected.
    pub fn release(&mut self, reservation: &Reservation) {
        if let Some(row) = self.rows.get_mut(&reservation.node).filter(|_| reservation.overlay == self.overlay) {
            row.in_flight = row.in_flight.saturating_sub(reservation.resources);
        }
    }

    /// Forgets what is in flight: leadership was lost, and with it the knowledge of what became of it.
    pub fn drop_overlay(&mut self) {
        self.overlay = self.overlay.wrapping_add(1);
        for row in self.rows.values_mut() {
            row.in_flight = Resources::default();
        }
    }

    /// Every node, by id.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }
}
