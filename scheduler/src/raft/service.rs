//! What other replicas ask of this one: the server side of `network`.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest, VoteResponse};
use openraft::storage::Snapshot;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::ids::ReplicaId;
use warren_proto::v1 as pb;
use warren_proto::v1::append_entries_response::Result as WireResult;
use warren_proto::v1::install_checkpoint_request::Message as InstallMessage;
use warren_proto::v1::raft_service_server::RaftService;

use super::checkpoint::{self, CheckpointDirectory, CheckpointFile, Temporary};
use super::codec::command::{disk_to, put_replica};
use super::codec::log::{entry_from, log_id_to, membership_from, vote_to};
use super::identity::Identity;
use super::network::{answer, check_disk, log_id_of, vote_required};
use super::proposer::Proposer;
use super::types::{CheckpointMeta, Raft, TypeConfig};
use crate::clock;
use crate::disk::DiskUse;
use crate::state::State;
use crate::state::command::{Body, Caller, Command};

/// Serves `RaftService` for one replica.
pub(super) struct RaftApi {
    pub raft: Raft,
    pub checkpoints: CheckpointDirectory,
    pub identity: Identity,
    pub states: watch::Receiver<Arc<State>>,
    pub proposer: Proposer,
    /// Set once this replica knows.
    pub disk: Arc<OnceLock<DiskUse>>,
}

impl RaftApi {
    /// 0: it does not know.
    fn disk_used_percent(&self) -> u32 {
        self.disk.get().map_or(0, |disk| u32::try_from(disk.percent()).unwrap_or(u32::MAX))
    }

    /// Refuses a candidate whose disk is not the one that the ledger knows.
    fn check_candidate<T>(&self, request: &Request<T>, vote: Option<&pb::StoredVote>) -> Result<(), Status> {
        let candidate = ReplicaId(vote.map_or(0, |vote| vote.voted_for));
        check_disk(&self.states.borrow(), candidate, request.metadata())
    }
}

