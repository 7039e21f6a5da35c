//! Durable creates a second, beside the puts of an etcd that is driven in the same way.
//!
//! Both have three members on one file system, both are called at their leader over the same number of connections, and a
//! put's key and value have together the bytes of a create's log record. The systems take turns, each round with fresh data.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use prost::Message;
use serde::Serialize;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::Channel;
use warren_proto::error::reason_of;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::stored_command::Body;
use warren_proto::v1::stored_create_sandbox::Decision;
use warren_proto::v1::{
    BatchCreateSandboxesRequest, CreateSandboxRequest, Resources, Sandbox, StoredCaller, StoredCommand,
    StoredCreateSandbox, StoredRequestKey, StoredResources, StoredSandboxSpec, batch_create_result,
};

use super::drive::{self, Call};
use super::etcd::{self, Etcd};
use super::machine::Machine;
use super::probe::{Server, Used};
use super::region::{Region, Shape};
use super::stats::{Summary, median};
use super::{Place, table};
use crate::client::{Client, TENANT, small_sandbox};

/// Tenants that clients belong to: one alone would fill its share of the table of request ids, 262,144 in ten minutes.
const TENANTS: usize = 8;

/// Between the start of a system and its first call: elections are over, caches are warm.
const SETTLE: Duration = Duration::from_secs(1);

/// What is measured, and for how long.
#[derive(Debug, Clone)]
pub struct Plan {
    pub clients: Vec<usize>,
    pub batch_clients: usize,
    pub batch: usize,
    pub connections: usize,
    pub rounds: usize,
    pub warm_up: Duration,
    pub measured: Duration,
    pub with_etcd: bool,
    pub shape: Shape,
}

/// One system under one number of clients, in one round.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub system: &'static str,
    pub round: usize,
    pub clients: usize,
    pub batch: usize,
    pub per_second: f64,
    pub latency: Summary,
    pub errors: BTreeMap<String, u64>,
    /// Of each member: its name, durable syncs a second.
    pub syncs_per_second: BTreeMap<String, f64>,
    /// Of each process: microseconds of processor time for one operation.
    pub cpu_us_each: BTreeMap<String, f64>,
}

/// All that was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub connections: usize,
    pub record_bytes: usize,
    pub etcd_version: Option<String>,
    pub points: Vec<Point>,
}

/// A system that can be called.
struct Target {
    name: &'static str,
    servers: Vec<Server>,
    channels: Vec<Channel>,
    record_bytes: usize,
}

/// Measures.
pub async fn run(place: &Place, plan: &Plan) -> anyhow::Result<Report> {
    let machine = Machine::look(&place.root)?;
    if plan.with_etcd {
        etcd::find()?;
    }
    let record_bytes = record_bytes();
    let mut report =
        Report { machine, connections: plan.connections, record_bytes, etcd_version: None, points: Vec::new() };
    for round in 1..=plan.rounds {
        eprintln!("round {round} of {}: Warren", plan.rounds);
        report.points.extend(warren(place, plan, round).await?);
        if plan.with_etcd {
            eprintln!("round {round} of {}: etcd", plan.rounds);
            let (version, points) = etcd(place, plan, round, record_bytes).await?;
            report.etcd_version = Some(version);
            report.points.extend(points);
        }
    }
    Ok(report)
}

async fn warren(place: &Place, plan: &Plan, round: usize) -> anyhow::Result<Vec<Point>> {
    let region = Region::start(place, &plan.shape).await?;
    tokio::time::sleep(SETTLE).await;
    let leader = region.leader().await?;
    let target = Target {
        name: "warren",
        servers: named_by_role(region.servers(), leader),
        channels: region.channels(leader, plan.connections)?,
        record_bytes: 0,
    };
    let mut points = Vec::new();
    for &clients in &plan.clients {
        points.push(target.measure(plan, round, clients, 1).await?);
    }
    if plan.batch_clients > 0 {
        points.push(target.measure(plan, round, plan.batch_clients, plan.batch).await?);
    }
    ensure!(region.leader().await? == leader, "another replica leads now: the figures are of two leaders");
    Ok(points)
}

