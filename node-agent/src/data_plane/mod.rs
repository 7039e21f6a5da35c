//! What clients and other agents ask of this node: processes in sandboxes, and the bytes of templates.
//!
//! Every call is checked against its token before anything else. Messages are at most [`MAX_CHUNK`]; nothing is read faster
//! than it is passed on. Children: `auth`, `status` (the only place that makes a status), `held`, `exec`, `process`, `logs`,
//! `files`, `ports`, `templates`.

mod auth;
mod exec;
mod files;
mod held;
mod logs;
mod ports;
mod process;
mod status;
mod templates;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use warren_proto::client::TlsFiles;
use warren_proto::v1::sandbox_data_service_server::SandboxDataServiceServer;
use warren_proto::v1::sandbox_file_service_server::SandboxFileServiceServer;
use warren_proto::v1::sandbox_log_service_server::SandboxLogServiceServer;
use warren_proto::v1::sandbox_port_service_server::SandboxPortServiceServer;
use warren_proto::v1::sandbox_process_service_server::SandboxProcessServiceServer;
use warren_proto::v1::template_data_service_server::TemplateDataServiceServer;

pub use auth::Authority;

use crate::supervisor::Supervisor;
use crate::templates::TemplateStore;

/// Largest piece of a stream, as the protocol says.
pub const MAX_CHUNK: usize = 1 << 20;
/// A message around such a piece.
const MAX_MESSAGE: usize = MAX_CHUNK + (16 << 10);

/// A client that vanished without a word is noticed within the sum: its processes must not outlive it for long.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long streams may take to end once the agent stops; they are told to at once.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Why a server cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("read {path}: {source}")]
    TlsFile { path: PathBuf, source: io::Error },
    #[error("server: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// The services of the data plane with reflection and health.
pub async fn routes(
    supervisor: Supervisor,
    store: TemplateStore,
    authority: Authority,
    insecure_registries: Vec<String>,
    stop: CancellationToken,
) -> Result<Routes, ServeError> {
    let instances = held::Instances::new(supervisor.clone(), authority.clone(), stop.clone());
    let files = files::FileService::new(instances.clone());
    let ports = ports::PortService::new(instances);
    let slots = process::Slots::adopt(&supervisor);
    let exec = exec::ExecService::new(supervisor.clone(), authority.clone(), slots.clone(), stop.clone());
    let processes = process::ProcessService::new(supervisor.clone(), authority.clone(), slots, stop.clone());
    let logs = logs::LogService::new(supervisor, authority.clone(), stop.clone());
    let templates = templates::TemplateService::new(store, authority, insecure_registries, stop);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<SandboxDataServiceServer<exec::ExecService>>().await;
    health.set_serving::<SandboxProcessServiceServer<process::ProcessService>>().await;
    health.set_serving::<SandboxLogServiceServer<logs::LogService>>().await;
    health.set_serving::<TemplateDataServiceServer<templates::TemplateService>>().await;
    health.set_serving::<SandboxFileServiceServer<files::FileService>>().await;
    health.set_serving::<SandboxPortServiceServer<ports::PortService>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(warren_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("warren.v1.SandboxDataService")
            .with_service_name("warren.v1.SandboxFileService")
            .with_service_name("warren.v1.SandboxPortService")
            .with_service_name("warren.v1.SandboxProcessService")
            .with_service_name("warren.v1.SandboxLogService")
            .with_service_name("warren.v1.TemplateDataService")
            .with_service_name("grpc.health.v1.Health")
    };
    Ok(Routes::new(SandboxDataServiceServer::new(exec).max_decoding_message_size(MAX_MESSAGE))
        .add_service(SandboxProcessServiceServer::new(processes).max_decoding_message_size(MAX_MESSAGE))
        .add_service(SandboxLogServiceServer::new(logs))
        .add_service(TemplateDataServiceServer::new(templates).max_decoding_message_size(MAX_MESSAGE))
        .add_service(SandboxFileServiceServer::new(files).max_decoding_message_size(MAX_MESSAGE))
        .add_service(SandboxPortServiceServer::new(ports).max_decoding_message_size(MAX_MESSAGE))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?))
}

/// Serves `routes` until `stop`, with TLS where the files name a certificate. Also HTTP/1.1, for probes and Prometheus.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    tls: &TlsFiles,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let mut server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    if let (Some(certificate), Some(key)) = (&tls.certificate, &tls.key) {
        let identity = Identity::from_pem(read(certificate)?, read(key)?);
        server = server.tls_config(ServerTlsConfig::new().identity(identity))?;
    }
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    let patience = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_PATIENCE).await;
    };
    tokio::select! {
        result = serving => Ok(result?),
        () = patience => Ok(()),
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, ServeError> {
    fs::read(path).map_err(|source| ServeError::TlsFile { path: path.clone(), source })
}
