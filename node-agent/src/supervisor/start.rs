//! One start: the template, a turn, the intent on disk, then the driver.
//!
//! Until the intent is written a start can be called off; from then on it is finished, whatever the leader wants meanwhile.

use std::path::PathBuf;
use std::sync::Arc;

use metrics::histogram;
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::Supervisor;
use super::work::{Done, timed};
use crate::assignment::{OnIsolation, StartSpec};
use crate::clock::BootInstant;
use crate::driver::{Driver, DriverError, InstanceKey, InstanceSpec};
use crate::failpoint;
use crate::metrics::START_SECONDS;
use crate::reconcile::{Reason, Record, Stage};

/// What a start needs before anything is done to the host.
struct Prepared<'a> {
    driver: Arc<dyn Driver>,
    runtime: Option<String>,
    base: PathBuf,
    _turn: SemaphorePermit<'a>,
}

impl Supervisor {
    pub(super) async fn start(&self, key: InstanceKey, spec: StartSpec, cancel: CancellationToken) -> Done {
        let begun = BootInstant::now();
        let prepared = tokio::select! {
            () = cancel.cancelled() => return Done::CalledOff,
            () = self.0.stopping.cancelled() => return Done::CalledOff,
            prepared = self.prepare(&spec) => prepared,
        };
        if spec.on_isolation == OnIsolation::Freeze && self.is_gate_closed() {
            // It waits, as if it had not begun, until fenced sandboxes run again.
            return Done::CalledOff;
        }
        let result = match prepared {
            Ok(prepared) => self.start_prepared(&key, spec, &prepared).await,
            Err(reason) => Err(reason),
        };
        match result {
            Ok((driver, fenced)) => {
                let (egress, driver) = (driver.egress(&key), driver.name());
                histogram!(START_SECONDS).record(BootInstant::now().since(begun).as_secs_f64());
                tracing::info!(sandbox = %key.sandbox, epoch = %key.epoch, driver, "started");
                failpoint::pass("start.started");
                let record = Record { epoch: key.epoch, stage: Stage::Started };
                self.journal_put(&key.sandbox, &record).await;
                failpoint::pass("start.noted");
                Done::Started { driver: driver.to_owned(), record, fenced, egress }
            }
            Err(reason) => {
                tracing::warn!(sandbox = %key.sandbox, epoch = %key.epoch, code = %reason.code, message = %reason.message, "not started");
                let record = Record { epoch: key.epoch, stage: Stage::Failed(reason) };
                self.journal_put(&key.sandbox, &record).await;
                Done::NotStarted { record }
            }
        }
    }

    fn is_gate_closed(&self) -> bool {
        self.model().gate.is_closed(BootInstant::now())
    }

    async fn prepare(&self, spec: &StartSpec) -> Result<Prepared<'_>, Reason> {
        let unknown = || Reason::new("DRIVER_UNKNOWN", format!("this node offers {:?}", self.0.drivers));
        let (driver, runtime) = self.0.drivers.choose(spec.driver.as_deref()).ok_or_else(unknown)?;
        let fetcher = &self.0.fetcher;
        let unavailable = |error: String| Reason::new("TEMPLATE_UNAVAILABLE", error);
        fetcher.ensure(&spec.template).await.map_err(|error| unavailable(error.to_string()))?;
        let base = fetcher.store.rootfs(&spec.template.digest);
        let base = base.ok_or_else(|| unavailable(format!("{} is not held", spec.template.digest)))?;
        let turn = self.0.starts.acquire().await.expect("never closed");
        Ok(Prepared { driver, runtime, base, _turn: turn })
    }

    async fn start_prepared(
        &self,
        key: &InstanceKey,
        spec: StartSpec,
        to: &Prepared<'_>,
    ) -> Result<(Arc<dyn Driver>, bool), Reason> {
        let intent = Record { epoch: key.epoch, stage: Stage::Starting };
        let written = self.journal_put_surely(&key.sandbox, &intent).await;
        written.map_err(|error| Reason::new("JOURNAL_FAILED", error.to_string()))?;
        failpoint::pass("start.intended");
        let fenced = spec.on_isolation == OnIsolation::Freeze && to.driver.switch().is_some();
        let spec = InstanceSpec {
            key: key.clone(),
            resources: spec.resources,
            pids: spec.pids,
            base: to.base.clone(),
            command: spec.command,
            environment: spec.environment,
            working_directory: spec.working_directory,
            fenced,
            runtime: to.runtime.clone(),
            gpus: spec.gpus,
            egress: spec.egress,
        };
        let started = timed(to.driver.name(), "start", to.driver.start(&spec)).await;
        started.map_err(|error| {
            let code =
                if matches!(error, DriverError::HostDiskFull { .. }) { "NODE_DISK_FULL" } else { "START_FAILED" };
            Reason::new(code, error.to_string())
        })?;
        Ok((Arc::clone(&to.driver), fenced))
    }
}
