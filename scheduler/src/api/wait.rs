//! Waits until a sandbox is in a state: follows committed state, so nothing is missed and nothing is asked twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use warren_proto::ids::SandboxName;
use warren_proto::v1::{SandboxState, WaitSandboxRequest, WaitSandboxResponse};

use super::shares::{Bounds, Shares};
use super::wakes::Wakes;
use super::{convert, status, validate};
use crate::controller::Controller;
use crate::state::State;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// Waits of this replica, and of one tenant: each costs a task, a timer and a stream, some KiB; together less than 100 MiB.
const WAITS: Bounds = Bounds { what: "waits", whole: 16_384, of_tenant: 4096 };

/// What is waited for.
pub(super) struct Wanted {
    name: SandboxName,
    states: BTreeSet<SandboxState>,
    timeout: Duration,
}

impl Wanted {
    pub fn parse(name: SandboxName, request: &WaitSandboxRequest) -> Result<Self, Status> {
        let mut states = validate::states(&request.states)?;
        if states.is_empty() {
            states.insert(SandboxState::Running);
        }
        let timeout = match request.timeout {
            None => DEFAULT_TIMEOUT,
            Some(wire) => Duration::from_millis(validate::millis("timeout", wire)?),
        };
        if timeout > MAX_TIMEOUT {
            return Err(status::invalid_field("timeout", "must be at most 1 hour"));
        }
        Ok(Self { name, states, timeout })
    }
}

/// The waits of one replica. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Waits {
    controller: Controller,
    shares: Shares,
    wakes: Wakes,
}

impl Waits {
    pub fn start(controller: Controller) -> Self {
        Self { wakes: Wakes::start(controller.clone()), shares: Shares::new(WAITS), controller }
    }

    /// From `first` on, until the wait is over. It looks again only when something happened to its sandbox.
    pub async fn wait(&self, wanted: &Wanted, first: Arc<State>) -> Result<WaitSandboxResponse, Status> {
        if let Some(answer) = self.answer(wanted, &first, false)? {
            return Ok(answer);
        }
        let _share = self.shares.take(Some(&wanted.name.tenant), 1)?;
        let sleeper = self.wakes.sleeper(&wanted.name);
        let states = self.controller.replica().watch_state();
        let over = tokio::time::sleep(wanted.timeout);
        tokio::pin!(over);
        loop {
            let woken = sleeper.bell.notified();
            tokio::pin!(woken);
            // Before it looks: what happens from now on rings the bell.
            woken.as_mut().enable();
            let state = states.borrow().clone();
            if let Some(answer) = self.answer(wanted, &state, false)? {
                return Ok(answer);
            }
            tokio::select! {
                () = woken => if states.has_changed().is_err() { return Err(status::no_leader()) },
                () = self.controller.stopping() => return Err(status::no_leader()),
                () = &mut over => {
                    let state = states.borrow().clone();
                    return self.answer(wanted, &state, true)?.ok_or_else(status::no_leader);
                }
            }
        }
    }

    /// The answer, if the wait ends here: it is reached, cannot be reached any more, or the time is `over`.
    fn answer(&self, wanted: &Wanted, state: &State, over: bool) -> Result<Option<WaitSandboxResponse>, Status> {
        let sandbox = state.sandboxes.get(&wanted.name).ok_or_else(|| status::sandbox_not_found(&wanted.name))?;
        let shown = convert::sandbox_state(state, sandbox);
        let reached = wanted.states.contains(&shown);
        let ended = sandbox.life.ended().is_some();
        let ends = reached || ended || over;
        let shown = || convert::sandbox_in_full(state, sandbox, self.controller.log_now(state));
        Ok(ends.then(|| WaitSandboxResponse { sandbox: Some(shown()), reached }))
    }
}
