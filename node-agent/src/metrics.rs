//! Every metric of the agent: its name, what it means and its unit. No id of a sandbox, tenant or template is a label.

use std::sync::{Mutex, PoisonError};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

pub const BUILD_INFO: &str = "warren_agent_build_info";
pub const SANDBOXES: &str = "warren_agent_sandboxes";
pub const DRIVER_SECONDS: &str = "warren_agent_driver_operation_seconds";
pub const DRIVER_ERRORS: &str = "warren_agent_driver_errors_total";
pub const START_SECONDS: &str = "warren_agent_start_seconds";
pub const SESSION_UP: &str = "warren_agent_session_up";
pub const SESSION_ATTEMPTS: &str = "warren_agent_session_attempts_total";
pub const SESSION_FOREIGN_LEDGER: &str = "warren_agent_session_foreign_ledger";
pub const LEASE_REMAINING: &str = "warren_agent_lease_remaining_seconds";
pub const LEASE_LAPSES: &str = "warren_agent_lease_lapses_total";
pub const RENEWAL_SECONDS: &str = "warren_agent_lease_renewal_seconds";
pub const FENCE_UP: &str = "warren_agent_fence_up";
pub const FENCE_STARTS: &str = "warren_agent_fence_starts_total";
pub const GENERATION: &str = "warren_agent_assignment_generation";
pub const RESYNCS: &str = "warren_agent_assignment_resyncs_total";
pub const TEMPLATES: &str = "warren_agent_templates";
pub const TEMPLATE_INGESTS: &str = "warren_agent_template_ingests_total";
pub const TEMPLATE_BYTES: &str = "warren_agent_template_bytes_total";
pub const EXECS: &str = "warren_agent_execs_total";
pub const EXECS_ACTIVE: &str = "warren_agent_execs_active";
pub const TOKENS_REFUSED: &str = "warren_agent_tokens_refused_total";

/// From a claim of milliseconds to a start that downloads its template first.
const BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// One recorder a process, whoever asks first: tests run several agents in one.
static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);

/// Installs the recorder; the handle renders what was recorded.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*installed {
        return Ok(handle.clone());
    }
    let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)?;
    let handle = builder.install_recorder()?;
    describe();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(installed.insert(handle).clone())
}

fn describe() {
    describe_gauge!(BUILD_INFO, "1, with the agent's version as a label");
    describe_gauge!(SANDBOXES, "Sandboxes by what the agent reports of them, by phase");
    describe_histogram!(DRIVER_SECONDS, Unit::Seconds, "Time that a driver took, by driver and operation");
    describe_counter!(DRIVER_ERRORS, "Operations that a driver could not do, by driver and operation");
    describe_histogram!(START_SECONDS, Unit::Seconds, "Time from an assignment to the sandbox's main process running");
    describe_gauge!(SESSION_UP, "1 while a leader has this node registered");
    describe_counter!(SESSION_ATTEMPTS, "Attempts to open a session with a leader, by result");
    describe_gauge!(SESSION_FOREIGN_LEDGER, "1 while the schedulers serve another ledger than this node's");
    describe_gauge!(LEASE_REMAINING, Unit::Seconds, "What is left of the lease; 0 after it lapsed");
    describe_counter!(LEASE_LAPSES, "Times that the lease lapsed");
    describe_histogram!(RENEWAL_SECONDS, Unit::Seconds, "Time from sending a renewal to its grant");
    describe_gauge!(FENCE_UP, "1 while a fence lives that freezes sandboxes when the lease lapses");
    describe_counter!(FENCE_STARTS, "Fences that were started");
    describe_gauge!(GENERATION, "Generation of the assignment that the agent acts on");
    describe_counter!(RESYNCS, "Assignments asked for as a whole because a delta did not fit");
    describe_gauge!(TEMPLATES, "Templates that the node holds");
    describe_counter!(TEMPLATE_INGESTS, "Templates written to disk, by source (client or peer) and result");
    describe_counter!(TEMPLATE_BYTES, Unit::Bytes, "Bytes of templates that came in and went out, by direction");
    describe_counter!(EXECS, "Processes executed in sandboxes, by result");
    describe_gauge!(EXECS_ACTIVE, "Processes executing in sandboxes now");
    describe_counter!(TOKENS_REFUSED, "Data plane calls refused for their token, by reason");
}
