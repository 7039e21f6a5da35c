//! Creating sandboxes, one or many: what was asked is checked, secrets are sealed, and the controller decides.

use std::sync::Arc;

use tonic::Status;
use warren_proto::ids::{SandboxName, TenantId};
use warren_proto::v1::batch_create_result::Result as ItemResult;
use warren_proto::v1::{
    self, BatchCreateResult, BatchCreateSandboxesRequest, BatchCreateSandboxesResponse, CreateSandboxRequest,
};

use super::shares::Shares;
use super::{caller, convert, status, validate};
use crate::controller::{Answered, ControlError, Controller, NewSandbox};
use crate::state::command::{Caller, RequestKey};
use crate::state::sandbox::{Sandbox, SandboxSpec};

/// Most sandboxes of one batch.
const MAX_BATCH: usize = 1000;

/// Creates sandboxes through one controller. Clones share what is under way.
#[derive(Debug, Clone)]
pub(super) struct Creates {
    controller: Controller,
    changes: Shares,
}

impl Creates {
    /// `changes`: what tenants have under way of creates and all else that changes the ledger.
    pub fn new(controller: Controller, changes: Shares) -> Self {
        Self { controller, changes }
    }

    fn check_disk(&self) -> Result<(), Status> {
        match self.controller.full_disk() {
            Some((replica, percent)) => Err(status::disk_full(replica, percent)),
            None => Ok(()),
        }
    }

    /// Creates one sandbox.
    pub async fn one(&self, caller: Caller, request: CreateSandboxRequest) -> Result<v1::Sandbox, Status> {
        let tenant = validate::one_tenant(&request.parent)?;
        caller::check_tenant(&caller, &tenant)?;
        self.check_disk()?;
        let _share = self.changes.take(Some(&tenant), 1)?;
        let new = self.new_sandbox(&tenant, request)?;
        let name = new.name.clone();
        let created = self.controller.create_sandbox(caller, new).await.map_err(status::control)?;
        Ok(convert::answered(&self.controller.replica().state(), &name, &created))
    }

    /// Creates many, each for itself or all in one step.
    pub async fn batch(
        &self,
        caller: Caller,
        mut request: BatchCreateSandboxesRequest,
    ) -> Result<BatchCreateSandboxesResponse, Status> {
        let tenant = validate::one_tenant(&request.parent)?;
        caller::check_tenant(&caller, &tenant)?;
        self.check_disk()?;
        if !(1..=MAX_BATCH).contains(&request.requests.len()) {
            return Err(status::invalid_field("requests", format!("must be 1 to {MAX_BATCH}")));
        }
        let _share = self.changes.take(Some(&tenant), request.requests.len())?;
        let request_id = std::mem::take(&mut request.request_id);
        if !request.all_or_nothing {
            if !request_id.is_empty() {
                let right = "goes with all_or_nothing; otherwise each of `requests` carries its own";
                return Err(status::invalid_field("request_id", right));
            }
            return self.each(caller, &tenant, request.requests).await;
        }
        let key = self.batch_key(&request_id, &request)?;
        self.all(caller, &tenant, request.requests, key).await
    }

    async fn each(
        &self,
        caller: Caller,
        tenant: &TenantId,
        requests: Vec<CreateSandboxRequest>,
    ) -> Result<BatchCreateSandboxesResponse, Status> {
        let mut results: Vec<Option<ItemResult>> = Vec::with_capacity(requests.len());
        let (mut items, mut names) = (Vec::new(), Vec::new());
        let mut specs = Shared::default();
        for request in requests {
            match check_parent(tenant, &request).and_then(|()| self.new_sandbox(tenant, request)) {
                Ok(item) => {
                    names.push(item.name.clone());
                    items.push(NewSandbox { spec: specs.share(item.spec), ..item });
                    results.push(None);
                }
                Err(wrong) => results.push(Some(ItemResult::Error(status::item(&wrong)))),
            }
        }
        let created = self.controller.create_each(caller, items).await.map_err(status::control)?;
        let mut created = names.into_iter().zip(created);
        let state = self.controller.replica().state();
        let shown = |(name, created): (SandboxName, Result<Answered<Sandbox>, ControlError>)| match created {
            Ok(created) => ItemResult::Sandbox(convert::answered(&state, &name, &created)),
            Err(error) => ItemResult::Error(status::item(&status::control(error))),
        };
        let results = results.into_iter().map(|known| known.or_else(|| created.next().map(shown)));
        Ok(BatchCreateSandboxesResponse {
            results: results.map(|result| BatchCreateResult { result }).collect(),
            revision: state.revision,
        })
    }

