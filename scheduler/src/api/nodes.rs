//! `NodeService`.

use std::ops::Bound;

use tonic::{Request, Response, Status};
use warren_proto::ids::NodeId;
use warren_proto::v1::node_service_server::NodeService;
use warren_proto::v1::{GetNodeRequest, ListNodesRequest, ListNodesResponse, Node};

use super::page::Page;
use super::{convert, status, validate};
use crate::controller::Controller;

/// Serves `NodeService`.
#[derive(Debug, Clone)]
pub struct NodesApi {
    controller: Controller,
}

impl NodesApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }
}

#[tonic::async_trait]
impl NodeService for NodesApi {
    async fn cordon_node(&self, _: Request<warren_proto::v1::CordonNodeRequest>) -> Result<Response<Node>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn uncordon_node(&self, _: Request<warren_proto::v1::UncordonNodeRequest>) -> Result<Response<Node>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn set_node_labels(
        &self,
        _: Request<warren_proto::v1::SetNodeLabelsRequest>,
    ) -> Result<Response<Node>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn forget_node(
        &self,
        _: Request<warren_proto::v1::ForgetNodeRequest>,
    ) -> Result<Response<warren_proto::v1::ForgetNodeResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn stop_orphan(&self, _: Request<warren_proto::v1::StopOrphanRequest>) -> Result<Response<Node>, Status> {
        Err(Status::unimplemented("soon"))
    }

    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let id = NodeId::from_name(&request.into_inner().name).map_err(validate::id_error("name"))?;
        let state = self.controller.replica().read().await.map_err(|error| status::propose(&error))?;
        let node = state.nodes.get(&id).ok_or_else(|| status::node_not_found(&id))?;
        Ok(Response::new(convert::node(node)))
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::parse("nodes", request.page_size, &request.page_token)?;
        let start = match &page.after {
            Some(last) => Bound::Excluded(NodeId::parse(last).map_err(|_| status::invalid_page_token())?),
            None => Bound::Unbounded,
        };
        let state = self.controller.replica().read().await.map_err(|error| status::propose(&error))?;
        let mut found = state.nodes.range((start, Bound::Unbounded));
        let listed: Vec<_> = found.by_ref().take(page.size).map(|(_, node)| node).collect();
        let next_page_token = match (found.next(), listed.last()) {
            (Some(_), Some(last)) => page.next_token(last.id.as_str()),
            _ => String::new(),
        };
        Ok(Response::new(ListNodesResponse {
            nodes: listed.into_iter().map(|node| convert::node(node)).collect(),
            next_page_token,
            revision: state.revision,
        }))
    }
}
