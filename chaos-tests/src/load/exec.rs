//! Real sandboxes through the whole of Warren: three schedulers and one node agent on loopback, beside the bare runtime with the
//! same bundle, in turns.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::bare::Bare;
use super::machine::Machine;
use super::memory::Memory;
use super::stats::{Durations, Summary};
use super::{Place, table};
use crate::client::{Client, small_sandbox};
use crate::cluster::{Cluster, Options};
use crate::image::Image;

/// Creates and deletes under way at once, in the measurement of many.
const AT_ONCE: usize = 32;

/// What is executed.
const ECHO: [&str; 2] = ["/bin/echo", "x"];

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    pub runtimes: Vec<String>,
    pub rounds: usize,
    pub many: usize,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub runtimes: Vec<OfRuntime>,
}

/// Figures of one runtime.
#[derive(Debug, Serialize)]
pub struct OfRuntime {
    pub runtime: String,
    /// From the create's call until the caller heard that it runs.
    pub running: Summary,
    /// From the create's call to the first output of its first exec.
    pub created: Summary,
    /// From the exec's call, with its Connect, to the first output.
    pub executed: Summary,
    /// `run --detach` of the bare runtime.
    pub bare_running: Summary,
    /// And its first exec.
    pub bare_created: Summary,
    pub bare_executed: Summary,
    /// From the delete's call until the sandbox is not known any more.
    pub deleted: Summary,
    pub many: Many,
}

/// Very many at once.
#[derive(Debug, Serialize)]
pub struct Many {
    pub sandboxes: usize,
    pub all_running_s: f64,
    pub all_answered_s: f64,
    pub all_gone_s: f64,
    pub memory: Memory,
    pub each_kib: f64,
}

pub async fn run(place: &Place, plan: &Plan) -> anyhow::Result<Report> {
    let machine = Machine::look(&place.root)?;
    let image = Image::busybox()?;
    let mut runtimes = Vec::new();
    for runtime in &plan.runtimes {
        let options = Options {
            agents: 1,
            runtime: runtime.clone(),
            cpu_milli: 1_000_000,
            memory: "64GiB".to_owned(),
            disk: "256GiB".to_owned(),
            ..Options::default()
        };
        let cluster = Cluster::start(options, &image).await.with_context(|| format!("a cluster with {runtime}"))?;
        let measured = measure(&cluster, runtime, plan).await;
        cluster.finish().await?;
        runtimes.push(measured.with_context(|| format!("measure {runtime}"))?);
    }
    Ok(Report { machine, runtimes })
}

async fn measure(cluster: &Cluster, runtime: &str, plan: &Plan) -> anyhow::Result<OfRuntime> {
    let client = cluster.client()?;
    let bare = bare(cluster, &client, runtime).await?;
    let bare = std::sync::Arc::new(bare);
    let mut all: [Durations; 7] = Default::default();
    for round in 0..plan.rounds {
        let [running, created, executed, deleted, ..] = &mut all;
        let begun = Instant::now();
        let name = client.create(small_sandbox()).await?.name;
        ensure!(client.wait_running(&name).await?, "{name} does not run");
        running.push(begun.elapsed());
        first_output(&client, &name).await?;
        created.push(begun.elapsed());
        executed.push(first_output(&client, &name).await?);
        let begun = Instant::now();
        client.delete(&name).await?;
        client.await_gone(std::slice::from_ref(&name)).await?;
        deleted.push(begun.elapsed());
        let (bare, id) = (bare.clone(), format!("bare-{round}"));
        let took = tokio::task::spawn_blocking(move || bare_round(&bare, &id)).await??;
        for (durations, took) in all[4..].iter_mut().zip(took) {
            durations.push(took);
        }
    }
    let many = measure_many(cluster, &client, plan.many).await?;
    let [running, created, executed, deleted, bare_running, bare_created, bare_executed] = all.map(Durations::summary);
    Ok(OfRuntime {
        runtime: runtime.to_owned(),
        running,
        created,
        executed,
        deleted,
        bare_running,
        bare_created,
        bare_executed,
        many,
    })
}

/// How long until the first output came.
async fn first_output(client: &Client, name: &str) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut first = None;
    let noticed = || first = first.or_else(|| Some(begun.elapsed()));
    let output = client.exec_noticing(name, &ECHO, &[], noticed).await?;
    ensure!(output.text()? == "x", "{name} says something else");
    first.context("no output")
}

fn bare_round(bare: &Bare, id: &str) -> anyhow::Result<[Duration; 3]> {
    let begun = Instant::now();
    bare.run(id)?;
    let running = begun.elapsed();
    let first = bare.exec(id)?;
    let second = bare.exec(id)?;
    bare.delete(id)?;
    Ok([running, running + first, second])
}