    async fn all(
        &self,
        caller: Caller,
        tenant: &TenantId,
        requests: Vec<CreateSandboxRequest>,
        key: Option<RequestKey>,
    ) -> Result<BatchCreateSandboxesResponse, Status> {
        let mut specs = Shared::default();
        let mut items = Vec::with_capacity(requests.len());
        for request in requests {
            check_parent(tenant, &request)?;
            if !request.request_id.is_empty() {
                return Err(status::invalid_field("requests.request_id", "goes beside all_or_nothing, on the batch"));
            }
            let item = self.new_sandbox(tenant, request)?;
            items.push(NewSandbox { spec: specs.share(item.spec), ..item });
        }
        let names = self.controller.create_all(caller, items, key).await.map_err(status::control)?;
        let state = self.controller.replica().state();
        let shown = |name: &SandboxName| match state.sandboxes.get(name) {
            Some(sandbox) => ItemResult::Sandbox(convert::sandbox(&state, sandbox)),
            // An earlier attempt created it, and it is deleted by now.
            None => ItemResult::Sandbox(convert::gone(name, state.revision)),
        };
        Ok(BatchCreateSandboxesResponse {
            results: names.iter().map(|name| BatchCreateResult { result: Some(shown(name)) }).collect(),
            revision: state.revision,
        })
    }

    fn new_sandbox(&self, tenant: &TenantId, mut request: CreateSandboxRequest) -> Result<NewSandbox, Status> {
        let request_id = std::mem::take(&mut request.request_id);
        let key = match request.sandbox.as_ref().is_some_and(|sandbox| !sandbox.secret_environment.is_empty()) {
            true => validate::request_key(&request_id, &self.without_secrets(&request)?)?,
            false => validate::request_key(&request_id, &request)?,
        };
        let wanted = request.sandbox.ok_or_else(|| status::invalid_field("sandbox", "must be set"))?;
        let name = SandboxName::new(tenant.clone(), validate::sandbox_id(&request.sandbox_id)?);
        let seal = |variable: &str, value: &str| match self.controller.sealer() {
            Some(sealer) => Ok(sealer.seal(&name, variable, value)),
            None => Err(status::secrets_unavailable()),
        };
        let spec = Arc::new(validate::sandbox_spec(&wanted, &seal)?);
        Ok(NewSandbox { name, spec, request: key })
    }

    /// What a request's payload is hashed from: a hash over a short secret could be guessed, so a keyed one stands for it.
    fn without_secrets(&self, request: &CreateSandboxRequest) -> Result<CreateSandboxRequest, Status> {
        let mut request = request.clone();
        let sealer = self.controller.sealer().ok_or_else(status::secrets_unavailable)?;
        let sandbox = request.sandbox.get_or_insert_with(v1::Sandbox::default);
        sandbox.secret_environment.values_mut().for_each(|value| *value = sealer.fingerprint(value));
        Ok(request)
    }

    fn batch_key(&self, request_id: &str, request: &BatchCreateSandboxesRequest) -> Result<Option<RequestKey>, Status> {
        let has_secrets = |request: &CreateSandboxRequest| {
            request.sandbox.as_ref().is_some_and(|sandbox| !sandbox.secret_environment.is_empty())
        };
        if !request.requests.iter().any(has_secrets) {
            return validate::request_key(request_id, request);
        }
        let requests =
            request.requests.iter().map(|request| self.without_secrets(request)).collect::<Result<_, _>>()?;
        validate::request_key(request_id, &BatchCreateSandboxesRequest { requests, ..request.clone() })
    }
}

fn check_parent(tenant: &TenantId, request: &CreateSandboxRequest) -> Result<(), Status> {
    if request.parent.is_empty() || request.parent == tenant.name() {
        return Ok(());
    }
    Err(status::invalid_field("requests.parent", "must be the batch's parent, or empty"))
}

/// Equal specs, kept once.
#[derive(Default)]
struct Shared(Option<Arc<SandboxSpec>>);

impl Shared {
    /// Batches are mostly of one kind: comparing with the last finds nearly all.
    fn share(&mut self, spec: Arc<SandboxSpec>) -> Arc<SandboxSpec> {
        match &self.0 {
            Some(last) if **last == *spec => last.clone(),
            _ => self.0.insert(spec).clone(),
        }
    }
}
