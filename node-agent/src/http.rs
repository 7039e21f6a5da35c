//! `/metrics`, `/healthz` and `/readyz`, for Prometheus and whoever watches the process.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::clock::BootInstant;
use crate::metrics::{GENERATION, LEASE_REMAINING, SANDBOXES, TEMPLATES};
use crate::session::{Membership, count_by_phase};
use crate::supervisor::Supervisor;

/// What the pages are made from.
#[derive(Clone)]
struct Sources {
    supervisor: Supervisor,
    membership: Membership,
    metrics: PrometheusHandle,
}

/// The three pages.
pub fn router(supervisor: Supervisor, membership: Membership, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/metrics", get(render))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Sources { supervisor, membership, metrics })
}

async fn render(State(sources): State<Sources>) -> String {
    let snapshot = sources.supervisor.observe();
    for (phase, count) in count_by_phase(&snapshot.reports) {
        gauge!(SANDBOXES, "phase" => phase).set(count as f64);
    }
    gauge!(TEMPLATES).set(snapshot.templates.len() as f64);
    gauge!(GENERATION).set(snapshot.generation.0 as f64);
    let left = sources.membership.lease_remaining(BootInstant::now()).unwrap_or_default();
    gauge!(LEASE_REMAINING).set(left.as_secs_f64());
    // Histograms are folded in as they are scraped: nothing else drains them.
    sources.metrics.run_upkeep();
    sources.metrics.render()
}

/// Ready: registered, with a lease. The drivers were listed before this is served.
async fn ready(State(sources): State<Sources>) -> (StatusCode, &'static str) {
    let leased = sources.membership.lease_remaining(BootInstant::now()).is_some();
    match (sources.membership.is_registered(), leased) {
        (true, true) => (StatusCode::OK, "ready\n"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "no session with a leader\n"),
        (true, false) => (StatusCode::SERVICE_UNAVAILABLE, "the lease lapsed\n"),
    }
}
