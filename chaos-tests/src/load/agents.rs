//! What a leader bears: very many nodes with live leases, at rest and when the leader dies.
//!
//! The fleet's sessions are real and share a process. At rest the processor time of each process is taken over a while; then
//! the leader is killed, and all nodes register with the next one. None of them may be called anything but ready at any time.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::machine::Machine;
use super::probe::{self, Server, Used};
use super::region::{Counts, Region, Shape};
use super::stats::milliseconds;
use super::{Place, table};
use crate::client::Client;

/// Time at rest before anything is counted: the registrations are applied and the agents' first reports are in.
const SETTLE: Duration = Duration::from_secs(10);

/// How often the region is asked how many nodes are ready.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Longest that all nodes may take to be served again.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(120);

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    pub shape: Shape,
    pub quiet: Duration,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub nodes: usize,
    pub quiet_seconds: f64,
    /// Percent of one core, of each process, at rest.
    pub quiet_cpu_percent: BTreeMap<String, f64>,
    pub resident_mib: BTreeMap<String, u64>,
    /// Until the first call was answered by the new leader.
    pub leader_after_ms: f64,
    /// Until every node had a session again.
    pub registered_after_ms: f64,
    /// Percent of one core, of each process that lives, while they registered.
    pub failover_cpu_percent: BTreeMap<String, f64>,
    /// Renewals that were granted too late, and leases that lapsed, since the fleet began.
    pub late_renewals: u64,
    pub lapses: u64,
    /// Most nodes that were not ready at any look, and looks.
    pub most_not_ready: i64,
    pub looks: u64,
}

/// Measures.
pub async fn run(place: &Place, plan: &Plan) -> anyhow::Result<Report> {
    let machine = Machine::look(&place.root)?;
    let nodes = plan.shape.nodes;
    eprintln!("starting {nodes} nodes");
    let mut region = Region::start(place, &plan.shape).await?;
    tokio::time::sleep(SETTLE).await;
    let watch = Watch::start(region.client()?, nodes);
    let leader = region.leader().await?;
    let servers = by_role(region.servers(), leader);

    eprintln!("at rest for {:?}", plan.quiet);
    let (begun, before) = (Instant::now(), used(&servers).await?);
    tokio::time::sleep(plan.quiet).await;
    let quiet = percent(&servers, &before, &used(&servers).await?, begun.elapsed());
    let resident_mib = resident(&servers)?;

    eprintln!("killing the leader");
    let living: Vec<Server> = servers.iter().filter(|server| server.name != "leader").cloned().collect();
    let earlier = region.fleet_counts()?;
    let (killed, before) = (Instant::now(), used(&living).await?);
    region.scheduler_process(leader).kill()?;
    region.client()?.cluster_status().await.context("ask the new leader")?;
    let leader_after = killed.elapsed();
    let (registered_after, counts) = all_renewed(&region, nodes, &earlier, killed).await?;
    let failover = percent(&living, &before, &used(&living).await?, killed.elapsed());
    // What lapses late lapses within a lease.
    tokio::time::sleep(SETTLE).await;
    let last = region.fleet_counts().unwrap_or(counts);
    let (most_not_ready, looks) = watch.finish().await?;
    Ok(Report {
        machine,
        nodes,
        quiet_seconds: plan.quiet.as_secs_f64(),
        quiet_cpu_percent: quiet,
        resident_mib,
        leader_after_ms: milliseconds(leader_after),
        registered_after_ms: milliseconds(registered_after),
        failover_cpu_percent: failover,
        late_renewals: last.renewals_late,
        lapses: last.lapses,
        most_not_ready,
        looks,
    })
}

/// Waits until each node has opened a new session and all are registered.
async fn all_renewed(
    region: &Region,
    nodes: usize,
    earlier: &Counts,
    killed: Instant,
) -> anyhow::Result<(Duration, Counts)> {
    while killed.elapsed() < RECONNECT_PATIENCE {
        tokio::time::sleep(LOOK_EVERY).await;
        let counts = region.fleet_counts()?;
        let again = counts.reconnects.saturating_sub(earlier.reconnects);
        if counts.registered >= nodes && again >= nodes as u64 {
            return Ok((killed.elapsed(), counts));
        }
    }
    bail!("after {RECONNECT_PATIENCE:?}: {:?}\n{}", region.fleet_counts()?, region.logs())
}

fn by_role(mut servers: Vec<Server>, leader: usize) -> Vec<Server> {
    if let Some(server) = servers.get_mut(leader) {
        "leader".clone_into(&mut server.name);
    }
    servers
}

async fn used(servers: &[Server]) -> anyhow::Result<Vec<Used>> {
    futures::future::try_join_all(servers.iter().map(Server::used)).await
}

fn percent(servers: &[Server], before: &[Used], after: &[Used], time: Duration) -> BTreeMap<String, f64> {
    let share = |(before, after): (&Used, &Used)| {
        100.0 * after.cpu.saturating_sub(before.cpu).as_secs_f64() / time.as_secs_f64()
    };
    servers.iter().zip(before.iter().zip(after)).map(|(server, pair)| (server.name.clone(), share(pair))).collect()
}

fn resident(servers: &[Server]) -> anyhow::Result<BTreeMap<String, u64>> {
    let of = |server: &Server| {
        let bytes = probe::resident_bytes(server.process.context("it does not run")?)?;
        Ok((server.name.clone(), bytes >> 20))
    };
    servers.iter().map(of).collect()
}

/// Asks all the time how many nodes are not ready.
struct Watch {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<(i64, u64)>>,
}

impl Watch {
    fn start(client: Client, nodes: usize) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(look(client, i64::try_from(nodes).unwrap_or(i64::MAX), stop.clone()));
        Self { stop, task }
    }

    async fn finish(self) -> anyhow::Result<(i64, u64)> {
        self.stop.cancel();
        self.task.await?
    }
}

async fn look(client: Client, nodes: i64, stop: CancellationToken) -> anyhow::Result<(i64, u64)> {
    let (mut most, mut looks) = (0, 0);
    while !stop.is_cancelled() {
        let status = client.cluster_status().await?;
        most = most.max(nodes - status.ready_node_count);
        looks += 1;
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok((most, looks))
}

impl Report {
    pub fn print(&self) {
        self.machine.print();
        println!("{} nodes with live leases", self.nodes);
        let names: Vec<&String> = self.quiet_cpu_percent.keys().collect();
        let rows: Vec<Vec<String>> = names.into_iter().map(|name| self.row(name)).collect();
        let quiet = format!("quiet {:.0} s, % of a core", self.quiet_seconds);
        table::print(&["process", &quiet, "MiB", "failover, % of a core"], &rows);
        println!(
            "leader killed: another answered after {:.0} ms, every node was registered again after {:.0} ms",
            self.leader_after_ms, self.registered_after_ms
        );
        println!(
            "late renewals: {}; lapsed leases: {}; most nodes not ready at any of {} looks: {}",
            self.late_renewals, self.lapses, self.looks, self.most_not_ready
        );
    }

    fn row(&self, name: &String) -> Vec<String> {
        let share = |of: &BTreeMap<String, f64>| of.get(name).map_or(String::new(), |value| format!("{value:.1}"));
        let memory = self.resident_mib.get(name).map_or(String::new(), u64::to_string);
        vec![name.clone(), share(&self.quiet_cpu_percent), memory, share(&self.failover_cpu_percent)]
    }
}

/// No node was given up.
pub fn check(report: &Report) -> anyhow::Result<()> {
    ensure!(report.most_not_ready == 0, "{} nodes were called not ready", report.most_not_ready);
    Ok(())
}
