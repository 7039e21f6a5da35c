//! `ClusterService`.

use tonic::{Request, Response, Status};
use warren_proto::ids::ReplicaId;
use warren_proto::units::Resources;
use warren_proto::v1::cluster_service_server::ClusterService;
use warren_proto::v1::{
    self, BackupRequest, CheckStateRequest, CheckStateResponse, GetClusterStatusRequest, GetClusterStatusResponse,
    GetDebugInfoRequest, GetDebugInfoResponse, GetReplicaStatusRequest, GetReplicaStatusResponse, JoinReplicaRequest,
    JoinReplicaResponse, Member, ReleaseBrakeRequest, ReleaseBrakeResponse, RemoveReplicaRequest,
    RemoveReplicaResponse, SetLevelRequest, SetLevelResponse, SetPauseRequest, SetPauseResponse, StateCount, StateHash,
    TransferLeadershipRequest, TransferLeadershipResponse,
};

use super::backup::{self, BackupStream};
use super::{caller, convert, read, status};
use crate::clock;
use crate::controller::Controller;
use crate::metrics;
use crate::raft::{self, MemberRole, MemberStatus};
use crate::state::command::Body;
use crate::state::level::Level;
use crate::state::region::{believed, lapsed};
use crate::state::{State, invariants};

/// Most violations that are told: enough to see what kind they are of.
const MAX_VIOLATIONS: usize = 1000;

/// Serves `ClusterService`.
#[derive(Debug, Clone)]
pub struct ClusterApi {
    controller: Controller,
}