async fn etcd(place: &Place, plan: &Plan, round: usize, record_bytes: usize) -> anyhow::Result<(String, Vec<Point>)> {
    let etcd = Etcd::start(place).await?;
    tokio::time::sleep(SETTLE).await;
    let (leader, version) = etcd.leader().await?;
    let target = Target {
        name: "etcd",
        servers: named_by_role(etcd.servers(), leader),
        channels: etcd.channels(leader, plan.connections)?,
        record_bytes,
    };
    let mut points = Vec::new();
    for &clients in &plan.clients {
        points.push(target.measure(plan, round, clients, 1).await?);
    }
    ensure!(etcd.leader().await?.0 == leader, "another member leads now: the figures are of two leaders");
    Ok((version, points))
}

/// The member that leads comes first and is called so: then the lines of a table are about the same.
fn named_by_role(mut servers: Vec<Server>, leader: usize) -> Vec<Server> {
    let mut followers = 0;
    for (at, server) in servers.iter_mut().enumerate() {
        if at == leader {
            "leader".clone_into(&mut server.name);
        } else if server.syncs.is_some() {
            followers += 1;
            server.name = format!("follower-{followers}");
        }
    }
    servers.push(Server::own("clients"));
    servers
}

impl Target {
    async fn measure(&self, plan: &Plan, round: usize, clients: usize, batch: usize) -> anyhow::Result<Point> {
        let running = drive::start(clients, plan.warm_up, plan.measured, &self.call(batch));
        tokio::time::sleep_until(running.from).await;
        let (begun, before) = (Instant::now(), self.used().await?);
        tokio::time::sleep_until(running.until).await;
        let (ended, after) = (Instant::now(), self.used().await?);
        let done = running.finish().await?;
        let seconds = (ended - begun).as_secs_f64();
        let operations = done.operations;
        let (latency, errors) = done.summary();
        let point = Point {
            system: self.name,
            round,
            clients,
            batch,
            per_second: rate(operations, plan.measured),
            latency,
            errors,
            syncs_per_second: self.each(|at| Some((after[at].syncs? - before[at].syncs?) / seconds)),
            cpu_us_each: self.each(|at| {
                let used = after[at].cpu.saturating_sub(before[at].cpu);
                Some(used.as_secs_f64() * 1e6 / rate(operations, Duration::from_secs(1)).max(1.0))
            }),
        };
        eprintln!("  {}", line(&point).join("  "));
        Ok(point)
    }

    async fn used(&self) -> anyhow::Result<Vec<Used>> {
        futures::future::try_join_all(self.servers.iter().map(Server::used)).await
    }

    fn each(&self, figure: impl Fn(usize) -> Option<f64>) -> BTreeMap<String, f64> {
        let named = self.servers.iter().enumerate();
        named.filter_map(|(at, server)| Some((server.name.clone(), figure(at)?))).collect()
    }

