//! How long nobody can create when the leader fails: killed, stopped, or cut off from the other replicas.
//!
//! Clients create all the time, with request ids, at any replica that answers. Each run is one fault; then the replica comes
//! back and catches up before the next. In the end every create that was acknowledged must be there, and nothing else.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use tokio::time::Instant;

use super::clients::{Book, Clients};
use super::machine::Machine;
use super::region::{FIRST_GROUP, PEER_PORT, Region, Shape};
use super::stats::{Durations, Summary, milliseconds};
use super::{Place, table};

/// Clients that create, and their pause between two creates: fine enough to see a gap of some milliseconds.
const CLIENTS: usize = 8;
const PACE: Duration = Duration::from_millis(20);

/// Undisturbed time before each fault.
const CALM: Duration = Duration::from_secs(1);

/// How long a fault lasts: several elections, so that the new leader's first work is seen too.
const FAULT: Duration = Duration::from_secs(5);

/// How long a replica may take to come back and catch up.
const RETURN_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Set for the copy of this program that runs in a network of its own.
const INSIDE: &str = "WARREN_LOAD_PRIVATE_NETWORK";

/// What happens to the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Sigkill,
    Sigstop,
    /// Nothing passes between it and the other replicas; clients and nodes reach it as before.
    Partition,
}

/// One fault.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Run {
    /// Longest time without an acknowledged create, from just before the fault until it ended.
    pub gap_ms: f64,
    /// The same while the replica came back.
    pub return_gap_ms: f64,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub kind: Kind,
    pub runs: Vec<Run>,
    pub gap: Summary,
    pub return_gap: Summary,
    pub acknowledged: usize,
    /// Acknowledged and not there. Must be 0.
    pub missing: usize,
    /// There and not acknowledged: a request that had two effects. Must be 0.
    pub unknown: usize,
}

/// Measures.
pub async fn run(place: &Place, shape: &Shape, kind: Kind, runs: usize) -> anyhow::Result<Report> {
    let machine = Machine::look(&place.root)?;
    let mut region = Region::start(place, shape).await?;
    caught_up(&region).await?;
    let clients = Clients::start(&region.endpoints(), CLIENTS, PACE)?;
    let mut seen = Vec::new();
    for at in 1..=runs {
        let run =
            one(&mut region, kind, &clients.book).await.with_context(|| format!("run {at}\n{}", region.logs()))?;
        eprintln!("  run {at}: {:.0} ms, {:.0} ms on return", run.gap_ms, run.return_gap_ms);
        seen.push(run);
    }
    let book = clients.finish().await?;
    let there: BTreeSet<String> = region.names().await?;
    let acknowledged = book.names();
    Ok(Report {
        machine,
        kind,
        gap: summary(seen.iter().map(|run| run.gap_ms)),
        return_gap: summary(seen.iter().map(|run| run.return_gap_ms)),
        runs: seen,
        acknowledged: acknowledged.len(),
        missing: acknowledged.difference(&there).count(),
        unknown: there.difference(&acknowledged).count(),
    })
}

fn summary(values: impl Iterator<Item = f64>) -> Summary {
    let mut durations = Durations::default();
    values.for_each(|ms| durations.push(Duration::from_secs_f64(ms / 1000.0)));
    durations.summary()
}

async fn one(region: &mut Region, kind: Kind, book: &Book) -> anyhow::Result<Run> {
    tokio::time::sleep(CALM).await;
    let leader = region.leader().await?;
    let begun = Instant::now();
    begin(region, kind, leader)?;
    tokio::time::sleep(FAULT).await;
    let ended = Instant::now();
    end(region, kind, leader).await?;
    caught_up(region).await?;
    Ok(Run {
        gap_ms: milliseconds(book.longest_gap(begun, ended)),
        return_gap_ms: milliseconds(book.longest_gap(ended, Instant::now())),
    })
}

fn begin(region: &mut Region, kind: Kind, leader: usize) -> anyhow::Result<()> {
    match kind {
        Kind::Sigkill => region.scheduler_process(leader).kill(),
        Kind::Sigstop => region.signal(leader, Signal::SIGSTOP),
        Kind::Partition => cut_off(region, leader),
    }
}

