//! Which sandboxes a list or a watch is about, and the cheapest way to walk them: the smallest index that holds them all.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use imbl::OrdSet;
use tonic::Status;
use warren_proto::ids::{NodeId, SandboxId, SandboxName, TenantId};
use warren_proto::v1::SandboxState;

use super::{convert, status, validate};
use crate::state::State;
use crate::state::event::{Event, EventKind};
use crate::state::sandbox::Sandbox;

/// Most labels that one filter names.
const MAX_LABELS: usize = 16;

/// All of these must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    tenant: Option<TenantId>,
    states: BTreeSet<SandboxState>,
    labels: BTreeMap<String, String>,
    node: Option<NodeId>,
}

/// How an event looks through a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It exists, or came to match.
    Appeared,
    Changed,
    /// It is gone, or no longer matches.
    Disappeared,
}

impl Filter {
    pub fn parse(parent: &str, states: &[i32], labels: BTreeMap<String, String>, node: &str) -> Result<Self, Status> {
        if labels.len() > MAX_LABELS {
            return Err(status::invalid_field("labels", format!("at most {MAX_LABELS}")));
        }
        let node = match node {
            "" => None,
            name => Some(NodeId::from_name(name).map_err(validate::id_error("node"))?),
        };
        Ok(Self { tenant: validate::parent(parent)?, states: validate::states(states)?, labels, node })
    }

    pub fn tenant(&self) -> Option<&TenantId> {
        self.tenant.as_ref()
    }

    /// Stands for the filter in page tokens.
    pub fn describe(&self) -> String {
        format!("{self:?}")
    }

    pub fn matches(&self, state: &State, sandbox: &Sandbox) -> bool {
        self.matches_as(sandbox, convert::sandbox_state(state, sandbox))
    }

    fn matches_as(&self, sandbox: &Sandbox, shown: SandboxState) -> bool {
        let labels = &sandbox.settings().labels;
        self.tenant.as_ref().is_none_or(|tenant| sandbox.name.tenant == *tenant)
            && (self.states.is_empty() || self.states.contains(&shown))
            && self.labels.iter().all(|(key, value)| labels.get(key).is_some_and(|own| **own == **value))
            && self.node.as_ref().is_none_or(|node| sandbox.life.node() == Some(node))
    }

    /// What an event is to somebody who sees only what matches; `None`: nothing.
    pub fn see(&self, state: &State, event: &Event) -> Option<Seen> {
        let shown = convert::sandbox_state(state, &event.sandbox);
        let now = event.kind != EventKind::Deleted && self.matches_as(&event.sandbox, shown);
        let before = event.before.as_ref().is_some_and(|before| {
            self.matches_as(before, shown_before(shown, before, &event.sandbox).unwrap_or(convert::own_state(before)))
        });
        match (before, now) {
            (false, false) => None,
            (false, true) => Some(Seen::Appeared),
            (true, true) => Some(Seen::Changed),
            (true, false) => Some(Seen::Disappeared),
        }
    }

    /// Everything that matches, by name, after `after`.
    pub fn walk<'a>(
        &'a self,
        state: &'a State,
        after: Option<&SandboxName>,
    ) -> Result<impl Iterator<Item = &'a Arc<Sandbox>> + 'a, Status> {
        let start = match (after, &self.tenant) {
            (Some(last), _) => Bound::Excluded(last.clone()),
            (None, Some(tenant)) => Bound::Included(first_of(tenant)?),
            (None, None) => Bound::Unbounded,
        };
        let named = self.candidates(state, start.clone());
        let found: Box<dyn Iterator<Item = &'a Arc<Sandbox>> + Send> = match named {
            Some(names) => Box::new(names.filter_map(|name| state.sandboxes.get(name))),
            None => Box::new(state.sandboxes.range((start, Bound::Unbounded)).map(|(_, sandbox)| sandbox)),
        };
        let own = move |sandbox: &&Arc<Sandbox>| self.tenant.as_ref().is_none_or(|t| sandbox.name.tenant == *t);
        Ok(found.take_while(own).filter(|sandbox| self.matches(state, sandbox)))
    }

    /// The names in the smallest index that holds everything that matches, in order; `None` where walking the sandboxes
    /// themselves is no more.
    fn candidates<'a>(
        &self,
        state: &'a State,
        start: Bound<SandboxName>,
    ) -> Option<Box<dyn Iterator<Item = &'a SandboxName> + Send + 'a>> {
        static NONE: std::sync::LazyLock<OrdSet<SandboxName>> = std::sync::LazyLock::new(OrdSet::new);
        let whole = match &self.tenant {
            Some(tenant) => state.tenants.get(tenant).map_or(0, |tenant| tenant.sandboxes),
            None => state.sandboxes.len() as u64,
        };
        let by_label = self.labels.iter().map(|(key, value)| {
            state.indexes.labels.get(&(Arc::from(key.as_str()), Arc::from(value.as_str()))).unwrap_or(&NONE)
        });
        let by_node = self.node.iter().map(|id| state.nodes.get(id).map_or(&*NONE, |node| &node.sandboxes));
        let smallest = by_label.chain(by_node).min_by_key(|names| names.len());
        let kinds = self.kinds(state);
        let of_kinds = kinds.as_ref().map_or(usize::MAX, |sets| sets.iter().map(|set| set.len()).sum());
        match (smallest, kinds) {
            (Some(names), _) if names.len() <= of_kinds && names.len() as u64 <= whole => {
                Some(Box::new(names.range((start, Bound::Unbounded))))
            }
            (_, Some(sets)) if of_kinds as u64 <= whole => Some(Box::new(merged(sets, &start))),
            _ => None,
        }
    }

    /// The sets of the kinds that can show one of the states.
    fn kinds<'a>(&self, state: &'a State) -> Option<Vec<&'a OrdSet<SandboxName>>> {
        if self.states.is_empty() {
            return None;
        }
        let names: BTreeSet<&str> = self.states.iter().flat_map(|state| convert::kinds_of(*state)).copied().collect();
        Some(names.into_iter().filter_map(|kind| state.indexes.kinds.get(kind)).collect())
    }
}

/// What it showed before, where only its node's condition changed.
fn shown_before(now: SandboxState, before: &Sandbox, after: &Sandbox) -> Option<SandboxState> {
    if before.life != after.life {
        return None;
    }
    Some(if now == SandboxState::Unreachable { convert::own_state(before) } else { now })
}

/// Several sets as one, in order; they have nothing in common.
fn merged<'a>(
    sets: Vec<&'a OrdSet<SandboxName>>,
    start: &Bound<SandboxName>,
) -> impl Iterator<Item = &'a SandboxName> + use<'a> {
    let mut parts: Vec<_> =
        sets.into_iter().map(|set| set.range((start.clone(), Bound::Unbounded)).peekable()).collect();
    std::iter::from_fn(move || {
        let heads = parts.iter_mut().enumerate().filter_map(|(at, part)| part.peek().map(|name| (*name, at)));
        let (_, at) = heads.min()?;
        parts[at].next()
    })
}

/// A name that no sandbox of the tenant comes before: ids begin with a digit or letter, and `0` is the least.
fn first_of(tenant: &TenantId) -> Result<SandboxName, Status> {
    let id = SandboxId::parse("0").map_err(validate::id_error("parent"))?;
    Ok(SandboxName::new(tenant.clone(), id))
}
