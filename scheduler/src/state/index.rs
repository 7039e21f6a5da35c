//! Indexes over the sandboxes: by state, by label, by what is due, by queue. Derived from the sandboxes alone, and kept by
//! [`State::put_sandbox`](super::State::put_sandbox); a list that filters walks the smallest of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use warren_proto::ids::{SandboxName, TenantId};

use super::command::LogTime;
use super::pairs::Pairs;
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
    /// What all of them take, by what their creators chose ([`Sandbox::chosen_bytes`]).
    pub chosen_bytes: u64,
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

    /// What a sandbox's change from one state to another means here; `None`: it is not there. What did not change costs nothing.
    pub(super) fn change(&mut self, before: Option<&Sandbox>, after: Option<&Sandbox>) {
        let Some(name) = after.or(before).map(|sandbox| sandbox.name.clone()) else { return };
        self.change_kind(&name, before.map(|s| s.life.kind()), after.map(|s| s.life.kind()));
        self.change_labels(&name, before.map(|s| &s.settings().labels), after.map(|s| &s.settings().labels));
        self.change_rank(&name, before.and_then(waiting), after.and_then(waiting));
        if !before.zip(after).is_some_and(|(before, after)| before.chose_the_same(after)) {
            let bytes = |sandbox: Option<&Sandbox>| sandbox.map_or(0, Sandbox::chosen_bytes);
            self.chosen_bytes = self.chosen_bytes.saturating_sub(bytes(before)).saturating_add(bytes(after));
        }
        let at = |time: Option<LogTime>| time.map(|at| (at, name.clone()));
        turn(&mut self.due, at(before.and_then(Sandbox::due)), at(after.and_then(Sandbox::due)));
        let ended = |sandbox: &Sandbox| sandbox.life.ended();
        turn(&mut self.ended, at(before.and_then(ended)), at(after.and_then(ended)));
        let at = |time: Option<LogTime>| time.map(|at| (at, Some(name.clone())));
        let until = |sandbox: Option<&Sandbox>| at(sandbox.and_then(Sandbox::backs_off_until));
        turn(&mut self.backing_off, until(before), until(after));
    }

    fn change_kind(&mut self, name: &SandboxName, before: Option<&'static str>, after: Option<&'static str>) {
        if before == after {
            return;
        }
        if let Some(kind) = before
            && let Some(names) = self.kinds.get_mut(kind)
        {
            names.remove(name);
            if names.is_empty() {
                self.kinds.remove(kind);
            }
        }
        if let Some(kind) = after {
            self.kinds.entry(kind).or_default().insert(name.clone());
        }
    }

    fn change_labels(&mut self, name: &SandboxName, before: Option<&Pairs>, after: Option<&Pairs>) {
        if before == after {
            return;
        }
        for label in before.into_iter().flat_map(labels) {
            if let Some(names) = self.labels.get_mut(&label) {
                names.remove(name);
                if names.is_empty() {
                    self.labels.remove(&label);
                }
            }
        }
        for label in after.into_iter().flat_map(labels) {
            self.labels.entry(label).or_default().insert(name.clone());
        }
    }

    fn change_rank(&mut self, name: &SandboxName, before: Option<(u8, LogTime)>, after: Option<(u8, LogTime)>) {
        if before == after {
            return;
        }
        let place = |(priority, created)| (priority, created, name.clone());
        let mut queue = self.queues.get(&name.tenant).cloned().unwrap_or_default();
        turn(&mut queue, before.map(place), after.map(place));
        if queue.is_empty() {
            self.queues.remove(&name.tenant);
        } else {
            self.queues.insert(name.tenant.clone(), queue);
        }
    }
}

fn labels(pairs: &Pairs) -> impl Iterator<Item = Label> {
    pairs.iter().map(|(key, value)| (Arc::from(key), Arc::from(value.as_ref())))
}

/// Its place in its tenant's queue, where it waits.
fn waiting(sandbox: &Sandbox) -> Option<(u8, LogTime)> {
    matches!(sandbox.life, Life::Pending { .. }).then(|| sandbox.rank())
}

fn turn<K: Ord + Clone>(set: &mut OrdSet<K>, before: Option<K>, after: Option<K>) {
    if before == after {
        return;
    }
    if let Some(key) = before {
        set.remove(&key);
    }
    if let Some(key) = after {
        set.insert(key);
    }
}
