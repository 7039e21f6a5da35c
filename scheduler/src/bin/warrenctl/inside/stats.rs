//! `sandbox stats`: what sandboxes use at this moment, again and again.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stdout};
use std::time::Duration;

use clap::Args;
use futures::stream::{self, StreamExt};
use prost_types::Timestamp;
use serde::Serialize;
use warren_proto::v1::sandbox_log_service_client::SandboxLogServiceClient;
use warren_proto::v1::{GetSandboxMetricsRequest, SandboxMetrics, SandboxState};

use super::link::{Again, Link};
use crate::client::Client;
use crate::create::PARALLEL;
use crate::failure::Failure;
use crate::json::Json;
use crate::output::{Format, Output, unwritable, write};
use crate::sandbox::{list, parent};
use crate::table::{Table, bytes, last_segment, of};

const TYPE: &str = "warren.v1.SandboxMetrics";

/// Between two rounds: CPU is what was used meanwhile.
const INTERVAL: Duration = Duration::from_secs(2);

/// Between the two rounds of `--no-stream`.
const ONCE: Duration = Duration::from_secs(1);

/// Goes to the first place of a terminal and clears what is below.
const REDRAW: &str = "\x1b[H\x1b[J";

const HEADERS: [&str; 8] = ["SANDBOX", "CPU", "MEMORY", "MEMORY %", "DISK", "NET IN / OUT", "PROCESSES", "PROBLEM"];

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox stats                          all that run, again and again
  warrenctl sandbox stats --no-stream box          one of them, once
  warrenctl sandbox stats --no-stream -o json box  every counter, for a program";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatsArgs {
    /// Show one round and end
    #[arg(long)]
    no_stream: bool,
    /// Ids or full names [default: all of the tenant that run]
    names: Vec<String>,
}

/// The last round's figures, by sandbox.
type Round = BTreeMap<String, Result<SandboxMetrics, String>>;

pub async fn stats(client: &Client, output: &Output, args: StatsArgs) -> Result<(), Failure> {
    let named = !args.names.is_empty();
    let mut links = BTreeMap::new();
    for name in &args.names {
        let link = Link::new(client, name);
        links.insert(link.name.clone(), link);
    }
    let mut before = Round::new();
    let redraws = output.format == Format::Table && !args.no_stream && stdout().is_terminal();
    loop {
        if !named {
            follow_running(client, &mut links).await?;
        }
        let mut rounds = stream::iter(links.values().map(ask)).buffer_unordered(PARALLEL);
        let mut now = Round::new();
        while let Some((name, metrics)) = rounds.next().await {
            // Asked for by itself: its failure is the command's.
            if let (Err(failure), true, true) = (&metrics, named, args.names.len() == 1) {
                return Err(Failure::Failed(failure.clone()));
            }
            now.insert(name, metrics);
        }
        let first = before.is_empty() && !now.is_empty();
        if !(first && args.no_stream) {
            show(output, &before, &now, redraws)?;
            if args.no_stream {
                return Ok(());
            }
        }
        before = now;
        tokio::time::sleep(if args.no_stream { ONCE } else { INTERVAL }).await;
    }
}

/// Those that run now: new ones are added, others go.
async fn follow_running<'a>(client: &'a Client, links: &mut BTreeMap<String, Link<'a>>) -> Result<(), Failure> {
    let running = list(client, &parent(client, false)).await?;
    let names: Vec<String> = running
        .into_iter()
        .filter(|sandbox| sandbox.state() == SandboxState::Running)
        .map(|sandbox| sandbox.name)
        .collect();
    links.retain(|name, _| names.contains(name));
    for name in names {
        links.entry(name.clone()).or_insert_with(|| Link::new(client, &name));
    }
    Ok(())
}

async fn ask(link: &Link<'_>) -> (String, Result<SandboxMetrics, String>) {
    let metrics = link.call(Again::Unstarted, |agent| {
        let request = agent.asking(GetSandboxMetricsRequest {});
        async move { Ok(SandboxLogServiceClient::new(agent.channel).get_sandbox_metrics(request?).await?.into_inner()) }
    });
    (link.name.clone(), metrics.await.map_err(|failure| failure.to_string()))
}

/// A sandbox's figures for a program.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    sandbox: String,
    /// Of one CPU, since the round before.
    cpu_percent: Option<f64>,
    metrics: Option<Json>,
    error: Option<String>,
}

