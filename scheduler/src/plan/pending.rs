//! Places waiting sandboxes; says anew why, where the reason changed.
//!
//! Tenants take turns by what they hold (`shares`), each with its own in the order of priority and age. A sandbox
//! that fits nowhere does not hold up others. A pass is bounded: it looks at the first of the queues, and then goes on where the
//! pass before stopped, so that each waiting sandbox is looked at in the end, however many before it fit nowhere.

use std::collections::BTreeMap;

use warren_proto::ids::TenantId;
use warren_proto::units::Resources;

use super::shares::{Look, Rank, Shares, Turns};
use super::{MAX_COMMANDS, Planned};
use crate::placement::filter::Misfit;
use crate::placement::view::{Reservation, View};
use crate::placement::{Request, Unplaceable, place};
use crate::state::State;
use crate::state::command::{Body, LogTime, Spot};
use crate::state::sandbox::{Life, PendingCode, PendingReason, Sandbox};

/// Most waiting sandboxes that one pass looks at. Those of a shape that fitted nowhere cost a map look-up.
const MAX_LOOKED_AT: usize = 20_000;

/// How many of these are the first of the queues: more than the commands of a pass, so that what is freed goes by rank.
const MAX_FIRST: usize = 1_000;

/// Most searches for a node in one pass, of shapes that differ: the view is locked meanwhile, and creates wait.
const MAX_SEARCHES: usize = 256;

/// Shape of a request: what decides whether it fits, but for where it was before.
type Shape = (u64, u64, u64, u64, bool);

/// What a pass planned, and the room that it holds for that until the commands have been applied or rejected.
#[derive(Debug, Default)]
pub struct Placements {
    pub commands: Vec<Planned>,
    pub reserved: Vec<Reservation>,
    /// Not all of the queues were looked at: another pass is to follow, also where nothing changes.
    pub more: bool,
}

/// How far each tenant's queue has been looked at. In the leader's memory alone: without it, a pass begins at the beginning.
#[derive(Debug, Clone, Default)]
pub struct Cursor(BTreeMap<TenantId, Rank>);

/// Plans placements and reserves them in `view`, so that one pass does not give the same room twice.
pub fn plan(state: &State, view: &mut View, now: LogTime, cursor: &mut Cursor) -> Placements {
    if state.indexes.queues.is_empty() {
        cursor.0.clear();
        return Placements::default();
    }
    let mut pass = Pass { state, now, planned: Placements::default(), hopeless: BTreeMap::new(), searches: 0 };
    let mut shares = Shares::new(state);
    let mut first = Cursor::default();
    let mut turns = Turns::new(state, &first.0, &shares);
    pass.look_through(view, &mut shares, &mut turns, &mut first, MAX_FIRST, MAX_SEARCHES / 2);
    // Nothing is looked at twice in a pass: a cursor stands behind the first of its queue.
    for (tenant, rank) in first.0 {
        let at = cursor.0.entry(tenant).or_insert_with(|| rank.clone());
        *at = rank.max(at.clone());
    }
    let mut rest = Turns::new(state, &cursor.0, &shares);
    pass.look_through(view, &mut shares, &mut rest, cursor, MAX_LOOKED_AT - MAX_FIRST, MAX_SEARCHES);
    pass.planned.more = !rest.is_over();
    if !pass.planned.more {
        cursor.0.clear();
    }
    pass.planned
}

/// One pass under way.
struct Pass<'a> {
    state: &'a State,
    now: LogTime,
    planned: Placements,
    hopeless: BTreeMap<Shape, Unplaceable>,
    searches: usize,
}

