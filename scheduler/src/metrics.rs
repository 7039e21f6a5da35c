//! Every metric of the scheduler: names, units, descriptions, and where they are set from.
//!
//! No id, tenant or template is ever a label: the count of series does not grow with what Warren runs.

use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::BoxFuture;
use http::{Request, Response};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::clock;
use crate::controller::Controller;
use crate::raft::Leadership;
use crate::state::sandbox::Life;

const REQUESTS: &str = "warren_grpc_requests_total";
const REQUEST_SECONDS: &str = "warren_grpc_request_duration_seconds";
const IS_LEADER: &str = "warren_raft_is_leader";
const HAS_LEADER: &str = "warren_raft_has_leader";
const TERM: &str = "warren_raft_term";
const LAST_LOG: &str = "warren_raft_last_log_index";
const APPLIED: &str = "warren_raft_applied_index";
const CHECKPOINT: &str = "warren_raft_checkpoint_index";
const SYNCS: &str = "warren_raft_log_syncs_total";
const NODES: &str = "warren_nodes";
const SANDBOXES: &str = "warren_sandboxes";
const SESSIONS: &str = "warren_agent_sessions";
const KEPT_ANSWERS: &str = "warren_request_ids";
const LOG_TIME: &str = "warren_log_time_seconds";

/// Seconds; from a commit on a fast disk to what a client gives up on.
const LATENCY_BUCKETS: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Installs the recorder; once a process.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(REQUEST_SECONDS.to_owned()), &LATENCY_BUCKETS)?
        .install_recorder()?;
    describe_counter!(REQUESTS, Unit::Count, "gRPC calls that were answered here, by method and code");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "Time until a gRPC call's response began, by method");
    describe_gauge!(IS_LEADER, "1 while this replica leads");
    describe_gauge!(HAS_LEADER, "1 while this replica knows a leader");
    describe_gauge!(TERM, "Raft term");
    describe_gauge!(LAST_LOG, "Index of the last entry in this replica's log");
    describe_gauge!(APPLIED, "Index of the last entry that this replica has applied");
    describe_gauge!(CHECKPOINT, "Index of the last entry that the newest checkpoint holds");
    describe_counter!(SYNCS, Unit::Count, "Durable syncs of the log");
    describe_gauge!(NODES, "Nodes by state, in the state that this replica has applied");
    describe_gauge!(SANDBOXES, "Sandboxes by state, in the state that this replica has applied");
    describe_gauge!(SESSIONS, "Agents that have a session with this replica");
    describe_gauge!(KEPT_ANSWERS, "Answers in the table of request ids");
    describe_gauge!(LOG_TIME, Unit::Seconds, "The ledger's clock, since the Unix epoch");
    Ok(handle)
}

/// Sets the gauges that follow from state, for a scrape.
#[allow(clippy::cast_precision_loss, reason = "a gauge is a float, and these stay far below 2^53")]
pub fn observe(controller: &Controller) {
    let replica = controller.replica();
    let status = replica.status();
    let leads = matches!(*replica.leadership().borrow(), Leadership::Leader { .. });
    gauge!(IS_LEADER).set(if leads { 1.0 } else { 0.0 });
    gauge!(HAS_LEADER).set(if status.leader.is_some() { 1.0 } else { 0.0 });
    gauge!(TERM).set(status.term as f64);
    gauge!(LAST_LOG).set(status.last_log_index as f64);
    gauge!(APPLIED).set(status.applied_index as f64);
    gauge!(CHECKPOINT).set(status.checkpoint_index as f64);
    counter!(SYNCS).absolute(status.sync_count);
    let state = replica.state();
    let (suspect, down) = (state.suspects.len(), state.down.len());
    let ready = state.nodes.len().saturating_sub(suspect).saturating_sub(down);
    gauge!(NODES, "state" => "ready").set(ready as f64);
    gauge!(NODES, "state" => "suspect").set(suspect as f64);
    gauge!(NODES, "state" => "down").set(down as f64);
    for kind in Life::KINDS {
        gauge!(SANDBOXES, "state" => kind.to_lowercase()).set(state.indexes.count(kind) as f64);
    }
    gauge!(SESSIONS).set(controller.sessions().count() as f64);
    gauge!(KEPT_ANSWERS).set(state.requests.len() as f64);
    gauge!(LOG_TIME).set(state.log_time.0 as f64 / 1000.0);
}

/// Counts and times every gRPC call.
#[derive(Debug, Clone, Copy)]
pub struct RequestMetricsLayer;

impl<S> Layer<S> for RequestMetricsLayer {
    type Service = RequestMetrics<S>;

    fn layer(&self, inner: S) -> RequestMetrics<S> {
        RequestMetrics { inner }
    }
}

/// See [`RequestMetricsLayer`].
#[derive(Debug, Clone)]
pub struct RequestMetrics<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for RequestMetrics<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Send,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = method_label(request.uri().path());
        let begin = clock::monotonic();
        let answering = self.inner.call(request);
        Box::pin(async move {
            let result = answering.await;
            if let Ok(response) = &result {
                record(method, response, begin);
            }
            result
        })
    }
}

fn record(method: &'static str, response: &Response<Body>, begin: Instant) {
    // A status that comes with the trailers counts as 0 here: the stream began well.
    let code = response.headers().get("grpc-status").and_then(|value| value.to_str().ok()).unwrap_or("0").to_owned();
    counter!(REQUESTS, "method" => method, "code" => code).increment(1);
    histogram!(REQUEST_SECONDS, "method" => method).record(clock::monotonic().duration_since(begin).as_secs_f64());
}

/// The methods of Warren's own services; a path that a client made up is `other`.
fn method_label(path: &str) -> &'static str {
    const METHODS: [&str; 16] = [
        "CreateSandbox",
        "GetSandbox",
        "ListSandboxes",
        "WatchSandboxes",
        "DeleteSandbox",
        "ConnectSandbox",
        "BeginTemplateUpload",
        "CreateTemplate",
        "GetTemplate",
        "ListTemplates",
        "DeleteTemplate",
        "GetNode",
        "ListNodes",
        "GetClusterStatus",
        "GetReplicaStatus",
        "OpenSession",
    ];
    let method = path.strip_prefix("/warren.v1.").and_then(|rest| rest.split_once('/')).map(|(_, method)| method);
    METHODS.iter().find(|known| Some(**known) == method).copied().unwrap_or("other")
}
