//! Sandboxes: create, look, delete, and wait for what becomes of them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail};
use tonic::Status;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{
    ConnectSandboxRequest, ConnectSandboxResponse, CreateSandboxRequest, DeleteSandboxRequest, GetSandboxRequest,
    ListSandboxesRequest, Resources, Sandbox, SandboxState, WaitSandboxRequest, WatchSandboxesResponse,
};

use super::Client;
use crate::cluster::TEMPLATE;

/// Whose sandboxes tests make.
pub const TENANT: &str = "tenants/default";

/// Fewer than tests have sandboxes, so that lists have several pages.
const PAGE_SIZE: i32 = 40;

/// A sandbox of the test template, small enough that hundreds fit.
pub fn small_sandbox() -> Sandbox {
    Sandbox {
        template: format!("templates/{TEMPLATE}"),
        resources: Some(Resources { cpu_milli: 50, memory_bytes: 32 << 20, disk_bytes: 64 << 20, pids: 32, gpus: 0 }),
        ..Sandbox::default()
    }
}

impl Client {
    /// Creates a sandbox under a name that the server makes.
    pub async fn create(&self, sandbox: Sandbox) -> Result<Sandbox, Status> {
        self.create_as(CreateSandboxRequest {
            parent: TENANT.to_owned(),
            sandbox: Some(sandbox),
            request_id: Self::request_id(),
            ..CreateSandboxRequest::default()
        })
        .await
    }

    /// Creates exactly what the request says.
    pub async fn create_as(&self, request: CreateSandboxRequest) -> Result<Sandbox, Status> {
        self.call(|channel| {
            let request = request.clone();
            async move { SandboxServiceClient::new(channel).create_sandbox(request).await }
        })
        .await
    }

    pub async fn get(&self, name: &str) -> Result<Sandbox, Status> {
        self.call(|channel| {
            let request = GetSandboxRequest { name: name.to_owned() };
            async move { SandboxServiceClient::new(channel).get_sandbox(request).await }
        })
        .await
    }

    /// All sandboxes of the tenant, page by page.
    pub async fn list(&self) -> Result<Vec<Sandbox>, Status> {
        let mut sandboxes = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = ListSandboxesRequest {
                parent: TENANT.to_owned(),
                page_size: PAGE_SIZE,
                page_token: page_token.clone(),
                ..Default::default()
            };
            let page = self
                .call(|channel| {
                    let request = request.clone();
                    async move { SandboxServiceClient::new(channel).list_sandboxes(request).await }
                })
                .await?;
            sandboxes.extend(page.sandboxes);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(sandboxes);
            }
        }
    }

    /// A token from which a watch continues exactly where a list was read.
    pub async fn watch_token(&self) -> Result<String, Status> {
        let request = ListSandboxesRequest { parent: TENANT.to_owned(), ..ListSandboxesRequest::default() };
        let page = self
            .call(|channel| {
                let request = request.clone();
                async move { SandboxServiceClient::new(channel).list_sandboxes(request).await }
            })
            .await?;
        Ok(page.watch_token)
    }

    /// Begins to delete a sandbox.
    pub async fn delete(&self, name: &str) -> Result<Sandbox, Status> {
        self.delete_as(DeleteSandboxRequest {
            name: name.to_owned(),
            request_id: Self::request_id(),
            ..DeleteSandboxRequest::default()
        })
        .await
    }

    /// Deletes exactly what the request says.
    pub async fn delete_as(&self, request: DeleteSandboxRequest) -> Result<Sandbox, Status> {
        self.call(|channel| {
            let request = request.clone();
            async move { SandboxServiceClient::new(channel).delete_sandbox(request).await }
        })
        .await
    }

    pub async fn connect(&self, name: &str) -> Result<ConnectSandboxResponse, Status> {
        self.call(|channel| {
            let request = ConnectSandboxRequest { name: name.to_owned(), token_ttl: None };
            async move { SandboxServiceClient::new(channel).connect_sandbox(request).await }
        })
        .await
    }

    /// Asks the server to say when a sandbox runs; whether it does.
    pub async fn wait_running(&self, name: &str) -> Result<bool, Status> {
        let answer = self
            .call_within(Duration::from_secs(70), |channel| {
                let request = WaitSandboxRequest { name: name.to_owned(), ..WaitSandboxRequest::default() };
                async move { SandboxServiceClient::new(channel).wait_sandbox(request).await }
            })
            .await?;
        Ok(answer.reached)
    }

    /// Waits until every named sandbox runs. One that ends instead is an error that says why.
    pub async fn await_running(&self, names: &[String]) -> anyhow::Result<()> {
        self.await_each(names, |event, sandbox| {
            if event == Kind::Deleted {
                bail!("{} was deleted", sandbox.name);
            }
            match sandbox.state() {
                SandboxState::Running => Ok(true),
                SandboxState::Failed | SandboxState::Stopped => {
                    let reason = sandbox.reason.clone().unwrap_or_default();
                    bail!("{} is {}: {} {}", sandbox.name, sandbox.state().as_str_name(), reason.code, reason.message)
                }
                _ => Ok(false),
            }
        })
        .await
        .context("wait until sandboxes run")
    }

    /// Waits until no named sandbox is known any more.
    pub async fn await_gone(&self, names: &[String]) -> anyhow::Result<()> {
        let mut watcher = self.watch(String::new());
        let mut left: BTreeSet<&str> = BTreeSet::new();
        let wanted: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut synced = false;
        while !synced || !left.is_empty() {
            let event = watcher.next().await.context("wait until sandboxes are gone")?;
            let name = event.sandbox.as_ref().map(|sandbox| sandbox.name.as_str()).unwrap_or_default();
            match (event.kind(), wanted.get(name)) {
                (Kind::Synced, _) => synced = true,
                (Kind::Deleted, _) => {
                    left.remove(name);
                }
                (_, Some(known)) => {
                    left.insert(known);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Watches until `done` said true of every named sandbox.
    async fn await_each(
        &self,
        names: &[String],
        done: impl Fn(Kind, &Sandbox) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let mut left: BTreeSet<String> = names.iter().cloned().collect();
        let mut watcher = self.watch(String::new());
        while !left.is_empty() {
            let event: WatchSandboxesResponse = watcher.next().await?;
            if event.kind() == Kind::Synced {
                continue;
            }
            let kind = event.kind();
            let sandbox = event.sandbox.context("an event without a sandbox")?;
            if left.contains(&sandbox.name) && done(kind, &sandbox)? {
                left.remove(&sandbox.name);
            }
        }
        Ok(())
    }
}
