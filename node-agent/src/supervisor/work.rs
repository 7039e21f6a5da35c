//! One action on one sandbox, from its beginning to the model that knows its outcome.

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, histogram};
use tokio_util::sync::CancellationToken;
use warren_proto::ids::SandboxName;

use super::Supervisor;
use crate::assignment::StartSpec;
use crate::clock::BootInstant;
use crate::driver::{Driver, DriverError, InstanceKey};
use crate::failpoint;
use crate::journal::{Entry, JournalError};
use crate::metrics::{DRIVER_ERRORS, DRIVER_SECONDS};
use crate::network::egress::Egress;
use crate::reconcile::{Action, Record};

/// Pause before the first repetition of what a driver refused; doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// It goes on for as long as the sandbox is there: to give up would hide what still holds the host's memory.
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// What an action's task takes with it.
#[derive(Debug)]
pub enum Job {
    Start {
        spec: Box<StartSpec>,
        cancel: CancellationToken,
    },
    /// `failures`: how often in a row it failed before.
    Driver {
        driver: String,
        failures: u32,
    },
    Egress {
        driver: String,
        egress: Egress,
        failures: u32,
    },
    Forget,
}

/// How an action ended.
#[derive(Debug)]
pub enum Done {
    Started {
        driver: String,
        record: Record,
        fenced: bool,
        egress: Option<Egress>,
    },
    /// It could not be started, and nothing of it is left.
    NotStarted {
        record: Record,
    },
    /// Called off before anything was done.
    CalledOff,
    Removed {
        record: Option<Record>,
    },
    EgressSet {
        egress: Egress,
    },
    /// Frozen, thawed or forgotten.
    Carried,
    /// Refused; ask again what is to be done.
    Retry,
}

impl Supervisor {
    pub(super) async fn perform(&self, sandbox: SandboxName, action: Action, job: Job) {
        let done = match (action, job) {
            (Action::Start(epoch), Job::Start { spec, cancel }) => {
                self.start(InstanceKey { sandbox: sandbox.clone(), epoch }, *spec, cancel).await
            }
            (Action::Forget, _) => self.forget(&sandbox).await,
            (Action::Remove(epoch) | Action::Freeze(epoch) | Action::Thaw(epoch), Job::Driver { driver, failures }) => {
                let key = InstanceKey { sandbox: sandbox.clone(), epoch };
                self.patiently(&key, action, failures, self.drive_once(&key, action, &driver)).await
            }
            (Action::SetEgress(epoch), Job::Egress { driver, egress, failures }) => {
                let key = InstanceKey { sandbox: sandbox.clone(), epoch };
                self.patiently(&key, action, failures, self.set_egress(&key, &driver, egress)).await
            }
            (_, _) => Done::CalledOff,
        };
        self.conclude(&sandbox, action, done);
    }

    /// Waits for what a driver does; after a refusal it pauses.
    async fn patiently(
        &self,
        key: &InstanceKey,
        action: Action,
        failures: u32,
        work: impl Future<Output = Result<Done, DriverError>>,
    ) -> Done {
        match work.await {
            Ok(done) => done,
            Err(error) => {
                let pause = LAST_PAUSE.min(FIRST_PAUSE.saturating_mul(1u32.checked_shl(failures).unwrap_or(u32::MAX)));
                tracing::warn!(sandbox = %key.sandbox, epoch = %key.epoch, ?action, %error, failures, ?pause, "driver refused");
                tokio::select! {
                    () = self.0.stopping.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                }
                Done::Retry
            }
        }
    }

    async fn drive_once(&self, key: &InstanceKey, action: Action, name: &str) -> Result<Done, DriverError> {
        let _permit = self.0.others.acquire().await.expect("never closed");
        let driver = self.offered(name)?;
        match action {
            Action::Freeze(_) => {
                timed(driver.name(), "freeze", driver.freeze(key)).await?;
                if self.is_orphan(key) {
                    tracing::error!(sandbox = %key.sandbox, epoch = %key.epoch, "orphan: no assignment names it; frozen, an operator must decide");
                }
                Ok(Done::Carried)
            }
            Action::Thaw(_) => timed(driver.name(), "thaw", driver.thaw(key)).await.map(|()| Done::Carried),
            _ => {
                timed(driver.name(), "remove", driver.remove(key)).await?;
                let record = self.model().record_after_removal(key);
                if let Some(record) = &record {
                    self.journal_put(&key.sandbox, record).await;
                }
                failpoint::pass("remove.noted");
                tracing::info!(sandbox = %key.sandbox, epoch = %key.epoch, "removed");
                Ok(Done::Removed { record })
            }
        }
    }

    async fn set_egress(&self, key: &InstanceKey, name: &str, egress: Egress) -> Result<Done, DriverError> {
        let _permit = self.0.others.acquire().await.expect("never closed");
        let driver = self.offered(name)?;
        timed(driver.name(), "set_egress", driver.set_egress(key, &egress)).await?;
        tracing::info!(sandbox = %key.sandbox, epoch = %key.epoch, ?egress, "what it may reach changed");
        Ok(Done::EgressSet { egress })
    }

    fn offered(&self, name: &str) -> Result<Arc<dyn Driver>, DriverError> {
        let unknown =
            || DriverError::Runtime { what: "driver".into(), output: format!("`{name}` is not offered any more") };
        self.0.drivers.get(Some(name)).ok_or_else(unknown)
    }

    fn is_orphan(&self, key: &InstanceKey) -> bool {
        let model = self.model();
        model.assignment.goal(&key.sandbox).is_none_or(|goal| goal.epoch != key.epoch)
    }

    async fn forget(&self, sandbox: &SandboxName) -> Done {
        // A record too many: the next agent forgets it.
        if let Err(error) = self.0.journal.forget(sandbox).await {
            tracing::error!(%sandbox, %error, "the journal cannot be written");
        }
        Done::Carried
    }

    /// Writes what can be learnt again from the host if it is lost: nobody waits for the disk.
    pub(super) async fn journal_put(&self, sandbox: &SandboxName, record: &Record) {
        if let Err(error) = self.0.journal.put_soon(sandbox, &self.entry(sandbox, record)).await {
            tracing::error!(%sandbox, %error, "the journal cannot be written");
        }
    }

    pub(super) async fn journal_put_surely(&self, sandbox: &SandboxName, record: &Record) -> Result<(), JournalError> {
        self.0.journal.put(vec![(sandbox.clone(), self.entry(sandbox, record))]).await
    }

    fn entry(&self, sandbox: &SandboxName, record: &Record) -> Entry {
        let foreign = self.model().held.get(sandbox).and_then(|held| held.foreign);
        Entry { record: record.clone(), foreign }
    }
}

/// Measures an operation of a driver.
pub async fn timed<T>(
    driver: &'static str,
    operation: &'static str,
    work: impl Future<Output = Result<T, DriverError>>,
) -> Result<T, DriverError> {
    let begun = BootInstant::now();
    let result = work.await;
    let took = BootInstant::now().since(begun).as_secs_f64();
    histogram!(DRIVER_SECONDS, "driver" => driver, "operation" => operation).record(took);
    if result.is_err() {
        counter!(DRIVER_ERRORS, "driver" => driver, "operation" => operation).increment(1);
    }
    result
}
