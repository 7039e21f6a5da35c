//! Nodes that are not heard of, and schedulers that are all gone.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use warren_chaos::client::{Client, small_sandbox};
use warren_chaos::cluster::{Cluster, Options, Server};
use warren_proto::v1::{NodeState, OnIsolation, Resources, RestartPolicy, Sandbox, SandboxState};

use crate::faults::main_processes;
use crate::{delete_all, scenario};

/// Short, so that ten of them pass in a test; long enough for an agent that has to wait for its turn on a busy host.
const LEASE: Duration = Duration::from_secs(3);

/// Writes the host's time since its boot, in seconds, twenty times a second: where the host can read it.
const BEATING: &str = "while :; do read now rest < /proc/uptime; echo $now >> /root/beat; sleep 0.05; done";

/// So many beats say that an instance runs.
const SOME_BEATS: usize = 20;

/// Between two looks at a file of beats, and looks before giving up: a minute.
const LOOK_PAUSE: Duration = Duration::from_millis(50);
const LOOKS: u32 = 1200;

fn options() -> Options {
    Options { lease_ms: Some(3000), ..Options::default() }
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
        for before in &sandboxes {
            let now = client.get(&before.name).await?;
            ensure!((now.epoch, &now.node) == (before.epoch, &before.node), "placed again: {now:?}");
        }
        delete_all(&client, &names(&sandboxes)).await
    });
}

/// What an instance wrote, read by its host. The file stays open: it can be read when the instance has been removed.
struct Beats {
    file: File,
}

