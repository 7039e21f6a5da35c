//! Wakes those who wait for a sandbox, and nobody else, when something happened to it.
//!
//! One task follows committed state and reads what is new in the ring of events. A thousand waits for a thousand sandboxes cost a
//! look-up an event, not a thousand looks a publication.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use warren_proto::ids::SandboxName;

use crate::controller::Controller;
use crate::state::State;
use crate::state::event::Position;

/// Events that are read from the ring at a time.
const READ_AT_ONCE: usize = 1024;

type Sleepers = Arc<Mutex<BTreeMap<SandboxName, Waited>>>;

/// A sandbox that somebody waits for.
#[derive(Debug, Default)]
struct Waited {
    bell: Arc<Notify>,
    sleepers: usize,
}

/// Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Wakes(Sleepers);

/// Somebody who waits for a sandbox, until it is dropped.
#[derive(Debug)]
pub struct Sleeper {
    all: Sleepers,
    name: SandboxName,
    pub bell: Arc<Notify>,
}

impl Wakes {
    /// Starts the task; it ends with the replica.
    pub fn start(controller: Controller) -> Self {
        let wakes = Self::default();
        tokio::spawn(wakes.clone().follow(controller));
        wakes
    }

    /// The bell rings for everything that is published after this call and changed the sandbox.
    pub fn sleeper(&self, name: &SandboxName) -> Sleeper {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = all.entry(name.clone()).or_default();
        waited.sleepers = waited.sleepers.saturating_add(1);
        Sleeper { all: self.0.clone(), name: name.clone(), bell: waited.bell.clone() }
    }

    async fn follow(self, controller: Controller) {
        let mut states = controller.replica().watch_state();
        let mut position = Position::end_of(states.borrow_and_update().revision);
        loop {
            tokio::select! {
                changed = states.changed() => if changed.is_err() { break },
                () = controller.stopping() => break,
            }
            let state = states.borrow_and_update().clone();
            self.tell(&state, &mut position);
        }
        self.wake_all();
    }

    /// Wakes whoever waits for what happened after `position`, which moves on.
    fn tell(&self, state: &State, position: &mut Position) {
        // Who comes meanwhile sees this state before sleeping.
        if !self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            loop {
                // What is no longer known may have been about anybody.
                let Ok(events) = state.events.after(*position, READ_AT_ONCE) else {
                    self.wake_all();
                    break;
                };
                let Some(last) = events.last() else { break };
                *position = last.position;
                let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                events.iter().filter_map(|event| all.get(&event.sandbox.name)).for_each(|w| w.bell.notify_waiters());
            }
        }
        *position = Position::end_of(state.revision);
    }

    fn wake_all(&self) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.values().for_each(|waited| waited.bell.notify_waiters());
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(waited) = all.get_mut(&self.name) else { return };
        waited.sleepers = waited.sleepers.saturating_sub(1);
        if waited.sleepers == 0 {
            all.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::state::command::{Body, Caller, Command, Decision, LogTime};
    use crate::state::event::EventRing;
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn create(state: &mut State, id: &str) {
        let decision = Decision::Place(node("a").into());
        let body = Body::CreateSandbox { sandbox: name(id), spec: spec(1, 1).into(), decision, request: None };
        let index = state.revision + 1;
        state.apply(index, &Command { caller: Caller::system("test"), time: LogTime(1), body }).unwrap();
    }

    #[test]
    fn only_those_are_woken_whose_sandbox_changed_or_may_have() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        let wakes = Wakes::default();
        let mut position = Position::end_of(state.revision);
        create(&mut state, "before");
        wakes.tell(&state, &mut position);
        let (own, other, before) =
            (wakes.sleeper(&name("own")), wakes.sleeper(&name("x")), wakes.sleeper(&name("before")));
        let (mut woken, mut not, mut past) =
            (Box::pin(own.bell.notified()), Box::pin(other.bell.notified()), Box::pin(before.bell.notified()));
        assert!(woken.as_mut().now_or_never().is_none() && not.as_mut().now_or_never().is_none());
        assert!(past.as_mut().now_or_never().is_none());
        create(&mut state, "own");
        wakes.tell(&state, &mut position);
        assert!(woken.as_mut().now_or_never().is_some(), "its sandbox was created");
        assert!(not.as_mut().now_or_never().is_none(), "nothing happened to its own");
        assert!(past.as_mut().now_or_never().is_none(), "that was seen before");
        state.revision += 1;
        state.events = EventRing::starting_after(state.revision);
        wakes.tell(&state, &mut position);
        assert!(not.as_mut().now_or_never().is_some(), "a checkpoint was installed: anything may have happened");
        drop((woken, not, past));
        drop((own, other, before));
        assert!(wakes.0.lock().unwrap().is_empty(), "nothing is left of those who went");
    }
}
