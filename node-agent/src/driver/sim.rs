//! Driver `sim`: instances that exist only in memory, for tests of scale.
//!
//! It starts, freezes and lists like a real one, costs nothing, and forgets everything when its process ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Driver, DriverError, Ended, InstanceKey, InstanceSpec, Presence};
use crate::fence::{Kind, Switch};

const NAME: &str = "sim";

/// How simulated instances behave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SimConfig {
    /// How long a start takes.
    pub start_delay: Duration,
    /// Each start whose number, counted from 1, this divides fails; 0: none does.
    pub fail_every: u64,
    /// File that freezes the fenced instances as a whole.
    pub switch: Option<PathBuf>,
}

/// A simulated instance. Dropping it wakes those who wait for its end.
#[derive(Debug)]
struct Simulated {
    frozen: bool,
    fenced: bool,
    removed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Instances {
    starts: u64,
    running: BTreeMap<InstanceKey, Simulated>,
}

/// Simulates instances.
#[derive(Debug, Default)]
pub struct SimDriver {
    config: SimConfig,
    instances: Mutex<Instances>,
}

impl SimDriver {
    pub fn new(config: SimConfig) -> Self {
        Self { config, instances: Mutex::default() }
    }

    fn instances(&self) -> MutexGuard<'_, Instances> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Instances that are here.
    pub fn count(&self) -> usize {
        self.instances().running.len()
    }

    /// Whether the instance's processes would run now: neither it nor its group is frozen.
    pub fn executes(&self, key: &InstanceKey) -> bool {
        let held = self.switch().is_some_and(|switch| switch.is_frozen());
        self.instances().running.get(key).is_some_and(|instance| !(instance.frozen || instance.fenced && held))
    }

    fn set_frozen(&self, key: &InstanceKey, frozen: bool) -> Result<(), DriverError> {
        match self.instances().running.get_mut(key) {
            Some(instance) => {
                instance.frozen = frozen;
                Ok(())
            }
            None => Err(DriverError::NotFound(key.clone())),
        }
    }
}

#[async_trait]
impl Driver for SimDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn start(&self, spec: &InstanceSpec) -> Result<(), DriverError> {
        if !self.config.start_delay.is_zero() {
            tokio::time::sleep(self.config.start_delay).await;
        }
        let mut instances = self.instances();
        instances.starts += 1;
        let what = || format!("start {}", spec.key.sandbox);
        if self.config.fail_every > 0 && instances.starts.is_multiple_of(self.config.fail_every) {
            return Err(DriverError::Runtime { what: what(), output: "told to fail".to_owned() });
        }
        if instances.running.contains_key(&spec.key) {
            return Err(DriverError::Io { what: what(), source: std::io::ErrorKind::AlreadyExists.into() });
        }
        let removed = watch::Sender::new(());
        instances.running.insert(spec.key.clone(), Simulated { frozen: false, fenced: spec.fenced, removed });
        Ok(())
    }

    async fn wait(&self, key: &InstanceKey) -> Result<Ended, DriverError> {
        let removed = self.instances().running.get(key).map(|instance| instance.removed.subscribe());
        if let Some(mut removed) = removed {
            // Nothing is ever sent: it changes when the sender goes.
            let _ = removed.changed().await;
        }
        Err(DriverError::NotFound(key.clone()))
    }

    async fn freeze(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.set_frozen(key, true)
    }

    async fn thaw(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.set_frozen(key, false)
    }

    async fn remove(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.instances().running.remove(key);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<(InstanceKey, Presence)>, DriverError> {
        let presence = |instance: &Simulated| if instance.frozen { Presence::Frozen } else { Presence::Running };
        Ok(self.instances().running.iter().map(|(key, instance)| (key.clone(), presence(instance))).collect())
    }

    fn switch(&self) -> Option<Switch> {
        self.config.switch.clone().map(|path| Switch { kind: Kind::Plain, path })
    }

    fn is_fenced(&self, key: &InstanceKey) -> bool {
        self.instances().running.get(key).is_some_and(|instance| instance.fenced)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use warren_proto::ids::{Epoch, SandboxName};
    use warren_proto::units::Resources;

    use super::*;

    fn spec(epoch: u64) -> InstanceSpec {
        let sandbox = SandboxName::parse("tenants/a/sandboxes/b").expect("valid");
        InstanceSpec {
            gpus: Vec::new(),
            key: InstanceKey { sandbox, epoch: Epoch(epoch) },
            resources: Resources::default(),
            pids: 1,
            base: PathBuf::new(),
            command: Vec::new(),
            environment: Vec::new(),
            working_directory: "/".into(),
            fenced: false,
            runtime: None,
            egress: Default::default(),
        }
    }

    #[tokio::test]
    async fn an_instance_lives_until_it_is_removed() {
        let driver = Arc::new(SimDriver::default());
        let spec = spec(1);
        driver.start(&spec).await.expect("starts");
        assert!(driver.start(&spec).await.is_err());
        driver.freeze(&spec.key).await.expect("freezes");
        driver.freeze(&spec.key).await.expect("freezes again");
        assert_eq!(driver.list().await.expect("lists"), [(spec.key.clone(), Presence::Frozen)]);
        driver.thaw(&spec.key).await.expect("thaws");
        let waiting = tokio::spawn({
            let (driver, key) = (Arc::clone(&driver), spec.key.clone());
            async move { driver.wait(&key).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        driver.remove(&spec.key).await.expect("removes");
        driver.remove(&spec.key).await.expect("removes again");
        assert!(matches!(waiting.await.expect("task"), Err(DriverError::NotFound(_))));
        assert!(driver.list().await.expect("lists").is_empty());
    }

    #[tokio::test]
    async fn starts_fail_as_often_as_they_were_told_to() {
        let driver = SimDriver::new(SimConfig { fail_every: 3, ..SimConfig::default() });
        let mut failed = Vec::new();
        for epoch in 1..=6 {
            failed.push(driver.start(&spec(epoch)).await.is_err());
        }
        assert_eq!(failed, [false, false, true, false, false, true]);
    }
}
