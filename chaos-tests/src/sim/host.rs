//! A host: the instances that are really on it, the journal on its disk, and the fence beside the agent.
//!
//! All of it outlives the agent's process. The fence freezes the group of fenced instances from the moment that it was told,
//! whether the agent lives or not; a reboot ends every instance and keeps the disk.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use warren_node_agent::driver::{Ended, Presence};
use warren_node_agent::reconcile::Record;
use warren_proto::ids::{Digest, Epoch, NodeId, SandboxName};
use warren_proto::units::Resources;
use warren_scheduler::state::command::LedgerId;
use warren_scheduler::state::gpu::GpuDevice;
use warren_scheduler::state::node::Condition;

use super::agent::Process;
use super::clock::{Clock, MS};
use super::queue::Event;
use super::world::World;

/// Longest that a fence takes from the end of a lease until nothing of the group runs: less than the schedulers allow for.
const LONGEST_FREEZE: u64 = 900 * MS;

/// An instance that is really there.
#[derive(Debug, Clone)]
pub struct Instance {
    pub resources: Resources,
    pub presence: Presence,
    /// In the group that the fence freezes.
    pub fenced: bool,
    /// The ledger gave it up: its node was forgotten, or an older ledger was restored. Until its agent hears of that it runs,
    /// and nobody can help it.
    pub disowned: bool,
}

/// A host and the agent on it, if one runs.
#[derive(Debug)]
pub struct Agent {
    pub id: NodeId,
    pub clock: Clock,
    pub capacity: Resources,
    /// What it had before faults took some of it.
    pub full_capacity: Resources,
    /// By name, where it does not merely count them.
    pub gpus: Vec<GpuDevice>,
    pub has_fence: bool,
    pub instances: BTreeMap<(SandboxName, Epoch), Instance>,
    /// What the journal holds: a record, and up to which epoch it is an earlier ledger's.
    pub journal: BTreeMap<SandboxName, (Record, Option<Epoch>)>,
    pub ledger_file: Option<LedgerId>,
    pub templates: Vec<Digest>,
    /// Until when the group may run, by the boot-time clock: what the fence was told.
    pub published: Duration,
    /// The group is frozen.
    pub frozen: bool,
    /// How often an agent was started here.
    pub life: u32,
    pub boot: u32,
    pub process: Option<Process>,
    /// While it is stopped: what has come for it meanwhile.
    pub stalled: Option<VecDeque<Event>>,
}

impl Agent {
    /// Whether an instance's processes get anything done.
    pub fn is_live(&self, instance: &Instance) -> bool {
        instance.presence == Presence::Running && !(instance.fenced && self.frozen)
    }

    /// What the instances hold that the ledger must know of.
    pub fn really_held(&self) -> Option<Resources> {
        let known = self.instances.values().filter(|instance| !instance.disowned);
        known.map(|instance| instance.resources).try_fold(Resources::default(), Resources::checked_add)
    }

    /// The moment by its own clock.
    pub fn reading(&self, now: u64) -> Duration {
        self.clock.monotonic(now)
    }
}

impl World {
    /// Something about this sandbox changed on a host: whatever must be true of hosts is looked at.
    pub fn host_changed(&mut self, agent: usize, sandbox: &SandboxName) {
        let mut live: Vec<(NodeId, Epoch)> = Vec::new();
        for host in &self.agents {
            let range = (sandbox.clone(), Epoch(0))..=(sandbox.clone(), Epoch(u64::MAX));
            let here = host.instances.range(range).filter(|(_, one)| host.is_live(one) && !one.disowned);
            live.extend(here.map(|((_, epoch), _)| (host.id.clone(), *epoch)));
        }
        self.oracle.one_live_instance(sandbox, &live);
        self.oracle.fits_physically(&self.agents[agent]);
        self.nothing_runs_on_what_is_down();
    }

    /// Rule 2: once a node is declared down, nothing that may be placed elsewhere runs there.
    pub fn nothing_runs_on_what_is_down(&mut self) {
        let state = self.oracle.state();
        let mut wrong = None;
        for host in &self.agents {
            let down = state
                .nodes
                .get(&host.id)
                .is_some_and(|node| node.condition == Condition::Down && node.report.fence && state.level.0 > 1);
            if down {
                let runs = |(_, one): &(_, &Instance)| one.fenced && !one.disowned && host.is_live(one);
                wrong = wrong.or(host.instances.iter().find(runs).map(|(key, _)| (host.id.clone(), key.0.clone())));
            }
        }
        if let Some((node, sandbox)) = wrong {
            self.oracle.runs_on_what_is_down(&node, &sandbox);
        }
    }

    /// The fence was told a moment: the group runs until then.
    pub fn publish(&mut self, agent: usize, until: Duration) {
        let host = &mut self.agents[agent];
        host.published = until;
        let late = self.rng.between(0, 5 * MS);
        self.queue.put(self.now + late, Event::Fence { agent });
        let lapse = self.agents[agent].clock.when(until) + self.rng.between(0, LONGEST_FREEZE);
        self.queue.put(lapse, Event::Fence { agent });
    }

    /// The fence looks at its clock.
    pub fn fence(&mut self, agent: usize) {
        let host = &mut self.agents[agent];
        let frozen = host.published <= host.clock.monotonic(self.now);
        if std::mem::replace(&mut host.frozen, frozen) == frozen {
            return;
        }
        let word = if frozen { "freezes" } else { "thaws" };
        self.trace.note(self.now, format_args!("{} {word} its fenced sandboxes", host.id));
        let fenced: Vec<SandboxName> =
            host.instances.iter().filter(|(_, one)| one.fenced).map(|((name, _), _)| name.clone()).collect();
        for sandbox in fenced {
            self.host_changed(agent, &sandbox);
        }
    }

    /// A main process ends by itself.
    pub fn ends(&mut self, agent: usize, boot: u32, sandbox: SandboxName, epoch: Epoch) {
        let host = &mut self.agents[agent];
        let live = host.instances.get(&(sandbox.clone(), epoch)).is_some_and(|instance| host.is_live(instance));
        if host.boot != boot || !live || self.calm {
            return;
        }
        let ended = Presence::Ended(Ended::default());
        if let Some(instance) = host.instances.get_mut(&(sandbox.clone(), epoch)) {
            instance.presence = ended.clone();
        }
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
        // What another boot wrote says nothing.
        host.published = Duration::ZERO;
        host.frozen = true;
    }

    /// The ledger knows no more of what runs on a node.
    pub fn disown(&mut self, node: &NodeId) {
        for host in self.agents.iter_mut().filter(|host| host.id == *node) {
            host.instances.values_mut().for_each(|instance| instance.disowned = true);
        }
    }
}
