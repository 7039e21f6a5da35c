//! `SandboxService`.

use std::ops::Bound;
use std::time::Duration;

use tonic::{Request, Response, Status};
use warren_proto::ids::{SandboxName, TenantId};
use warren_proto::v1::sandbox_service_server::SandboxService;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::{
    ConnectSandboxRequest, ConnectSandboxResponse, CreateSandboxRequest, DeleteSandboxRequest, GetSandboxRequest,
    ListSandboxesRequest, ListSandboxesResponse, Sandbox, SandboxState, TokenClaims, WatchSandboxesRequest,
};

use super::page::Page;
use super::validate;
use super::watch::{WatchStream, Watchers, watch_token};
use super::{caller, convert, status};
use crate::clock;
use crate::controller::{ControlError, Controller};
use crate::state::State;
use crate::state::event::Position;
use crate::state::outcome::Rejected;
use crate::state::sandbox::{self, Life};

/// How long a data plane token lasts when the request does not say.
const DEFAULT_TOKEN_TTL: Duration = Duration::from_secs(15 * 60);

/// Longest that a data plane token lasts: it cannot be taken back before.
const MAX_TOKEN_TTL: Duration = Duration::from_secs(60 * 60);

/// Serves `SandboxService`.
#[derive(Debug, Clone)]
pub struct SandboxesApi {
    controller: Controller,
    watchers: Watchers,
}

impl SandboxesApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller, watchers: Watchers::default() }
    }

    async fn read(&self) -> Result<std::sync::Arc<State>, Status> {
        self.controller.replica().read().await.map_err(|error| status::propose(&error))
    }
}

#[tonic::async_trait]
impl SandboxService for SandboxesApi {
    type WatchSandboxesStream = WatchStream;
    async fn batch_create_sandboxes(
        &self,
        _: Request<warren_proto::v1::BatchCreateSandboxesRequest>,
    ) -> Result<Response<warren_proto::v1::BatchCreateSandboxesResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn wait_sandbox(
        &self,
        _: Request<warren_proto::v1::WaitSandboxRequest>,
    ) -> Result<Response<warren_proto::v1::WaitSandboxResponse>, Status> {
        Err(Status::unimplemented("soon"))
    }
    async fn update_sandbox(
        &self,
        _: Request<warren_proto::v1::UpdateSandboxRequest>,
    ) -> Result<Response<Sandbox>, Status> {
        Err(Status::unimplemented("soon"))
    }

    async fn create_sandbox(&self, request: Request<CreateSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let key = validate::request_key(&request_id, &request)?;
        let tenant = validate::one_tenant(&request.parent)?;
        caller::check_tenant(&caller, &tenant)?;
        let wanted = request.sandbox.ok_or_else(|| status::invalid_field("sandbox", "must be set"))?;
        let spec = validate::sandbox_spec(&wanted)?;
        let name = SandboxName { tenant, id: validate::sandbox_id(&request.sandbox_id)? };
        let sandbox = self.controller.create_sandbox(caller, name, spec, key).await.map_err(status::control)?;
        Ok(Response::new(convert::sandbox(&self.controller.replica().state(), &sandbox)))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        let name = validate::sandbox_name(&request.into_inner().name)?;
        caller::check_tenant(&caller, &name.tenant)?;
        let state = self.read().await?;
        let sandbox = state.sandboxes.get(&name).ok_or_else(|| status::sandbox_not_found(&name))?;
        Ok(Response::new(convert::sandbox(&state, sandbox)))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let tenant = validate::parent(&request.parent)?;
        if let Some(tenant) = &tenant {
            caller::check_tenant(&caller, tenant)?;
        }
        let list = format!("sandboxes of {}", request.parent);
        let page = Page::parse(&list, request.page_size, &request.page_token)?;
        let state = self.read().await?;
        Ok(Response::new(list_page(&state, tenant.as_ref(), &page)?))
    }

