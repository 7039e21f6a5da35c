//! A host: the instances that are really on it, the journal on its disk, and the fence beside the agent.
//!
//! All of it outlives the agent's process. The fence freezes what must not run on without a lease, whether the agent lives or
//! not; a reboot ends every instance and keeps the disk.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use warren_node_agent::driver::{Ended, Presence};
use warren_node_agent::reconcile::Record;
use warren_proto::ids::{Digest, Epoch, NodeId, SandboxName};
use warren_proto::units::Resources;
use warren_scheduler::state::command::LedgerId;

use super::agent::Process;
use super::clock::Clock;
use super::queue::Event;
use super::world::World;

/// An instance that is really there.
#[derive(Debug, Clone)]
pub struct Instance {
    pub resources: Resources,
    pub presence: Presence,
    /// Frozen by the fence, besides what `presence` says.
    pub fenced: bool,
    /// The ledger that it was last assigned by.
    pub ledger_id: Option<LedgerId>,
}

impl Instance {
    /// Whether its processes get anything done.
    pub fn is_live(&self) -> bool {
        self.presence == Presence::Running && !self.fenced
    }
}

/// A host and the agent on it, if one runs.
#[derive(Debug)]
pub struct Agent {
    pub id: NodeId,
    pub clock: Clock,
    pub capacity: Resources,
    /// What it had before faults took some of it.
    pub full_capacity: Resources,
    pub instances: BTreeMap<(SandboxName, Epoch), Instance>,
    pub journal: BTreeMap<SandboxName, Record>,
    pub ledger_file: Option<LedgerId>,
    pub templates: Vec<Digest>,
    /// When the lease lapses, by the boot-time clock. Kept by the fence.
    pub lease_until: Option<Duration>,
    /// How often an agent was started here.
    pub life: u32,
    pub boot: u32,
    pub process: Option<Process>,
    /// While it is stopped: what has come for it meanwhile.
    pub stalled: Option<VecDeque<Event>>,
}

impl Agent {
    /// What its instances really hold.
    pub fn really_held(&self) -> Option<Resources> {
        self.instances.values().try_fold(Resources::default(), |sum, instance| sum.checked_add(instance.resources))
    }

    /// By its own clock.
    pub fn lease_is_valid(&self, now: u64) -> bool {
        self.lease_until.is_some_and(|until| self.clock.monotonic(now) < until)
    }
}

impl World {
    /// Something about this host changed: whatever must be true of hosts is looked at.
    pub fn host_changed(&mut self, agent: usize, sandbox: &SandboxName) {
        let live: Vec<(NodeId, Epoch, Option<LedgerId>)> = self
            .agents
            .iter()
            .flat_map(|host| {
                let range = (sandbox.clone(), Epoch(0))..=(sandbox.clone(), Epoch(u64::MAX));
                let live = host.instances.range(range).filter(|(_, instance)| instance.is_live());
                live.map(|((_, epoch), instance)| (host.id.clone(), *epoch, instance.ledger_id))
            })
            .collect();
        self.oracle.one_live_instance(sandbox, &live);
        self.oracle.fits_physically(&self.agents[agent]);
    }

    /// A main process ends by itself.
    pub fn ends(&mut self, agent: usize, boot: u32, sandbox: SandboxName, epoch: Epoch) {
        let host = &mut self.agents[agent];
        let Some(instance) = host.instances.get_mut(&(sandbox.clone(), epoch)).filter(|i| i.is_live()) else { return };
        if host.boot != boot {
            return;
        }
        let ended = Presence::Ended(Ended::default());
        instance.presence = ended.clone();
        self.trace.note(self.now, format_args!("{} {sandbox} {epoch} ends by itself", host.id));
        let Some(process) = &mut host.process else { return };
        let held = process.held.get_mut(&sandbox).and_then(|held| held.instances.get_mut(&epoch));
        if let Some(held) = held {
            held.presence = ended;
            self.settle_one(agent, &sandbox);
            self.ring(agent);
        }
    }

    /// The power fails: every process is gone, the disk stays.
    pub fn reboot(&mut self, agent: usize) {
        self.trace.note(self.now, format_args!("{} reboots", self.agents[agent].id));
        self.stop_agent(agent);
        let host = &mut self.agents[agent];
        host.boot += 1;
        host.instances.clear();
        host.lease_until = None;
    }
}
