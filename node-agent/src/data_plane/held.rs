//! The instances that calls are using: who may call, what a call must end for, and a helper process that waits for the next.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

use super::Authority;
use super::status::Refusal;
use crate::driver::{Driver, DriverError, InstanceKey};
use crate::files::{FileError, Helper, HelperError, Request};
use crate::supervisor::Supervisor;

/// How long a helper process waits for another call before it ends: it takes a few MiB.
const IDLE: Duration = Duration::from_secs(15);

/// Calls about files under way for one sandbox, so that it leaves some of the node's to others.
const CALLS: usize = 32;

/// Connections to ports of one sandbox, likewise.
const TUNNELS: usize = 256;

/// All instances that are in use.
#[derive(Debug, Clone)]
pub struct Instances(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    supervisor: Supervisor,
    authority: Authority,
    stop: CancellationToken,
    held: Mutex<HashMap<InstanceKey, Arc<Held>>>,
}

/// One that is in use.
pub struct Held {
    pub key: InstanceKey,
    pub driver: Arc<dyn Driver>,
    pub calls: Arc<Semaphore>,
    pub tunnels: Arc<Semaphore>,
    stop: CancellationToken,
    gone: CancellationToken,
    helper: Mutex<Option<Helper>>,
    used: AtomicBool,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Instances {
    pub fn new(supervisor: Supervisor, authority: Authority, stop: CancellationToken) -> Self {
        Self(Arc::new(Shared { supervisor, authority, stop, held: Mutex::default() }))
    }

    /// The instance that the bearer may use, if it is here.
    pub fn enter(&self, metadata: &MetadataMap) -> Result<Arc<Held>, Refusal> {
        let key = self.0.authority.sandbox(metadata)?;
        let driver = self.0.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        let mut all = self.all();
        if let Some(held) = all.get(&key).filter(|held| !held.gone.is_cancelled()) {
            held.used.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(held));
        }
        let held = Arc::new(Held {
            key: key.clone(),
            driver,
            calls: Arc::new(Semaphore::new(CALLS)),
            tunnels: Arc::new(Semaphore::new(TUNNELS)),
            stop: self.0.stop.clone(),
            gone: CancellationToken::new(),
            helper: Mutex::default(),
            used: AtomicBool::new(true),
        });
        all.insert(key, Arc::clone(&held));
        tokio::spawn(self.clone().keep(Arc::clone(&held)));
        Ok(held)
    }

    /// Lets go of an instance when it ends, and when nobody used it for a while.
    async fn keep(self, held: Arc<Held>) {
        let driver = Arc::clone(&held.driver);
        let mut ended = driver.wait(&held.key);
        loop {
            tokio::select! {
                _ = &mut ended => break,
                () = held.stop.cancelled() => break,
                () = tokio::time::sleep(IDLE) => {}
            }
            let mut all = self.all();
            // Here and in the map; calls take theirs from the map only.
            if !held.used.swap(false, Ordering::Relaxed) && Arc::strong_count(&held) == 2 {
                all.remove(&held.key);
                return;
            }
        }
        held.gone.cancel();
        drop(held.helper().take());
        let mut all = self.all();
        if all.get(&held.key).is_some_and(|other| Arc::ptr_eq(other, &held)) {
            all.remove(&held.key);
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<InstanceKey, Arc<Held>>> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Returns when nothing may use the instance any more, with what to tell.
    pub async fn ended(&self) -> Refusal {
        tokio::select! {
            () = self.gone.cancelled() => match self.stop.is_cancelled() {
                true => Refusal::Stopping,
                false => Refusal::Moved(self.key.clone()),
            },
            () = self.stop.cancelled() => Refusal::Stopping,
        }
    }

    /// Asks a helper process; also answers the host's id of the sandbox's user 0.
    pub async fn call(&self, path: &[u8], request: Request, fds: Vec<OwnedFd>) -> Result<(Vec<OwnedFd>, u32), Refusal> {
        // Each time: what has been frozen meanwhile is not touched.
        let root = self.driver.root(&self.key).await?;
        let first_id = root.first_id;
        let waiting = self.helper().take();
        let asked = blocking(move || {
            let helper = match waiting {
                Some(helper) => helper,
                None => Helper::start(root)?,
            };
            let answer = helper.call(&request, &fds);
            // One that failed otherwise may be in the middle of a message.
            Ok((matches!(answer, Ok(_) | Err(HelperError::Fault(_))).then_some(helper), answer))
        });
        let (helper, answer) = asked.await?;
        if let Some(helper) = helper
            && !self.gone.is_cancelled()
        {
            self.helper().get_or_insert(helper);
        }
        match answer {
            Ok(fds) => Ok((fds, first_id)),
            Err(HelperError::Fault(fault)) => Err(FileError::new(path, fault).into()),
            Err(HelperError::Io(source)) => Err(failed(source)),
        }
    }

    fn helper(&self) -> MutexGuard<'_, Option<Helper>> {
        self.helper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does blocking work where it disturbs nobody.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other).and_then(|done| done).map_err(failed)
}

fn failed(source: std::io::Error) -> Refusal {
    DriverError::Io { what: "reach the sandbox's files".to_owned(), source }.into()
}
