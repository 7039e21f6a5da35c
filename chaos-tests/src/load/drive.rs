//! Clients that call, wait for the answer, and call again. The same for every system that is measured.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use futures::future::BoxFuture;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::stats::{Durations, Summary};

/// Longest that one call may take; then it counts as an error.
const CALL_PATIENCE: Duration = Duration::from_secs(10);

/// A system that refuses is not asked again at once: the figure would be of its refusals.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);

/// Makes one call as client number `usize`; gives how many operations it did, or the reason why not.
pub type Call = std::sync::Arc<dyn Fn(usize) -> BoxFuture<'static, Result<u64, String>> + Send + Sync>;

/// Clients at work.
#[derive(Debug)]
pub struct Running {
    /// What was answered before does not count.
    pub from: Instant,
    pub until: Instant,
    clients: JoinSet<Done>,
}

/// What all clients did between `from` and `until`.
#[derive(Debug, Default)]
pub struct Done {
    pub operations: u64,
    pub latency: Durations,
    pub errors: BTreeMap<String, u64>,
}

/// Lets `clients` call, each one call at a time.
pub fn start(clients: usize, warm_up: Duration, measured: Duration, call: &Call) -> Running {
    let from = Instant::now() + warm_up;
    let until = from + measured;
    let mut set = JoinSet::new();
    for client in 0..clients {
        let call = call.clone();
        set.spawn(async move { work(client, from, until, &call).await });
    }
    Running { from, until, clients: set }
}

impl Running {
    /// Waits until every client has ended.
    pub async fn finish(mut self) -> anyhow::Result<Done> {
        let mut all = Done::default();
        while let Some(done) = self.clients.join_next().await {
            all.add(done.context("a client failed")?);
        }
        Ok(all)
    }
}

async fn work(client: usize, from: Instant, until: Instant, call: &Call) -> Done {
    let mut done = Done::default();
    loop {
        let begun = Instant::now();
        if begun >= until {
            return done;
        }
        let outcome = tokio::time::timeout(CALL_PATIENCE, call(client)).await;
        let ended = Instant::now();
        let counts = ended >= from && ended < until;
        let reason = match outcome {
            Ok(Ok(operations)) if counts => {
                done.operations += operations;
                done.latency.push(ended - begun);
                continue;
            }
            Ok(Ok(_)) => continue,
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {CALL_PATIENCE:?}"),
        };
        *done.errors.entry(reason).or_default() += 1;
        tokio::time::sleep(PAUSE_AFTER_ERROR).await;
    }
}

impl Done {
    fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.latency.extend(other.latency);
        for (reason, count) in other.errors {
            *self.errors.entry(reason).or_default() += count;
        }
    }

    /// Latency of calls, and the errors.
    pub fn summary(self) -> (Summary, BTreeMap<String, u64>) {
        (self.latency.summary(), self.errors)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_client_has_one_call_at_a_time_and_errors_are_counted() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (inside, peak) = (now.clone(), most.clone());
        let call: Call = Arc::new(move |client| {
            let (inside, peak) = (inside.clone(), peak.clone());
            Box::pin(async move {
                peak.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                if client == 0 { Err("no".to_owned()) } else { Ok(2) }
            })
        });
        let running = start(3, Duration::from_millis(100), Duration::from_millis(1000), &call);
        let done = running.finish().await.unwrap();
        assert_eq!(most.load(Ordering::SeqCst), 3);
        assert_eq!(now.load(Ordering::SeqCst), 0);
        let (latency, errors) = (done.operations, done.errors.clone());
        assert_eq!(latency, 2 * done.latency.summary().count as u64);
        assert!((90..=104).contains(&latency.div_euclid(2)), "{latency}");
        assert!(errors["no"] > 30);
    }
}
