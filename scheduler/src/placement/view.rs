//! The fleet as placement sees it: one row a node, kept from committed state, overlaid with what is in flight.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use warren_proto::ids::NodeId;
use warren_proto::units::Resources;

use crate::state::State;
use crate::state::command::Spot;
use crate::state::gpu::{self, GpuDevice, GpuUse};
use crate::state::node::Node;

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub node: Arc<Node>,
    /// Decided, not applied yet.
    pub in_flight: Resources,
    pub in_flight_gpus: GpuUse,
}

impl Row {
    fn new(node: Arc<Node>) -> Self {
        Self { node, in_flight: Resources::default(), in_flight_gpus: GpuUse::default() }
    }

    /// What a decision may still use.
    pub fn free(&self) -> Resources {
        self.node.free().saturating_sub(self.in_flight)
    }

    /// Devices that a decision may still give away, by uuid.
    pub fn free_gpus(&self) -> impl Iterator<Item = &GpuDevice> {
        gpu::free(&self.node.report.gpus, &self.node.gpu_use)
            .filter(|device| self.in_flight_gpus.of(&device.uuid).milli == 0)
    }

    /// All that would be taken with `wanted`; `None` where that cannot even be counted.
    pub fn taken_with(&self, wanted: Resources) -> Option<Resources> {
        self.node.assigned.checked_add(self.in_flight)?.checked_add(wanted)
    }
}

/// Room that a decision under way holds; given back with [`View::release`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    spot: Spot,
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
                    row.and_modify(|row| row.node = node.clone()).or_insert_with(|| Row::new(node.clone()));
                }
                DiffItem::Remove(id, _) => {
                    self.rows.remove(id);
                }
            }
        }
        self.seen = state.nodes.clone();
    }

    /// Counts `resources` of a spot's node, and its devices, as taken until the reservation is released.
    pub fn reserve(&mut self, spot: &Spot, resources: Resources) -> Reservation {
        if let Some(row) = self.rows.get_mut(&spot.node)
            && let Some(sum) = row.in_flight.checked_add(resources)
        {
            row.in_flight = sum;
            row.in_flight_gpus.add(&spot.gpus);
        }
        Reservation { spot: spot.clone(), resources, overlay: self.overlay }
    }

    /// The opposite, once the command was applied (and [`sync`](Self::sync) saw it) or rejected.
    pub fn release(&mut self, reservation: &Reservation) {
        if let Some(row) = self.rows.get_mut(&reservation.spot.node).filter(|_| reservation.overlay == self.overlay) {
            row.in_flight = row.in_flight.saturating_sub(reservation.resources);
            row.in_flight_gpus.remove(&reservation.spot.gpus);
        }
    }

    /// Forgets what is in flight: leadership was lost, and with it the knowledge of what became of it.
    pub fn drop_overlay(&mut self) {
        self.overlay = self.overlay.wrapping_add(1);
        for row in self.rows.values_mut() {
            row.in_flight = Resources::default();
            row.in_flight_gpus = GpuUse::default();
        }
    }

    /// Every node, by id.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }
}
