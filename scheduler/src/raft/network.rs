//! openraft's calls to other replicas, over gRPC. Every call has a deadline.

use std::future::Future;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use futures::Stream;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use warren_proto::client::{self, ClientTls};
use warren_proto::ids::ReplicaId;
use warren_proto::v1 as pb;
use warren_proto::v1::append_entries_response::Result as WireResult;
use warren_proto::v1::install_checkpoint_request::Message as InstallMessage;
use warren_proto::v1::raft_service_client::RaftServiceClient;

use super::checkpoint::CheckpointFile;
use super::codec::CodecError;
use super::codec::log::{entry_to, log_id_from, log_id_to, membership_to, vote_from, vote_to};
use super::origin::Origin;
use super::types::{CheckpointMeta, LogId, Member, TypeConfig, Vote};

/// Largest message between replicas: 64 entries of 64 KiB, twice.
pub(super) const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Bytes of a checkpoint in one message.
const CHUNK_BYTES: usize = 1 << 20;

/// Chunks that are read ahead of the network.
const CHUNKS_AHEAD: usize = 4;

/// How long a follower may take to write entries: a slow disk's worst sync. Its silence is noticed by heartbeats, not by this.
const APPEND_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a checkpoint may take to be sent and installed: 1 GiB at 10 MB/s, with room.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(180);

type Checkpoint = openraft::type_config::alias::SnapshotOf<TypeConfig, CheckpointFile>;
type TransferOutcome = openraft::raft::TransferLeaderResponse<TypeConfig>;

/// Makes clients for the other replicas. Channels connect when first used, and again after a break.
#[derive(Debug, Clone)]
pub(super) struct Network {
    pub tls: ClientTls,
    pub origin: Origin,
}

/// A client for one replica.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Why there can be none: the address is no address.
    client: Result<RaftServiceClient<Channel>, String>,
    target: ReplicaId,
    origin: Origin,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &Member) -> Peer {
        let channel = client::channel(&node.peer_address, &self.tls).map_err(|error| error.to_string());
        let client = channel.map(|channel| {
            RaftServiceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
        });
        Peer { client, target: ReplicaId(target), origin: self.origin.clone() }
    }
}

impl Peer {
    fn client(&self) -> Result<RaftServiceClient<Channel>, RPCError<TypeConfig>> {
        self.client.clone().map_err(|error| RPCError::Unreachable(Unreachable::from_string(error)))
    }

    /// A call with a deadline that says where it comes from.
    fn call<T>(&self, message: T, limit: Duration) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(limit);
        self.origin.call(request)
    }

    /// What was answered, if it comes from this ledger and from the disk that it knows: another has forgotten what the replica
    /// promised.
    fn checked<T>(&self, response: Result<Response<T>, Status>) -> Result<T, RPCError<TypeConfig>> {
        let response = response.map_err(|status| rpc_error(&status))?;
        match self.origin.check(self.target, response.metadata()) {
            Ok(()) => Ok(response.into_inner()),
            Err(status) => Err(rpc_error(&status)),
        }
    }
}

/// A replica that cannot be connected to, or will not do it, is left alone for a while; anything else is tried again at once.
fn rpc_error(status: &Status) -> RPCError<TypeConfig> {
    match status.code() {
        Code::Unavailable | Code::FailedPrecondition => RPCError::Unreachable(Unreachable::from_string(status)),
        _ => RPCError::Network(NetworkError::from_string(status)),
    }
}