/// A peer sent what cannot be read.
fn malformed(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

/// This replica cannot go on; its log says why.
fn failed(error: impl ToString) -> Status {
    Status::internal(error.to_string())
}

fn vote_request(from: Option<&pb::VoteRequest>) -> Result<VoteRequest<TypeConfig>, Status> {
    let from = from.ok_or_else(|| malformed("no vote"))?;
    Ok(VoteRequest {
        vote: vote_required(from.vote.as_ref()).map_err(malformed)?,
        last_log_id: log_id_of(from.last_log_id.as_ref()),
        leadership_transfer: from.leadership_transfer,
    })
}

fn vote_response(from: &VoteResponse<TypeConfig>) -> pb::VoteResponse {
    pb::VoteResponse {
        vote: Some(vote_to(&from.vote)),
        granted: from.vote_granted,
        last_log_id: from.last_log_id.as_ref().map(log_id_to),
    }
}

#[tonic::async_trait]
impl RaftService for RaftApi {
    async fn announce(&self, request: Request<pb::AnnounceRequest>) -> Result<Response<pb::AnnounceResponse>, Status> {
        let replica = request.into_inner().replica.ok_or_else(|| malformed("`replica` is missing"))?;
        let record = put_replica(&replica).map_err(malformed)?;
        let (id, state) = (ReplicaId(replica.replica_id), self.states.borrow().clone());
        if !state.voters.contains(&id) && !state.learners.contains(&id) {
            return Err(Status::failed_precondition(format!("replica {id} is not in the group")));
        }
        let body = Body::PutReplica { replica: id, record };
        let command = Command { caller: Caller::system(&format!("replica {id}")), time: state.log_time, body };
        match self.proposer.propose(command).await {
            Ok(Ok(_)) => Ok(Response::new(pb::AnnounceResponse {})),
            Ok(Err(rejected)) => Err(Status::failed_precondition(rejected.to_string())),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn read_clock(
        &self,
        _request: Request<pb::ReadClockRequest>,
    ) -> Result<Response<pb::ReadClockResponse>, Status> {
        Ok(Response::new(pb::ReadClockResponse {
            time_ms: clock::log_time().0,
            disk_used_percent: self.disk_used_percent(),
        }))
    }

    async fn identify(&self, request: Request<pb::IdentifyRequest>) -> Result<Response<pb::IdentifyResponse>, Status> {
        let state = self.states.borrow().clone();
        let known = state.replicas.get(&ReplicaId(request.into_inner().replica_id));
        Ok(Response::new(pb::IdentifyResponse {
            ledger_id: state.ledger_id.map(|id| id.0.to_be_bytes().to_vec()).unwrap_or_default(),
            disk_id: known.map(|record| disk_to(record.disk)).unwrap_or_default(),
        }))
    }

    async fn append_entries(
        &self,
        request: Request<pb::AppendEntriesRequest>,
    ) -> Result<Response<pb::AppendEntriesResponse>, Status> {
        let request = request.into_inner();
        let entries = request.entries.into_iter().map(entry_from).collect::<Result<Vec<_>, _>>().map_err(malformed)?;
        let rpc = AppendEntriesRequest {
            vote: vote_required(request.vote.as_ref()).map_err(malformed)?,
            prev_log_id: log_id_of(request.previous.as_ref()),
            entries,
            leader_commit: log_id_of(request.leader_commit.as_ref()),
        };
        let result = match self.raft.append_entries(rpc).await.map_err(failed)? {
            AppendEntriesResponse::Success => WireResult::Success(pb::StoredBlank {}),
            AppendEntriesResponse::PartialSuccess(matched) => {
                WireResult::Partial(pb::PartialSuccess { matched: matched.as_ref().map(log_id_to) })
            }
            AppendEntriesResponse::Conflict => WireResult::Conflict(pb::StoredBlank {}),
            AppendEntriesResponse::HigherVote(vote) => WireResult::HigherVote(vote_to(&vote)),
        };
        Ok(answer(&self.identity, pb::AppendEntriesResponse { result: Some(result) }))
    }

    async fn vote(&self, request: Request<pb::VoteRequest>) -> Result<Response<pb::VoteResponse>, Status> {
        self.check_candidate(&request, request.get_ref().vote.as_ref())?;
        let rpc = vote_request(Some(&request.into_inner()))?;
        Ok(answer(&self.identity, vote_response(&self.raft.vote(rpc).await.map_err(failed)?)))
    }

    async fn pre_vote(&self, request: Request<pb::PreVoteRequest>) -> Result<Response<pb::PreVoteResponse>, Status> {
        self.check_candidate(&request, request.get_ref().vote.as_ref().and_then(|vote| vote.vote.as_ref()))?;
        let rpc = vote_request(request.into_inner().vote.as_ref())?;
        let vote = vote_response(&self.raft.pre_vote(rpc).await.map_err(failed)?);
        Ok(answer(&self.identity, pb::PreVoteResponse { vote: Some(vote) }))
    }

    async fn install_checkpoint(
        &self,
        request: Request<Streaming<pb::InstallCheckpointRequest>>,
    ) -> Result<Response<pb::InstallCheckpointResponse>, Status> {
        let mut stream = request.into_inner();
        let header = match stream.message().await?.and_then(|first| first.message) {
            Some(InstallMessage::Header(header)) => header,
            _ => return Err(malformed("the first message must be `header`")),
        };
        let vote = vote_required(header.vote.as_ref()).map_err(malformed)?;
        let membership = membership_from(&header.membership.unwrap_or_default()).map_err(malformed)?;
        let meta = CheckpointMeta { last_log_id: log_id_of(header.last_log_id.as_ref()), last_membership: membership };
        let temporary = Temporary { path: self.checkpoints.temporary() };
        let snapshot = receive(&mut stream, temporary, header.size_bytes).await?;
        let response = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot }).await.map_err(failed)?;
        Ok(Response::new(pb::InstallCheckpointResponse { vote: Some(vote_to(&response.vote)) }))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        let from = vote_required(request.from_leader.as_ref()).map_err(malformed)?;
        let rpc = TransferLeaderRequest::new(from, request.to_replica_id, log_id_of(request.last_log_id.as_ref()));
        let refusal = match self.raft.handle_transfer_leader(rpc).await.map_err(failed)? {
            Ok(()) => String::new(),
            Err(refusal) => refusal.to_string(),
        };
        Ok(Response::new(pb::TransferLeaderResponse { refusal }))
    }
}

/// Writes and syncs what arrives; it must be as long as was announced, and whole: Raft takes a checkpoint that cannot be
/// installed for a broken disk, and stops. The file outlives a call that is given up while Raft still installs it.
async fn receive(
    stream: &mut Streaming<pb::InstallCheckpointRequest>,
    temporary: Temporary,
    size_bytes: u64,
) -> Result<CheckpointFile, Status> {
    let mut file = File::create(&temporary.path).map_err(failed)?;
    let mut written = 0u64;
    while let Some(message) = stream.message().await? {
        let Some(InstallMessage::Chunk(chunk)) = message.message else { return Err(malformed("expected `chunk`")) };
        written = written.saturating_add(chunk.len() as u64);
        if written > size_bytes {
            return Err(malformed("more bytes than were announced"));
        }
        file = tokio::task::spawn_blocking(move || file.write_all(&chunk).map(|()| file))
            .await
            .map_err(failed)?
            .map_err(failed)?;
    }
    if written != size_bytes {
        return Err(malformed(format!("{written} of {size_bytes} bytes arrived")));
    }
    tokio::task::spawn_blocking(move || {
        file.sync_all().map_err(failed)?;
        checkpoint::read(&temporary.path).map_err(|error| Status::data_loss(error.to_string()))?;
        let (file, path) = (Arc::new(file), temporary.path.clone());
        Ok(CheckpointFile { file, path, size_bytes, received: Some(Arc::new(temporary)) })
    })
    .await
    .map_err(failed)?
}
