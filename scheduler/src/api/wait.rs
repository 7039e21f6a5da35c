//! Waits until a sandbox is in a state: follows committed state, so nothing is missed and nothing is asked twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use warren_proto::ids::SandboxName;
use warren_proto::v1::{SandboxState, WaitSandboxRequest, WaitSandboxResponse};

use super::{convert, status, validate};
use crate::controller::Controller;
use crate::state::State;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_TIMEOUT: Duration = Duration::from_secs(60 * 60);

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

    /// From `first` on, until the wait is over.
    pub async fn wait(&self, controller: &Controller, first: Arc<State>) -> Result<WaitSandboxResponse, Status> {
        if let Some(answer) = self.answer(&first, false)? {
            return Ok(answer);
        }
        let mut states = controller.replica().watch_state();
        let over = tokio::time::sleep(self.timeout);
        tokio::pin!(over);
        loop {
            let state = states.borrow_and_update().clone();
            // A state older than the first says nothing new.
            if state.revision >= first.revision
                && let Some(answer) = self.answer(&state, false)?
            {
                return Ok(answer);
            }
            tokio::select! {
                changed = states.changed() => changed.map_err(|_stopped| status::no_leader())?,
                () = controller.stopping() => return Err(status::no_leader()),
                () = &mut over => {
                    let state = states.borrow().clone();
                    return self.answer(&state, true)?.ok_or_else(status::no_leader);
                }
            }
        }
    }

    /// The answer, if the wait ends here: it is reached, cannot be reached any more, or the time is `over`.
    fn answer(&self, state: &State, over: bool) -> Result<Option<WaitSandboxResponse>, Status> {
        let sandbox = state.sandboxes.get(&self.name).ok_or_else(|| status::sandbox_not_found(&self.name))?;
        let shown = convert::sandbox_state(state, sandbox);
        let reached = self.states.contains(&shown);
        let ended = sandbox.life.ended().is_some();
        let ends = reached || ended || over;
        Ok(ends.then(|| WaitSandboxResponse { sandbox: Some(convert::sandbox(state, sandbox)), reached }))
    }
}
