//! What very many sandboxes cost one replica: memory, checkpoints, a restart, lists, watches.
//!
//! They are created in batches, without request ids, so that memory is theirs. Then a create every few milliseconds shows what
//! a client feels while checkpoints are written, and a watch shows how long after its acknowledgement each is seen.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{
    BatchCreateSandboxesRequest, CreateSandboxRequest, ListSandboxesRequest, WatchSandboxesRequest,
    WatchSandboxesResponse, batch_create_result,
};

use super::machine::Machine;
use super::probe;
use super::region::{Region, Shape};
use super::stats::{Durations, Summary, milliseconds};
use super::{Place, create};
use crate::client::TENANT;

/// Creates in one call, and calls at once, while the state is filled.
const BATCH: usize = 500;
const FILLERS: usize = 8;
const MAX_ATTEMPTS: u32 = 200;

/// Sandboxes that bear the same label, where there are as many.
const MATCHES: usize = 100;
const LISTS: usize = 300;

/// A create each so often while checkpoints are written, and how many may be unanswered.
const PROBE_EVERY: Duration = Duration::from_millis(5);
const MAX_UNANSWERED: usize = 2000;

/// Between two looks at the checkpoint directory.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How long the replica may work off what the nodes report, until it counts as loaded.
const SETTLE_PATIENCE: Duration = Duration::from_secs(300);

/// Entries between two checkpoints: few, so that the probe meets some.
pub const CHECKPOINT_EVERY: u64 = 2000;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    pub shape: Shape,
    pub sandboxes: usize,
    pub probe: Duration,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub sandboxes: usize,
    pub fill_per_second: f64,
    pub resident_bytes: u64,
    pub bytes_each: f64,
    pub list: Summary,
    /// Creates while no checkpoint was written, and while one was.
    pub create_between: Summary,
    pub create_during: Summary,
    pub checkpoints: Summary,
    pub checkpoint_bytes: u64,
    /// From the acknowledgement of a create until the watcher has it.
    pub watch: Summary,
    pub restart_ms: f64,
    pub resident_bytes_after_restart: u64,
}

/// Measures.
pub async fn run(place: &Place, plan: &Plan) -> anyhow::Result<Report> {
    let machine = Machine::look(&place.root)?;
    let mut region = Region::start(place, &plan.shape).await?;
    let channel = region.channels(0, 1)?.remove(0);
    let process = |region: &mut Region| region.scheduler_process(0).id().context("it does not run");
    let empty = probe::resident_bytes(process(&mut region)?)?;
    let fill_per_second = fill(&channel, plan.sandboxes).await?;
    settled(&region, plan.sandboxes).await?;
    let resident_bytes = probe::resident_bytes(process(&mut region)?)?;
    eprintln!("filled: {} MiB", resident_bytes >> 20);
    let list = lists(&channel, plan.sandboxes).await?;
    eprintln!("listed: {list:?}");
    let directory = region.scheduler_directory(0).join("checkpoints");
    let seen = probes(&channel, &directory, plan.probe).await?;
    let begun = Instant::now();
    let scheduler = region.scheduler_process(0);
    scheduler.kill()?;
    scheduler.start()?;
    scheduler.await_ready().await?;
    let restart_ms = milliseconds(begun.elapsed());
    #[allow(clippy::cast_precision_loss, reason = "bytes of one machine stay far below 2^53")]
    let bytes_each = resident_bytes.saturating_sub(empty) as f64 / plan.sandboxes as f64;
    Ok(Report {
        machine,
        sandboxes: plan.sandboxes,
        fill_per_second,
        resident_bytes,
        bytes_each,
        list,
        create_between: seen.between.summary(),
        create_during: seen.during.summary(),
        checkpoints: seen.checkpoints.summary(),
        checkpoint_bytes: bytes_in(&directory)?,
        watch: seen.watch.summary(),
        restart_ms,
        resident_bytes_after_restart: probe::resident_bytes(process(&mut region)?)?,
    })
}

fn label(number: usize, sandboxes: usize) -> String {
    format!("app-{}", number % (sandboxes / MATCHES).max(1))
}

/// Creates the sandboxes; how many a second that was.
async fn fill(channel: &Channel, sandboxes: usize) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut set = JoinSet::new();
    for _ in 0..FILLERS {
        let (service, next) = (SandboxServiceClient::new(channel.clone()), next.clone());
        set.spawn(async move {
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= sandboxes {
                    return anyhow::Ok(());
                }
                create_some(service.clone(), first..sandboxes.min(first + BATCH), sandboxes).await?;
                if first.is_multiple_of(100_000) {
                    eprintln!("  {first} of {sandboxes} after {:.0} s", begun.elapsed().as_secs_f64());
                }
            }
        });
    }
    while let Some(ended) = set.join_next().await {
        ended.context("a client failed")??;
    }
    #[allow(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    Ok(sandboxes as f64 / begun.elapsed().as_secs_f64())
}

