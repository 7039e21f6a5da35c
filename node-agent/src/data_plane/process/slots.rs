//! How many processes that were started run on the node, whoever waits for them.

use std::sync::Arc;

use metrics::gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::carry::Target;
use crate::data_plane::status::Refusal;
use crate::metrics::EXECS_ACTIVE;
use crate::supervisor::Supervisor;

/// Processes that run at once on a node beside the main ones: each costs a shim with its ring, some file descriptors here, and
/// a buffer of 64 KiB for each that is attached.
const MAX_RUNNING: usize = 1024;

/// Clones share the slots.
#[derive(Debug, Clone)]
pub struct Slots(Arc<Semaphore>);

impl Slots {
    /// Those that an earlier agent started count too, as soon as they are found.
    pub fn adopt(supervisor: &Supervisor) -> Self {
        let slots = Self(Arc::new(Semaphore::new(MAX_RUNNING)));
        let (all, found) = (supervisor.instances(), slots.clone());
        tokio::spawn(async move {
            for (key, driver) in all {
                for status in driver.processes(&key).await.unwrap_or_default() {
                    if status.exit.is_none()
                        && let Ok(slot) = found.take()
                    {
                        slot.hold_until_ended(&Target { driver: Arc::clone(&driver), key: key.clone(), id: status.id });
                    }
                }
            }
        });
        slots
    }

    pub fn take(&self) -> Result<Slot, Refusal> {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        let permit = permit.map_err(|_| Refusal::Overloaded("executing processes"))?;
        gauge!(EXECS_ACTIVE).increment(1.0);
        Ok(Slot { _permit: permit })
    }
}

/// The right to one running process.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    pub fn hold_until_ended(self, target: &Target) {
        let target = target.clone();
        tokio::spawn(async move {
            target.driver.process_ended(&target.key, &target.id).await;
            drop(self);
        });
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        gauge!(EXECS_ACTIVE).decrement(1.0);
    }
}
