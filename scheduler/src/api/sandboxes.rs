//! `SandboxService`.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use warren_proto::ids::{SandboxName, TenantId};
use warren_proto::v1::sandbox_service_server::SandboxService;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::{
    self, BatchCreateSandboxesRequest, BatchCreateSandboxesResponse, ConnectSandboxRequest, ConnectSandboxResponse,
    CreateSandboxRequest, DeleteSandboxRequest, GetSandboxRequest, ListSandboxesRequest, ListSandboxesResponse,
    Sandbox, SandboxState, TokenClaims, UpdateSandboxRequest, WaitSandboxRequest, WaitSandboxResponse,
    WatchSandboxesRequest,
};

use super::creates::Creates;
use super::filter::Filter;
use super::page::Page;
use super::shares::{Bounds, Shares};
use super::wait::{Waits, Wanted};
use super::watch::{WatchStream, Watchers, watch_token};
use super::{caller, convert, read, status, validate};
use crate::clock;
use crate::controller::{Answered, ControlError, Controller};
use crate::state::State;
use crate::state::command::Caller;
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
    creates: Creates,
    changes: Shares,
    watchers: Watchers,
    waits: Waits,
}

/// What one tenant may have under way here of what changes the ledger: a third of what the log takes from clients, so that one tenant
/// cannot fill it. The log's queue bounds them all.
const CHANGES: Bounds = Bounds { what: "changes", whole: usize::MAX, of_tenant: 4096 };

impl SandboxesApi {
    pub fn new(controller: Controller) -> Self {
        let changes = Shares::new(CHANGES);
        Self {
            creates: Creates::new(controller.clone(), changes.clone()),
            changes,
            watchers: Watchers::default(),
            waits: Waits::start(controller.clone()),
            controller,
        }
    }

    /// As the sandbox stands in the state that the change left.
    fn shown(&self, name: &SandboxName, answered: &Answered<sandbox::Sandbox>) -> Response<Sandbox> {
        Response::new(convert::answered(&self.controller.replica().state(), name, answered))
    }
}

#[tonic::async_trait]
impl SandboxService for SandboxesApi {
    type WatchSandboxesStream = WatchStream;

    async fn create_sandbox(&self, request: Request<CreateSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        self.creates.one(caller, request.into_inner()).await.map(Response::new)
    }

    async fn batch_create_sandboxes(
        &self,
        request: Request<BatchCreateSandboxesRequest>,
    ) -> Result<Response<BatchCreateSandboxesResponse>, Status> {
        let caller = caller::of(&request);
        self.creates.batch(caller, request.into_inner()).await.map(Response::new)
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let name = own_name(&caller::of(&request), &request.get_ref().name)?;
        let state = read::state(&self.controller, &request).await?;
        let sandbox = state.sandboxes.get(&name).ok_or_else(|| status::sandbox_not_found(&name))?;
        Ok(Response::new(convert::sandbox_in_full(&state, sandbox, self.controller.log_now(&state))))
    }

    async fn wait_sandbox(
        &self,
        request: Request<WaitSandboxRequest>,
    ) -> Result<Response<WaitSandboxResponse>, Status> {
        let name = own_name(&caller::of(&request), &request.get_ref().name)?;
        let wanted = Wanted::parse(name, request.get_ref())?;
        let state = read::state(&self.controller, &request).await?;
        self.waits.wait(&wanted, state).await.map(Response::new)
    }

    async fn update_sandbox(&self, request: Request<UpdateSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let key = validate::request_key(&request_id, &request)?;
        let wanted = request.sandbox.unwrap_or_default();
        let name = SandboxName::parse(&wanted.name).map_err(validate::id_error("sandbox.name"))?;
        caller::check_tenant(&caller, &name.tenant)?;
        let change = validate::change(&wanted, request.update_mask)?;
        let if_revision = validate::etag(&wanted.etag)?;
        let _share = self.changes.take(Some(&name.tenant), 1)?;
        let updated = self.controller.update_sandbox(caller, name.clone(), change, if_revision, key).await;
        Ok(self.shown(&name, &updated.map_err(status::control)?))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        let caller = caller::of(&request);
        let wanted = request.get_ref();
        let filter = Filter::parse(&wanted.parent, &wanted.states, wanted.labels.clone(), &wanted.node)?;
        check_filter(&caller, filter.tenant())?;
        let page = Page::parse(&filter.describe(), wanted.page_size, &wanted.page_token)?;
        let state = read::state(&self.controller, &request).await?;
        Ok(Response::new(list_page(&state, &filter, &page)?))
    }

    async fn watch_sandboxes(&self, request: Request<WatchSandboxesRequest>) -> Result<Response<WatchStream>, Status> {
        let caller = caller::of(&request);
        let wanted = request.get_ref();
        let filter = Filter::parse(&wanted.parent, &wanted.states, wanted.labels.clone(), "")?;
        check_filter(&caller, filter.tenant())?;
        let state = read::state(&self.controller, &request).await?;
        let token = request.into_inner().watch_token;
        Ok(Response::new(self.watchers.start(&self.controller, &state, filter, &token)?))
    }

    async fn delete_sandbox(&self, request: Request<DeleteSandboxRequest>) -> Result<Response<Sandbox>, Status> {
        let caller = caller::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let key = validate::request_key(&request_id, &request)?;
        let name = own_name(&caller, &request.name)?;
        let _share = self.changes.take(Some(&name.tenant), 1)?;
        match self.controller.delete_sandbox(caller, name.clone(), key).await {
            Ok(deleted) => Ok(self.shown(&name, &deleted)),
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
        let name = own_name(&caller::of(&request), &request.get_ref().name)?;
        let ttl = token_ttl(request.get_ref().token_ttl)?;
        let state = read::state(&self.controller, &request).await?;
        let sandbox = state.sandboxes.get(&name).ok_or_else(|| status::sandbox_not_found(&name))?;
        Ok(Response::new(self.connect(&state, sandbox, ttl)?))
    }
}

/// The sandbox's name, if the caller may act for its tenant.
fn own_name(caller: &Caller, text: &str) -> Result<SandboxName, Status> {
    let name = validate::sandbox_name(text)?;
    caller::check_tenant(caller, &name.tenant)?;
    Ok(name)
}

fn check_filter(caller: &Caller, tenant: Option<&TenantId>) -> Result<(), Status> {
    match tenant {
        Some(tenant) => caller::check_tenant(caller, tenant),
        None => caller::check_operator(caller),
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
        let node = state.nodes.get(id).ok_or_else(|| status::node_not_found(id))?;
        if !node.is_ready() {
            return Err(status::node_unreachable(&sandbox.name, id));
        }
        if !self.controller.may_sign(state) {
            return Err(status::no_leader());
        }
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
fn list_page(state: &Arc<State>, filter: &Filter, page: &Page) -> Result<ListSandboxesResponse, Status> {
    let after = page.after.as_deref().map(SandboxName::parse).transpose().map_err(|_| status::invalid_page_token())?;
    let mut found = filter.walk(state, after.as_ref())?;
    let sandboxes: Vec<v1::Sandbox> =
        found.by_ref().take(page.size).map(|sandbox| convert::sandbox(state, sandbox)).collect();
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
