//! Places waiting sandboxes; says anew why, where the reason changed.
//!
//! Tenants take turns: in each round every tenant's next sandbox is looked at, those of the round in the order of priority and
//! age. A sandbox that fits nowhere does not hold up others.

use std::collections::BTreeMap;

use warren_proto::ids::SandboxName;
use warren_proto::units::Resources;

use super::{MAX_COMMANDS, Planned};
use crate::placement::filter::Misfit;
use crate::placement::view::{Reservation, View};
use crate::placement::{Request, Unplaceable, place};
use crate::state::State;
use crate::state::command::{Body, LogTime};
use crate::state::sandbox::{Life, PendingCode, PendingReason, Sandbox};

/// Most waiting sandboxes that one pass looks at. Those of a shape that fitted nowhere cost a map look-up.
const MAX_LOOKED_AT: usize = 20_000;

/// Shape of a request: what decides whether it fits, but for where it was before.
type Shape = (u64, u64, u64, u64, bool);

/// What a pass planned, and the room that it holds for that until the commands have been applied or rejected.
#[derive(Debug, Default)]
pub struct Placements {
    pub commands: Vec<Planned>,
    pub reserved: Vec<Reservation>,
}

/// Plans placements and reserves them in `view`, so that one pass does not give the same room twice.
pub fn plan(state: &State, view: &mut View, now: LogTime) -> Placements {
    let mut planned = Placements::default();
    let mut hopeless: BTreeMap<Shape, Unplaceable> = BTreeMap::new();
    for name in in_turns(state).take(MAX_LOOKED_AT) {
        if planned.commands.len() >= MAX_COMMANDS {
            break;
        }
        let Some(sandbox) = state.sandboxes.get(name) else { continue };
        let Life::Pending { reason, not_before, .. } = &sandbox.life else { continue };
        if *not_before > now {
            continue;
        }
        let decision = match () {
            () if state.region.pauses.placement => Err(paused()),
            () => decide(state, view, sandbox, &mut hopeless),
        };
        match decision {
            Ok(node) => {
                planned.reserved.push(view.reserve(&node, sandbox.spec.resources));
                planned.commands.push(Body::PlaceSandbox { sandbox: name.clone(), epoch: sandbox.epoch, node });
            }
            Err(why) => planned.commands.extend(explain(sandbox, reason, why)),
        }
    }
    planned
}

/// Every waiting sandbox: the first of each tenant's queue, then the second of each, and so on.
fn in_turns(state: &State) -> impl Iterator<Item = &SandboxName> {
    let mut queues: Vec<_> = state.indexes.queues.values().map(|queue| queue.iter()).collect();
    let mut round = Vec::new();
    std::iter::from_fn(move || {
        if round.is_empty() {
            round = queues.iter_mut().filter_map(|queue| queue.next()).collect::<Vec<_>>();
            round.sort_unstable_by(|a, b| b.cmp(a));
        }
        round.pop().map(|(_, _, name)| name)
    })
}

fn decide(
    state: &State,
    view: &View,
    sandbox: &Sandbox,
    hopeless: &mut BTreeMap<Shape, Unplaceable>,
) -> Result<warren_proto::ids::NodeId, PendingReason> {
    let request = Request::of(state, sandbox);
    let shape = shape(sandbox.spec.resources, request.needs_fence);
    if let Some(known) = hopeless.get(&shape) {
        return Err(known.reason());
    }
    place(view, &request).map_err(|unplaceable| {
        let reason = unplaceable.reason();
        // What only an old instance is in the way of, another sandbox of the same shape need not wait for.
        if !unplaceable.misfits.contains_key(&Misfit::HoldsOld) {
            hopeless.insert(shape, unplaceable);
        }
        reason
    })
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

    use warren_proto::ids::Epoch;

    use super::*;
    use crate::state::command::{Caller, Command, Decision, Observation, Observed, Phase};
    use crate::state::invariants;
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn create(state: &mut State, id: &str, memory: u64) {
        let reason = PendingReason { code: PendingCode::Conflict, message: String::new() };
        let body = Body::CreateSandbox {
            sandbox: name(id),
            spec: spec(100, memory).into(),
            decision: Decision::Queue(reason),
            request: None,
        };
        apply(state, body);
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
        plan(state, &mut view, state.log_time).commands
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
