//! What must be true once everything works again: whatever was begun has come to an end, and everybody agrees.
//!
//! These are liveness: a rule that holds because nothing ever happens is no comfort.

use warren_node_agent::driver::Presence;
use warren_proto::ids::Epoch;
use warren_scheduler::placement::view::View;
use warren_scheduler::placement::{Request, place};
use warren_scheduler::state::node::Condition;
use warren_scheduler::state::sandbox::Life;

use super::super::host::Agent;
use super::Oracle;

impl Oracle {
    /// Looked at when nothing has gone wrong for a good while.
    pub fn all_is_calm(&mut self, hosts: &[Agent]) {
        self.nodes_are_back(hosts);
        self.nothing_hangs();
        self.hosts_agree(hosts);
    }

    /// Nothing is left to do: whoever proposes the same again and again never ends.
    pub fn came_to_rest(&mut self, quiet: bool) {
        if !quiet {
            self.wrong(12, "something is committed again and again, and nothing comes of it");
        }
    }

    fn nodes_are_back(&mut self, hosts: &[Agent]) {
        for host in hosts {
            match self.state.nodes.get(&host.id).map(|node| node.condition) {
                Some(Condition::Ready) => {}
                Some(other) => self.wrong(2, format!("{} is still {}", host.id, other.name())),
                None => self.wrong(2, format!("{} never came back", host.id)),
            }
        }
    }

    fn nothing_hangs(&mut self) {
        let mut view = View::default();
        view.sync(&self.state);
        let mut wrong = Vec::new();
        for sandbox in self.state.sandboxes.values() {
            let name = &sandbox.name;
            match &sandbox.life {
                Life::Starting { node, .. } => wrong.push((6, format!("{name} still starts on {node}"))),
                Life::Stopping { node, .. } => wrong.push((6, format!("{name} is still being removed from {node}"))),
                Life::Stopped { node: Some(node), .. } => {
                    wrong.push((6, format!("{name} ended, and {node} still holds it")));
                }
                Life::Pending { not_before, reason, .. } if *not_before <= self.state.log_time => {
                    let fits = place(&view, &Request::of(&self.state, sandbox)).ok().map(|spot| spot.node);
                    if let Some(node) = fits {
                        wrong.push((10, format!("{name} still waits ({}) and fits on {node}", reason.message)));
                    }
                }
                _ => {}
            }
        }
        for (id, node) in &self.state.nodes {
            if let Some((name, epoch)) = node.leftovers.keys().next() {
                wrong.push((6, format!("{id} still holds what is left over of {name} at epoch {epoch}")));
            }
        }
        for (rule, what) in wrong {
            self.wrong(rule, what);
        }
    }

    /// What the ledger says runs, runs; what runs besides is an orphan that it was told of, and frozen.
    fn hosts_agree(&mut self, hosts: &[Agent]) {
        for sandbox in self.state.sandboxes.clone().values() {
            let Life::Running { node, .. } = &sandbox.life else { continue };
            let Some(host) = hosts.iter().find(|host| host.id == *node) else { continue };
            let instance = host.instances.get(&(sandbox.name.clone(), sandbox.epoch));
            if !instance.is_some_and(|instance| host.is_live(instance)) {
                self.wrong(6, format!("{} should run on {node} and does not: {instance:?}", sandbox.name));
            }
        }
        for host in hosts {
            for ((name, epoch), instance) in &host.instances {
                if self.belongs(host, name, *epoch) {
                    continue;
                }
                let reported =
                    self.state.nodes.get(&host.id).is_some_and(|n| n.orphans.contains(&(name.clone(), *epoch)));
                let still = matches!(instance.presence, Presence::Frozen | Presence::Ended(_));
                if !reported || !still {
                    self.wrong(
                        6,
                        format!("{} holds {name} at epoch {epoch}, unknown to the ledger: {instance:?}", host.id),
                    );
                }
            }
        }
    }

    fn belongs(&self, host: &Agent, name: &warren_proto::ids::SandboxName, epoch: Epoch) -> bool {
        self.state.sandboxes.get(name).is_some_and(|s| s.epoch == epoch && s.life.node() == Some(&host.id))
    }
}
