//! Every metric of the scheduler: the recorder, what is set for a scrape, and the layer that counts calls. Names and what they say
//! stand in `names`; modules record what only they see, under these names.

pub mod names;

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::BoxFuture;
use http::{Request, Response};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::body::Body;
use tower::{Layer, Service};
use warren_proto::FILE_DESCRIPTOR_SET;
use warren_proto::units::Resources;

use crate::clock;
use crate::controller::Controller;
use crate::raft::{Leadership, MemberRole};
use crate::state::State;
use crate::state::command::LogTime;
use crate::state::sandbox::Life;

/// Seconds; from a commit on a fast disk to what a client gives up on.
const LATENCY_BUCKETS: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Seconds of one placement decision (section 7 of the design: 50 µs).
const DECISION_BUCKETS: [f64; 9] = [5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 1e-2, 0.1];

/// Installs the recorder; once a process.
#[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".to_owned()), &LATENCY_BUCKETS)?
        .set_buckets_for_metric(Matcher::Full(names::PLACEMENT_SECONDS.to_owned()), &DECISION_BUCKETS)?
        .install_recorder()?;
    names::describe();
    // Alerts on its rise need it to be there before.
    counter!(names::PROPOSALS_FAILED).absolute(0);
    gauge!(names::STARTED).set(clock::log_time().0 as f64 / 1000.0);
    Ok(handle)
}

/// Sets the gauges that follow from state, for a scrape.
#[allow(clippy::cast_precision_loss, reason = "a gauge is a float, and these stay far below 2^53")]
pub fn observe(controller: &Controller) {
    observe_raft(controller);
    let state = controller.replica().state();
    observe_region(&state);
    let log_now = controller.log_now(&state);
    gauge!(names::OLDEST_PENDING).set(oldest_pending(&state, log_now) as f64 / 1000.0);
    gauge!(names::SESSIONS).set(controller.sessions().count() as f64);
    gauge!(names::LEASES).set(controller.watched_leases() as f64);
    gauge!(names::DISK_USED).set(controller.disk().percent() as f64 / 100.0);
    gauge!(names::RESIDENT).set(resident_bytes() as f64);
}

#[allow(clippy::cast_precision_loss, reason = "a gauge is a float, and these stay far below 2^53")]
fn observe_raft(controller: &Controller) {
    let replica = controller.replica();
    let status = replica.status();
    let leads = matches!(*replica.leadership().borrow(), Leadership::Leader { .. });
    gauge!(names::IS_LEADER).set(if leads { 1.0 } else { 0.0 });
    gauge!(names::HAS_LEADER).set(if status.leader.is_some() { 1.0 } else { 0.0 });
    gauge!(names::TERM).set(status.term as f64);
    gauge!(names::LAST_LOG).set(status.last_log_index as f64);
    gauge!(names::APPLIED).set(status.applied_index as f64);
    gauge!(names::CHECKPOINT).set(status.checkpoint_index as f64);
    counter!(names::SYNCS).absolute(status.sync_count);
    gauge!(names::PROPOSALS_PENDING).set(replica.pending_proposals() as f64);
    let members = replica.members();
    let of = |role: MemberRole| members.iter().filter(|member| member.role == role).count() as f64;
    gauge!(names::MEMBERS, "role" => "voter").set(of(MemberRole::Leader) + of(MemberRole::Follower));
    gauge!(names::MEMBERS, "role" => "learner").set(of(MemberRole::Learner));
    gauge!(names::MEMBERS, "role" => "standby").set(of(MemberRole::Standby));
    let silent = members.iter().filter(|member| leads && !member.reachable).count();
    gauge!(names::MEMBERS_SILENT).set(silent as f64);
}

