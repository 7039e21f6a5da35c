//! Places waiting sandboxes, oldest first; says anew why, where the reason changed.
//!
//! A sandbox that fits nowhere does not hold up younger ones.

use std::collections::BTreeMap;

use warren_proto::units::Resources;

use super::{MAX_COMMANDS, Planned};
use crate::placement::view::View;
use crate::placement::{Request, Unplaceable, place};
use crate::state::State;
use crate::state::command::Body;
use crate::state::sandbox::{Life, PendingReason, Sandbox};

/// Most waiting sandboxes that one pass looks at. Those of a shape that fitted nowhere cost a map look-up.
const MAX_LOOKED_AT: usize = 20_000;

/// Plans placements and reserves them in `view`, so that one pass does not give the same room twice. The caller releases
/// them when the commands have been applied or rejected.
pub fn plan(state: &State, view: &mut View) -> Vec<Planned> {
    let mut commands = Vec::new();
    let mut hopeless: BTreeMap<(u64, u64, u64), Unplaceable> = BTreeMap::new();
    for (_, name) in state.pending.iter().take(MAX_LOOKED_AT) {
        if commands.len() >= MAX_COMMANDS {
            break;
        }
        let Some(sandbox) = state.sandboxes.get(name) else { continue };
        let Life::Pending { reason, .. } = &sandbox.life else { continue };
        let wanted = sandbox.spec.resources;
        let decision = match hopeless.get(&shape(wanted)) {
            Some(known) => Err(known.clone()),
            None => place(view, &request(state, sandbox)),
        };
        match decision {
            Ok(node) => {
                view.reserve(&node, wanted);
                commands.push(Body::PlaceSandbox { sandbox: name.clone(), epoch: sandbox.epoch, node });
            }
            Err(unplaceable) => {
                commands.extend(explain(sandbox, reason, &unplaceable));
                hopeless.insert(shape(wanted), unplaceable);
            }
        }
    }
    commands
}

fn shape(resources: Resources) -> (u64, u64, u64) {
    (resources.cpu.0, resources.memory.0, resources.disk.0)
}

/// What a sandbox asks of placement.
pub fn request(state: &State, sandbox: &Sandbox) -> Request {
    Request {
        resources: sandbox.spec.resources,
        template: state.templates.get(&sandbox.spec.template).map(|template| template.spec.digest),
        avoid: sandbox.avoid.clone(),
    }
}

/// Only a change of code is worth a log entry: the figures in the text go out of date with every placement.
fn explain(sandbox: &Sandbox, old: &PendingReason, unplaceable: &Unplaceable) -> Option<Planned> {
    let reason = unplaceable.reason();
    (reason.code != old.code).then(|| Body::ExplainPending {
        sandbox: sandbox.name.clone(),
        epoch: sandbox.epoch,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{Caller, Command, Decision, LogTime};
    use crate::state::invariants;
    use crate::state::sandbox::PendingCode;
    use crate::state::testing::{name, resources, spec, with_node_and_template};

    fn create(state: &mut State, id: &str, memory: u64) {
        let reason = PendingReason { code: PendingCode::Conflict, message: String::new() };
        let body = Body::CreateSandbox {
            sandbox: name(id),
            spec: spec(100, memory),
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
        view.sync(&state.nodes);
        plan(state, &mut view)
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
}
