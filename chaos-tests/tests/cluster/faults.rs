//! SIGKILL: whatever was acknowledged stays.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{Cluster, Options, Server};
use warren_proto::v1::SandboxState;

use crate::{PARALLEL, delete_all, exec_in_each, scenario};

/// Sandboxes that are created while a process is killed, and how many are acknowledged before.
const CREATES: usize = 40;
const BEFORE: usize = 10;

#[test]
fn the_leader_is_killed_amid_creates() {
    scenario("leader killed", Options::default(), async |cluster| {
        let victim = cluster.leader().await?;
        killed_amid_creates(cluster, Server::Scheduler(victim)).await
    });
}

#[test]
fn a_follower_is_killed_amid_creates() {
    scenario("follower killed", Options::default(), async |cluster| {
        let victim = cluster.follower().await?;
        killed_amid_creates(cluster, Server::Scheduler(victim)).await
    });
}

#[test]
fn an_agent_is_killed_amid_creates() {
    scenario("agent killed", Options::default(), async |cluster| killed_amid_creates(cluster, Server::Agent(0)).await);
}

/// A stopped leader does not know that it was replaced: what it acknowledges after it wakes must hold too.
#[test]
fn the_leader_is_stopped_amid_creates_and_wakes_up_replaced() {
    scenario("leader stopped", Options::default(), async |cluster| {
        let victim = Server::Scheduler(cluster.leader().await?);
        let (creates, mut acknowledged) = begin_creates(cluster.client()?);
        await_acknowledged(&mut acknowledged, BEFORE).await?;
        cluster.pause(victim)?;
        await_acknowledged(&mut acknowledged, BEFORE).await?;
        cluster.unpause(victim)?;
        let names = creates.await??;
        check_and_delete(cluster, &names).await
    });
}

async fn killed_amid_creates(cluster: &mut Cluster, victim: Server) -> anyhow::Result<()> {
    let (creates, mut acknowledged) = begin_creates(cluster.client()?);
    await_acknowledged(&mut acknowledged, BEFORE).await?;
    cluster.kill(victim)?;
    // The others go on, also without it.
    await_acknowledged(&mut acknowledged, BEFORE).await?;
    cluster.restart(victim).await?;
    let names = creates.await??;
    check_and_delete(cluster, &names).await
}

type Creates = tokio::task::JoinHandle<anyhow::Result<Vec<String>>>;

/// Creates [`CREATES`] sandboxes; the channel has a message for each acknowledgement.
fn begin_creates(client: Client) -> (Creates, mpsc::UnboundedReceiver<String>) {
    // Bounded by CREATES.
    let (acknowledge, acknowledged) = mpsc::unbounded_channel();
    let creates = tokio::spawn(async move {
        let (client, acknowledge) = (&client, &acknowledge);
        futures::stream::iter(0..CREATES)
            .map(|_| async move {
                let name = client.create(small_sandbox()).await.context("create")?.name;
                // Nobody listens any more once the test has seen enough.
                let _ = acknowledge.send(name.clone());
                Ok(name)
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await
    });
    (creates, acknowledged)
}

async fn await_acknowledged(acknowledged: &mut mpsc::UnboundedReceiver<String>, count: usize) -> anyhow::Result<()> {
    for _ in 0..count {
        acknowledged.recv().await.context("creates ended early")?;
    }
    Ok(())
}

/// Each create had exactly one effect, each sandbox runs and answers, and each can be deleted.
async fn check_and_delete(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    let client = cluster.client()?;
    client.await_running(names).await?;
    let acknowledged: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    ensure!(acknowledged.len() == CREATES, "two creates were answered with the same sandbox");
    let listed = client.list().await?;
    let known: BTreeSet<&str> = listed.iter().map(|sandbox| sandbox.name.as_str()).collect();
    ensure!(known == acknowledged, "known {}, acknowledged {}", known.len(), acknowledged.len());
    exec_in_each(&client, names).await?;
    for node in client.nodes().await? {
        ensure!(node.orphans.is_empty(), "{} has orphans: {:?}", node.name, node.orphans);
    }
    delete_all(&client, names).await?;
    let left = cluster.traces().of_sandboxes();
    ensure!(left.is_empty(), "left on the host:\n{}", left.join("\n"));
    Ok(())
}

/// Every process at once, as when a rack loses power and the hosts do not.
#[test]
fn a_full_restart_keeps_every_sandbox_running() {
    // Four sandboxes fill a node.
    let options = Options { cpu_milli: 200, ..Options::default() };
    scenario("full restart", options, async |cluster| {
        let client = cluster.client()?;
        let names = crate::create_many(&client, 12).await?;
        client.await_running(&names).await?;
        let before = main_processes(&client, &names).await?;

        for server in cluster.servers() {
            cluster.kill(server)?;
        }
        cluster.restart_all().await?;

        let client = cluster.client()?;
        client.await_running(&names).await?;
        ensure!(client.list().await?.len() == names.len(), "others are known");
        let after = main_processes(&client, &names).await?;
        ensure!(after == before, "main processes changed: {before:?} became {after:?}");
        for sandbox in client.list().await? {
            ensure!(sandbox.epoch == 1 && sandbox.state() == SandboxState::Running, "{sandbox:?}");
        }
        delete_all(&client, &names).await
    });
}

/// When each main process began, in ticks since the host's boot, and what was written to each disk: a sandbox that was
/// started anew would differ in both.
pub async fn main_processes(client: &Client, names: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let script = "[ -e /tmp/marker ] || cat /proc/sys/kernel/random/uuid > /tmp/marker; \
                  echo $(cut -d' ' -f22 /proc/1/stat) $(cat /tmp/marker)";
    let mut found = BTreeMap::new();
    for name in names {
        found.insert(name.clone(), client.sh(name, script).await?);
    }
    Ok(found)
}
