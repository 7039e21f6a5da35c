//! What must be true of hosts, whatever the ledger thinks of them.

use warren_node_agent::driver::Presence;
use warren_proto::ids::{Epoch, NodeId, SandboxName};
use warren_proto::units::Resources;
use warren_scheduler::state::State;

use super::super::clock::At;
use super::super::host::{Agent, Instance};
use super::super::session::SessionId;
use super::Oracle;

impl Oracle {
    /// Rule 2: at most one instance of a sandbox gets anything done.
    pub fn one_live_instance(&mut self, sandbox: &SandboxName, live: &[(NodeId, Epoch)]) {
        if live.len() > 1 {
            self.wrong(2, format!("{sandbox} runs more than once: {live:?}"));
        }
    }

    /// Rule 2: a node is down, and something runs there that may be placed elsewhere.
    pub fn runs_on_what_is_down(&mut self, node: &NodeId, sandbox: &SandboxName) {
        self.wrong(2, format!("{node} was declared down, and {sandbox} still runs there"));
    }

    /// A renewal reached a leader: no lease that it grants for it is good beyond `ends`.
    pub fn lease_asked(&mut self, session: SessionId, sequence: u64, ends: At) {
        self.leases.insert((session, sequence), ends);
    }

    /// Rule 2: an agent never counts on a lease for longer than whoever granted it.
    pub fn lease_taken(&mut self, node: &NodeId, session: SessionId, sequence: u64, ends: At) {
        match self.leases.remove(&(session, sequence)) {
            Some(granted) if ends <= granted => {}
            Some(granted) => {
                let late = ends - granted;
                self.wrong(2, format!("{node} counts on its lease {late} us longer than its leader"));
            }
            None => self.wrong(2, format!("{node} counts on a lease that no leader was asked for")),
        }
    }

    /// Rule 2: a lease needs the word of a quorum that its leader still leads.
    pub fn granted_without_quorum(&mut self, node: &NodeId) {
        self.wrong(2, format!("{node} is granted a lease by a leader that no quorum confirmed"));
    }

    /// Rule 2: from proposing that a node is down until that is settled, it gets no lease.
    pub fn granted_to_what_goes_down(&mut self, node: &NodeId) {
        self.wrong(2, format!("{node} is granted a lease while it is being declared down"));
    }

    /// Rule 1, physically: what is on a host fits on it.
    pub fn fits_physically(&mut self, host: &Agent) {
        let fits = host.really_held().is_some_and(|sum| sum.fits_in(host.full_capacity));
        if !fits {
            let held: Vec<_> = host.instances.iter().filter(|(_, one)| !one.disowned).map(|(key, _)| key).collect();
            let what = format!("host {} holds more than its {:?}: {held:?}", host.id, host.full_capacity);
            self.wrong(1, what);
        }
    }

    /// Rule 6: nothing that ran is removed unless the ledger wanted it gone.
    pub fn instance_removed(&mut self, node: &NodeId, sandbox: &SandboxName, epoch: Epoch, instance: &Instance) {
        if !matches!(instance.presence, Presence::Running | Presence::Frozen) {
            return;
        }
        let told = self.removable.get(&(node.clone(), sandbox.clone())).is_some_and(|told| *told >= epoch);
        let moved = self.placed.get(sandbox).is_some_and(|(newer, _)| *newer > epoch);
        if !told && !moved {
            self.wrong(6, format!("{node} removed {sandbox} at epoch {epoch}, and nobody wanted that"));
        }
    }

    /// A leader decided to place something: there is room for it beside all that it has under way (section 6 of the
    /// design: what an uncommitted command would free is not counted).
    pub fn decided(&mut self, replica: usize, _term: u64, node: &NodeId, wanted: Resources, state: &State) {
        let under_way = self.in_flight.entry((replica, node.clone())).or_default();
        let sum = under_way.checked_add(wanted);
        *under_way = sum.unwrap_or(*under_way);
        let Some(record) = state.nodes.get(node) else {
            return self.wrong(4, format!("a decision for {node}, which is not registered"));
        };
        let fits =
            sum.and_then(|sum| sum.checked_add(record.assigned)).is_some_and(|all| all.fits_in(record.report.capacity));
        if !fits {
            let what = format!("replica {replica} decided for {node}, which has no room: {:?} under way", sum);
            self.wrong(4, what);
        }
    }

    pub fn released(&mut self, replica: usize, node: &NodeId, resources: Resources) {
        if let Some(under_way) = self.in_flight.get_mut(&(replica, node.clone())) {
            *under_way = under_way.saturating_sub(resources);
        }
    }

    pub fn overlay_dropped(&mut self, replica: usize) {
        self.in_flight.retain(|(of, _), _| *of != replica);
    }
}
