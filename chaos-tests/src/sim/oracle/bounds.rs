//! Rule 12: what grows has a bound, whoever asks for how much.

use warren_scheduler::state::command::Command;
use warren_scheduler::state::event::MAX_EVENTS;
use warren_scheduler::state::node::{MAX_NODES, MAX_ORPHANS};
use warren_scheduler::state::request::{MAX_REQUESTS, MAX_REQUESTS_OF_TENANT, Scope};
use warren_scheduler::state::sandbox::MAX_SANDBOXES;
use warren_scheduler::state::template::MAX_TEMPLATES;
use warren_scheduler::state::tenant::{MAX_PENDING_OF_TENANT, MAX_SANDBOXES_OF_TENANT, MAX_TENANTS};

use super::Oracle;

impl Oracle {
    /// Sizes only: it is done after every command.
    pub(super) fn check_bounds(&mut self, command: &Command) {
        let state = &self.state;
        let scope = Scope { tenant: command.caller.tenant.clone() };
        let tenant = scope.tenant.as_ref().and_then(|id| state.tenants.get(id)).cloned().unwrap_or_default();
        let orphans = state.nodes.values().map(|node| node.orphans.len()).max().unwrap_or_default();
        let size = |len: usize| len as u64;
        let sizes = [
            ("sandboxes", size(state.sandboxes.len()), MAX_SANDBOXES),
            ("nodes", size(state.nodes.len()), MAX_NODES),
            ("templates", size(state.templates.len()), MAX_TEMPLATES),
            ("tenants", size(state.tenants.len()), MAX_TENANTS),
            ("events", size(state.events.len()), size(MAX_EVENTS)),
            ("request ids", size(state.requests.len()), MAX_REQUESTS),
            ("request ids of the tenant", state.requests.held_by(&scope), MAX_REQUESTS_OF_TENANT),
            ("sandboxes of the tenant", tenant.sandboxes, MAX_SANDBOXES_OF_TENANT),
            ("waiting sandboxes of the tenant", tenant.pending, MAX_PENDING_OF_TENANT),
            ("orphans of a node", size(orphans), size(MAX_ORPHANS)),
            ("lapses", size(state.region.lapses.len()), size(state.nodes.len())),
        ];
        if let Some((what, is, most)) = sizes.into_iter().find(|(_, is, most)| is > most) {
            self.wrong(12, format!("there are {is} {what}, and {most} is the most"));
        }
    }
}
