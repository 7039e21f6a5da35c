//! The scheduler's part of the fake region.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use warren_proto::v1::cluster_service_server::ClusterService;
use warren_proto::v1::node_service_server::NodeService;
use warren_proto::v1::sandbox_service_server::SandboxService;
use warren_proto::v1::template_service_server::TemplateService;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::*;

use crate::fake::{Region, TOKEN, error};

/// Pages are short, so that lists of a few things have several.
const PAGE: usize = 2;

#[tonic::async_trait]
impl ClusterService for Region {
    type BackupStream = Pin<Box<dyn Stream<Item = Result<BackupResponse, Status>> + Send>>;

    async fn join_replica(&self, _: Request<JoinReplicaRequest>) -> Result<Response<JoinReplicaResponse>, Status> {
        Err(not_faked())
    }

    async fn remove_replica(
        &self,
        _: Request<RemoveReplicaRequest>,
    ) -> Result<Response<RemoveReplicaResponse>, Status> {
        Err(not_faked())
    }

    async fn transfer_leadership(
        &self,
        _: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        Err(not_faked())
    }

    async fn set_pause(&self, _: Request<SetPauseRequest>) -> Result<Response<SetPauseResponse>, Status> {
        Err(not_faked())
    }

    async fn release_brake(&self, _: Request<ReleaseBrakeRequest>) -> Result<Response<ReleaseBrakeResponse>, Status> {
        Err(not_faked())
    }

    async fn set_level(&self, _: Request<SetLevelRequest>) -> Result<Response<SetLevelResponse>, Status> {
        Err(not_faked())
    }

    async fn backup(&self, _: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(not_faked())
    }

    async fn check_state(&self, _: Request<CheckStateRequest>) -> Result<Response<CheckStateResponse>, Status> {
        self.check("check")?;
        Ok(Response::new(CheckStateResponse { revision: 41, violations: self.book().violations.clone() }))
    }

    async fn get_debug_info(&self, _: Request<GetDebugInfoRequest>) -> Result<Response<GetDebugInfoResponse>, Status> {
        let config = [("lease_ms".to_owned(), "10000".to_owned())].into();
        Ok(Response::new(GetDebugInfoResponse { config, metrics: "warren_raft_has_leader 0\n".into() }))
    }

    async fn get_cluster_status(
        &self,
        request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        let stale = request.metadata().contains_key("warren-consistency");
        self.check(if stale { "stale status" } else { "status" })?;
        Ok(Response::new(self.book().status.clone()))
    }

    async fn get_replica_status(
        &self,
        _: Request<GetReplicaStatusRequest>,
    ) -> Result<Response<GetReplicaStatusResponse>, Status> {
        self.check("replica")?;
        Ok(Response::new(self.book().replica.clone()))
    }
}

fn not_faked() -> Status {
    Status::unimplemented("the fake cannot do this")
}

/// One page, and the token of the next.
fn page<T: Clone>(all: Vec<T>, token: &str) -> (Vec<T>, String) {
    let from: usize = token.parse().unwrap_or(0);
    let next = if from + PAGE < all.len() { (from + PAGE).to_string() } else { String::new() };
    (all.into_iter().skip(from).take(PAGE).collect(), next)
}

#[tonic::async_trait]
impl NodeService for Region {
    async fn cordon_node(&self, _: Request<CordonNodeRequest>) -> Result<Response<Node>, Status> {
        Err(not_faked())
    }

    async fn uncordon_node(&self, _: Request<UncordonNodeRequest>) -> Result<Response<Node>, Status> {
        Err(not_faked())
    }

    async fn set_node_labels(&self, _: Request<SetNodeLabelsRequest>) -> Result<Response<Node>, Status> {
        Err(not_faked())
    }

    async fn forget_node(&self, _: Request<ForgetNodeRequest>) -> Result<Response<ForgetNodeResponse>, Status> {
        Err(not_faked())
    }

