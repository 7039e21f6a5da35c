//! Operators: they cordon, forget, stop orphans, pause, set quotas, release the brake, and restore a backup.

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::ids::{Epoch, NodeId, TenantId};
use warren_scheduler::raft::testing::renewed;
use warren_scheduler::state::command::{Body, Caller, LedgerId, Role};
use warren_scheduler::state::node::Condition;
use warren_scheduler::state::tenant::Quota;

use super::clock::SECOND;
use super::leader::Origin;
use super::queue::Event;
use super::world::World;

impl World {
    /// Says something to whoever leads, if anybody does; operators try again later by themselves.
    pub fn operate(&mut self, body: Body) {
        let Some(leader) = self.log.leader.filter(|leader| self.replicas[*leader].lead.is_some()) else { return };
        let caller = Caller { principal: "operator".to_owned(), role: Role::Operator, tenant: None };
        self.propose(leader, caller, body, Origin::Nobody);
    }

    fn some_node(&mut self, wanted: impl Fn(Condition) -> bool) -> Option<NodeId> {
        let nodes = &self.oracle.state().nodes;
        let able: Vec<NodeId> = nodes.values().filter(|n| wanted(n.condition)).map(|n| n.id.clone()).collect();
        self.rng.pick(&able).cloned()
    }

    pub fn operator_acts(&mut self) {
        match self.rng.below(12) {
            0..3 => self.cordon(),
            3 => self.forget_node(),
            4..6 => self.stop_orphan(),
            6 => self.operate(Body::ReleaseBrake),
            7..9 => self.pause_region(),
            9..11 => self.set_quota(),
            _ => self.restore_backup(),
        }
    }

    fn cordon(&mut self) {
        let Some(node) = self.some_node(|_| true) else { return };
        let cordoned = Some(self.rng.per_mille(400));
        self.operate(Body::SetNodePolicy {
            node,
            cordoned,
            set_labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
            remove_labels: BTreeSet::new(),
        });
    }

    fn forget_node(&mut self) {
        if let Some(node) = self.some_node(|condition| condition == Condition::Down) {
            self.operate(Body::ForgetNode { node });
        }
    }

    fn stop_orphan(&mut self) {
        let nodes = self.oracle.state().nodes.values();
        let orphans: Vec<_> =
            nodes.flat_map(|n| n.orphans.iter().map(|orphan| (n.id.clone(), orphan.clone()))).collect();
        if let Some((node, (sandbox, epoch))) = self.rng.pick(&orphans).cloned() {
            self.operate(Body::StopOrphan { node, sandbox, epoch });
        }
    }

    fn pause_region(&mut self) {
        let mut maybe = || self.rng.per_mille(300).then(|| self.rng.per_mille(300));
        let body = Body::SetPause { creates: maybe(), placement: maybe(), moves: maybe() };
        self.operate(body);
    }

    fn set_quota(&mut self) {
        let tenant = self.rng.per_mille(700).then(|| TenantId::parse("t0").expect("a valid id"));
        let few = self.rng.between(1, 20);
        let quota = self.rng.per_mille(600).then_some(Quota {
            sandboxes: Some(few),
            creates_per_minute: self.rng.per_mille(300).then_some(few * 4),
            ..Quota::default()
        });
        self.operate(Body::SetQuota { tenant, quota });
    }

    /// Every scheduler is stopped, and started again from a backup under a new ledger id.
    fn restore_backup(&mut self) {
        let Some(backup) = self.oracle.some_past(&mut self.rng) else { return };
        if backup.ledger_id.is_none() {
            return;
        }
        self.trace.note(self.now, format_args!("the backup of index {} is restored", backup.revision));
        let first = self.replicas[0].id;
        let restored = renewed(backup.clone(), first, LedgerId(u128::from(self.rng.next()) + 1));
        for replica in 0..self.replicas.len() {
            self.crash_replica(replica);
            let this = &mut self.replicas[replica];
            this.checkpoint = Some((restored.revision, restored.clone()));
            this.applied = restored.revision;
            this.state = restored.clone();
            let at = self.now + self.rng.between(SECOND / 2, 5 * SECOND);
            self.queue.put(at, Event::ReplicaStarts { replica });
            self.queue.put(at + SECOND, Event::Announce { replica });
        }
        self.log.base = restored.revision;
        self.log.entries.clear();
        self.log.left_behind.clear();
        self.oracle.restored(&backup, restored);
        self.upheaval = true;
        self.disown_unknown();
        // Whatever was asked of the ledger that is gone is asked again.
        for (_, call) in std::mem::take(&mut self.calls) {
            self.try_again(call);
        }
    }

    /// What runs and the restored ledger does not know as it runs is nobody's for now.
    fn disown_unknown(&mut self) {
        for agent in 0..self.agents.len() {
            let keys: Vec<_> = self.agents[agent].instances.keys().cloned().collect();
            for (sandbox, epoch) in keys {
                let disowned = !self.is_known(agent, &sandbox, epoch);
                if let Some(instance) = self.agents[agent].instances.get_mut(&(sandbox, epoch)) {
                    instance.disowned = disowned;
                }
            }
        }
    }

    /// Whether the ledger counts this instance as the sandbox, or as left over of it.
    pub fn is_known(&self, agent: usize, sandbox: &warren_proto::ids::SandboxName, epoch: Epoch) -> bool {
        let (state, id) = (self.oracle.state(), &self.agents[agent].id);
        let lives = state.sandboxes.get(sandbox).is_some_and(|s| s.epoch == epoch && s.life.node() == Some(id));
        let left = state.nodes.get(id).is_some_and(|node| node.leftovers.contains_key(&(sandbox.clone(), epoch)));
        lives || left
    }
}
