//! `TemplateService`.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use warren_proto::ids::{Digest, TemplateId};
use warren_proto::v1::template_service_server::TemplateService;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::{
    BeginTemplateImportRequest, BeginTemplateImportResponse, BeginTemplateUploadRequest, BeginTemplateUploadResponse,
    CreateTemplateRequest, DeleteTemplateRequest, DeleteTemplateResponse, GetTemplateRequest, ListTemplatesRequest,
    ListTemplatesResponse, Template, TokenClaims,
};

use super::page::Page;
use super::{caller, convert, read, status, validate};
use crate::clock;
use crate::controller::{Answered, Controller};
use crate::state::State;
use crate::state::node::Node;

/// How long an upload may begin after it was asked for.
const UPLOAD_TOKEN_TTL: Duration = Duration::from_secs(60 * 60);

/// How long a create waits for the node to report the bytes that it has just taken.
const HOLDER_PATIENCE: Duration = Duration::from_secs(10);

/// Serves `TemplateService`.
#[derive(Debug, Clone)]
pub struct TemplatesApi {
    controller: Controller,
}

impl TemplatesApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }

    /// Waits until a reachable node reports that it holds the bytes.
    async fn await_holder(&self, digest: Digest) -> Result<(), Status> {
        let mut states = self.controller.replica().watch_state();
        let held = states.wait_for(|state| reachable(state).any(|node| node.templates.contains(&digest)));
        match tokio::time::timeout(HOLDER_PATIENCE, held).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(status::bytes_not_held(digest)),
        }
    }

    /// A token that brings bytes to one node.
    fn node_token(&self, state: &State, node: &Node, scope: Scope, template_digest: String) -> Result<String, Status> {
        if !self.controller.may_sign(state) {
            return Err(status::no_leader());
        }
        let expires = clock::log_time().plus_ms(u64::try_from(UPLOAD_TOKEN_TTL.as_millis()).unwrap_or(u64::MAX));
        Ok(self.controller.signer().sign(TokenClaims {
            scope: scope.into(),
            ledger_id: state.ledger_id.map(|id| id.to_string()).unwrap_or_default(),
            node: node.id.to_string(),
            template_digest,
            expire_time_ms: convert::int(expires.0),
            ..TokenClaims::default()
        }))
    }
}

fn reachable(state: &State) -> impl Iterator<Item = &Arc<Node>> {
    state.nodes.values().filter(|node| node.is_ready())
}

fn template_name(text: &str) -> Result<TemplateId, Status> {
    TemplateId::from_name(text).map_err(validate::id_error("name"))
}

#[tonic::async_trait]
impl TemplateService for TemplatesApi {
    async fn begin_template_upload(
        &self,
        request: Request<BeginTemplateUploadRequest>,
    ) -> Result<Response<BeginTemplateUploadResponse>, Status> {
        let digest = validate::digest("digest", &request.get_ref().digest)?;
        validate::template_size("size_bytes", request.get_ref().size_bytes)?;
        let state = read::state(&self.controller, &request).await?;
        // One that holds it already needs no bytes; else the one with the most room.
        let node = reachable(&state)
            .max_by_key(|node| (node.templates.contains(&digest), node.free().disk))
            .ok_or_else(status::no_node_available)?;
        let token = self.node_token(&state, node, Scope::TemplateUpload, digest.to_string())?;
        Ok(Response::new(BeginTemplateUploadResponse {
            address: node.report.address.clone(),
            token,
            node: node.id.name(),
            tls: node.report.tls,
        }))
    }

    async fn begin_template_import(
        &self,
        request: Request<BeginTemplateImportRequest>,
    ) -> Result<Response<BeginTemplateImportResponse>, Status> {
        let state = read::state(&self.controller, &request).await?;
        let node = reachable(&state).max_by_key(|node| node.free().disk).ok_or_else(status::no_node_available)?;
        Ok(Response::new(BeginTemplateImportResponse {
            address: node.report.address.clone(),
            token: self.node_token(&state, node, Scope::TemplateImport, String::new())?,
            node: node.id.name(),
            tls: node.report.tls,
        }))
    }

    async fn create_template(&self, request: Request<CreateTemplateRequest>) -> Result<Response<Template>, Status> {
        let caller = caller::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let key = validate::request_key(&request_id, &request)?;
        let id = TemplateId::parse(&request.template_id).map_err(validate::id_error("template_id"))?;
        let wanted = request.template.ok_or_else(|| status::invalid_field("template", "must be set"))?;
        let spec = validate::template_spec(&wanted)?;
        self.await_holder(spec.digest).await?;
        let created = self.controller.create_template(caller, id.clone(), spec, key).await.map_err(status::control)?;
        Ok(Response::new(match created {
            Answered::Is(template) => convert::template(&self.controller.replica().state(), &template),
            // It came before, and the template is deleted since.
            Answered::WasAt { .. } => Template { name: id.name(), ..Template::default() },
        }))
    }

    async fn get_template(&self, request: Request<GetTemplateRequest>) -> Result<Response<Template>, Status> {
        let id = template_name(&request.get_ref().name)?;
        let state = read::state(&self.controller, &request).await?;
        let template = state.templates.get(&id).ok_or_else(|| status::template_not_found(&id))?;
        Ok(Response::new(convert::template(&state, template)))
    }

    async fn list_templates(
        &self,
        request: Request<ListTemplatesRequest>,
    ) -> Result<Response<ListTemplatesResponse>, Status> {
        let page = Page::parse("templates", request.get_ref().page_size, &request.get_ref().page_token)?;
        let start = match &page.after {
            Some(last) => Bound::Excluded(TemplateId::parse(last).map_err(|_| status::invalid_page_token())?),
            None => Bound::Unbounded,
        };
        let state = read::state(&self.controller, &request).await?;
        let mut found = state.templates.range((start, Bound::Unbounded));
        let listed: Vec<_> = found.by_ref().take(page.size).map(|(_, template)| template).collect();
        let next_page_token = match (found.next(), listed.last()) {
            (Some(_), Some(last)) => page.next_token(last.id.as_str()),
            _ => String::new(),
        };
        Ok(Response::new(ListTemplatesResponse {
            templates: listed.into_iter().map(|template| convert::template(&state, template)).collect(),
            next_page_token,
            revision: state.revision,
        }))
    }

    async fn delete_template(
        &self,
        request: Request<DeleteTemplateRequest>,
    ) -> Result<Response<DeleteTemplateResponse>, Status> {
        let caller = caller::of(&request);
        let id = template_name(&request.into_inner().name)?;
        self.controller.delete_template(caller, id).await.map_err(status::control)?;
        Ok(Response::new(DeleteTemplateResponse {}))
    }
}