#[allow(clippy::cast_precision_loss, reason = "a gauge is a float, and these stay far below 2^53")]
fn observe_region(state: &State) {
    let (suspect, down) = (state.suspects.len(), state.down.len());
    let ready = state.nodes.len().saturating_sub(suspect).saturating_sub(down);
    gauge!(names::NODES, "state" => "ready").set(ready as f64);
    gauge!(names::NODES, "state" => "suspect").set(suspect as f64);
    gauge!(names::NODES, "state" => "down").set(down as f64);
    gauge!(names::NODES_CORDONED).set(state.nodes.values().filter(|node| node.cordoned).count() as f64);
    gauge!(names::ORPHANS).set(state.nodes.values().map(|node| node.orphans.len()).sum::<usize>() as f64);
    for kind in Life::KINDS {
        gauge!(names::SANDBOXES, "state" => kind.to_lowercase()).set(state.indexes.count(kind) as f64);
    }
    let (capacity, assigned) =
        state.nodes.values().fold((Totals::default(), Totals::default()), |(all, held), node| {
            (all.plus(node.report.capacity), held.plus(node.assigned))
        });
    capacity.set(names::CAPACITY);
    assigned.set(names::ASSIGNED);
    gauge!(names::TENANTS).set(state.tenants.len() as f64);
    gauge!(names::BRAKE).set(if state.region.brake_since.is_some() { 1.0 } else { 0.0 });
    let pauses = state.region.pauses;
    for (what, paused) in [("creates", pauses.creates), ("placement", pauses.placement), ("moves", pauses.moves)] {
        gauge!(names::PAUSED, "what" => what).set(if paused { 1.0 } else { 0.0 });
    }
    gauge!(names::LEVEL).set(f64::from(state.level.0));
    gauge!(names::KEPT_ANSWERS).set(state.requests.len() as f64);
    gauge!(names::EVENTS).set(state.events.len() as f64);
    gauge!(names::LOG_TIME).set(state.log_time.0 as f64 / 1000.0);
}

/// Sums over nodes, as gauges show them.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    cores: f64,
    memory: f64,
    disk: f64,
    gpus: f64,
}

impl Totals {
    #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
    fn plus(self, more: Resources) -> Self {
        Self {
            cores: self.cores + more.cpu.0 as f64 / 1000.0,
            memory: self.memory + more.memory.0 as f64,
            disk: self.disk + more.disk.0 as f64,
            gpus: self.gpus + more.gpus.0 as f64,
        }
    }

    fn set(self, name: &'static str) {
        let all =
            [("cpu_cores", self.cores), ("memory_bytes", self.memory), ("disk_bytes", self.disk), ("gpus", self.gpus)];
        for (dimension, value) in all {
            gauge!(name, "dimension" => dimension).set(value);
        }
    }
}

/// In ms.
fn oldest_pending(state: &State, now: LogTime) -> u64 {
    let firsts = state.indexes.queues.values().filter_map(|queue| queue.iter().map(|(_, created, _)| *created).min());
    firsts.min().map_or(0, |created| now.0.saturating_sub(created.0))
}

/// From /proc; 0 where there is none.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    pages.saturating_mul(rustix::param::page_size() as u64)
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
    counter!(names::REQUESTS, "method" => method, "code" => code).increment(1);
    histogram!(names::REQUEST_SECONDS, "method" => method)
        .record(clock::monotonic().duration_since(begin).as_secs_f64());
}

/// The methods of Warren's own services, by their paths.
static METHODS: LazyLock<BTreeMap<String, &'static str>> = LazyLock::new(|| {
    let described = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap_or_default();
    let files = described.file.iter().filter(|file| file.package() == "warren.v1");
    let services = files.flat_map(|file| &file.service);
    services
        .flat_map(|service| service.method.iter().map(move |method| (service.name(), method.name())))
        .map(|(service, method)| {
            (format!("/warren.v1.{service}/{method}"), &*Box::leak(method.to_owned().into_boxed_str()))
        })
        .collect()
});

/// A path that a client made up is `other`.
fn method_label(path: &str) -> &'static str {
    METHODS.get(path).copied().unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_own_label_and_what_is_made_up_has_none() {
        for (service, method) in [
            ("SandboxService", "BatchCreateSandboxes"),
            ("SandboxService", "WaitSandbox"),
            ("NodeService", "CordonNode"),
            ("TenantService", "SetQuota"),
            ("ClusterService", "Backup"),
            ("AgentSessionService", "OpenSession"),
        ] {
            assert_eq!(method_label(&format!("/warren.v1.{service}/{method}")), method);
        }
        for made_up in ["/warren.v1.SandboxService/Nothing", "/warren.v1.NodeService/WaitSandbox", "", "/x"] {
            assert_eq!(method_label(made_up), "other");
        }
    }
}