fn show(output: &Output, before: &Round, now: &Round, redraws: bool) -> Result<(), Failure> {
    match output.format {
        Format::Table => {
            let mut table = Table::new(&HEADERS);
            now.iter().for_each(|(name, figures)| table.push(cells(name, before.get(name), figures)));
            write(&format!("{}{table}", if redraws { REDRAW } else { "" }))
        }
        Format::Name => write(&now.keys().map(|name| format!("{name}\n")).collect::<String>()),
        format => {
            let figures = now.iter().map(|(name, metrics)| figures(output, name, before.get(name), metrics));
            let figures = figures.collect::<Result<Vec<_>, Failure>>()?;
            if format == Format::Jsonl {
                let lines = figures.iter().map(|one| Ok(serde_json::to_string(one).map_err(unwritable)? + "\n"));
                return write(&lines.collect::<Result<String, Failure>>()?);
            }
            output.document(&figures)
        }
    }
}

fn figures(
    output: &Output,
    name: &str,
    before: Option<&Result<SandboxMetrics, String>>,
    now: &Result<SandboxMetrics, String>,
) -> Result<Figures, Failure> {
    Ok(Figures {
        sandbox: name.to_owned(),
        cpu_percent: cpu_percent(before, now),
        metrics: now.as_ref().ok().map(|metrics| output.json(TYPE, metrics)).transpose()?,
        error: now.as_ref().err().cloned(),
    })
}

fn cells(
    name: &str,
    before: Option<&Result<SandboxMetrics, String>>,
    now: &Result<SandboxMetrics, String>,
) -> Vec<String> {
    let metrics = match now {
        Ok(metrics) => metrics,
        Err(why) => {
            let mut cells = vec![last_segment(name)];
            cells.extend(["-"; 6].map(str::to_owned));
            cells.push(why.clone());
            return cells;
        }
    };
    let percent = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{share:.1}%"));
    let limited = |used: i64, limit: i64| if limit > 0 { of(bytes(used), bytes(limit)) } else { bytes(used) };
    vec![
        last_segment(name),
        percent(cpu_percent(before, now)),
        limited(metrics.memory_working_set_bytes, metrics.memory_limit_bytes),
        percent(share(metrics.memory_working_set_bytes, metrics.memory_limit_bytes)),
        limited(metrics.disk_used_bytes, metrics.disk_limit_bytes),
        of(bytes(metrics.network_receive_bytes), bytes(metrics.network_transmit_bytes)),
        match metrics.processes_limit {
            0 => metrics.processes.to_string(),
            limit => of(metrics.processes.to_string(), limit.to_string()),
        },
        if metrics.oom_kills > 0 { format!("out of memory {} times", metrics.oom_kills) } else { String::new() },
    ]
}

#[allow(clippy::cast_precision_loss, reason = "a percentage for a person")]
fn share(used: i64, all: i64) -> Option<f64> {
    (all > 0).then(|| used as f64 / all as f64 * 100.0)
}

/// Of one CPU, between two rounds; nothing over a restart, which begins its counters anew.
fn cpu_percent(before: Option<&Result<SandboxMetrics, String>>, now: &Result<SandboxMetrics, String>) -> Option<f64> {
    let (Some(Ok(before)), Ok(now)) = (before, now) else { return None };
    let elapsed = nanoseconds(now.time?)?.checked_sub(nanoseconds(before.time?)?)?;
    let used = now.cpu_usage_ns.checked_sub(before.cpu_usage_ns).filter(|&used| used >= 0)?;
    share(used, elapsed)
}

fn nanoseconds(time: Timestamp) -> Option<i64> {
    time.seconds.checked_mul(1_000_000_000)?.checked_add(time.nanos.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64, cpu_usage_ns: i64) -> Result<SandboxMetrics, String> {
        let time = Some(Timestamp { seconds, nanos: 500_000_000 });
        Ok(SandboxMetrics { time, cpu_usage_ns, ..SandboxMetrics::default() })
    }

    #[test]
    fn cpu_is_what_was_used_between_two_rounds() {
        assert_eq!(cpu_percent(Some(&at(10, 1_000_000_000)), &at(12, 4_000_000_000)), Some(150.0));
        assert_eq!(cpu_percent(None, &at(12, 4)), None);
        assert_eq!(cpu_percent(Some(&at(10, 5_000)), &at(12, 10)), None, "it was started again");
        assert_eq!(cpu_percent(Some(&at(10, 5)), &at(10, 5)), None, "no time has passed");
    }
}
