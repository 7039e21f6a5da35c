//! `NodeService`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use tonic::{Request, Response, Status};
use warren_proto::ids::{Epoch, NodeId, SandboxName};
use warren_proto::v1::node_service_server::NodeService;
use warren_proto::v1::{
    CordonNodeRequest, ForgetNodeRequest, ForgetNodeResponse, GetNodeRequest, ListNodesRequest, ListNodesResponse,
    Node, SetNodeLabelsRequest, StopOrphanRequest, UncordonNodeRequest,
};

use super::page::Page;
use super::{caller, convert, read, status, validate};
use crate::controller::Controller;
use crate::state::command::{Body, Caller};

/// Serves `NodeService`.
#[derive(Debug, Clone)]
pub struct NodesApi {
    controller: Controller,
}

impl NodesApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }

    /// Commits what an operator wants of a node, and answers the node.
    async fn operate(&self, caller: Caller, id: NodeId, body: Body) -> Result<Response<Node>, Status> {
        caller::check_operator(&caller)?;
        self.controller.operate(caller, body).await.map_err(status::control)?;
        let state = self.controller.replica().state();
        let node = state.nodes.get(&id).ok_or_else(|| status::node_not_found(&id))?;
        Ok(Response::new(convert::node(node)))
    }

    async fn set_cordoned(&self, caller: Caller, name: &str, cordoned: bool) -> Result<Response<Node>, Status> {
        let node = node_id(name)?;
        let body = Body::SetNodePolicy {
            node: node.clone(),
            cordoned: Some(cordoned),
            set_labels: BTreeMap::new(),
            remove_labels: BTreeSet::new(),
        };
        self.operate(caller, node, body).await
    }
}

fn node_id(name: &str) -> Result<NodeId, Status> {
    NodeId::from_name(name).map_err(validate::id_error("name"))
}

#[tonic::async_trait]
impl NodeService for NodesApi {
    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let id = node_id(&request.get_ref().name)?;
        let state = read::state(&self.controller, &request).await?;
        let node = state.nodes.get(&id).ok_or_else(|| status::node_not_found(&id))?;
        Ok(Response::new(convert::node(node)))
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let page = Page::parse("nodes", request.get_ref().page_size, &request.get_ref().page_token)?;
        let start = match &page.after {
            Some(last) => Bound::Excluded(NodeId::parse(last).map_err(|_| status::invalid_page_token())?),
            None => Bound::Unbounded,
        };
        let state = read::state(&self.controller, &request).await?;
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

    async fn cordon_node(&self, request: Request<CordonNodeRequest>) -> Result<Response<Node>, Status> {
        self.set_cordoned(caller::of(&request), &request.get_ref().name, true).await
    }

    async fn uncordon_node(&self, request: Request<UncordonNodeRequest>) -> Result<Response<Node>, Status> {
        self.set_cordoned(caller::of(&request), &request.get_ref().name, false).await
    }

    async fn set_node_labels(&self, request: Request<SetNodeLabelsRequest>) -> Result<Response<Node>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let node = node_id(&request.name)?;
        let set_labels = validate::labels("set", &request.set)?;
        let remove_labels: BTreeSet<String> = request.remove.into_iter().collect();
        let body = Body::SetNodePolicy { node: node.clone(), cordoned: None, set_labels, remove_labels };
        self.operate(caller, node, body).await
    }

    async fn forget_node(&self, request: Request<ForgetNodeRequest>) -> Result<Response<ForgetNodeResponse>, Status> {
        let caller = caller::of(&request);
        caller::check_operator(&caller)?;
        let node = node_id(&request.get_ref().name)?;
        self.controller.operate(caller, Body::ForgetNode { node }).await.map_err(status::control)?;
        Ok(Response::new(ForgetNodeResponse {}))
    }

    async fn stop_orphan(&self, request: Request<StopOrphanRequest>) -> Result<Response<Node>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let node = node_id(&request.name)?;
        let sandbox = SandboxName::parse(&request.sandbox).map_err(validate::id_error("sandbox"))?;
        let body = Body::StopOrphan { node: node.clone(), sandbox, epoch: Epoch(request.epoch) };
        self.operate(caller, node, body).await
    }
}
