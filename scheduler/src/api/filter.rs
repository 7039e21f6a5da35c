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

    /// What an event is to somebody who sees only what matches; `None`: nothing. It follows from the event alone.
    pub fn see(&self, event: &Event) -> Option<Seen> {
        let now = convert::shown_state(&event.sandbox, event.unreachable);
        let now = event.kind != EventKind::Deleted && self.matches_as(&event.sandbox, now);
        let before = event
            .before
            .as_deref()
            .is_some_and(|before| self.matches_as(before, convert::shown_state(before, event.unreachable_before)));
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

#[cfg(test)]
mod tests {
    use warren_proto::ids::ReplicaId;

    use super::*;
    use crate::state::command::{
        Body, Caller, Command, Decision, LogTime, Observation, Observed, Phase, ReplicaRecord,
    };
    use crate::state::event::Position;
    use crate::state::level::Level;
    use crate::state::node::Condition;
    use crate::state::sandbox::SandboxSpec;
    use crate::state::settings::Isolation;
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn run(state: &mut State, body: Body) {
        let index = state.revision + 1;
        let command = Command { caller: Caller::system("test"), time: LogTime(index), body };
        state.apply(index, &command).expect("accepted");
    }

    fn turn(state: &mut State, to: Condition) {
        run(state, Body::SetNodeCondition { node: node("a"), incarnation: 1, to });
    }

    fn report(state: &mut State, phase: Phase) {
        let epoch = state.sandboxes[&name("s")].epoch;
        let observation =
            Observation { sandboxes: vec![Observed { sandbox: name("s"), epoch, phase }], templates: None };
        run(state, Body::Observe { node: node("a"), incarnation: 1, observation });
    }

    /// A node, and a sandbox that runs there.
    fn running(isolation: Isolation) -> State {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        state.set_members([ReplicaId(1)].into(), BTreeSet::new());
        let record = ReplicaRecord { api_address: "h:1".into(), token_key: [1; 32], disk: 7, max_level: Level::SECOND };
        run(&mut state, Body::PutReplica { replica: ReplicaId(1), record });
        run(&mut state, Body::SetLevel { level: Level::SECOND });
        let spec = SandboxSpec { isolation, ..spec(100, 100) }.into();
        let decision = Decision::Place(node("a").into());
        run(&mut state, Body::CreateSandbox { sandbox: name("s"), spec, decision, request: None });
        report(&mut state, Phase::Running);
        state
    }

    /// What a watch for these states says of everything that happened after `from`, and what state it then shows.
    fn said(state: &State, states: &[SandboxState], from: Position) -> Vec<(Seen, SandboxState)> {
        let filter = Filter { states: states.iter().copied().collect(), ..Filter::default() };
        let events = state.events.after(from, 99).unwrap();
        let seen = |event: &Event| Some((filter.see(event)?, convert::sandbox_of_event(event).state()));
        events.iter().filter_map(seen).collect()
    }

    #[test]
    fn a_filtered_watch_loses_nothing_while_a_node_goes_down_and_returns() {
        use SandboxState::{Running, Unreachable};
        let mut state = running(Isolation::Keep);
        let from = Position::end_of(state.revision);
        for to in [Condition::Suspect, Condition::Down, Condition::Ready] {
            turn(&mut state, to);
        }
        assert_eq!(said(&state, &[Unreachable], from), [(Seen::Appeared, Unreachable), (Seen::Disappeared, Running)]);
        assert_eq!(said(&state, &[Running], from), [(Seen::Disappeared, Unreachable), (Seen::Appeared, Running)]);
        assert_eq!(said(&state, &[], from), [(Seen::Changed, Unreachable), (Seen::Changed, Running)]);
        assert_eq!(said(&state, &[Running, Unreachable], from).len(), 2);
    }

    #[test]
    fn a_filtered_watch_is_told_when_a_sandbox_leaves_a_node_that_is_down() {
        use SandboxState::{Pending, Unreachable};
        let mut state = running(Isolation::Freeze);
        let from = Position::end_of(state.revision);
        turn(&mut state, Condition::Suspect);
        turn(&mut state, Condition::Down);
        let epoch = state.sandboxes[&name("s")].epoch;
        run(&mut state, Body::RequeueSandbox { sandbox: name("s"), epoch });
        assert_eq!(said(&state, &[Unreachable], from), [(Seen::Appeared, Unreachable), (Seen::Disappeared, Pending)]);
        assert_eq!(said(&state, &[Pending], from), [(Seen::Appeared, Pending)]);

        let mut state = running(Isolation::Keep);
        let from = Position::end_of(state.revision);
        turn(&mut state, Condition::Suspect);
        turn(&mut state, Condition::Down);
        let before = said(&state, &[Unreachable], from);
        run(&mut state, Body::ForgetNode { node: node("a") });
        let all = said(&state, &[Unreachable], from);
        assert_eq!(all[..1], before, "what has happened since does not change what was said");
        assert_eq!(all[1..], [(Seen::Disappeared, SandboxState::Lost)]);
    }
}