    fn call(&self, batch: usize) -> Call {
        let channels = self.channels.clone();
        if self.name == "etcd" {
            let (next, bytes) = (Arc::new(AtomicU64::new(0)), self.record_bytes);
            return Arc::new(move |client| {
                let channel = channels[client % channels.len()].clone();
                let key = format!("sandbox/{:020}", next.fetch_add(1, Ordering::Relaxed)).into_bytes();
                let value = vec![b'v'; bytes.saturating_sub(key.len())];
                Box::pin(async move { etcd::put(channel, key, value).await.map(|()| 1).map_err(|s| reason(&s)) })
            });
        }
        Arc::new(move |client| {
            let service = SandboxServiceClient::new(channels[client % channels.len()].clone());
            Box::pin(async move {
                match batch {
                    1 => create(service, client % TENANTS).await,
                    _ => create_batch(service, batch).await,
                }
            })
        })
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn rate(operations: u64, time: Duration) -> f64 {
    operations as f64 / time.as_secs_f64()
}

/// A small sandbox, as an API tier asks for it.
pub fn request() -> CreateSandboxRequest {
    CreateSandboxRequest {
        parent: TENANT.to_owned(),
        sandbox: Some(small_sandbox()),
        request_id: Client::request_id(),
        ..CreateSandboxRequest::default()
    }
}

async fn create(mut service: SandboxServiceClient<Channel>, tenant: usize) -> Result<u64, String> {
    let request = CreateSandboxRequest { parent: format!("tenants/load-{tenant}"), ..request() };
    service.create_sandbox(request).await.map(|_| 1).map_err(|status| reason(&status))
}

/// Batches would fill a tenant's share of the table of request ids within seconds.
fn without_id(request: CreateSandboxRequest) -> CreateSandboxRequest {
    CreateSandboxRequest { request_id: String::new(), ..request }
}

async fn create_batch(mut service: SandboxServiceClient<Channel>, batch: usize) -> Result<u64, String> {
    let requests = (0..batch).map(|_| without_id(request())).collect();
    let request = BatchCreateSandboxesRequest { parent: TENANT.to_owned(), requests, ..Default::default() };
    let answer = service.batch_create_sandboxes(request).await.map_err(|status| reason(&status))?;
    let results = answer.into_inner().results;
    let failed = results.iter().find_map(|item| match &item.result {
        Some(batch_create_result::Result::Error(error)) => Some(error.reason.clone()),
        _ => None,
    });
    // A batch counts as a whole or not at all: half of one would flatter the figure.
    match failed {
        Some(reason) => Err(reason),
        None if results.len() == batch => Ok(batch as u64),
        None => Err(format!("{} results for {batch} requests", results.len())),
    }
}

fn reason(status: &Status) -> String {
    match reason_of(status) {
        Some(reason) => reason.as_str_name().trim_start_matches("ERROR_REASON_").to_owned(),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Bytes of the log record that one such create becomes, as `proto/warren/v1/storage.proto` says.
pub fn record_bytes() -> usize {
    let Sandbox { template, resources, .. } = small_sandbox();
    let Resources { cpu_milli, memory_bytes, disk_bytes, pids, .. } = resources.unwrap_or_default();
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    let spec = StoredSandboxSpec {
        template: template.trim_start_matches("templates/").to_owned(),
        resources: Some(StoredResources {
            cpu_milli: number(cpu_milli),
            memory_bytes: number(memory_bytes),
            disk_bytes: number(disk_bytes),
            gpus: 0,
        }),
        pids: number(pids),
        ..Default::default()
    };
    let create = StoredCreateSandbox {
        sandbox: format!("tenants/load-0/sandboxes/s-{:024x}", 0),
        spec: Some(spec),
        request: Some(StoredRequestKey { id: vec![1; 16], payload: vec![1; 32] }),
        decision: Some(Decision::Place("sim-100".to_owned())),
        gpus: Vec::new(),
    };
    let caller = StoredCaller { principal: "local".to_owned(), role: 3, tenant: String::new() };
    let record = StoredCommand { caller: Some(caller), time_ms: 1 << 40, body: Some(Body::CreateSandbox(create)) };
    record.encoded_len()
}

impl Report {
    /// Medians over the rounds, and the ratio.
    pub fn print(&self) {
        self.machine.print();
        let etcd = self.etcd_version.as_deref().map_or(String::new(), |version| format!(", etcd {version}"));
        println!("{} bytes a record, {} connections to the leader{etcd}", self.record_bytes, self.connections);
        let rows = self.shapes().into_iter().map(|key| self.row(key)).collect::<Vec<_>>();
        table::print(
            &[
                "system", "clients", "batch", "rounds", "ops/s", "spread", "p50 ms", "p99 ms", "errors", "syncs/s",
                "x etcd",
            ],
            &rows,
        );
        println!("\nprocessor time for one operation, in µs");
        let rows = self.shapes().into_iter().map(|key| self.cpu_row(key)).collect::<Vec<_>>();
        table::print(&["system", "clients", "batch", "all", "of which"], &rows);
    }

    fn shapes(&self) -> Vec<(&'static str, usize, usize)> {
        let mut shapes = Vec::new();
        for point in &self.points {
            let shape = (point.system, point.clients, point.batch);
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
        shapes
    }

    fn of(&self, (system, clients, batch): (&'static str, usize, usize)) -> Vec<&Point> {
        let all = self.points.iter();
        all.filter(|p| (p.system, p.clients, p.batch) == (system, clients, batch)).collect()
    }

    /// Median over the rounds.
    pub fn per_second(&self, key: (&'static str, usize, usize)) -> f64 {
        median(self.of(key).iter().map(|point| point.per_second).collect())
    }

    fn row(&self, key: (&'static str, usize, usize)) -> Vec<String> {
        let points = self.of(key);
        let middle = |figure: fn(&Point) -> f64| median(points.iter().map(|p| figure(p)).collect());
        let rates = points.iter().map(|p| p.per_second);
        let (least, most) = (rates.clone().fold(f64::MAX, f64::min), rates.fold(0.0, f64::max));
        let errors: u64 = points.iter().flat_map(|p| p.errors.values()).sum();
        let other = self.per_second(("etcd", key.1, 1));
        let ratio = if key.0 == "warren" && other > 0.0 { self.per_second(key) / other } else { 0.0 };
        vec![
            key.0.to_owned(),
            key.1.to_string(),
            key.2.to_string(),
            points.len().to_string(),
            format!("{:.0}", self.per_second(key)),
            format!("{least:.0}-{most:.0}"),
            format!("{:.2}", middle(|p| p.latency.p50_ms)),
            format!("{:.2}", middle(|p| p.latency.p99_ms)),
            errors.to_string(),
            medians(&points, |p| &p.syncs_per_second)
                .iter()
                .map(|(_, v)| format!("{v:.0}"))
                .collect::<Vec<_>>()
                .join("/"),
            if ratio > 0.0 { format!("{ratio:.2}") } else { String::new() },
        ]
    }

    fn cpu_row(&self, key: (&'static str, usize, usize)) -> Vec<String> {
        let each = medians(&self.of(key), |p| &p.cpu_us_each);
        let all: f64 = each.iter().map(|(_, value)| value).sum();
        let words: Vec<String> = each.iter().map(|(name, value)| format!("{name} {value:.0}")).collect();
        vec![key.0.to_owned(), key.1.to_string(), key.2.to_string(), format!("{all:.0}"), words.join(", ")]
    }
}

/// Median of each named figure, the leader's first.
fn medians(points: &[&Point], of: fn(&Point) -> &BTreeMap<String, f64>) -> Vec<(String, f64)> {
    let mut names: Vec<&String> = points.iter().flat_map(|p| of(p).keys()).collect();
    names.sort_by_key(|name| (*name != "leader", *name));
    names.dedup();
    let figure = |name: &String| median(points.iter().filter_map(|p| of(p).get(name).copied()).collect());
    names.into_iter().map(|name| (name.clone(), figure(name))).collect()
}

fn line(point: &Point) -> Vec<String> {
    let Point { clients, batch, per_second, latency, errors, .. } = point;
    let errors: Vec<String> = errors.iter().map(|(reason, count)| format!("{reason} x {count}")).collect();
    vec![
        format!("{clients} clients x {batch}: {per_second:.0}/s"),
        format!("p50 {:.2} ms, p99 {:.2} ms", latency.p50_ms, latency.p99_ms),
        errors.join(", "),
    ]
}

/// Whether anything was measured at all.
pub fn check(report: &Report) -> anyhow::Result<()> {
    let idle = report.points.iter().find(|point| point.latency.count == 0 && point.batch == 1);
    idle.map_or(Ok(()), |point| Err(anyhow::anyhow!("{} did nothing: {:?}", point.system, point.errors)))
        .context("create")
}
