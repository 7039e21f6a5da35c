//! Rule 10: what waits says why, and what it says was true when it was said.

use warren_proto::ids::SandboxName;
use warren_proto::units::Resources;
use warren_scheduler::state::State;
use warren_scheduler::state::event::Event;
use warren_scheduler::state::node::Node;
use warren_scheduler::state::sandbox::{Life, PendingCode, PendingReason, SandboxSpec};
use warren_scheduler::state::settings::Isolation;

use super::super::bug::Bug;
use super::Oracle;

impl Oracle {
    /// A leader says of a sandbox why it waits; `name` where it has one already. Its state and what it has under way are what it
    /// can know.
    pub fn said_why(
        &mut self,
        replica: usize,
        state: &State,
        name: Option<&SandboxName>,
        spec: &SandboxSpec,
        reason: &PendingReason,
    ) {
        // With this bug its state is not what it decides by.
        if self.bug == Some(Bug::OverlayCountsFrees) {
            return;
        }
        let fenced = |node: &Node| spec.isolation != Isolation::Freeze || node.report.fence;
        let able = state.nodes.values().filter(|node| node.is_ready() && !node.cordoned && fenced(node));
        let able: Vec<&Node> = able.map(AsRef::as_ref).collect();
        let old = |node: &Node| name.is_some_and(|name| node.has_other_instance_of(name));
        let taken = |node: &Node| {
            let under_way = self.in_flight.get(&(replica, node.id.clone())).copied().unwrap_or_default();
            node.assigned.checked_add(under_way).and_then(|sum| sum.checked_add(spec.resources))
        };
        let short = |node: &Node, lacks: fn(&Resources, &Resources) -> bool| {
            taken(node).is_some_and(|sum| lacks(&sum, &node.report.capacity))
        };
        let some = |lacks| able.iter().any(|node| short(node, lacks));
        let fits =
            able.iter().any(|node| !old(node) && taken(node).is_some_and(|sum| sum.fits_in(node.report.capacity)));
        let right = match reason.code {
            PendingCode::Paused => state.region.pauses.placement,
            _ if fits => false,
            PendingCode::NoNodes => able.iter().all(|node| old(node)),
            PendingCode::TooLarge => {
                let never = |node: &&Node| old(node) || !spec.resources.fits_in(node.report.capacity);
                able.iter().all(never)
            }
            PendingCode::ShortOfCpu => some(|sum, all| sum.cpu > all.cpu),
            PendingCode::ShortOfMemory => some(|sum, all| sum.memory > all.memory),
            PendingCode::ShortOfDisk => some(|sum, all| sum.disk > all.disk),
            PendingCode::ShortOfGpus => some(|sum, all| sum.gpus > all.gpus),
            // These are `apply`'s to say.
            PendingCode::Conflict | PendingCode::StartFailed | PendingCode::Restarting | PendingCode::NodeDown => false,
        };
        if !right {
            let what = format!("replica {replica} says {reason:?} of {:?}, which is not so", spec.resources);
            self.wrong(10, what);
        }
    }

    /// What is committed of it.
    pub(super) fn check_pending(&mut self, events: &[Event]) {
        for event in events {
            let sandbox = &event.sandbox;
            let Life::Pending { reason, .. } = &sandbox.life else { continue };
            let came_back = event.before.as_ref().is_some_and(|before| before.epoch.0 > 0);
            let right = match reason.code {
                PendingCode::StartFailed => sandbox.failed_starts > 0 && sandbox.avoid.is_some(),
                PendingCode::Restarting => sandbox.restarts > 0,
                PendingCode::NodeDown => came_back,
                _ => true,
            };
            if reason.message.is_empty() || !right {
                self.wrong(10, format!("{} waits and says {reason:?}", sandbox.name));
            }
        }
    }
}
