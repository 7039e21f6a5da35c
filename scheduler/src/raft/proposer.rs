//! The way into the log for commands, on the leader.

use tokio::sync::{mpsc, oneshot, watch};

use super::batcher::{MAX_BATCH_BYTES, Proposal, QUEUE_OF_CLIENTS, encoded_bytes};
use super::replica::{Leadership, ProposeError};
use super::types::Outcome;
use crate::state::command::{Command, Role};

/// Clones share the queue.
#[derive(Debug, Clone)]
pub(super) struct Proposer {
    pub leadership: watch::Receiver<Leadership>,
    pub proposals: mpsc::Sender<Proposal>,
}

impl Proposer {
    /// Commands that wait to be put into an entry.
    pub fn waiting(&self) -> usize {
        self.proposals.max_capacity().saturating_sub(self.proposals.capacity())
    }

    /// Commits a command; the answer is what `apply` made of it. Goes on when the caller goes away.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        if let Leadership::Follower { leader } = &*self.leadership.borrow() {
            return Err(ProposeError::NotLeader { leader: leader.clone() });
        }
        let of_client = matches!(command.caller.role, Role::Operator | Role::Tenant);
        if of_client && self.waiting() >= QUEUE_OF_CLIENTS {
            return Err(ProposeError::Overloaded);
        }
        let bytes = encoded_bytes(&command);
        if bytes > MAX_BATCH_BYTES {
            return Err(ProposeError::TooLarge { bytes, limit: MAX_BATCH_BYTES });
        }
        let (answer, wait) = oneshot::channel();
        let queued = self.proposals.try_send(Proposal { command, bytes, answer });
        queued.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ProposeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ProposeError::Stopped,
        })?;
        wait.await.unwrap_or(Err(ProposeError::OutcomeUnknown))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::super::batcher::QUEUE;
    use super::*;
    use crate::state::command::{Body, Caller, LogTime};

    fn command(role: Role) -> Command {
        let caller = Caller { principal: "somebody".into(), role, tenant: None };
        Command { caller, time: LogTime(1), body: Body::ReleaseBrake }
    }

    /// No batcher runs here: whatever is proposed waits.
    #[test]
    fn clients_are_refused_while_nodes_and_the_leader_still_pass() {
        let (proposals, _queue) = mpsc::channel(QUEUE);
        let (_leading, leadership) = watch::channel(Leadership::Leader { term: 1 });
        let proposer = Proposer { leadership, proposals };
        let propose = |role| proposer.propose(command(role)).now_or_never();
        for _ in 0..QUEUE_OF_CLIENTS {
            assert!(propose(Role::Tenant).is_none(), "it waits");
        }
        for role in [Role::Tenant, Role::Operator] {
            assert_eq!(propose(role), Some(Err(ProposeError::Overloaded)));
        }
        for n in QUEUE_OF_CLIENTS..QUEUE {
            assert!(propose(if n % 2 == 0 { Role::System } else { Role::Node }).is_none(), "it waits");
        }
        assert_eq!(propose(Role::System), Some(Err(ProposeError::Overloaded)), "this is bounded too");
    }
}
