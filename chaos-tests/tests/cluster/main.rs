//! Warren as a whole, on real processes and real sandboxes: three schedulers, three node agents, containers.
//!
//! One test at a time, each with a cluster of its own. Needs root, an OCI runtime, busybox and the built binaries; without
//! the first three the tests are skipped, aloud.

mod api;
mod faults;
mod group;
mod isolation;
mod lifecycle;
mod operators;
mod recovery;
mod secured;
mod upgrade;
mod watches;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{self, Cluster, Options};
use warren_chaos::image::Image;
use warren_proto::v1::Sandbox;

/// A scenario that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// How many calls a test has under way at once: enough to overlap, few enough for two cores.
const PARALLEL: usize = 8;

/// One cluster at a time: 100 containers and six servers are work for this host.
static TURN: Mutex<()> = Mutex::new(());

/// Runs a scenario on a fresh cluster and checks that nothing is left of it, however it ends.
fn scenario(name: &str, options: Options, run: impl AsyncFnOnce(&mut Cluster) -> anyhow::Result<()>) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(what) = cluster::missing() {
        eprintln!("SKIPPED {name}: {what}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = runtime.expect("a runtime").block_on(async {
        let work = async {
            let mut cluster = Cluster::start(options, &Image::busybox()?).await.context("start the cluster")?;
            run(&mut cluster).await?;
            cluster.finish().await.context("finish the cluster")
        };
        tokio::time::timeout(PATIENCE, work).await.with_context(|| format!("hangs after {PATIENCE:?}"))?
    });
    outcome.unwrap_or_else(|error| panic!("{name}: {error:#}"));
}

/// Creates `count` small sandboxes, several at once, and gives their names back: those that were acknowledged.
async fn create_many(client: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    futures::stream::iter(0..count)
        .map(|_| async { Ok(client.create(small_sandbox()).await.context("create")?.name) })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
}

/// Executes in every sandbox and checks that it is that sandbox which answers.
async fn exec_in_each(client: &Client, names: &[String]) -> anyhow::Result<()> {
    futures::stream::iter(names.iter().enumerate())
        .map(|(n, name)| async move {
            let answer = client.sh(name, &format!("echo $(({n} * 3)) > /tmp/answer; cat /tmp/answer")).await?;
            anyhow::ensure!(answer == (n * 3).to_string(), "{name} answers {answer}");
            Ok(())
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
}

/// Deletes every sandbox and waits until none is known.
async fn delete_all(client: &Client, names: &[String]) -> anyhow::Result<()> {
    futures::stream::iter(names)
        .map(|name| async move { client.delete(name).await.with_context(|| format!("delete {name}")) })
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<_>>()
        .await?;
    client.await_gone(names).await
}

/// It fits on no node: nothing but the ledger is at work.
fn without_room() -> Sandbox {
    let mut huge = small_sandbox();
    huge.resources.get_or_insert_default().memory_bytes = 1 << 40;
    huge
}
