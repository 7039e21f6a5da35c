//! The way into the log for commands, on the leader.

use tokio::sync::{mpsc, oneshot, watch};

use super::batcher::{MAX_BATCH_BYTES, Proposal, encoded_bytes};
use super::replica::{Leadership, ProposeError};
use super::types::Outcome;
use crate::state::command::Command;

/// Clones share the queue.
#[derive(Debug, Clone)]
pub(super) struct Proposer {
    pub leadership: watch::Receiver<Leadership>,
    pub proposals: mpsc::Sender<Proposal>,
}

impl Proposer {
    /// Commits a command; the answer is what `apply` made of it. Goes on when the caller goes away.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        if let Leadership::Follower { leader } = &*self.leadership.borrow() {
            return Err(ProposeError::NotLeader { leader: leader.clone() });
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
