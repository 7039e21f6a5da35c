//! The operators' HTTP port: `/metrics`, `/healthz`, `/readyz`.

use axum::Router;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::controller::Controller;
use crate::metrics;
use crate::raft::Leadership;

#[derive(Clone)]
struct Shown {
    controller: Controller,
    metrics: PrometheusHandle,
}

/// Serves until `stop`.
pub async fn serve(
    controller: Controller,
    metrics: PrometheusHandle,
    listener: TcpListener,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .with_state(Shown { controller, metrics });
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn render_metrics(Shared(shown): Shared<Shown>) -> String {
    metrics::observe(&shown.controller);
    shown.metrics.render()
}

/// Healthy: its Raft runs. One that does not is about to end.
async fn healthy(Shared(shown): Shared<Shown>) -> (StatusCode, String) {
    match shown.controller.replica().failure() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(cause) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ok: {cause}\n")),
    }
}

/// Ready: this replica knows a leader, and the ledger is open.
async fn ready(Shared(shown): Shared<Shown>) -> (StatusCode, &'static str) {
    let replica = shown.controller.replica();
    let knows_leader = !matches!(*replica.leadership().borrow(), Leadership::Follower { leader: None });
    match (knows_leader, replica.state().ledger_id.is_some()) {
        (true, true) => (StatusCode::OK, "ready\n"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "not ready: this replica knows no leader\n"),
        (true, false) => (StatusCode::SERVICE_UNAVAILABLE, "not ready: the ledger is not open yet\n"),
    }
}
