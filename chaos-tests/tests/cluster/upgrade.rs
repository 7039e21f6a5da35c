//! A rolling upgrade between two builds with different levels of the ledger's rules, under load.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{Cluster, Options, Server};

use crate::{PARALLEL, scenario, without_room};

/// Every replica takes the hash of its state at the indexes that this divides.
const HASH_EVERY: u64 = 256;

/// Between two looks at the replicas' hashes, and looks before giving up: a minute, in which the load makes thousands of entries.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
const LOOKS: u32 = 600;

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
        let load = (0..PARALLEL).map(|at| tokio::spawn(churn(client.clone(), at, stop.clone()))).collect::<Vec<_>>();
        agree(cluster, "before").await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
            cluster.upgrade(scheduler);
            cluster.restart(Server::Scheduler(scheduler)).await?;
            let level = client.cluster_status().await?.level;
            ensure!(scheduler == 2 || level == 1, "level {level} while a replica does not know it");
            agree(cluster, &format!("after the upgrade of {} of 3", scheduler + 1)).await?;
        }
        client.await_status("the second level", |status| status.level == 2).await?;
        agree(cluster, "at the second level").await?;
        stop.store(true, Ordering::Relaxed);
        for client in load {
            let created = client.await?.context("a call failed beyond retries")?;
            ensure!(created > 0, "a client did nothing");
        }
        ensure!(client.check_state().await?.violations.is_empty(), "the rules are broken");
        Ok(())
    });
}

/// Creates and deletes, one after the other, until told to stop; how many. A quarter of the clients have real sandboxes, which
/// the node reports of; the others are the ledger's alone, since it is the ledger that is under test.
async fn churn(client: Client, at: usize, stop: Arc<AtomicBool>) -> anyhow::Result<u64> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let wanted = if at.is_multiple_of(4) { small_sandbox() } else { without_room() };
        let name = client.create(wanted).await.context("create")?.name;
        client.delete(&name).await.with_context(|| format!("delete {name}"))?;
        count += 1;
    }
    Ok(count)
}

/// Waits until all three replicas have the hash of one index that none of them had come to before, and checks that all their
/// hashes agree. The load brings them there.
async fn agree(cluster: &Cluster, when: &str) -> anyhow::Result<()> {
    let before = applied(cluster).await?;
    for _ in 0..LOOKS {
        let by_index = hashes(cluster).await?;
        for (index, hashes) in &by_index {
            ensure!(hashes.values().collect::<BTreeSet<_>>().len() == 1, "{when}: at {index}: {hashes:?}");
        }
        let new = |(index, hashes): (&u64, &BTreeMap<usize, String>)| {
            index.is_multiple_of(HASH_EVERY) && *index > before && hashes.len() == 3
        };
        if by_index.iter().any(new) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    bail!("{when}: no index after {before} that all have a hash of: {:?}", hashes(cluster).await?)
}

/// The furthest that any has come.
async fn applied(cluster: &Cluster) -> anyhow::Result<u64> {
    let mut furthest = 0;
    for scheduler in 0..3 {
        furthest = furthest.max(cluster.client_of(scheduler)?.replica_status().await?.applied_index);
    }
    Ok(furthest)
}

/// By index, then by scheduler.
async fn hashes(cluster: &Cluster) -> anyhow::Result<BTreeMap<u64, BTreeMap<usize, String>>> {
    let mut by_index: BTreeMap<u64, BTreeMap<usize, String>> = BTreeMap::new();
    for scheduler in 0..3 {
        for hash in cluster.client_of(scheduler)?.replica_status().await?.hashes {
            by_index.entry(hash.index).or_default().insert(scheduler, hash.hash);
        }
    }
    Ok(by_index)
}
