//! What other replicas ask of this one: the server side of `network`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use openraft::ChangeMembers;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest, VoteResponse};
use openraft::storage::Snapshot;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;
use warren_proto::ids::ReplicaId;
use warren_proto::v1 as pb;
use warren_proto::v1::append_entries_response::Result as WireResult;
use warren_proto::v1::install_checkpoint_request::Message as InstallMessage;
use warren_proto::v1::raft_service_server::RaftService;

use super::checkpoint::{self, CheckpointDirectory, CheckpointError, CheckpointFile, Temporary};
use super::codec::command::{disk_to, put_replica};
use super::codec::log::{entry_from, log_id_to, membership_from, vote_to};
use super::codec::{CodecError, RUN_NEWER};
use super::failure::Failure;
use super::network::{log_id_of, vote_required};
use super::origin::{Origin, same_ledger};
use super::proposer::Proposer;
use super::types::{CheckpointMeta, LogId, Raft, TypeConfig};
use crate::clock;
use crate::disk::DiskUse;
use crate::state::command::{Body, Caller, Command};
use crate::state::outcome::Rejected;

/// Serves `RaftService` for one replica.
pub(super) struct RaftApi {
    pub raft: Raft,
    pub checkpoints: CheckpointDirectory,
    pub origin: Origin,
    pub proposer: Proposer,
    pub failure: Failure,
    /// When a refusal was last told.
    pub told: Mutex<Option<Instant>>,
    /// Set once this replica knows.
    pub disk: Arc<OnceLock<DiskUse>>,
}

/// A replica that must stay out tries again every moment; a person needs to be told less often.
const REFUSAL_TOLD_EVERY: Duration = Duration::from_secs(30);

impl RaftApi {
    /// 0: it does not know.
    fn disk_used_percent(&self) -> u32 {
        self.disk.get().map_or(0, |disk| u32::try_from(disk.percent()).unwrap_or(u32::MAX))
    }

    /// Refuses, before any effect, a leader or a candidate of another ledger, or with a disk that the ledger does not know.
    fn check_sender(&self, metadata: &MetadataMap, vote: Option<&pb::StoredVote>) -> Result<(), Status> {
        let sender = ReplicaId(vote.map_or(0, |vote| vote.voted_for));
        let checked = self.origin.check(sender, metadata);
        if let Err(refusal) = &checked
            && self.is_to_be_told()
        {
            warn!(%sender, reason = refusal.message(), "a replica is refused");
        }
        checked
    }

    fn is_to_be_told(&self) -> bool {
        let now = clock::monotonic();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_none_or(|last| now.saturating_duration_since(last) >= REFUSAL_TOLD_EVERY);
        if due {
            *told = Some(now);
        }
        due
    }

    /// What a leader of this ledger sends and this build cannot read: nobody but a newer build can go on here.
    fn unreadable(&self, error: &CodecError) -> Status {
        let cause = format!("the leader sent an entry that this build cannot read ({error}): {RUN_NEWER}");
        self.failure.report(cause.clone());
        Status::failed_precondition(cause)
    }

    /// Reads what has arrived as a whole: Raft takes a checkpoint that cannot be installed for a broken disk, and stops. The
    /// file outlives a call that is given up while Raft still installs it.
    async fn readable(
        &self,
        file: File,
        temporary: Temporary,
        size_bytes: u64,
        last: Option<LogId>,
    ) -> Result<CheckpointFile, Status> {
        let (path, failure, ours) = (temporary.path.clone(), self.failure.clone(), self.origin.ledger());
        let checked = tokio::task::spawn_blocking(move || {
            let loaded = checkpoint::read(&path).map_err(|error| unusable(&error, &failure))?;
            if loaded.meta.last_log_id != last {
                return Err(malformed("the checkpoint is not the one that its header announces"));
            }
            same_ledger(ours, loaded.state.ledger_id)
        });
        checked.await.map_err(failed)??;
        let (file, path) = (Arc::new(file), temporary.path.clone());
        Ok(CheckpointFile { file, path, size_bytes, received: Some(Arc::new(temporary)) })
    }
}