async fn end(region: &mut Region, kind: Kind, leader: usize) -> anyhow::Result<()> {
    match kind {
        Kind::Sigkill => {
            let process = region.scheduler_process(leader);
            process.start()?;
            process.await_ready().await
        }
        Kind::Sigstop => region.signal(leader, Signal::SIGCONT),
        Kind::Partition => tool("nft", &["delete", "table", "inet", "warren"]),
    }
}

/// Waits until every replica is there and has what the leader has, nearly.
async fn caught_up(region: &Region) -> anyhow::Result<()> {
    /// Entries that are under way while clients create.
    const NEARLY: u64 = 200;
    let begun = Instant::now();
    let client = region.client()?;
    while begun.elapsed() < RETURN_PATIENCE {
        let status = client.cluster_status().await?;
        let near = |index: u64| index.saturating_add(NEARLY) >= status.revision;
        if status.members.len() == region.endpoints().len()
            && status.members.iter().all(|member| member.reachable && near(member.matched_index))
        {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    bail!("a replica did not catch up within {RETURN_PATIENCE:?}")
}

/// Drops what passes between one replica and the others. Every address here is this machine's own, so packets are told
/// apart by the group of the process that sends them.
fn cut_off(region: &Region, leader: usize) -> anyhow::Result<()> {
    let group = |at: usize| (FIRST_GROUP + u32::try_from(at).unwrap_or(0)).to_string();
    let others: Vec<usize> = (0..region.endpoints().len()).filter(|at| *at != leader).collect();
    let list = |words: Vec<String>| format!("{{ {} }}", words.join(", "));
    let other_hosts = list(others.iter().map(|at| region.host(*at)).collect());
    let other_groups = list(others.iter().map(|at| group(*at)).collect());
    let (host, own) = (region.host(leader), group(leader));
    let rules = [
        format!("meta skgid {own} ip daddr {other_hosts} drop"),
        format!("meta skgid {other_groups} ip daddr {host} drop"),
        // What it answers on connections that the others made: their ends have no address of their own.
        format!("meta skgid {own} tcp sport {PEER_PORT} drop"),
    ];
    let chain = "add chain inet warren out { type filter hook output priority 0; }";
    let rules: String = rules.iter().map(|rule| format!("add rule inet warren out {rule}\n")).collect();
    let script = format!("add table inet warren\n{chain}\n{rules}");
    tool("nft", &[&script])
}

fn tool(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
    Ok(())
}

/// A partition needs packet filters, and they should be nobody else's: this program runs once more in a network of its own,
/// which goes with it, filters and all. `None` where this is that run already; otherwise the exit code of it.
pub async fn in_private_network() -> anyhow::Result<Option<i32>> {
    if std::env::var_os(INSIDE).is_some() {
        tool("ip", &["link", "set", "lo", "up"])?;
        return Ok(None);
    }
    ensure!(nix::unistd::geteuid().is_root(), "a partition needs root: it makes a network of its own");
    // When this program is told to end, `unshare` is killed, and with it the copy told to end.
    let status = tokio::process::Command::new("unshare")
        .args(["--net", "--fork", "--kill-child=SIGTERM", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .kill_on_drop(true)
        .status()
        .await
        .context("run unshare")?;
    Ok(Some(status.code().unwrap_or(1)))
}

impl Report {
    pub fn print(&self) {
        self.machine.print();
        println!("{CLIENTS} clients, {} creates acknowledged", self.acknowledged);
        let row = |what: &str, summary: &Summary| {
            let figure = |value: f64| format!("{value:.0}");
            let Summary { count, p50_ms, p99_ms, max_ms } = *summary;
            vec![what.to_owned(), count.to_string(), figure(p50_ms), figure(p99_ms), figure(max_ms)]
        };
        let rows = [row("without a leader", &self.gap), row("while it came back", &self.return_gap)];
        table::print(&["longest gap, ms", "runs", "p50", "p99", "max"], &rows);
        println!("acknowledged and missing: {}; there and not acknowledged: {}", self.missing, self.unknown);
    }
}

/// Nothing acknowledged is lost, and nothing happened twice.
pub fn check(report: &Report) -> anyhow::Result<()> {
    ensure!(report.missing == 0, "{} acknowledged creates are missing", report.missing);
    ensure!(report.unknown == 0, "{} sandboxes were never acknowledged", report.unknown);
    Ok(())
}
