//! Group commit: proposals that wait together become one log entry, and one sync serves them all.

use std::time::Duration;

use ::metrics::{counter, histogram};
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use prost::Message;
use tokio::sync::{Semaphore, mpsc, oneshot};
use warren_proto::v1 as pb;

use super::replica::{LeaderInfo, ProposeError};
use super::types::{Batch, Outcome, Raft, TypeConfig};
use crate::clock;
use crate::metrics::names;
use crate::state::command::Command;
use std::sync::Arc;

/// An entry closes at this size: the store is safe to 64 KiB (`docs/adr/0002-sled-guards.md`), and this leaves room.
pub(super) const MAX_BATCH_BYTES: usize = 48 * 1024;

/// An entry closes at this many commands, so that applying one never takes long.
pub(super) const MAX_BATCH_COMMANDS: usize = 256;

/// Proposals that wait for the batcher; more are refused at once. At 20,000/s this is most of a second.
pub(super) const QUEUE: usize = 16_384;

/// How much of the queue clients may fill. The rest is for nodes and the leader itself: what clients send must not keep a node from
/// registering, or the ledger's clock from going on.
pub(super) const QUEUE_OF_CLIENTS: usize = QUEUE / 4 * 3;

/// Entries under way: enough that the next is appended while the last is being synced and sent.
pub(super) const MAX_IN_FLIGHT: usize = 64;

/// After this a proposer is told that the outcome is unknown: a leader that was cut off does not learn it by itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) type Answer = Result<Outcome, ProposeError>;

/// A command, its size on disk, and who waits for it.
#[derive(Debug)]
pub(super) struct Proposal {
    pub command: Command,
    pub bytes: usize,
    pub answer: oneshot::Sender<Answer>,
}

/// Bytes that a command takes in an entry, its frame included.
pub(super) fn encoded_bytes(command: &Command) -> usize {
    /// Tag and length before each command.
    const FRAME: usize = 6;
    pb::StoredCommand::from(command).encoded_len() + FRAME
}

/// Runs until every sender is gone. `in_flight` has [`MAX_IN_FLIGHT`] permits.
pub(super) async fn run(raft: Raft, mut queue: mpsc::Receiver<Proposal>, in_flight: Arc<Semaphore>) {
    let mut held = None;
    loop {
        let first = match held.take() {
            Some(first) => first,
            None => match queue.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let Ok(permit) = in_flight.clone().acquire_owned().await else { return };
        let batch;
        (batch, held) = fill(first, &mut queue);
        counter!(names::PROPOSALS).increment(batch.len() as u64);
        let began = clock::monotonic();
        let waiting = submit(&raft, batch).await;
        tokio::spawn(async move {
            waiting.finish().await;
            histogram!(names::COMMIT_SECONDS).record(began.elapsed().as_secs_f64());
            drop(permit);
        });
    }
}

/// Takes what waits, up to the bounds; the one that no longer fits begins the next batch.
fn fill(first: Proposal, queue: &mut mpsc::Receiver<Proposal>) -> (Vec<Proposal>, Option<Proposal>) {
    let mut bytes = first.bytes;
    let mut batch = vec![first];
    while batch.len() < MAX_BATCH_COMMANDS {
        let Ok(next) = queue.try_recv() else { break };
        bytes = bytes.saturating_add(next.bytes);
        if bytes > MAX_BATCH_BYTES {
            return (batch, Some(next));
        }
        batch.push(next);
    }
    (batch, None)
}

type Written = <tokio::sync::oneshot::Receiver<ClientWriteResult<TypeConfig>> as Future>::Output;

/// An entry under way.
struct Submitted {
    written: Result<oneshot::Receiver<ClientWriteResult<TypeConfig>>, ProposeError>,
    answers: Vec<oneshot::Sender<Answer>>,
}

async fn submit(raft: &Raft, batch: Vec<Proposal>) -> Submitted {
    let (commands, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|p| (p.command, p.answer)).unzip();
    let (responder, receiver) = ProgressResponder::complete_only();
    let entry = Batch { commands: commands.into() };
    let written = match raft.client_write_ff(entry, Some(responder)).await {
        Ok(()) => Ok(receiver),
        Err(_fatal) => Err(ProposeError::Stopped),
    };
    Submitted { written, answers }
}

impl Submitted {
    async fn finish(self) {
        let result = match self.written {
            Ok(receiver) => match tokio::time::timeout(ANSWER_TIMEOUT, receiver).await {
                Ok(written) => outcomes(written),
                Err(_elapsed) => Err(ProposeError::OutcomeUnknown),
            },
            Err(error) => Err(error),
        };
        match result {
            Ok(outcomes) => {
                for (answer, outcome) in self.answers.into_iter().zip(outcomes) {
                    let _proposer_went_away = answer.send(Ok(outcome));
                }
            }
            Err(error) => {
                counter!(names::PROPOSALS_FAILED).increment(self.answers.len() as u64);
                for answer in self.answers {
                    let _proposer_went_away = answer.send(Err(error.clone()));
                }
            }
        }
    }
}

fn outcomes(written: Written) -> Result<Vec<Outcome>, ProposeError> {
    match written {
        Ok(Ok(response)) => Ok(response.data),
        Ok(Err(ClientWriteError::ForwardToLeader(forward))) => {
            Err(ProposeError::NotLeader { leader: LeaderInfo::new(forward.leader_id, forward.leader_node.as_ref()) })
        }
        // Its entry was discarded here, but may be committed elsewhere; or Raft stopped before it answered.
        Ok(Err(_)) | Err(_) => Err(ProposeError::OutcomeUnknown),
    }
}