    async fn stop_orphan(&self, _: Request<StopOrphanRequest>) -> Result<Response<Node>, Status> {
        Err(not_faked())
    }

    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let name = request.into_inner().name;
        let found = self.book().nodes.iter().find(|node| node.name == name).cloned();
        let missing = || error(Code::NotFound, ErrorReason::NodeNotFound, &format!("there is no {name}"));
        found.map(Response::new).ok_or_else(missing)
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let (nodes, next_page_token) = page(self.book().nodes.clone(), &request.get_ref().page_token);
        Ok(Response::new(ListNodesResponse { nodes, next_page_token, revision: 1 }))
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<WatchSandboxesResponse, Status>> + Send>>;

#[tonic::async_trait]
impl SandboxService for Region {
    type WatchSandboxesStream = Events;

    async fn batch_create_sandboxes(
        &self,
        request: Request<BatchCreateSandboxesRequest>,
    ) -> Result<Response<BatchCreateSandboxesResponse>, Status> {
        let batch = request.into_inner();
        self.book().batches.push(batch.clone());
        self.check("batch")?;
        let mut results = Vec::new();
        for item in batch.requests {
            let made = self.create_sandbox(Request::new(CreateSandboxRequest { parent: batch.parent.clone(), ..item }));
            let result = Some(batch_create_result::Result::Sandbox(made.await?.into_inner()));
            results.push(BatchCreateResult { result });
        }
        Ok(Response::new(BatchCreateSandboxesResponse { results, revision: 1 }))
    }

    async fn wait_sandbox(&self, _: Request<WaitSandboxRequest>) -> Result<Response<WaitSandboxResponse>, Status> {
        Err(not_faked())
    }

    async fn update_sandbox(&self, _: Request<UpdateSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        Err(not_faked())
    }

    async fn create_sandbox(&self, request: Request<CreateSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let request = request.into_inner();
        self.book().creates.push(request.clone());
        self.check("create")?;
        let mut sandbox = request.sandbox.unwrap_or_default();
        let count = self.book().sandboxes.len();
        let id = if request.sandbox_id.is_empty() { format!("made-{count}") } else { request.sandbox_id };
        sandbox.name = format!("{}/sandboxes/{id}", request.parent);
        sandbox.set_state(SandboxState::Starting);
        self.book().sandboxes.insert(sandbox.name.clone(), sandbox.clone());
        self.tell(Kind::Created, &sandbox);
        let fate = self.book().fate.clone();
        if let Some(fate) = fate {
            let later = Sandbox { name: sandbox.name.clone(), template: sandbox.template.clone(), ..fate };
            self.book().sandboxes.insert(later.name.clone(), later.clone());
            self.tell(Kind::Updated, &later);
        }
        Ok(Response::new(sandbox))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        self.check("get")?;
        let name = request.into_inner().name;
        let found = self.book().sandboxes.get(&name).cloned();
        let missing = || error(Code::NotFound, ErrorReason::SandboxNotFound, &format!("there is no {name}"));
        found.map(Response::new).ok_or_else(missing)
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        self.check("list")?;
        let metadata = request.metadata();
        let asked = metadata.get("warren-consistency").or_else(|| metadata.get("warren-min-revision"));
        let asked = asked.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        self.book().freshness.push(asked);
        let request = request.into_inner();
        let mut book = self.book();
        book.lists += 1;
        let wanted = |name: &str| request.parent == "tenants/-" || name.starts_with(&format!("{}/", request.parent));
        let all: Vec<Sandbox> = book.sandboxes.values().filter(|sandbox| wanted(&sandbox.name)).cloned().collect();
        let (sandboxes, next_page_token) = page(all, &request.page_token);
        let watch_token = book.events.len().to_string();
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token, revision: 1, watch_token }))
    }

    async fn watch_sandboxes(&self, request: Request<WatchSandboxesRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.book().watches.push(request.clone());
        self.check("watch")?;
        let (to, events) = mpsc::channel(16);
        tokio::spawn(watch(self.clone(), request.watch_token, to));
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn delete_sandbox(&self, request: Request<DeleteSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let request = request.into_inner();
        self.book().deletes.push(request.clone());
        self.check("delete")?;
        let Some(mut sandbox) = self.book().sandboxes.remove(&request.name) else {
            return match request.allow_missing {
                true => Ok(Response::new(Sandbox::default())),
                false => {
                    Err(error(Code::NotFound, ErrorReason::SandboxNotFound, &format!("there is no {}", request.name)))
                }
            };
        };
        sandbox.set_state(SandboxState::Stopping);
        self.tell(Kind::Updated, &sandbox);
        self.tell(Kind::Deleted, &sandbox);
        Ok(Response::new(sandbox))
    }

    async fn connect_sandbox(
        &self,
        _: Request<ConnectSandboxRequest>,
    ) -> Result<Response<ConnectSandboxResponse>, Status> {
        self.book().connects += 1;
        self.check("connect")?;
        let address = self.book().agent.clone().unwrap_or_else(|| self.address.clone());
        let place = ConnectSandboxResponse { address, token: TOKEN.into(), ..Default::default() };
        Ok(Response::new(place))
    }
}