impl ClusterApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }

    /// Commits what an operator wants of the region.
    async fn operate<T>(&self, request: &Request<T>, body: Body) -> Result<std::sync::Arc<State>, Status> {
        let caller = caller::of(request);
        caller::check_operator(&caller)?;
        self.controller.operate(caller, body).await.map_err(status::control)?;
        Ok(self.controller.replica().state())
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    type BackupStream = BackupStream;

    async fn get_cluster_status(
        &self,
        request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        let replica = self.controller.replica();
        let state = read::state(&self.controller, &request).await?;
        let own = replica.status();
        let (capacity, assigned) = totals(&state);
        let silent = state.suspects.len().saturating_add(state.down.len());
        Ok(Response::new(GetClusterStatusResponse {
            ledger_id: ledger_id(&state),
            leader_id: own.leader.unwrap_or_default().0,
            term: own.term,
            revision: state.revision,
            members: replica.members().into_iter().map(member).collect(),
            node_count: convert::int(state.nodes.len() as u64),
            ready_node_count: convert::int(state.nodes.len().saturating_sub(silent) as u64),
            sandbox_counts: state.indexes.counts().map(|(kind, count)| count_of(kind, count)).collect(),
            capacity: Some(convert::resources(capacity, 0)),
            assigned: Some(convert::resources(assigned, 0)),
            log_time: Some(convert::timestamp(state.log_time)),
            level: state.level.0,
            pauses: Some(pauses(&state)),
            brake: state.region.brake_since.map(|since| v1::Brake {
                since: Some(convert::timestamp(since)),
                lapsed: convert::int(lapsed(&state)),
                allowed: convert::int(believed(&state)),
            }),
            hold_until: Some(state.region.hold_until).filter(|until| *until > state.log_time).map(convert::timestamp),
        }))
    }

    async fn get_replica_status(
        &self,
        _request: Request<GetReplicaStatusRequest>,
    ) -> Result<Response<GetReplicaStatusResponse>, Status> {
        let own = self.controller.replica().status();
        let hashes = self.controller.replica().hashes();
        let shown = |(index, hash): (u64, u128)| StateHash { index, hash: format!("{hash:032x}") };
        let newest = hashes.last().copied().map(shown).unwrap_or_default();
        Ok(Response::new(GetReplicaStatusResponse {
            replica_id: own.id.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            leader_id: own.leader.unwrap_or_default().0,
            term: own.term,
            last_log_index: own.last_log_index,
            applied_index: own.applied_index,
            checkpoint_index: own.checkpoint_index,
            ledger_id: ledger_id(&self.controller.replica().state()),
            max_level: Level::MAX.0,
            hash_index: newest.index,
            hash: newest.hash,
            hashes: hashes.into_iter().map(shown).collect(),
            sync_count: own.sync_count,
            disk_used_percent: u32::try_from(self.controller.disk().percent()).unwrap_or(100),
            clock: Some(convert::timestamp(clock::log_time())),
            purged_index: own.purged_index,
        }))
    }

    async fn join_replica(
        &self,
        request: Request<JoinReplicaRequest>,
    ) -> Result<Response<JoinReplicaResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        let wanted = request.into_inner();
        if wanted.replica_id == 0 {
            return Err(status::invalid_field("replica_id", "must be 1 or more"));
        }
        for (field, address) in [("api_address", &wanted.api_address), ("peer_address", &wanted.peer_address)] {
            if !address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
                return Err(status::invalid_field(field, "must be `host:port`"));
            }
        }
        let member = raft::Member {
            peer_address: wanted.peer_address,
            api_address: wanted.api_address,
            standby: wanted.standby,
        };
        let replica = self.controller.replica();
        replica
            .join(ReplicaId(wanted.replica_id), member, wanted.itself)
            .await
            .map_err(|error| status::membership(&error))?;
        Ok(Response::new(JoinReplicaResponse { ledger_id: ledger_id(&replica.state()) }))
    }

    async fn remove_replica(
        &self,
        request: Request<RemoveReplicaRequest>,
    ) -> Result<Response<RemoveReplicaResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        let id = ReplicaId(request.get_ref().replica_id);
        self.controller.replica().remove(id).await.map_err(|error| status::membership(&error))?;
        Ok(Response::new(RemoveReplicaResponse {}))
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        let to = Some(request.get_ref().replica_id).filter(|id| *id > 0).map(ReplicaId);
        let leader = self.controller.replica().transfer_leadership(to).await;
        let leader = leader.map_err(|error| status::membership(&error))?;
        Ok(Response::new(TransferLeadershipResponse { leader_id: leader.0 }))
    }

    async fn set_pause(&self, request: Request<SetPauseRequest>) -> Result<Response<SetPauseResponse>, Status> {
        let SetPauseRequest { creates, placement, moves } = *request.get_ref();
        let state = self.operate(&request, Body::SetPause { creates, placement, moves }).await?;
        Ok(Response::new(SetPauseResponse { pauses: Some(pauses(&state)) }))
    }

    async fn release_brake(
        &self,
        request: Request<ReleaseBrakeRequest>,
    ) -> Result<Response<ReleaseBrakeResponse>, Status> {
        self.operate(&request, Body::ReleaseBrake).await?;
        Ok(Response::new(ReleaseBrakeResponse {}))
    }

    async fn set_level(&self, request: Request<SetLevelRequest>) -> Result<Response<SetLevelResponse>, Status> {
        let level = Level(request.get_ref().level);
        let state = self.operate(&request, Body::SetLevel { level }).await?;
        Ok(Response::new(SetLevelResponse { level: state.level.0 }))
    }

    async fn backup(&self, request: Request<BackupRequest>) -> Result<Response<BackupStream>, Status> {
        caller::check_operator(&caller::of(&request))?;
        backup::start(&self.controller).await.map(Response::new)
    }

    async fn check_state(&self, request: Request<CheckStateRequest>) -> Result<Response<CheckStateResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        let state = self.controller.replica().state();
        let revision = state.revision;
        let checked = tokio::task::spawn_blocking(move || invariants::check(&state)).await;
        let mut violations = checked.map_err(status::internal)?;
        violations.truncate(MAX_VIOLATIONS);
        Ok(Response::new(CheckStateResponse { revision, violations }))
    }

    async fn get_debug_info(
        &self,
        request: Request<GetDebugInfoRequest>,
    ) -> Result<Response<GetDebugInfoResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        metrics::observe(&self.controller);
        let debug = self.controller.debug_info();
        Ok(Response::new(GetDebugInfoResponse { config: debug.config, metrics: debug.metrics }))
    }
}

fn ledger_id(state: &State) -> String {
    state.ledger_id.map(|id| id.to_string()).unwrap_or_default()
}

fn pauses(state: &State) -> v1::Pauses {
    let pauses = state.region.pauses;
    v1::Pauses { creates: pauses.creates, placement: pauses.placement, moves: pauses.moves }
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
        MemberRole::Standby => v1::MemberRole::Standby,
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
