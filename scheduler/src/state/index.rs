//! Indexes over the sandboxes: by state, by label, by what is due, by queue. Derived from the sandboxes alone, and kept by
//! [`State::put_sandbox`](super::State::put_sandbox); a list that filters walks the smallest of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use warren_proto::ids::{SandboxName, TenantId};

use super::command::LogTime;
use super::sandbox::{Life, Sandbox};

/// A label's key and value.
pub type Label = (Arc<str>, Arc<str>);

/// One tenant's waiting sandboxes: the higher priority first, then the older.
pub type Queue = OrdSet<(u8, LogTime, SandboxName)>;

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Indexes {
    /// By [`Life::kind`]. Only kinds that some sandbox has.
    pub kinds: BTreeMap<&'static str, OrdSet<SandboxName>>,
    pub labels: OrdMap<Label, OrdSet<SandboxName>>,
    /// Pending ones, by tenant. Only tenants that have some.
    pub queues: OrdMap<TenantId, Queue>,
    /// By when they end by themselves.
    pub due: OrdSet<(LogTime, SandboxName)>,
    /// By until when they are not to be placed; times may have passed. Each has a name: none stands before all of a time.
    pub backing_off: OrdSet<(LogTime, Option<SandboxName>)>,
    /// Those that ended and hold no node, oldest first.
    pub ended: OrdSet<(LogTime, SandboxName)>,
}

impl Indexes {
    /// How many sandboxes are in a state.
    pub fn count(&self, kind: &str) -> u64 {
        self.kinds.get(kind).map_or(0, |names| names.len() as u64)
    }

    /// How many there are in each state that some are in.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.kinds.iter().map(|(kind, names)| (*kind, names.len() as u64))
    }

    pub(super) fn insert(&mut self, sandbox: &Sandbox) {
        let name = &sandbox.name;
        self.kinds.entry(sandbox.life.kind()).or_default().insert(name.clone());
        for (key, value) in &sandbox.settings().labels {
            let label = (Arc::from(key.as_str()), Arc::from(value.as_str()));
            self.labels.entry(label).or_default().insert(name.clone());
        }
        if matches!(sandbox.life, Life::Pending { .. }) {
            let (priority, created) = sandbox.rank();
            self.queues.entry(name.tenant.clone()).or_default().insert((priority, created, name.clone()));
        }
        if let Some(at) = sandbox.due() {
            self.due.insert((at, name.clone()));
        }
        if let Some(at) = sandbox.backs_off_until() {
            self.backing_off.insert((at, Some(name.clone())));
        }
        if let Some(at) = sandbox.life.ended() {
            self.ended.insert((at, name.clone()));
        }
    }

    pub(super) fn remove(&mut self, sandbox: &Sandbox) {
        let name = &sandbox.name;
        if let Some(names) = self.kinds.get_mut(sandbox.life.kind()) {
            names.remove(name);
            if names.is_empty() {
                self.kinds.remove(sandbox.life.kind());
            }
        }
        for (key, value) in &sandbox.settings().labels {
            self.remove_label(&(Arc::from(key.as_str()), Arc::from(value.as_str())), name);
        }
        if matches!(sandbox.life, Life::Pending { .. }) {
            self.dequeue(sandbox);
        }
        if let Some(at) = sandbox.due() {
            self.due.remove(&(at, name.clone()));
        }
        if let Some(at) = sandbox.backs_off_until() {
            self.backing_off.remove(&(at, Some(name.clone())));
        }
        if let Some(at) = sandbox.life.ended() {
            self.ended.remove(&(at, name.clone()));
        }
    }

    fn remove_label(&mut self, label: &Label, name: &SandboxName) {
        if let Some(names) = self.labels.get_mut(label) {
            names.remove(name);
            if names.is_empty() {
                self.labels.remove(label);
            }
        }
    }

    fn dequeue(&mut self, sandbox: &Sandbox) {
        let tenant = &sandbox.name.tenant;
        let (priority, created) = sandbox.rank();
        if let Some(queue) = self.queues.get_mut(tenant) {
            queue.remove(&(priority, created, sandbox.name.clone()));
            if queue.is_empty() {
                self.queues.remove(tenant);
            }
        }
    }
}