/// What was damaged on the way may come whole the next time; what this build does not know never will.
fn unusable(error: &CheckpointError, failure: &Failure) -> Status {
    match error {
        CheckpointError::TooNew { .. } => {
            failure.report(format!("the leader sent a checkpoint that this replica cannot install: {error}"));
            Status::failed_precondition(error.to_string())
        }
        CheckpointError::Io { .. } | CheckpointError::Damaged { .. } => Status::data_loss(error.to_string()),
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
        self.origin.check_ledger(request.metadata())?;
        let replica = request.into_inner().replica.ok_or_else(|| malformed("`replica` is missing"))?;
        let record = put_replica(&replica).map_err(malformed)?;
        let (id, state) = (ReplicaId(replica.replica_id), self.origin.states.borrow().clone());
        if !state.voters.contains(&id) && !state.learners.contains(&id) {
            return Err(Status::failed_precondition(format!("replica {id} is not in the group")));
        }
        let body = Body::PutReplica { replica: id, record };
        let command = Command { caller: Caller::system(&format!("replica {id}")), time: state.log_time, body };
        match self.proposer.propose(command).await {
            Ok(Ok(_)) => Ok(Response::new(pb::AnnounceResponse {})),
            // To the replica a reason to end.
            Ok(Err(lost @ Rejected::ReplicaDisk(_))) => Err(Status::data_loss(lost.to_string())),
            Ok(Err(rejected)) => Err(Status::failed_precondition(rejected.to_string())),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn read_clock(
        &self,
        request: Request<pb::ReadClockRequest>,
    ) -> Result<Response<pb::ReadClockResponse>, Status> {
        self.origin.check_ledger(request.metadata())?;
        let (time_ms, disk_used_percent) = (clock::log_time().0, self.disk_used_percent());
        Ok(self.origin.answer(pb::ReadClockResponse { time_ms, disk_used_percent }))
    }

    async fn identify(&self, request: Request<pb::IdentifyRequest>) -> Result<Response<pb::IdentifyResponse>, Status> {
        // Of any ledger: whoever asks has lost what it knew.
        let state = self.origin.states.borrow().clone();
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
        self.check_sender(request.metadata(), request.get_ref().vote.as_ref())?;
        let request = request.into_inner();
        let entries = request.entries.into_iter().map(entry_from).collect::<Result<Vec<_>, _>>();
        let entries = entries.map_err(|error| self.unreadable(&error))?;
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
        Ok(self.origin.answer(pb::AppendEntriesResponse { result: Some(result) }))
    }

    async fn vote(&self, request: Request<pb::VoteRequest>) -> Result<Response<pb::VoteResponse>, Status> {
        self.check_sender(request.metadata(), request.get_ref().vote.as_ref())?;
        let rpc = vote_request(Some(&request.into_inner()))?;
        Ok(self.origin.answer(vote_response(&self.raft.vote(rpc).await.map_err(failed)?)))
    }

    async fn pre_vote(&self, request: Request<pb::PreVoteRequest>) -> Result<Response<pb::PreVoteResponse>, Status> {
        self.check_sender(request.metadata(), request.get_ref().vote.as_ref().and_then(|vote| vote.vote.as_ref()))?;
        let rpc = vote_request(request.into_inner().vote.as_ref())?;
        let vote = vote_response(&self.raft.pre_vote(rpc).await.map_err(failed)?);
        Ok(self.origin.answer(pb::PreVoteResponse { vote: Some(vote) }))
    }

    async fn install_checkpoint(
        &self,
        request: Request<Streaming<pb::InstallCheckpointRequest>>,
    ) -> Result<Response<pb::InstallCheckpointResponse>, Status> {
        let (metadata, _, mut stream) = request.into_parts();
        let header = match stream.message().await?.and_then(|first| first.message) {
            Some(InstallMessage::Header(header)) => header,
            _ => return Err(malformed("the first message must be `header`")),
        };
        self.check_sender(&metadata, header.vote.as_ref())?;
        let vote = vote_required(header.vote.as_ref()).map_err(malformed)?;
        let membership = membership_from(&header.membership.unwrap_or_default()).map_err(malformed)?;
        let meta = CheckpointMeta { last_log_id: log_id_of(header.last_log_id.as_ref()), last_membership: membership };
        let temporary = Temporary { path: self.checkpoints.temporary() };
        let file = receive(&mut stream, &temporary, header.size_bytes).await?;
        let snapshot = self.readable(file, temporary, header.size_bytes, meta.last_log_id).await?;
        let response = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot }).await.map_err(failed)?;
        Ok(self.origin.answer(pb::InstallCheckpointResponse { vote: Some(vote_to(&response.vote)) }))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        self.check_sender(request.metadata(), request.get_ref().from_leader.as_ref())?;
        let request = request.into_inner();
        let from = vote_required(request.from_leader.as_ref()).map_err(malformed)?;
        let rpc = TransferLeaderRequest::new(from, request.to_replica_id, log_id_of(request.last_log_id.as_ref()));
        let refusal = match self.raft.handle_transfer_leader(rpc).await.map_err(failed)? {
            Ok(()) => String::new(),
            Err(refusal) => refusal.to_string(),
        };
        Ok(self.origin.answer(pb::TransferLeaderResponse { refusal }))
    }

    /// Whether enough voters stay is the one's to look at who hands over.
    async fn remove(&self, request: Request<pb::RemoveRequest>) -> Result<Response<pb::RemoveResponse>, Status> {
        let id = request.get_ref().replica_id;
        self.origin.check(ReplicaId(id), request.metadata())?;
        let change = ChangeMembers::RemoveVoters(BTreeSet::from([id]));
        match self.raft.change_membership(change, false).await {
            Ok(_) => Ok(self.origin.answer(pb::RemoveResponse {})),
            Err(refusal) => Err(Status::unavailable(refusal.to_string())),
        }
    }
}

/// Writes and syncs what arrives; it must be as long as was announced.
async fn receive(
    stream: &mut Streaming<pb::InstallCheckpointRequest>,
    temporary: &Temporary,
    size_bytes: u64,
) -> Result<File, Status> {
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
    tokio::task::spawn_blocking(move || file.sync_all().map(|()| file)).await.map_err(failed)?.map_err(failed)
}