impl Pass<'_> {
    fn is_full(&self, searches: usize) -> bool {
        self.planned.commands.len() >= MAX_COMMANDS || self.searches >= searches
    }

    /// Looks at the next in turn, at most `limit`, and until so many searches have been made; `cursor` says how far.
    fn look_through(
        &mut self,
        view: &mut View,
        shares: &mut Shares<'_>,
        turns: &mut Turns<'_>,
        cursor: &mut Cursor,
        limit: usize,
        searches: usize,
    ) {
        for _ in 0..limit {
            if self.is_full(searches) {
                return;
            }
            let more = turns.next(shares, |shares, rank| {
                cursor.0.insert(rank.2.tenant.clone(), rank.clone());
                self.look_at(view, shares, rank)
            });
            if !more {
                return;
            }
        }
    }

    fn look_at(&mut self, view: &mut View, shares: &mut Shares<'_>, (_, _, name): &Rank) -> Look {
        let Some(sandbox) = self.state.sandboxes.get(name) else { return Look::default() };
        let Life::Pending { reason, not_before, .. } = &sandbox.life else { return Look::default() };
        if *not_before > self.now {
            return Look::default();
        }
        let searches = self.searches;
        let decision = match () {
            () if self.state.region.pauses.placement => Err(paused()),
            () => self.decide(view, sandbox),
        };
        match decision {
            Ok(spot) => {
                self.planned.reserved.push(view.reserve(&spot, sandbox.spec.resources));
                self.planned.commands.push(Body::PlaceSandbox { sandbox: name.clone(), epoch: sandbox.epoch, spot });
                shares.planned(&name.tenant, sandbox.spec.resources);
                Look { placed: true, searched: true }
            }
            Err(why) => {
                self.planned.commands.extend(explain(sandbox, reason, why));
                Look { placed: false, searched: self.searches > searches }
            }
        }
    }

    fn decide(&mut self, view: &View, sandbox: &Sandbox) -> Result<Spot, PendingReason> {
        let request = Request::of(self.state, sandbox);
        let shape = shape(sandbox.spec.resources, request.needs_fence);
        if let Some(known) = self.hopeless.get(&shape) {
            return Err(known.reason());
        }
        self.searches += 1;
        place(view, &request).map_err(|unplaceable| {
            let reason = unplaceable.reason();
            // What only an old instance is in the way of, another sandbox of the same shape need not wait for.
            if !unplaceable.misfits.contains_key(&Misfit::HoldsOld) {
                self.hopeless.insert(shape, unplaceable);
            }
            reason
        })
    }
}

fn paused() -> PendingReason {
    PendingReason { code: PendingCode::Paused, message: "placement is paused in this region".to_owned() }
}

fn shape(resources: Resources, needs_fence: bool) -> Shape {
    (resources.cpu.0, resources.memory.0, resources.disk.0, resources.gpus.0, needs_fence)
}

