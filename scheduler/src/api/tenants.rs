//! `TenantService`.

use std::ops::Bound;

use tonic::{Request, Response, Status};
use warren_proto::ids::TenantId;
use warren_proto::v1::tenant_service_server::TenantService;
use warren_proto::v1::{self, GetTenantRequest, ListTenantsRequest, ListTenantsResponse, SetQuotaRequest};

use super::page::Page;
use super::{caller, convert, read, status, validate};
use crate::controller::Controller;
use crate::state::State;
use crate::state::command::Body;
use crate::state::tenant::{Quota, Tenant, quota_of};

/// Stands for the tenants that have no quota of their own.
const DEFAULT: &str = "tenants/-";

/// Serves `TenantService`.
#[derive(Debug, Clone)]
pub struct TenantsApi {
    controller: Controller,
}

impl TenantsApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }
}

#[tonic::async_trait]
impl TenantService for TenantsApi {
    async fn get_tenant(&self, request: Request<GetTenantRequest>) -> Result<Response<v1::Tenant>, Status> {
        let caller = caller::of(&request);
        let Some(id) = validate::parent(&request.get_ref().name)? else {
            let state = read::state(&self.controller, &request).await?;
            return Ok(Response::new(default_quota(&state)));
        };
        caller::check_tenant(&caller, &id)?;
        let state = read::state(&self.controller, &request).await?;
        let tenant = state.tenants.get(&id).ok_or_else(|| status::tenant_not_found(&id))?;
        Ok(Response::new(shown(&state, &id, tenant)))
    }

    async fn list_tenants(
        &self,
        request: Request<ListTenantsRequest>,
    ) -> Result<Response<ListTenantsResponse>, Status> {
        caller::check_operator(&caller::of(&request))?;
        let page = Page::parse("tenants", request.get_ref().page_size, &request.get_ref().page_token)?;
        let start = match &page.after {
            Some(last) => Bound::Excluded(TenantId::parse(last).map_err(|_| status::invalid_page_token())?),
            None => Bound::Unbounded,
        };
        let state = read::state(&self.controller, &request).await?;
        let mut found = state.tenants.range((start, Bound::Unbounded));
        let listed: Vec<_> = found.by_ref().take(page.size).collect();
        let next_page_token = match (found.next(), listed.last()) {
            (Some(_), Some((last, _))) => page.next_token(last.as_str()),
            _ => String::new(),
        };
        Ok(Response::new(ListTenantsResponse {
            tenants: listed.into_iter().map(|(id, tenant)| shown(&state, id, tenant)).collect(),
            next_page_token,
            revision: state.revision,
        }))
    }

    async fn set_quota(&self, request: Request<SetQuotaRequest>) -> Result<Response<v1::Tenant>, Status> {
        let caller = caller::of(&request);
        caller::check_operator(&caller)?;
        let tenant = validate::parent(&request.get_ref().name)?;
        let quota = request.get_ref().quota.as_ref().map(validate::quota).transpose()?;
        let body = Body::SetQuota { tenant: tenant.clone(), quota };
        self.controller.operate(caller, body).await.map_err(status::control)?;
        let state = self.controller.replica().state();
        let Some(id) = tenant else { return Ok(Response::new(default_quota(&state))) };
        let record = state.tenants.get(&id).cloned().unwrap_or_default();
        Ok(Response::new(shown(&state, &id, &record)))
    }
}

fn default_quota(state: &State) -> v1::Tenant {
    v1::Tenant {
        name: DEFAULT.to_owned(),
        quota: Some(quota(&state.region.default_quota.unwrap_or_default())),
        own_quota: state.region.default_quota.is_some(),
        ..v1::Tenant::default()
    }
}

fn shown(state: &State, id: &TenantId, tenant: &Tenant) -> v1::Tenant {
    let used = tenant.used;
    v1::Tenant {
        name: id.name(),
        quota: Some(quota(&quota_of(state, id))),
        own_quota: tenant.quota.is_some(),
        usage: Some(v1::Usage {
            cpu_milli: convert::int(used.cpu.0),
            memory_bytes: convert::int(used.memory.0),
            disk_bytes: convert::int(used.disk.0),
            gpus: convert::int(used.gpus.0),
            sandboxes: convert::int(tenant.live),
        }),
        create_time: Some(convert::timestamp(tenant.created)),
    }
}

fn quota(from: &Quota) -> v1::Quota {
    v1::Quota {
        cpu_milli: from.cpu.map(|n| convert::int(n.0)),
        memory_bytes: from.memory.map(|n| convert::int(n.0)),
        disk_bytes: from.disk.map(|n| convert::int(n.0)),
        gpus: from.gpus.map(|n| convert::int(n.0)),
        sandboxes: from.sandboxes.map(convert::int),
        creates_per_minute: from.creates_per_minute.map(convert::int),
    }
}