/// A bundle like that of a sandbox which runs now, and is deleted again.
async fn bare(cluster: &Cluster, client: &Client, runtime: &str) -> anyhow::Result<Bare> {
    let (node, data_dir) = cluster.traces().nodes.first().context("a node")?;
    let name = client.create(small_sandbox()).await?.name;
    ensure!(client.wait_running(&name).await?, "{name} does not run");
    let instance = only_entry(&data_dir.join("oci/instances"))?;
    let rootfs = only_entry(&data_dir.join("templates"))?.join("rootfs");
    let scratch = cluster.scratch("bare");
    let bare =
        Bare::prepare(runtime, &scratch, &instance.join("config.json"), &rootfs, &format!("/warren/{node}/bare"))?;
    client.delete(&name).await?;
    client.await_gone(&[name]).await?;
    Ok(bare)
}

fn only_entry(directory: &Path) -> anyhow::Result<PathBuf> {
    let first = std::fs::read_dir(directory)?.flatten().find(|entry| entry.path().is_dir());
    Ok(first.with_context(|| format!("{} is empty", directory.display()))?.path())
}

async fn measure_many(cluster: &Cluster, client: &Client, sandboxes: usize) -> anyhow::Result<Many> {
    let begun = Instant::now();
    let names = in_turns((0..sandboxes).collect(), client, |client, _| async move {
        Ok(client.create(small_sandbox()).await?.name)
    })
    .await?;
    client.await_running(&names).await?;
    let all_running_s = begun.elapsed().as_secs_f64();
    in_turns(names.clone(), client, |client, name| async move { first_output(&client, &name).await }).await?;
    let all_answered_s = begun.elapsed().as_secs_f64();
    let memory = Memory::of(cluster.traces());
    let begun = Instant::now();
    in_turns(names.clone(), client, |client, name| async move { Ok(client.delete(&name).await?) }).await?;
    client.await_gone(&names).await?;
    let all_gone_s = begun.elapsed().as_secs_f64();
    let left = cluster.traces().of_sandboxes();
    ensure!(left.is_empty(), "left on the host:\n{}", left.join("\n"));
    Ok(Many { sandboxes, all_running_s, all_answered_s, all_gone_s, each_kib: memory.each_kib(sandboxes), memory })
}

/// Does it with each, some at once.
async fn in_turns<A, T, F>(items: Vec<A>, client: &Client, work: impl Fn(Client, A) -> F) -> anyhow::Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = anyhow::Result<T>> + Send + 'static,
{
    let (mut tasks, mut done) = (JoinSet::new(), Vec::new());
    for item in items {
        if tasks.len() >= AT_ONCE
            && let Some(finished) = tasks.join_next().await
        {
            done.push(finished??);
        }
        tasks.spawn(work(client.clone(), item));
    }
    while let Some(finished) = tasks.join_next().await {
        done.push(finished??);
    }
    Ok(done)
}

impl Report {
    pub fn print(&self) {
        self.machine.print();
        let row = |of: &OfRuntime, what: &str, warren: Summary, bare: Option<Summary>| {
            let cell = |value: f64| format!("{value:.1}");
            let bare = |get: fn(Summary) -> f64| bare.map_or_else(|| "-".to_owned(), |summary| cell(get(summary)));
            vec![
                of.runtime.clone(),
                what.to_owned(),
                cell(warren.p50_ms),
                cell(warren.p99_ms),
                bare(|summary| summary.p50_ms),
                bare(|summary| summary.p99_ms),
            ]
        };
        let rows: Vec<Vec<String>> = self
            .runtimes
            .iter()
            .flat_map(|of| {
                [
                    row(of, "create → running", of.running, Some(of.bare_running)),
                    row(of, "create → first output", of.created, Some(of.bare_created)),
                    row(of, "exec → first output", of.executed, Some(of.bare_executed)),
                    row(of, "delete → gone", of.deleted, None),
                ]
            })
            .collect();
        table::print(&["runtime", "ms", "p50", "p99", "bare p50", "bare p99"], &rows);
        for of in &self.runtimes {
            let Many { sandboxes, all_running_s, all_answered_s, all_gone_s, memory, each_kib } = &of.many;
            println!(
                "{}: {sandboxes} at once: running in {all_running_s:.1} s, answered in {all_answered_s:.1} s, gone in \
                 {all_gone_s:.1} s; {each_kib:.0} KiB each (shims {}, inside {}, kernel {} KiB in all, {} processes)",
                of.runtime, memory.shims_kib, memory.inside_kib, memory.kernel_kib, memory.processes
            );
            let added = of.created.p50_ms - of.bare_created.p50_ms;
            println!("{}: Warren adds {added:.1} ms to the bare runtime (p50 to the first output)", of.runtime);
        }
    }
}

/// Whether each figure is of something that happened.
pub fn check(report: &Report, plan: &Plan) -> anyhow::Result<()> {
    for of in &report.runtimes {
        for summary in [of.running, of.created, of.executed, of.deleted, of.bare_created, of.bare_executed] {
            ensure!(summary.count == plan.rounds && summary.p50_ms > 0.0, "{of:?}");
        }
        // A shim and a main process at least.
        ensure!(of.many.memory.processes >= 2 * plan.many, "{of:?}");
    }
    Ok(())
}
