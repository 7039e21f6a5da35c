//! Waits for the main process of each instance, so that its end is reported when it comes.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Model, Supervisor};
use crate::driver::{Driver, DriverError, InstanceKey, Presence};
use crate::reconcile::Action;

/// Pause after a wait that failed: the runtime is asked what is there, and nobody is served by asking faster.
const PAUSE: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn watch(&self, model: &mut Model, key: InstanceKey, driver: &str) {
        if self.0.stopping.is_cancelled() {
            return;
        }
        let Some(driver) = self.0.drivers.get(Some(driver)) else { return };
        let cancel = CancellationToken::new();
        model.watches.insert(key.clone(), cancel.clone().drop_guard());
        let this = self.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = this.wait_for_end(&key, driver) => {}
            }
        });
    }

    async fn wait_for_end(&self, key: &InstanceKey, driver: Arc<dyn Driver>) {
        loop {
            let found = match driver.wait(key).await {
                Ok(ended) => Some(Presence::Ended(ended)),
                Err(error) => {
                    tracing::warn!(sandbox = %key.sandbox, epoch = %key.epoch, %error, "cannot wait for its end");
                    tokio::time::sleep(PAUSE).await;
                    match presence(&*driver, key).await {
                        Ok(found) => found,
                        Err(_) => continue,
                    }
                }
            };
            if !matches!(found, Some(Presence::Running | Presence::Frozen)) {
                return self.ended(key, found);
            }
        }
    }

    /// The main process ended, or the instance is gone (`None`) or broken. While it is being removed that is no news.
    fn ended(&self, key: &InstanceKey, found: Option<Presence>) {
        let mut model = self.model();
        let Some(held) = model.held.get_mut(&key.sandbox) else { return };
        if held.busy == Some(Action::Remove(key.epoch)) {
            return;
        }
        match &found {
            Some(Presence::Ended(ended)) => {
                tracing::info!(sandbox = %key.sandbox, epoch = %key.epoch, exit = ?ended.exit, "ended");
            }
            _ => tracing::warn!(sandbox = %key.sandbox, epoch = %key.epoch, "its instance is gone or broken"),
        }
        match (held.instances.get_mut(&key.epoch), found) {
            (Some(instance), Some(presence)) => instance.presence = presence,
            (Some(_), None) => {
                held.instances.remove(&key.epoch);
                model.watches.remove(key);
            }
            (None, _) => return,
        }
        self.settle_one(&mut model, &key.sandbox);
        drop(model);
        self.0.changes.ring();
    }
}

async fn presence(driver: &dyn Driver, key: &InstanceKey) -> Result<Option<Presence>, DriverError> {
    Ok(driver.list().await?.into_iter().find(|(found, _)| found == key).map(|(_, presence)| presence))
}
