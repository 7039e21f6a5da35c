//! What the agent's tests share: a driver without a runtime, a scripted scheduler, and an agent between them.
#![allow(dead_code, clippy::unwrap_used)]

pub mod driver;
pub mod lab;
pub mod scheduler;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use sha2::{Digest as _, Sha256};
use tokio_stream::iter;
use tonic::Request;
use warren_node_agent::agent::{Agent, DataDir};
use warren_node_agent::clock;
use warren_node_agent::config::{Config, Layer};
use warren_node_agent::driver::Driver;
use warren_node_agent::drivers::{Built, Drivers};
use warren_proto::client::{ClientTls, channel};
use warren_proto::ids::{Digest, Epoch, SandboxName};
use warren_proto::token;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::upload_template_request::Message as UploadMessage;
use warren_proto::v1::*;

pub use driver::FakeDriver;
pub use scheduler::{Peer, Scheduler};

/// Nothing here takes longer, unless it never happens.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Between two looks at something that tells nobody when it changes: a file, another process, a counter. Looking without a
/// pause takes the processor from what is waited for.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// Waits until it is time to look again.
pub async fn look_again() {
    tokio::time::sleep(LOOK_PAUSE).await;
}

pub const LEDGER: &str = "ledger-1";
pub const KEY_ID: u64 = 1;

pub fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

pub fn name(id: &str) -> SandboxName {
    SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).unwrap()
}

pub fn instance(id: &str, epoch: u64) -> warren_node_agent::driver::InstanceKey {
    warren_node_agent::driver::InstanceKey { sandbox: name(id), epoch: Epoch(epoch) }
}

/// An agent named `node` on `data_dir`, with nothing but `driver`.
pub async fn agent(node: &str, data_dir: &Path, schedulers: &str, driver: &FakeDriver) -> Agent {
    agent_with(layer(node, data_dir, schedulers), driver).await
}

pub fn layer(node: &str, data_dir: &Path, schedulers: &str) -> Layer {
    Layer {
        node_id: Some(node.into()),
        data_dir: Some(data_dir.to_string_lossy().into_owned()),
        schedulers: Some(schedulers.into()),
        listen: Some("127.0.0.1:0".into()),
        http_listen: Some("127.0.0.1:0".into()),
        cpu_milli: Some("4000".into()),
        memory: Some("8GiB".into()),
        disk: Some("20GiB".into()),
        labels: Some("zone=a".into()),
        ..Layer::default()
    }
}

pub async fn agent_with(layer: Layer, driver: &FakeDriver) -> Agent {
    agent_of(layer, Arc::new(driver.clone())).await
}

pub async fn agent_of(layer: Layer, driver: Arc<dyn Driver>) -> Agent {
    let config = Config::resolve(layer).unwrap();
    let data_dir = DataDir::hold(&config.data_dir).unwrap();
    let built = Built { drivers: Drivers::new(vec![driver]).unwrap(), oci: None, gpus: Arc::default() };
    Agent::start(config, data_dir, built).await.unwrap()
}

/// A small root file system, as a tar.
pub fn rootfs() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3000);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_cksum();
    tar.append_data(&mut header, "file", &[b'x'; 3000][..]).unwrap();
    tar.into_inner().unwrap()
}

pub fn digest(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// A token good for a minute, for the test to change.
pub fn claims(scope: Scope) -> TokenClaims {
    TokenClaims {
        scope: scope.into(),
        key_id: KEY_ID,
        ledger_id: LEDGER.into(),
        expire_time_ms: clock::unix_now_ms() + 60_000,
        ..TokenClaims::default()
    }
}

pub fn bearer<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub fn template_client(agent: &Agent) -> TemplateDataServiceClient<tonic::transport::Channel> {
    TemplateDataServiceClient::new(channel(&agent.data_plane.to_string(), &ClientTls::default()).unwrap())
}

/// Uploads `bytes` as `digest`.
pub async fn upload(agent: &Agent, digest: Digest, bytes: &[u8]) -> Result<UploadTemplateResponse, tonic::Status> {
    let claims = TokenClaims { template_digest: digest.to_string(), ..claims(Scope::TemplateUpload) };
    let header = UploadTemplateHeader { digest: digest.to_string(), size_bytes: bytes.len() as i64 };
    let mut messages = vec![UploadTemplateRequest { message: Some(UploadMessage::Header(header)) }];
    messages.extend(
        bytes.chunks(1000).map(|part| UploadTemplateRequest { message: Some(UploadMessage::Chunk(part.to_vec())) }),
    );
    let request = bearer(iter(messages), &token::sign(&claims, &key()));
    template_client(agent).upload_template(request).await.map(tonic::Response::into_inner)
}

/// One sandbox of an assignment that starts from [`rootfs`].
pub fn running(id: &str, epoch: u64) -> AssignedSandbox {
    let tar = rootfs();
    AssignedSandbox {
        sandbox: name(id).to_string(),
        epoch,
        desired: assigned_sandbox::Desired::Running.into(),
        resources: Some(Resources { cpu_milli: 100, memory_bytes: 1 << 26, disk_bytes: 1 << 26, pids: 64, gpus: 0 }),
        template: Some(AssignedTemplate {
            digest: digest(&tar).to_string(),
            size_bytes: tar.len() as i64,
            ..AssignedTemplate::default()
        }),
        ..AssignedSandbox::default()
    }
}

pub fn removed(id: &str, epoch: u64) -> AssignedSandbox {
    AssignedSandbox {
        sandbox: name(id).to_string(),
        epoch,
        desired: assigned_sandbox::Desired::Removed.into(),
        ..AssignedSandbox::default()
    }
}
