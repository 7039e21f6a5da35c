//! Nodes, templates and the cluster itself.

use tonic::Status;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::{
    GetClusterStatusRequest, GetClusterStatusResponse, GetReplicaStatusRequest, GetReplicaStatusResponse,
    ListNodesRequest, ListTemplatesRequest, Node, Template,
};

use super::Client;

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