/// Only a change of code is worth a log entry: the figures in the text go out of date with every placement.
fn explain(sandbox: &Sandbox, old: &PendingReason, reason: PendingReason) -> Option<Planned> {
    (reason.code != old.code).then(|| Body::ExplainPending {
        sandbox: sandbox.name.clone(),
        epoch: sandbox.epoch,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use warren_proto::ids::{Epoch, ReplicaId, SandboxName};

    use super::*;
    use crate::state::command::{Caller, Command, Decision, Observation, Observed, Phase, ReplicaRecord};
    use crate::state::invariants;
    use crate::state::level::Level;
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn create(state: &mut State, id: &str, memory: u64) {
        create_of(state, "t", id, memory, 0);
    }

    fn create_of(state: &mut State, tenant: &str, id: &str, memory: u64, priority: u8) {
        let reason = PendingReason { code: PendingCode::Conflict, message: String::new() };
        let sandbox = SandboxName::parse(&format!("tenants/{tenant}/sandboxes/{id}")).unwrap();
        let mut spec = spec(100, memory);
        spec.settings.priority = priority;
        apply(
            state,
            Body::CreateSandbox { sandbox, spec: spec.into(), decision: Decision::Queue(reason), request: None },
        );
    }

    /// How many sandboxes of a tenant are placed.
    fn placed(state: &State, tenant: &str) -> usize {
        state.sandboxes.values().filter(|s| s.name.tenant.as_str() == tenant && s.life.node().is_some()).count()
    }

    fn end_one_of(state: &mut State, tenant: &str) {
        let held = state.sandboxes.values().find(|s| s.name.tenant.as_str() == tenant && s.life.node().is_some());
        let held = held.cloned().unwrap();
        apply(state, Body::DeleteSandbox { sandbox: held.name.clone(), request: None });
        let gone = Observed { sandbox: held.name.clone(), epoch: held.epoch, phase: Phase::Removed };
        let observation = Observation { sandboxes: vec![gone], templates: None };
        apply(state, Body::Observe { node: node("a"), incarnation: 1, observation });
    }

    fn settle(state: &mut State) {
        for body in pass(state) {
            apply(state, body);
        }
    }

    /// At the level of the newest rules.
    fn at_newest_level(state: &mut State) {
        let voters: BTreeSet<ReplicaId> = [ReplicaId(1)].into();
        state.set_members(voters, BTreeSet::new());
        let record = ReplicaRecord { api_address: String::new(), token_key: [0; 32], disk: 1, max_level: Level::MAX };
        apply(state, Body::PutReplica { replica: ReplicaId(1), record });
        apply(state, Body::SetLevel { level: Level::SECOND });
    }

    /// Room for ten. One tenant has all of it, and a backlog that is older and of the highest priority; slots come free one by one.
    #[test]
    fn a_tenant_with_an_old_backlog_of_high_priority_does_not_starve_another() {
        let mut state = with_node_and_template("a", resources(10_000, 1000));
        at_newest_level(&mut state);
        for n in 0..60 {
            create_of(&mut state, "greedy", &format!("g{n:03}"), 100, 100);
        }
        settle(&mut state);
        assert_eq!(placed(&state, "greedy"), 10);
        for n in 0..20 {
            create_of(&mut state, "modest", &format!("m{n:03}"), 100, 0);
        }
        for _ in 0..5 {
            end_one_of(&mut state, "greedy");
            settle(&mut state);
        }
        assert_eq!(
            (placed(&state, "greedy"), placed(&state, "modest")),
            (5, 5),
            "what comes free goes to who has less"
        );
        for n in 0..10 {
            end_one_of(&mut state, if n % 2 == 0 { "greedy" } else { "modest" });
            settle(&mut state);
            let both = (placed(&state, "greedy"), placed(&state, "modest"));
            assert_eq!(both, (5, 5), "and neither takes more than its half");
        }
    }

    #[test]
    fn what_a_pass_plans_counts_at_once_and_one_that_is_too_large_costs_a_tenant_no_turn() {
        let mut state = with_node_and_template("a", resources(10_000, 1000));
        at_newest_level(&mut state);
        create_of(&mut state, "c", "held", 200, 0);
        settle(&mut state);
        create_of(&mut state, "b", "large", 900, 100);
        for n in 0..20 {
            create_of(&mut state, "c", &format!("c{n:02}"), 100, 100);
            create_of(&mut state, "b", &format!("b{n:02}"), 100, 0);
        }
        settle(&mut state);
        let memory = |tenant: &str| state.tenants[&TenantId::parse(tenant).unwrap()].holds().memory.0;
        assert_eq!((memory("b"), memory("c")), (500, 500));
    }

    fn apply(state: &mut State, body: Body) {
        let index = state.revision + 1;
        let command = Command { caller: Caller::system("test"), time: LogTime(index), body };
        state.apply(index, &command).expect("accepted");
        assert_eq!(invariants::check(state), Vec::<String>::new());
    }

    fn pass(state: &State) -> Vec<Planned> {
        let mut view = View::default();
        view.sync(state);
        plan(state, &mut view, state.log_time, &mut Cursor::default()).commands
    }

    /// Each of them has a shape of its own, so each costs a search; the one that fits stands behind them all.
    #[test]
    fn what_fits_is_found_behind_any_number_that_do_not() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        let hopeless = MAX_SEARCHES * 3;
        for n in 0..hopeless {
            create(&mut state, &format!("huge-{n:05}"), 5000 + n as u64);
        }
        create(&mut state, "small", 400);
        let (mut view, mut cursor) = (View::default(), Cursor::default());
        let mut found = false;
        for _ in 0..20 {
            view.sync(&state);
            let placements = plan(&state, &mut view, state.log_time, &mut cursor);
            found |= placements.commands.iter().any(|body| matches!(body, Body::PlaceSandbox { .. }));
            placements.reserved.iter().for_each(|reservation| view.release(reservation));
            if !placements.more {
                break;
            }
        }
        assert!(found, "it waits behind those that fit nowhere");
        assert!(cursor.0.is_empty(), "all of them were looked at, and the next pass begins anew");
    }

    #[test]
    fn one_pass_gives_no_room_twice_and_a_large_one_holds_up_nobody() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        create(&mut state, "huge", 5000);
        for id in ["one", "two", "three"] {
            create(&mut state, id, 400);
        }
        for body in pass(&state) {
            apply(&mut state, body);
        }
        let kinds: Vec<_> = state.sandboxes.values().map(|s| (s.name.id.as_str(), s.life.kind())).collect();
        assert_eq!(
            kinds,
            [("huge", "PENDING"), ("one", "STARTING"), ("three", "PENDING"), ("two", "STARTING")],
            "oldest first; creation time is the same here, so by name"
        );
    }

    #[test]
    fn a_reason_that_did_not_change_is_not_proposed_again() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        create(&mut state, "huge", 5000);
        let planned = pass(&state);
        assert!(matches!(&planned[..], [Body::ExplainPending { reason, .. }] if reason.code == PendingCode::TooLarge));
        for body in planned {
            apply(&mut state, body);
        }
        assert_eq!(pass(&state), vec![]);
    }

    #[test]
    fn a_node_with_another_instance_of_the_name_is_not_tried_again_and_again() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        let orphan = Observed { sandbox: name("one"), epoch: Epoch(7), phase: Phase::Orphan };
        let observation = Observation { sandboxes: vec![orphan], templates: Some(BTreeSet::new()) };
        apply(&mut state, Body::Observe { node: node("a"), incarnation: 1, observation });
        create(&mut state, "one", 400);
        create(&mut state, "two", 400);
        let planned = pass(&state);
        let placed: Vec<_> = planned
            .iter()
            .filter_map(|body| match body {
                Body::PlaceSandbox { sandbox, .. } => Some(sandbox.id.as_str()),
                _ => None,
            })
            .collect();
        assert_eq!(placed, ["two"], "and one of the same shape does not wait for it");
    }
}
