//! Where a leader puts new sandboxes, as `controller` decides it: the real placement over the real view, with room held for
//! every decision until its command is applied or rejected.

use std::sync::Arc;

use warren_proto::ids::NodeId;
use warren_scheduler::placement::{Request, place};
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Decision, Phase};
use warren_scheduler::state::sandbox::{PendingCode, PendingReason, SandboxSpec};

use super::bug::Bug;
use super::leader::Held;
use super::world::World;

impl World {
    /// Chooses a node for a new sandbox and holds its room in the view.
    pub fn decide(&mut self, replica: usize, spec: &SandboxSpec) -> (Decision, Option<Held>) {
        let fleet = self.fleet_for_view(replica);
        let this = &mut self.replicas[replica];
        this.view.sync(&fleet);
        if fleet.region.pauses.placement {
            let message = "placement is paused in this region".to_owned();
            return (Decision::Queue(PendingReason { code: PendingCode::Paused, message }), None);
        }
        if self.rng.per_mille(self.plan.wild_decisions) {
            // A leader may decide on whatever it likes: what does not hold must not be applied.
            let nodes: Vec<NodeId> = fleet.nodes.keys().cloned().collect();
            if let Some(node) = self.rng.pick(&nodes) {
                return (Decision::Place(node.clone().into()), None);
            }
        }
        match place(&this.view, &Request::new(&fleet, spec)) {
            Ok(spot) => {
                let reservation = this.view.reserve(&spot, spec.resources);
                let term = this.lead.as_ref().map_or(0, |lead| lead.term);
                self.oracle.decided(replica, term, &spot.node, spec.resources, &self.replicas[replica].state);
                let held = Held { reservation, node: spot.node.clone(), resources: spec.resources };
                (Decision::Place(spot), Some(held))
            }
            Err(unplaceable) => {
                let reason = unplaceable.reason();
                self.oracle.said_why(replica, &fleet, None, spec, &reason);
                (Decision::Queue(reason), None)
            }
        }
    }

    /// What was applied must be in the view before the reservation goes.
    pub fn release(&mut self, replica: usize, held: &Held) {
        let this = &mut self.replicas[replica];
        this.view.sync(&this.state);
        this.view.release(&held.reservation);
        self.oracle.released(replica, &held.node, held.resources);
    }

    /// The fleet as the view is to see it. With the bug, what an uncommitted observation says is gone counts as free.
    pub fn fleet_for_view(&self, replica: usize) -> State {
        let this = &self.replicas[replica];
        let mut seen = this.state.clone();
        let Some(lead) = this.lead.as_ref().filter(|_| self.bug == Some(Bug::OverlayCountsFrees)) else { return seen };
        let under_way = lead.under_way.iter().flat_map(|batch| &batch.proposals).chain(&lead.waiting);
        for proposal in under_way {
            let Body::Observe { node: id, observation, .. } = &proposal.command.body else { continue };
            let Some(node) = seen.nodes.get_mut(id).map(Arc::make_mut) else { continue };
            for gone in observation.sandboxes.iter().filter(|seen| seen.phase == Phase::Removed) {
                let held = this.state.sandboxes.get(&gone.sandbox).filter(|held| held.life.node() == Some(id));
                if let Some(held) = held {
                    node.assigned = node.assigned.saturating_sub(held.spec.resources);
                }
            }
        }
        seen
    }
}
