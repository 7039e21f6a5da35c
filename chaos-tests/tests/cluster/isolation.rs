//! Nodes that are not heard of, and schedulers that are all gone.

use std::time::Duration;

use anyhow::{Context, ensure};
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{Options, Server};
use warren_proto::v1::{NodeState, OnIsolation, Resources, Sandbox, SandboxState};

use crate::faults::main_processes;
use crate::{delete_all, scenario};

/// Short, so that ten of them pass in a test.
const LEASE: Duration = Duration::from_millis(1500);

fn options() -> Options {
    Options { lease_ms: Some(1500), ..Options::default() }
}

fn sandbox(on_isolation: OnIsolation) -> Sandbox {
    Sandbox { on_isolation: on_isolation.into(), ..small_sandbox() }
}

/// Has every node fetch the template, while all of them are there: each of these fills more than half of a node.
async fn warm_up(client: &Client) -> anyhow::Result<()> {
    let mut large = Vec::new();
    for _ in 0..3 {
        let resources = Resources { cpu_milli: 2500, ..small_sandbox().resources.unwrap_or_default() };
        large.push(client.create(Sandbox { resources: Some(resources), ..small_sandbox() }).await?.name);
    }
    client.await_running(&large).await?;
    delete_all(client, &large).await
}

/// Two that are kept and two that freeze.
async fn create_both(client: &Client) -> anyhow::Result<Vec<Sandbox>> {
    let mut names = Vec::new();
    for on_isolation in [OnIsolation::Keep, OnIsolation::Freeze, OnIsolation::Keep, OnIsolation::Freeze] {
        names.push(client.create(sandbox(on_isolation)).await.context("create")?.name);
    }
    client.await_running(&names).await?;
    let mut sandboxes = Vec::new();
    for name in &names {
        sandboxes.push(client.get(name).await?);
    }
    Ok(sandboxes)
}

fn names(sandboxes: &[Sandbox]) -> Vec<String> {
    sandboxes.iter().map(|sandbox| sandbox.name.clone()).collect()
}

/// The agent is stopped, not its host: what is kept runs on there and nowhere else; what freezes is frozen there, and runs
/// elsewhere; the node returns, and what was left over is removed.
#[test]
fn a_stopped_agents_node_goes_down_and_only_what_freezes_runs_elsewhere() {
    scenario("agent stopped", options(), async |cluster| {
        let client = cluster.client()?;
        warm_up(&client).await?;
        let sandboxes = create_both(&client).await?;
        // Best fit: they are all on one node.
        let node = sandboxes[0].node.clone();
        ensure!(sandboxes.iter().all(|sandbox| sandbox.node == node), "{sandboxes:?}");
        let at = cluster.nodes().iter().position(|name| *name == node).context("whose node is it")?;
        cluster.pause(Server::Agent(at))?;
        let is_down = |nodes: &[warren_proto::v1::Node]| {
            nodes.iter().any(|n| n.name == node && n.state() == NodeState::Down && n.leftovers.len() == 2)
        };
        client.await_nodes("the node is down, and two are left over there", is_down).await?;
        for before in &sandboxes {
            let freezes = before.on_isolation() == OnIsolation::Freeze;
            if freezes {
                client.await_running(std::slice::from_ref(&before.name)).await?;
            }
            let now = client.get(&before.name).await?;
            let wanted = if freezes { SandboxState::Running } else { SandboxState::Unreachable };
            ensure!(now.state() == wanted && (now.node == node) != freezes, "{now:?}");
            ensure!(now.epoch == before.epoch + u64::from(freezes), "{now:?}");
        }
        cluster.unpause(Server::Agent(at))?;
        client
            .await_nodes("it is back, and nothing is left over", |nodes| {
                nodes.iter().all(|n| n.state() == NodeState::Ready && n.leftovers.is_empty() && n.orphans.is_empty())
            })
            .await?;
        client.await_running(&names(&sandboxes)).await?;
        ensure!(client.check_state().await?.violations.is_empty(), "the rules are broken");
        delete_all(&client, &names(&sandboxes)).await
    });
}

/// No scheduler for ten leases: every sandbox is there afterwards, the same as before.
#[test]
fn all_schedulers_are_down_for_ten_leases_and_every_sandbox_survives() {
    scenario("schedulers down", options(), async |cluster| {
        let client = cluster.client()?;
        let sandboxes = create_both(&client).await?;
        let before = main_processes(&client, &names(&sandboxes)).await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
        }
        // There is no event in a silence.
        tokio::time::sleep(LEASE * 10).await;
        cluster.restart_all().await?;
        let client = cluster.client()?;
        client
            .await_nodes("all are back", |nodes| {
                nodes.len() == 3 && nodes.iter().all(|node| node.state() == NodeState::Ready)
            })
            .await?;
        client.await_running(&names(&sandboxes)).await?;
        ensure!(main_processes(&client, &names(&sandboxes)).await? == before, "main processes changed");
        for sandbox in client.list().await? {
            ensure!(sandbox.epoch == 1, "placed again: {sandbox:?}");
        }
        delete_all(&client, &names(&sandboxes)).await
    });
}
