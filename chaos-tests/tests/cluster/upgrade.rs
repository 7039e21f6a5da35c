//! A rolling upgrade between two builds with different levels of the ledger's rules, under load.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{Cluster, Options, Server};

use crate::scenario;

#[test]
fn replicas_are_upgraded_one_by_one_without_a_failed_call_and_agree() {
    if !Cluster::has_first_level() {
        eprintln!(
            "SKIPPED rolling upgrade: no warren-scheduler-first-level beside the programs (deploy/test builds it)"
        );
        return;
    }
    scenario("rolling upgrade", Options { first_level: true, agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        ensure!(client.cluster_status().await?.level == 1, "the older build begins at level 1");
        let stop = Arc::new(AtomicBool::new(false));
        let load = tokio::spawn(churn(client.clone(), stop.clone()));
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
            cluster.upgrade(scheduler);
            cluster.restart(Server::Scheduler(scheduler)).await?;
            let level = client.cluster_status().await?.level;
            ensure!(scheduler == 2 || level == 1, "level {level} while a replica does not know it");
        }
        client.await_status("the second level", |status| status.level == 2).await?;
        stop.store(true, Ordering::Relaxed);
        let created = load.await?.context("a call failed beyond retries")?;
        ensure!(created > 0, "there was no load");
        compare_hashes(cluster).await
    });
}

/// Creates and deletes, one after the other, until told to stop; how many.
async fn churn(client: Client, stop: Arc<AtomicBool>) -> anyhow::Result<u64> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let name = client.create(small_sandbox()).await.context("create")?.name;
        client.delete(&name).await.context("delete")?;
        count += 1;
    }
    Ok(count)
}

/// At every index of which two replicas have a hash it is the same, and there is one that all have.
async fn compare_hashes(cluster: &Cluster) -> anyhow::Result<()> {
    let mut by_index: BTreeMap<u64, BTreeMap<usize, String>> = BTreeMap::new();
    for scheduler in 0..3 {
        for hash in cluster.client_of(scheduler)?.replica_status().await?.hashes {
            by_index.entry(hash.index).or_default().insert(scheduler, hash.hash);
        }
    }
    for (index, hashes) in &by_index {
        ensure!(hashes.values().collect::<BTreeSet<_>>().len() == 1, "at {index}: {hashes:?}");
    }
    ensure!(by_index.values().any(|hashes| hashes.len() == 3), "no index that all have: {by_index:?}");
    Ok(())
}
