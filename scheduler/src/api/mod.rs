//! The gRPC services. A request is authenticated, parsed once into the domain's types, and handed to the controller.
//!
//! Any replica serves everything: a follower forwards to the leader (`forward`). Wire types stop here.

pub mod agent_session;
mod backup;
mod caller;
mod cluster;
mod convert;
mod creates;
mod filter;
mod forward;
mod nodes;
mod page;
mod read;
mod sandboxes;
mod shares;
mod status;
mod templates;
mod tenants;
mod validate;
mod wait;
mod wakes;
mod watch;

use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Server, ServerTlsConfig};
use tower::ServiceBuilder;
use warren_proto::FILE_DESCRIPTOR_SET;
use warren_proto::client::ClientTls;
use warren_proto::v1::agent_session_service_server::AgentSessionServiceServer;
use warren_proto::v1::cluster_service_server::ClusterServiceServer;
use warren_proto::v1::node_service_server::NodeServiceServer;
use warren_proto::v1::sandbox_service_server::SandboxServiceServer;
use warren_proto::v1::template_service_server::TemplateServiceServer;
use warren_proto::v1::tenant_service_server::TenantServiceServer;

use crate::controller::Controller;
use crate::metrics::RequestMetricsLayer;
use crate::raft::{Leadership, Replica};
use agent_session::AgentSessionApi;
use cluster::ClusterApi;
use forward::ForwardLayer;
use nodes::NodesApi;
use sandboxes::SandboxesApi;
use templates::TemplatesApi;
use tenants::TenantsApi;

/// Largest request of an API client: a specification is at most 16 KiB.
const MAX_API_REQUEST_BYTES: usize = 256 * 1024;

/// Largest batch: a thousand specifications, each at its limit.
const MAX_BATCH_REQUEST_BYTES: usize = 17 << 20;

/// Largest message of an agent: a hello that names everything that a large host holds.
const MAX_AGENT_MESSAGE_BYTES: usize = 32 << 20;

/// Streams of one connection at once.
const MAX_STREAMS: u32 = 4096;

/// A silent client is given up after interval + timeout.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the API on `listener` until `stop`.
pub async fn serve(
    controller: Controller,
    listener: TcpListener,
    tls: Option<ServerTlsConfig>,
    peers_tls: ClientTls,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let forward = ForwardLayer::new(controller.replica().clone(), peers_tls);
    let layers = ServiceBuilder::new().layer(RequestMetricsLayer).layer(forward).into_inner();
    let mut server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    if let Some(tls) = tls {
        server = server.tls_config(tls)?;
    }
    let routes = routes(&controller).await;
    server
        .layer(layers)
        .add_routes(routes)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop.cancelled())
        .await
}

async fn routes(controller: &Controller) -> Routes {
    let c = || controller.clone();
    let agents = AgentSessionServiceServer::new(AgentSessionApi::new(c()))
        .max_decoding_message_size(MAX_AGENT_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_AGENT_MESSAGE_BYTES);
    let (health_reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report_health(controller.replica().clone(), health_reporter));
    let mut routes = Routes::builder();
    routes
        .add_service(agents)
        .add_service(
            SandboxServiceServer::new(SandboxesApi::new(c())).max_decoding_message_size(MAX_BATCH_REQUEST_BYTES),
        )
        .add_service(
            TemplateServiceServer::new(TemplatesApi::new(c())).max_decoding_message_size(MAX_API_REQUEST_BYTES),
        )
        .add_service(NodeServiceServer::new(NodesApi::new(c())))
        .add_service(TenantServiceServer::new(TenantsApi::new(c())))
        .add_service(ClusterServiceServer::new(ClusterApi::new(c())))
        .add_service(health);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    if let Ok(service) = reflection().build_v1() {
        routes.add_service(service);
    }
    if let Ok(service) = reflection().build_v1alpha() {
        routes.add_service(service);
    }
    routes.routes()
}

/// SERVING while this replica knows a leader.
async fn report_health(replica: Replica, reporter: tonic_health::server::HealthReporter) {
    let mut leadership = replica.leadership();
    loop {
        let knows_leader = match &*leadership.borrow_and_update() {
            Leadership::Leader { .. } => true,
            Leadership::Follower { leader } => leader.is_some(),
        };
        let status =
            if knows_leader { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
        for service in ["", "warren.v1.SandboxService", "warren.v1.TemplateService", "warren.v1.NodeService"] {
            reporter.set_service_status(service, status).await;
        }
        if leadership.changed().await.is_err() {
            return;
        }
    }
}