/// One batch; items that were refused are asked for again. Their names are chosen, so none is made twice.
async fn create_some(
    mut service: SandboxServiceClient<Channel>,
    numbers: std::ops::Range<usize>,
    sandboxes: usize,
) -> anyhow::Result<()> {
    let mut wanted: Vec<CreateSandboxRequest> = numbers
        .map(|number| {
            let mut request = create::request();
            request.request_id.clear();
            request.sandbox_id = format!("load-{number:07}");
            let sandbox = request.sandbox.get_or_insert_default();
            sandbox.labels = BTreeMap::from([("app".to_owned(), label(number, sandboxes))]);
            request
        })
        .collect();
    for _ in 0..MAX_ATTEMPTS {
        let parent = TENANT.to_owned();
        let request = BatchCreateSandboxesRequest { parent, requests: wanted.clone(), ..Default::default() };
        let results = match service.batch_create_sandboxes(request).await {
            Ok(response) => response.into_inner().results,
            Err(status) if crate::client::may_retry(&status) => Vec::new(),
            Err(status) => bail!("a batch was refused: {status}"),
        };
        let done = |at: usize| {
            results.get(at).is_some_and(|r| matches!(r.result, Some(batch_create_result::Result::Sandbox(_))))
        };
        let left: Vec<_> = wanted.iter().enumerate().filter(|(at, _)| !done(*at)).map(|(_, r)| r.clone()).collect();
        if left.is_empty() {
            return Ok(());
        }
        wanted = left;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("{} creates were refused {MAX_ATTEMPTS} times", wanted.len())
}

/// Waits until all sandboxes run.
async fn settled(region: &Region, sandboxes: usize) -> anyhow::Result<()> {
    let begun = Instant::now();
    let client = region.client()?;
    let mut counts = Vec::new();
    while begun.elapsed() < SETTLE_PATIENCE {
        counts = client.cluster_status().await?.sandbox_counts;
        let running = counts.iter().find(|count| count.state == "RUNNING").map_or(0, |count| count.count);
        if usize::try_from(running).unwrap_or(0) >= sandboxes {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    bail!("after {SETTLE_PATIENCE:?} there are {counts:?}")
}

async fn lists(channel: &Channel, sandboxes: usize) -> anyhow::Result<Summary> {
    let mut service = SandboxServiceClient::new(channel.clone());
    let mut durations = Durations::default();
    for number in 0..LISTS {
        let label = label(number * 7919, sandboxes);
        let request = ListSandboxesRequest {
            parent: TENANT.to_owned(),
            page_size: i32::try_from(MATCHES)?,
            labels: BTreeMap::from([("app".to_owned(), label)]),
            ..Default::default()
        };
        let begun = Instant::now();
        let page = service.list_sandboxes(request).await?.into_inner();
        durations.push(begun.elapsed());
        let expected = MATCHES.min(sandboxes);
        ensure!(page.sandboxes.len() == expected, "{} matches instead of {expected}", page.sandboxes.len());
    }
    Ok(durations.summary())
}

#[derive(Debug, Default)]
struct Seen {
    between: Durations,
    during: Durations,
    checkpoints: Durations,
    watch: Durations,
}

/// One probe: when it was sent and acknowledged, and what it made.
type Acknowledged = (Instant, Instant, String);

/// When checkpoints were written, and how long those took that were seen from their beginning to their end.
#[derive(Debug, Default)]
struct Windows {
    all: Vec<(Instant, Instant)>,
    whole: Vec<Duration>,
}

impl Windows {
    fn push(&mut self, from: Instant, whole: bool) {
        let to = Instant::now();
        self.all.push((from, to));
        self.whole.extend(whole.then(|| to - from));
    }
}

async fn probes(channel: &Channel, directory: &Path, time: Duration) -> anyhow::Result<Seen> {
    let until = Instant::now() + time;
    let watching = tokio::spawn(watch(open_watch(channel).await?, until + Duration::from_secs(2)));
    let looking = tokio::spawn(checkpoints(directory.to_owned(), until));
    let mut calls = JoinSet::new();
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    while Instant::now() < until {
        ticks.tick().await;
        while let Some(ended) = calls.try_join_next() {
            acknowledged.push(ended??);
        }
        ensure!(calls.len() < MAX_UNANSWERED, "{} probes are not answered", calls.len());
        calls.spawn(probe_once(channel.clone()));
    }
    while let Some(ended) = calls.join_next().await {
        acknowledged.push(ended??);
    }
    let windows = looking.await??;
    let events = watching.await??;
    Ok(sort_out(&acknowledged, &windows, &events))
}

async fn probe_once(channel: Channel) -> anyhow::Result<Acknowledged> {
    let mut request = create::request();
    request.request_id.clear();
    let begun = Instant::now();
    let sandbox = SandboxServiceClient::new(channel).create_sandbox(request).await?.into_inner();
    Ok((begun, Instant::now(), sandbox.name))
}

fn sort_out(acknowledged: &[Acknowledged], windows: &Windows, events: &BTreeMap<String, Instant>) -> Seen {
    let mut seen = Seen::default();
    for (begun, ended, name) in acknowledged {
        let overlaps = windows.all.iter().any(|(from, to)| begun <= to && ended >= from);
        if overlaps { &mut seen.during } else { &mut seen.between }.push(*ended - *begun);
        if let Some(at) = events.get(name) {
            // An event may be there before the answer.
            seen.watch.push(at.saturating_duration_since(*ended));
        }
    }
    windows.whole.iter().for_each(|took| seen.checkpoints.push(*took));
    seen
}

async fn open_watch(channel: &Channel) -> anyhow::Result<Streaming<WatchSandboxesResponse>> {
    let mut service = SandboxServiceClient::new(channel.clone());
    let parent = TENANT.to_owned();
    let page =
        service.list_sandboxes(ListSandboxesRequest { parent: parent.clone(), page_size: 1, ..Default::default() });
    let watch_token = page.await?.into_inner().watch_token;
    let request = WatchSandboxesRequest { parent, watch_token, ..Default::default() };
    Ok(service.watch_sandboxes(request).await?.into_inner())
}

/// When each new sandbox was seen first.
async fn watch(
    mut stream: Streaming<WatchSandboxesResponse>,
    until: Instant,
) -> anyhow::Result<BTreeMap<String, Instant>> {
    let mut seen = BTreeMap::new();
    while let Ok(event) = tokio::time::timeout_at(until, stream.message()).await {
        let Some(event) = event? else { break };
        let now = Instant::now();
        if event.kind() == Kind::Created {
            seen.insert(event.sandbox.unwrap_or_default().name, now);
        }
    }
    Ok(seen)
}

/// From when to when checkpoints were written: as long as there is a file under a temporary name. One that was begun before, or
/// is not done in the end, counts for creates, but its time says nothing.
async fn checkpoints(directory: std::path::PathBuf, until: Instant) -> anyhow::Result<Windows> {
    let mut windows = Windows::default();
    let mut begun = None;
    let mut looks = 0u64;
    while Instant::now() < until {
        match (is_written(&directory)?, begun) {
            (true, None) => begun = Some((Instant::now(), looks > 0)),
            (false, Some((from, whole))) => {
                windows.push(from, whole);
                begun = None;
            }
            (true, Some(_)) | (false, None) => {}
        }
        looks += 1;
        tokio::time::sleep(LOOK_EVERY).await;
    }
    if let Some((from, _)) = begun {
        windows.push(from, false);
    }
    Ok(windows)
}

fn is_written(directory: &Path) -> anyhow::Result<bool> {
    let mut entries = std::fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    Ok(entries.any(|entry| entry.is_ok_and(|entry| entry.path().extension().is_some_and(|e| e == "tmp"))))
}

/// The largest file: older checkpoints lie beside the newest.
fn bytes_in(directory: &Path) -> anyhow::Result<u64> {
    let sizes = std::fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    Ok(sizes.max().unwrap_or(0))
}

impl Report {
    pub fn print(&self) {
        self.machine.print();
        let mib = |bytes: u64| bytes >> 20;
        let times = |what: &str, s: &Summary| {
            println!(
                "{what}: p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms ({} times)",
                s.p50_ms, s.p99_ms, s.max_ms, s.count
            );
        };
        println!("{} sandboxes in one replica, created at {:.0}/s", self.sandboxes, self.fill_per_second);
        println!("memory: {} MiB resident, {:.0} bytes each", mib(self.resident_bytes), self.bytes_each);
        times("list of 100 by label", &self.list);
        times("checkpoint", &self.checkpoints);
        println!("checkpoint: {} MiB", mib(self.checkpoint_bytes));
        times("create, no checkpoint being written", &self.create_between);
        times("create, while one was written", &self.create_during);
        times("create acknowledged until watched", &self.watch);
        let after = mib(self.resident_bytes_after_restart);
        println!("restart until ready: {:.1} s, {after} MiB resident then", self.restart_ms / 1000.0);
    }
}