/// Events from a token on, or what there is and then what comes.
async fn watch(region: Region, token: String, to: mpsc::Sender<Result<WatchSandboxesResponse, Status>>) {
    let mut position = token.parse().unwrap_or(0);
    let mut first = Vec::new();
    if token.is_empty() {
        let book = region.book();
        position = book.events.len();
        let current = |(kind, sandbox): (Kind, Option<Sandbox>)| WatchSandboxesResponse {
            kind: kind.into(),
            sandbox,
            watch_token: position.to_string(),
        };
        let existing = book.sandboxes.values().map(|sandbox| (Kind::Current, Some(sandbox.clone())));
        first = existing.chain([(Kind::Synced, None)]).map(current).collect();
    }
    for event in first {
        let _gone = to.send(Ok(event)).await;
    }
    loop {
        let changed = region.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let next = region.book().events.get(position).cloned();
        let breaks = region.book().break_watch_after.take_if(|after| position >= *after).is_some();
        let failure = match (breaks, &next) {
            (true, _) => Some(Status::unavailable("broken")),
            (false, None) => region.check("watch end").err(),
            (false, Some(_)) => None,
        };
        match (failure, next) {
            (Some(failure), _) => return drop(to.send(Err(failure)).await),
            (None, Some(event)) if to.send(Ok(event.clone())).await.is_ok() => position += 1,
            (None, Some(_)) => return,
            (None, None) => tokio::select! { () = changed => {}, () = to.closed() => return },
        }
    }
}

#[tonic::async_trait]
impl TemplateService for Region {
    async fn begin_template_upload(
        &self,
        _: Request<BeginTemplateUploadRequest>,
    ) -> Result<Response<BeginTemplateUploadResponse>, Status> {
        self.check("begin")?;
        let (address, token) = (self.address.clone(), TOKEN.to_owned());
        Ok(Response::new(BeginTemplateUploadResponse { address, token, node: "nodes/n1".into(), tls: false }))
    }

    async fn begin_template_import(
        &self,
        _: Request<BeginTemplateImportRequest>,
    ) -> Result<Response<BeginTemplateImportResponse>, Status> {
        self.check("begin import")?;
        let (address, token) = (self.address.clone(), TOKEN.to_owned());
        Ok(Response::new(BeginTemplateImportResponse { address, token, node: "nodes/n1".into(), tls: false }))
    }

    async fn create_template(&self, request: Request<CreateTemplateRequest>) -> Result<Response<Template>, Status> {
        let request = request.into_inner();
        self.book().template_creates.push(request.clone());
        self.check("create template")?;
        let name = format!("templates/{}", request.template_id);
        let template = Template { name, holders: vec!["nodes/n1".into()], ..request.template.unwrap_or_default() };
        Ok(Response::new(template))
    }

    async fn get_template(&self, request: Request<GetTemplateRequest>) -> Result<Response<Template>, Status> {
        let name = request.into_inner().name;
        let found = self.book().templates.iter().find(|template| template.name == name).cloned();
        let missing = || error(Code::NotFound, ErrorReason::TemplateNotFound, &format!("there is no {name}"));
        found.map(Response::new).ok_or_else(missing)
    }

    async fn list_templates(
        &self,
        request: Request<ListTemplatesRequest>,
    ) -> Result<Response<ListTemplatesResponse>, Status> {
        let (templates, next_page_token) = page(self.book().templates.clone(), &request.get_ref().page_token);
        Ok(Response::new(ListTemplatesResponse { templates, next_page_token, revision: 1 }))
    }

    async fn delete_template(
        &self,
        _: Request<DeleteTemplateRequest>,
    ) -> Result<Response<DeleteTemplateResponse>, Status> {
        self.check("delete template")?;
        Ok(Response::new(DeleteTemplateResponse {}))
    }
}
