//! Clients that go on through faults, and a book of what was acknowledged to them and when.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use warren_proto::client::{ClientTls, channel};
use warren_proto::v1::CreateSandboxRequest;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;

use super::create;
use crate::client::may_retry;

/// Longest that one attempt may take. A stopped or cut-off leader answers nothing, and another replica may: about as long
/// as an election takes at least, and a hundred times a commit.
pub const ATTEMPT_PATIENCE: Duration = Duration::from_millis(300);

/// After an attempt that failed: the connection broke, or nobody leads yet.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// Attempts at one create before its client gives up: a minute and more.
const MAX_ATTEMPTS: u32 = 3000;

/// Acknowledged creates, in order.
#[derive(Debug, Clone, Default)]
pub struct Book(Arc<Mutex<Vec<(Instant, String)>>>);

impl Book {
    fn write(&self, name: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), name));
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn names(&self) -> BTreeSet<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, name)| name.clone()).collect()
    }

    /// Longest time without an acknowledgement between two moments.
    pub fn longest_gap(&self, from: Instant, until: Instant) -> Duration {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = book.partition_point(|(at, _)| *at < from);
        longest_gap(from, book[first..].iter().map(|(at, _)| *at).take_while(|at| *at <= until), until)
    }
}

fn longest_gap(from: Instant, times: impl Iterator<Item = Instant>, until: Instant) -> Duration {
    let mut last = from;
    let mut longest = Duration::ZERO;
    for at in times.chain([until]) {
        longest = longest.max(at.saturating_duration_since(last));
        last = at;
    }
    longest
}

/// Clients at work.
#[derive(Debug)]
pub struct Clients {
    pub book: Book,
    stop: CancellationToken,
    set: JoinSet<anyhow::Result<()>>,
}

impl Clients {
    /// Lets `count` clients create, each one at a time, with a pause of `pace` between two.
    pub fn start(endpoints: &[String], count: usize, pace: Duration) -> anyhow::Result<Self> {
        let (book, stop) = (Book::default(), CancellationToken::new());
        let mut set = JoinSet::new();
        for at in 0..count {
            let channels = endpoints.iter().map(|address| channel(address, &ClientTls::default()));
            let client =
                Creator { channels: channels.collect::<Result<_, _>>()?, at, book: book.clone(), stop: stop.clone() };
            set.spawn(client.work(pace));
        }
        Ok(Self { book, stop, set })
    }

    /// Lets each finish the create that it is at.
    pub async fn finish(mut self) -> anyhow::Result<Book> {
        self.stop.cancel();
        while let Some(ended) = self.set.join_next().await {
            ended.context("a client failed")??;
        }
        Ok(self.book)
    }
}

struct Creator {
    channels: Vec<Channel>,
    /// The replica that is asked, modulo their number.
    at: usize,
    book: Book,
    stop: CancellationToken,
}

impl Creator {
    async fn work(mut self, pace: Duration) -> anyhow::Result<()> {
        while !self.stop.is_cancelled() {
            let name = self.create(create::request()).await?;
            self.book.write(name);
            tokio::time::sleep(pace).await;
        }
        Ok(())
    }

    /// The same request until it is answered, at one replica after the other.
    async fn create(&mut self, request: CreateSandboxRequest) -> anyhow::Result<String> {
        for _ in 0..MAX_ATTEMPTS {
            let mut service = SandboxServiceClient::new(self.channels[self.at % self.channels.len()].clone());
            match tokio::time::timeout(ATTEMPT_PATIENCE, service.create_sandbox(request.clone())).await {
                Ok(Ok(sandbox)) => return Ok(sandbox.into_inner().name),
                Ok(Err(status)) => {
                    ensure!(may_retry(&status), "a create was refused: {status}");
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                }
                Err(_) => {}
            }
            self.at = self.at.wrapping_add(1);
        }
        anyhow::bail!("a create was not answered in {MAX_ATTEMPTS} attempts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_gap_counts_to_both_ends_of_the_window() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let gap =
            |times: &[u64], from, until| longest_gap(at(from), times.iter().map(|ms| at(*ms)), at(until)).as_millis();
        assert_eq!(gap(&[10, 20, 70, 75], 0, 80), 50);
        assert_eq!(gap(&[10, 20], 0, 100), 80);
        assert_eq!(gap(&[90], 0, 100), 90);
        assert_eq!(gap(&[], 0, 100), 100);
    }
}
