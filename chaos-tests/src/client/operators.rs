//! Nodes, templates and the cluster itself.

use std::time::Duration;

use tonic::{Response, Status};
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::{
    BackupRequest, CheckStateRequest, CheckStateResponse, ForgetNodeRequest, ForgetNodeResponse,
    GetClusterStatusRequest, GetClusterStatusResponse, GetReplicaStatusRequest, GetReplicaStatusResponse,
    ListNodesRequest, ListTemplatesRequest, Node, RemoveReplicaRequest, RemoveReplicaResponse, SetPauseRequest,
    SetPauseResponse, StopOrphanRequest, Template, TransferLeadershipRequest, TransferLeadershipResponse,
};

use super::Client;

/// Between two looks at the region: there is no watch of members and nodes.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Longest that one attempt to hand over may take: more than the 10 s that a scheduler gives it.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(15);

/// Looks before giving up: a minute.
const LOOKS: u32 = 600;

impl Client {
    /// As the leader sees it.
    pub async fn cluster_status(&self) -> Result<GetClusterStatusResponse, Status> {
        self.call(|channel| async move {
            ClusterServiceClient::new(channel).get_cluster_status(GetClusterStatusRequest {}).await
        })
        .await
    }

    /// As the replica that answers sees itself.
    pub async fn replica_status(&self) -> Result<GetReplicaStatusResponse, Status> {
        self.call(|channel| async move {
            ClusterServiceClient::new(channel).get_replica_status(GetReplicaStatusRequest {}).await
        })
        .await
    }

    /// Pauses or resumes parts of the region's work.
    pub async fn set_pause(&self, pause: SetPauseRequest) -> Result<SetPauseResponse, Status> {
        self.call(|channel| async move { ClusterServiceClient::new(channel).set_pause(pause).await }).await
    }

    /// Takes a replica out of the group.
    pub async fn remove_replica(&self, replica_id: u64) -> Result<RemoveReplicaResponse, Status> {
        let request = RemoveReplicaRequest { replica_id };
        self.call(|channel| async move { ClusterServiceClient::new(channel).remove_replica(request).await }).await
    }

    /// Makes a voter the leader.
    pub async fn transfer_leadership(&self, replica_id: u64) -> Result<TransferLeadershipResponse, Status> {
        let request = TransferLeadershipRequest { replica_id };
        let transfer = |channel| async move { ClusterServiceClient::new(channel).transfer_leadership(request).await };
        self.call_within(TRANSFER_PATIENCE, transfer).await
    }

    /// What is wrong with the state of the replica that answers.
    pub async fn check_state(&self) -> Result<CheckStateResponse, Status> {
        self.call(|channel| async move { ClusterServiceClient::new(channel).check_state(CheckStateRequest {}).await })
            .await
    }

    /// A whole backup.
    pub async fn backup(&self) -> anyhow::Result<Vec<u8>> {
        let chunks = self
            .call(|channel| async move {
                let mut client = ClusterServiceClient::new(channel);
                let mut stream = client.backup(BackupRequest {}).await?.into_inner();
                let (mut bytes, mut size) = (Vec::new(), 0);
                while let Some(message) = stream.message().await? {
                    size = message.size_bytes;
                    bytes.extend(message.chunk);
                }
                match i64::try_from(bytes.len()) {
                    Ok(got) if got == size && size > 0 => Ok(Response::new(bytes)),
                    _ => Err(Status::unavailable(format!("{} of {size} bytes arrived", bytes.len()))),
                }
            })
            .await?;
        Ok(chunks)
    }

    pub async fn stop_orphan(&self, node: &str, sandbox: &str, epoch: u64) -> Result<Node, Status> {
        let request = StopOrphanRequest { name: node.to_owned(), sandbox: sandbox.to_owned(), epoch };
        self.call(|channel| {
            let request = request.clone();
            async move { NodeServiceClient::new(channel).stop_orphan(request).await }
        })
        .await
    }

    pub async fn forget_node(&self, name: &str) -> Result<ForgetNodeResponse, Status> {
        let request = ForgetNodeRequest { name: name.to_owned() };
        self.call(|channel| {
            let request = request.clone();
            async move { NodeServiceClient::new(channel).forget_node(request).await }
        })
        .await
    }

    /// Looks at the region again and again until it is as wanted; what was seen last otherwise.
    pub async fn await_status(
        &self,
        what: &str,
        wanted: impl Fn(&GetClusterStatusResponse) -> bool,
    ) -> anyhow::Result<GetClusterStatusResponse> {
        let mut last = None;
        for _ in 0..LOOKS {
            match self.cluster_status().await {
                Ok(status) if wanted(&status) => return Ok(status),
                Ok(status) => last = Some(status),
                Err(_not_now) => {}
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        anyhow::bail!("{what}: never; last seen {last:?}")
    }

    /// As [`await_status`](Self::await_status), for the nodes.
    pub async fn await_nodes(&self, what: &str, wanted: impl Fn(&[Node]) -> bool) -> anyhow::Result<Vec<Node>> {
        let mut last = Vec::new();
        for _ in 0..LOOKS {
            if let Ok(nodes) = self.nodes().await {
                if wanted(&nodes) {
                    return Ok(nodes);
                }
                last = nodes;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        anyhow::bail!("{what}: never; last seen {last:?}")
    }

    /// The first page: tests have few.
    pub async fn nodes(&self) -> Result<Vec<Node>, Status> {
        self.call(
            |channel| async move { NodeServiceClient::new(channel).list_nodes(ListNodesRequest::default()).await },
        )
        .await
        .map(|page| page.nodes)
    }

    /// The first page: tests have few.
    pub async fn templates(&self) -> Result<Vec<Template>, Status> {
        self.call(|channel| async move {
            TemplateServiceClient::new(channel).list_templates(ListTemplatesRequest::default()).await
        })
        .await
        .map(|page| page.templates)
    }
}