impl Beats {
    /// Waits until the instance of a sandbox on a node has written some.
    async fn open(cluster: &Cluster, sandbox: &Sandbox) -> anyhow::Result<Self> {
        let started = instance(cluster, sandbox)?.join("started");
        for _ in 0..LOOKS {
            // Seen as its main process sees it: its disk is mounted nowhere else.
            let pid = std::fs::read_to_string(&started).unwrap_or_default();
            if let Ok(file) = File::open(format!("/proc/{}/root/root/beat", pid.trim())) {
                let mut beats = Self { file };
                beats.grow(SOME_BEATS).await?;
                return Ok(beats);
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        anyhow::bail!("{} names no process that writes beats", started.display())
    }

    /// All there are, oldest first, in hundredths of a second.
    fn all(&mut self) -> anyhow::Result<Vec<u64>> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        // The last line may not be whole yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.replace('.', "").parse().with_context(|| format!("beat `{line}`"))).collect()
    }

    /// Waits until there are so many more than now.
    async fn grow(&mut self, more: usize) -> anyhow::Result<()> {
        let wanted = self.all()?.len() + more;
        for _ in 0..LOOKS {
            if self.all()?.len() >= wanted {
                return Ok(());
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        anyhow::bail!("it stands still at {} beats", self.all()?.len())
    }
}

/// Where a sandbox's present instance lies on the host.
fn instance(cluster: &Cluster, sandbox: &Sandbox) -> anyhow::Result<PathBuf> {
    let node = sandbox.node.trim_start_matches("nodes/");
    let nodes = &cluster.traces().nodes;
    let (_, directory) = nodes.iter().find(|(name, _)| name == node).with_context(|| format!("whose is {node}"))?;
    let id = sandbox.name.rsplit('/').next().unwrap_or_default();
    Ok(directory.join(format!("oci/instances/default.{id}.{}", sandbox.epoch)))
}

/// Creates sandboxes that beat, on one node, and answers them as they run, with that node's agent.
async fn create_beating(
    cluster: &Cluster,
    client: &Client,
    policies: &[(OnIsolation, RestartPolicy)],
) -> anyhow::Result<(Vec<Sandbox>, Server)> {
    let mut names = Vec::new();
    for (on_isolation, restart) in policies {
        let command = ["sh", "-c", BEATING].map(str::to_owned).to_vec();
        let beating = Sandbox { command, restart_policy: (*restart).into(), ..sandbox(*on_isolation) };
        names.push(client.create(beating).await.context("create")?.name);
    }
    client.await_running(&names).await?;
    let mut sandboxes = Vec::new();
    for name in &names {
        sandboxes.push(client.get(name).await?);
    }
    // Best fit.
    let node = &sandboxes[0].node;
    ensure!(sandboxes.iter().all(|sandbox| sandbox.node == *node), "not on one node: {sandboxes:?}");
    let at = cluster.nodes().iter().position(|name| name == node).context("whose node is it")?;
    Ok((sandboxes, Server::Agent(at)))
}

/// How an agent falls silent. Its fence is another process, and goes on in both cases.
#[derive(Debug, Clone, Copy)]
enum Silence {
    Killed,
    Stopped,
}

#[test]
fn an_agent_killed_for_three_leases_runs_nothing_twice() {
    scenario("agent killed for three leases", options(), async |cluster| silent(cluster, Silence::Killed).await);
}

#[test]
fn an_agent_stopped_for_three_leases_runs_nothing_twice() {
    scenario("agent stopped for three leases", options(), async |cluster| silent(cluster, Silence::Stopped).await);
}

/// What freezes stands still on the old host from before it begins elsewhere, for ever; what is kept runs on, there alone.
async fn silent(cluster: &mut Cluster, how: Silence) -> anyhow::Result<()> {
    let client = cluster.client()?;
    warm_up(&client).await?;
    let policies = [OnIsolation::Keep, OnIsolation::Freeze].map(|policy| (policy, RestartPolicy::Never));
    let mut watcher = client.watch(client.watch_token().await?);
    let (sandboxes, agent) = create_beating(cluster, &client, &policies).await?;
    let [kept, frozen] = &sandboxes[..] else { anyhow::bail!("two were created") };
    let (mut kept_beats, mut old) = (Beats::open(cluster, kept).await?, Beats::open(cluster, frozen).await?);
    let process = main_processes(&client, std::slice::from_ref(&kept.name)).await?;

    match how {
        Silence::Killed => cluster.kill(agent)?,
        Silence::Stopped => cluster.pause(agent)?,
    }
    // There is no event in a silence.
    tokio::time::sleep(LEASE * 3).await;
    let node = kept.node.clone();
    client.await_nodes("the node is down", |nodes| is(nodes, &node, NodeState::Down)).await?;
    client.await_running(std::slice::from_ref(&frozen.name)).await?;
    let moved = client.get(&frozen.name).await?;
    ensure!(moved.node != node && moved.epoch == frozen.epoch + 1, "{moved:?}");
    let mut new = Beats::open(cluster, &moved).await?;
    let stood = old.all()?;
    let (last, first) = (stood.last().copied(), new.all()?.first().copied());
    ensure!(last.is_some() && last <= first, "the old instance beat at {last:?}, the new one from {first:?} on");
    new.grow(SOME_BEATS).await?;
    kept_beats.grow(SOME_BEATS).await?;
    ensure!(old.all()? == stood, "the old instance runs beside the new one");

    match how {
        Silence::Killed => cluster.restart(agent).await?,
        Silence::Stopped => cluster.unpause(agent)?,
    }
    let back = |nodes: &[warren_proto::v1::Node]| {
        nodes.iter().all(|n| n.state() == NodeState::Ready && n.leftovers.is_empty() && n.orphans.is_empty())
    };
    client.await_nodes("it is back, and nothing is left over", back).await?;
    client.await_running(std::slice::from_ref(&kept.name)).await?;
    ensure!(!instance(cluster, frozen)?.exists(), "the old instance is still on its host");
    ensure!(old.all()? == stood, "the old instance was thawed before it was removed");
    kept_beats.grow(SOME_BEATS).await?;
    new.grow(SOME_BEATS).await?;
    let after = main_processes(&client, std::slice::from_ref(&kept.name)).await?;
    ensure!(after == process, "the main process of what is kept changed: {process:?}, {after:?}");
    ensure!(client.check_state().await?.violations.is_empty(), "the rules are broken");

    let names = names(&sandboxes);
    delete_all(&client, &names).await?;
    // Through all of it the ledger had what is kept in one place.
    let mut deleted = 0;
    while deleted < names.len() {
        let event = watcher.next().await?;
        deleted += usize::from(event.kind() == warren_proto::v1::watch_sandboxes_response::Kind::Deleted);
        let now = event.sandbox.unwrap_or_default();
        let placed = now.name == kept.name && !now.node.is_empty();
        ensure!(!placed || (&now.node, now.epoch) == (&kept.node, kept.epoch), "placed again: {now:?}");
    }
    Ok(())
}

fn is(nodes: &[warren_proto::v1::Node], name: &str, state: NodeState) -> bool {
    nodes.iter().any(|node| node.name == name && node.state() == state)
}

/// A person gives a silent node up: what it kept is lost, or starts elsewhere where its policy says so. The host was not dead:
/// what its agent still runs when it returns are orphans, which stand still until somebody decides.
#[test]
fn a_forgotten_nodes_sandboxes_follow_their_policy_and_its_instances_are_frozen_orphans() {
    scenario("node forgotten", options(), async |cluster| {
        let client = cluster.client()?;
        warm_up(&client).await?;
        let policies = [RestartPolicy::Never, RestartPolicy::Always].map(|policy| (OnIsolation::Keep, policy));
        let (sandboxes, agent) = create_beating(cluster, &client, &policies).await?;
        let [given_up, restarted] = &sandboxes[..] else { anyhow::bail!("two were created") };
        let mut old = [Beats::open(cluster, given_up).await?, Beats::open(cluster, restarted).await?];
        let node = given_up.node.clone();
        cluster.kill(agent)?;
        client.await_nodes("the node is down", |nodes| is(nodes, &node, NodeState::Down)).await?;
        for sandbox in &sandboxes {
            ensure!(client.get(&sandbox.name).await?.state() == SandboxState::Unreachable, "given up by itself");
        }

        client.forget_node(&node).await.context("forget")?;
        let lost = client.get(&given_up.name).await?;
        let reason = lost.reason.clone().unwrap_or_default();
        ensure!(lost.state() == SandboxState::Lost && reason.code == "NODE_FORGOTTEN", "{lost:?}");
        client.await_running(std::slice::from_ref(&restarted.name)).await?;
        let moved = client.get(&restarted.name).await?;
        ensure!(moved.node != node && moved.epoch > restarted.epoch, "{moved:?}");
        let mut new = Beats::open(cluster, &moved).await?;

        cluster.restart(agent).await?;
        let orphans = sandboxes.len();
        let returned = client
            .await_nodes("it is back, with what it runs as orphans", |nodes| {
                nodes.iter().any(|n| n.name == node && n.state() == NodeState::Ready && n.orphans.len() == orphans)
            })
            .await?;
        let stood = [old[0].all()?, old[1].all()?];
        new.grow(SOME_BEATS).await?;
        ensure!([old[0].all()?, old[1].all()?] == stood, "an orphan runs: {returned:?}");
        for sandbox in &sandboxes {
            client.stop_orphan(&node, &sandbox.name, sandbox.epoch).await.context("stop an orphan")?;
        }
        let gone = |nodes: &[warren_proto::v1::Node]| {
            nodes.iter().all(|node| node.orphans.is_empty() && node.leftovers.is_empty())
        };
        client.await_nodes("the orphans are gone", gone).await?;
        for sandbox in &sandboxes {
            ensure!(!instance(cluster, sandbox)?.exists(), "{} is still on its host", sandbox.name);
        }
        ensure!(client.check_state().await?.violations.is_empty(), "the rules are broken");
        delete_all(&client, &names(&sandboxes)).await
    });
}