fn malformed(error: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

pub(super) fn vote_required(vote: Option<&pb::StoredVote>) -> Result<Vote, CodecError> {
    vote_from(vote.ok_or(CodecError::Missing { field: "vote" })?)
}

pub(super) fn vote_request_to(from: &VoteRequest<TypeConfig>) -> pb::VoteRequest {
    pb::VoteRequest {
        vote: Some(vote_to(&from.vote)),
        last_log_id: from.last_log_id.as_ref().map(log_id_to),
        leadership_transfer: from.leadership_transfer,
    }
}

fn vote_response_from(from: &pb::VoteResponse) -> Result<VoteResponse<TypeConfig>, CodecError> {
    let last_log_id = from.last_log_id.as_ref().map(log_id_from);
    Ok(VoteResponse { vote: vote_required(from.vote.as_ref())?, vote_granted: from.granted, last_log_id })
}

fn append_response(from: pb::AppendEntriesResponse) -> Result<AppendEntriesResponse<TypeConfig>, CodecError> {
    Ok(match from.result.ok_or(CodecError::Missing { field: "result" })? {
        WireResult::Success(_) => AppendEntriesResponse::Success,
        WireResult::Partial(partial) => {
            AppendEntriesResponse::PartialSuccess(partial.matched.as_ref().map(log_id_from))
        }
        WireResult::Conflict(_) => AppendEntriesResponse::Conflict,
        WireResult::HigherVote(vote) => AppendEntriesResponse::HigherVote(vote_from(&vote)?),
    })
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = CheckpointFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        // openraft's own limit is a heartbeat's interval. A sync may take longer, and to send again what is being synced
        // only makes it later.
        let limit = if rpc.entries.is_empty() { option.soft_ttl() } else { APPEND_TIMEOUT };
        let request = pb::AppendEntriesRequest {
            vote: Some(vote_to(&rpc.vote)),
            previous: rpc.prev_log_id.as_ref().map(log_id_to),
            entries: rpc.entries.iter().map(entry_to).collect(),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_to),
        };
        let response = self.client()?.append_entries(self.call(request, limit)).await;
        append_response(self.checked(response)?).map_err(malformed)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let response = self.client()?.vote(self.call(vote_request_to(&rpc), option.soft_ttl())).await;
        vote_response_from(&self.checked(response)?).map_err(malformed)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = pb::PreVoteRequest { vote: Some(vote_request_to(&rpc)) };
        let response = self.client()?.pre_vote(self.call(request, option.soft_ttl())).await;
        let vote = self.checked(response)?.vote;
        vote_response_from(&vote.unwrap_or_default()).map_err(malformed)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Checkpoint,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut client = self.client()?;
        let chunks = checkpoint_stream(&vote, &snapshot.meta, snapshot.snapshot);
        let response = tokio::select! {
            response = client.install_checkpoint(self.call(chunks, INSTALL_TIMEOUT)) => response,
            closed = cancel => return Err(closed.into()),
        };
        let response = self.checked(response)?;
        Ok(SnapshotResponse { vote: vote_required(response.vote.as_ref()).map_err(malformed)? })
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferOutcome, RPCError<TypeConfig>> {
        let request = pb::TransferLeaderRequest {
            from_leader: Some(vote_to(req.from_leader())),
            to_replica_id: *req.to_node_id(),
            last_log_id: req.last_log_id().map(log_id_to),
        };
        let response = self.client()?.transfer_leader(self.call(request, option.soft_ttl())).await;
        let refusal = self.checked(response)?.refusal;
        if refusal.is_empty() { Ok(Ok(())) } else { Err(malformed(refusal)) }
    }
}

/// The header, then the file in chunks; read ahead of the network by a bounded number of them.
fn checkpoint_stream(
    vote: &Vote,
    meta: &CheckpointMeta,
    file: CheckpointFile,
) -> impl Stream<Item = pb::InstallCheckpointRequest> + use<> {
    let header = pb::CheckpointHeader {
        vote: Some(vote_to(vote)),
        last_log_id: meta.last_log_id.as_ref().map(log_id_to),
        membership: Some(membership_to(meta.last_membership.log_id().as_ref(), meta.last_membership.membership())),
        size_bytes: file.size_bytes,
    };
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let message = |message| pb::InstallCheckpointRequest { message: Some(message) };
        if sender.blocking_send(message(InstallMessage::Header(header))).is_err() {
            return;
        }
        // A file that cannot be read ends early; the receiver sees that bytes are missing.
        let mut at = 0;
        while at < file.size_bytes {
            let left = usize::try_from(file.size_bytes - at).unwrap_or(CHUNK_BYTES);
            let mut chunk = vec![0; CHUNK_BYTES.min(left)];
            let Ok(()) = file.file.read_exact_at(&mut chunk, at) else { return };
            at = at.saturating_add(chunk.len() as u64);
            if sender.blocking_send(message(InstallMessage::Chunk(chunk))).is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

pub(super) fn log_id_of(from: Option<&pb::StoredLogId>) -> Option<LogId> {
    from.map(log_id_from)
}
