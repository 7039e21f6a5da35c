//! `ClusterService`.

use tonic::{Request, Response, Status};
use warren_proto::units::Resources;
use warren_proto::v1::cluster_service_server::ClusterService;
use warren_proto::v1::{
    self, GetClusterStatusRequest, GetClusterStatusResponse, GetReplicaStatusRequest, GetReplicaStatusResponse, Member,
    StateCount,
};

use super::{convert, status};
use crate::controller::Controller;
use crate::raft::{MemberRole, MemberStatus};
use crate::state::State;

/// Serves `ClusterService`.
#[derive(Debug, Clone)]
pub struct ClusterApi {
    controller: Controller,
}

impl ClusterApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    type BackupStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::BackupResponse, Status>> + Send>>;
    async fn join_replica(
        &self,
        _: Request<v1::JoinReplicaRequest>,
    ) -> Result<Response<v1::JoinReplicaResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn remove_replica(
        &self,
        _: Request<v1::RemoveReplicaRequest>,
    ) -> Result<Response<v1::RemoveReplicaResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn transfer_leadership(
        &self,
        _: Request<v1::TransferLeadershipRequest>,
    ) -> Result<Response<v1::TransferLeadershipResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn set_pause(&self, _: Request<v1::SetPauseRequest>) -> Result<Response<v1::SetPauseResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn release_brake(
        &self,
        _: Request<v1::ReleaseBrakeRequest>,
    ) -> Result<Response<v1::ReleaseBrakeResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn set_level(&self, _: Request<v1::SetLevelRequest>) -> Result<Response<v1::SetLevelResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn backup(&self, _: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn check_state(&self, _: Request<v1::CheckStateRequest>) -> Result<Response<v1::CheckStateResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn get_debug_info(
        &self,
        _: Request<v1::GetDebugInfoRequest>,
    ) -> Result<Response<v1::GetDebugInfoResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }

    async fn get_cluster_status(
        &self,
        _request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        let replica = self.controller.replica();
        let state = replica.read().await.map_err(|error| status::propose(&error))?;
        let own = replica.status();
        let (capacity, assigned) = totals(&state);
        Ok(Response::new(GetClusterStatusResponse {
            ledger_id: ledger_id(&state),
            leader_id: own.leader.unwrap_or_default().0,
            term: own.term,
            revision: state.revision,
            members: replica.members().into_iter().map(member).collect(),
            node_count: convert::int(state.nodes.len() as u64),
            ready_node_count: convert::int(state.nodes.values().filter(|node| node.reachable).count() as u64),
            sandbox_counts: state.counts.iter().map(|(kind, count)| count_of(kind, *count)).collect(),
            capacity: Some(convert::resources(capacity, 0)),
            assigned: Some(convert::resources(assigned, 0)),
            log_time: Some(convert::timestamp(state.log_time)),
            ..Default::default()
        }))
    }

    async fn get_replica_status(
        &self,
        _request: Request<GetReplicaStatusRequest>,
    ) -> Result<Response<GetReplicaStatusResponse>, Status> {
        let own = self.controller.replica().status();
        Ok(Response::new(GetReplicaStatusResponse {
            replica_id: own.id.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            leader_id: own.leader.unwrap_or_default().0,
            term: own.term,
            last_log_index: own.last_log_index,
            applied_index: own.applied_index,
            checkpoint_index: own.checkpoint_index,
            ledger_id: ledger_id(&self.controller.replica().state()),
            ..Default::default()
        }))
    }
}

fn ledger_id(state: &State) -> String {
    state.ledger_id.map(|id| id.to_string()).unwrap_or_default()
}

fn count_of(kind: &str, count: u64) -> StateCount {
    StateCount { state: kind.to_owned(), count: convert::int(count) }
}

/// What all nodes have, and what of it is held. Sums that would overflow stay at the last that did not.
fn totals(state: &State) -> (Resources, Resources) {
    state.nodes.values().fold(Default::default(), |(capacity, assigned): (Resources, Resources), node| {
        (
            capacity.checked_add(node.report.capacity).unwrap_or(capacity),
            assigned.checked_add(node.assigned).unwrap_or(assigned),
        )
    })
}

fn member(from: MemberStatus) -> Member {
    let role = match from.role {
        MemberRole::Leader => v1::MemberRole::Leader,
        MemberRole::Follower => v1::MemberRole::Follower,
        MemberRole::Learner => v1::MemberRole::Learner,
    };
    Member {
        replica_id: from.id.0,
        api_address: from.api_address,
        peer_address: from.peer_address,
        role: role.into(),
        matched_index: from.matched_index,
        reachable: from.reachable,
    }
}