    async fn watch_sandboxes(&self, request: Request<WatchSandboxesRequest>) -> Result<Response<WatchStream>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let tenant = validate::parent(&request.parent)?;
        if let Some(tenant) = &tenant {
            caller::check_tenant(&caller, tenant)?;
        }
        let state = self.read().await?;
        let stream = self.watchers.start(&self.controller, &state, tenant, &request.watch_token)?;
        Ok(Response::new(stream))
    }

    async fn delete_sandbox(&self, request: Request<DeleteSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let key = validate::request_key(&request_id, &request)?;
        let name = validate::sandbox_name(&request.name)?;
        caller::check_tenant(&caller, &name.tenant)?;
        match self.controller.delete_sandbox(caller, name, key).await {
            Ok(sandbox) => Ok(Response::new(convert::sandbox(&self.controller.replica().state(), &sandbox))),
            Err(ControlError::Rejected(Rejected::SandboxNotFound(_))) if request.allow_missing => {
                Ok(Response::new(Sandbox::default()))
            }
            Err(error) => Err(status::control(error)),
        }
    }

    async fn connect_sandbox(
        &self,
        request: Request<ConnectSandboxRequest>,
    ) -> Result<Response<ConnectSandboxResponse>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let name = validate::sandbox_name(&request.name)?;
        caller::check_tenant(&caller, &name.tenant)?;
        let ttl = token_ttl(request.token_ttl)?;
        let state = self.read().await?;
        let sandbox = state.sandboxes.get(&name).ok_or_else(|| status::sandbox_not_found(&name))?;
        Ok(Response::new(self.connect(&state, sandbox, ttl)?))
    }
}

impl SandboxesApi {
    fn connect(
        &self,
        state: &State,
        sandbox: &sandbox::Sandbox,
        ttl: Duration,
    ) -> Result<ConnectSandboxResponse, Status> {
        let shown = convert::sandbox_state(state, sandbox);
        let Life::Running { node: id, .. } = &sandbox.life else {
            let soon = matches!(shown, SandboxState::Pending | SandboxState::Starting);
            return Err(status::sandbox_state(&sandbox.name, sandbox.life.kind(), soon));
        };
        if shown == SandboxState::Unreachable {
            return Err(status::node_unreachable(&sandbox.name, id));
        }
        let node = state.nodes.get(id).ok_or_else(|| status::node_not_found(id))?;
        let expires = clock::log_time().plus_ms(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        let token = self.controller.signer().sign(TokenClaims {
            scope: Scope::Sandbox.into(),
            ledger_id: state.ledger_id.map(|id| id.to_string()).unwrap_or_default(),
            node: id.to_string(),
            sandbox: sandbox.name.to_string(),
            epoch: sandbox.epoch.0,
            expire_time_ms: convert::int(expires.0),
            ..TokenClaims::default()
        });
        Ok(ConnectSandboxResponse {
            address: node.report.address.clone(),
            token,
            expire_time: Some(convert::timestamp(expires)),
            epoch: sandbox.epoch.0,
            node: id.name(),
            tls: node.report.tls,
        })
    }
}

fn token_ttl(wire: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let Some(wire) = wire else { return Ok(DEFAULT_TOKEN_TTL) };
    let wrong = || status::invalid_field("token_ttl", "must be more than 0 and at most 1 hour");
    let ttl = Duration::try_from(wire).map_err(|_| wrong())?;
    if ttl.is_zero() || ttl > MAX_TOKEN_TTL { Err(wrong()) } else { Ok(ttl) }
}

/// One page, ordered by name.
fn list_page(state: &State, tenant: Option<&TenantId>, page: &Page) -> Result<ListSandboxesResponse, Status> {
    let start = match &page.after {
        Some(last) => Bound::Excluded(SandboxName::parse(last).map_err(|_| status::invalid_page_token())?),
        None => match tenant {
            Some(tenant) => Bound::Included(first_of(tenant)?),
            None => Bound::Unbounded,
        },
    };
    let of_tenant = |name: &SandboxName| tenant.is_none_or(|tenant| name.tenant == *tenant);
    let mut found = state.sandboxes.range((start, Bound::Unbounded)).take_while(|(name, _)| of_tenant(name));
    let sandboxes: Vec<Sandbox> =
        found.by_ref().take(page.size).map(|(_, sandbox)| convert::sandbox(state, sandbox)).collect();
    let next_page_token = match (found.next(), sandboxes.last()) {
        (Some(_), Some(last)) => page.next_token(&last.name),
        _ => String::new(),
    };
    Ok(ListSandboxesResponse {
        sandboxes,
        next_page_token,
        revision: state.revision,
        watch_token: watch_token(state, Position::end_of(state.revision)),
    })
}

/// A name that no sandbox of the tenant comes before: ids begin with a digit or letter, and `0` is the least.
fn first_of(tenant: &TenantId) -> Result<SandboxName, Status> {
    let id = warren_proto::ids::SandboxId::parse("0").map_err(validate::id_error("parent"))?;
    Ok(SandboxName { tenant: tenant.clone(), id })
}
