//! A client as Warren wants its clients: it knows several schedulers, retries what may be retried with the same
//! `request_id`, asks where a sandbox is and talks to its node.
//!
//! Children: `retry` (what may be tried again), `sandboxes` and `operators` (the API), `watch` (changes, resumed after a
//! break), `data` (exec and template bytes, at a node).

mod data;
mod operators;
mod retry;
mod sandboxes;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use tonic::transport::Channel;
use tonic::{Response, Status};
use warren_proto::client::{ClientTls, channel};

pub use data::ExecOutput;
pub use retry::{Attempts, may_retry};
pub use sandboxes::{TENANT, small_sandbox};
pub use watch::Watcher;

/// Clones share connections.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    schedulers: Vec<Channel>,
    tls: ClientTls,
    /// The one that is asked next; moves on when it fails.
    current: AtomicUsize,
    /// Node agents that were talked to, by address.
    agents: Mutex<BTreeMap<String, Channel>>,
}

impl Client {
    /// Connects when first used, in plain text.
    pub fn new(endpoints: &[String]) -> anyhow::Result<Self> {
        Self::with_tls(endpoints, ClientTls::default())
    }

    /// Connects when first used.
    pub fn with_tls(endpoints: &[String], tls: ClientTls) -> anyhow::Result<Self> {
        ensure!(!endpoints.is_empty(), "a client needs an endpoint");
        let connect = |endpoint: &String| channel(endpoint, &tls);
        let schedulers = endpoints.iter().map(connect).collect::<Result<_, _>>().context("scheduler address")?;
        let shared = Shared { schedulers, tls, current: AtomicUsize::new(0), agents: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A fresh `request_id`.
    pub fn request_id() -> String {
        uuid::Uuid::now_v7().to_string()
    }

    /// Calls a scheduler, another one after a failure that allows it, until one answers.
    async fn call<T, F>(&self, attempt: impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(retry::ATTEMPT_PATIENCE, attempt).await
    }

    /// The same, where one attempt may take so long.
    async fn call_within<T, F>(&self, patience: Duration, attempt: impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut attempts = Attempts::default();
        loop {
            let at = self.shared.current.load(Ordering::Relaxed);
            let outcome = retry::within(patience, attempt(self.scheduler(at))).await;
            match outcome {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => attempts.after(status).await?,
            }
            self.leave(at);
        }
    }

    fn scheduler(&self, at: usize) -> Channel {
        self.shared.schedulers[at % self.shared.schedulers.len()].clone()
    }

    /// The scheduler at `at` failed: ask the next one, unless another call found that out already.
    fn leave(&self, at: usize) {
        let next = at.wrapping_add(1);
        let _ = self.shared.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn agent(&self, address: &str) -> anyhow::Result<Channel> {
        let mut agents = self.shared.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = agents.get(address) {
            return Ok(known.clone());
        }
        let new = channel(address, &self.shared.tls).context("node address")?;
        agents.insert(address.to_owned(), new.clone());
        Ok(new)
    }
}
