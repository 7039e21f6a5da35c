//! What a process used: processor time and memory from /proc, counters from its metrics page.

use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A process that is looked at while it is measured.
#[derive(Debug, Clone)]
pub struct Server {
    pub name: String,
    /// While it runs.
    pub process: Option<u32>,
    /// Where it counts its durable syncs: the address of its metrics page, and the metric.
    pub syncs: Option<(String, &'static str)>,
}

/// What a server had used at some time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    pub cpu: Duration,
    pub syncs: Option<f64>,
}

impl Server {
    /// This program itself.
    pub fn own(name: &str) -> Self {
        Self { name: name.to_owned(), process: Some(std::process::id()), syncs: None }
    }

    pub async fn used(&self) -> anyhow::Result<Used> {
        let process = self.process.with_context(|| format!("{} does not run", self.name))?;
        let syncs = match &self.syncs {
            Some((address, name)) => Some(metric(address, name).await?),
            None => None,
        };
        Ok(Used { cpu: cpu(process)?, syncs })
    }
}

/// `sysconf(_SC_CLK_TCK)` on Linux, as /proc counts processor time.
const TICKS_PER_SECOND: u64 = 100;

/// A metrics page is a few hundred lines; this is some thousand.
const MAX_PAGE_BYTES: u64 = 4 << 20;

/// A page that is served by a process at full load.
const PAGE_PATIENCE: Duration = Duration::from_secs(5);

/// Processor time of a process and its threads since it began.
pub fn cpu(process: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The name is in brackets and may hold anything; what follows is counted from the last of them.
    let (_, rest) = stat.rsplit_once(')').context("a stat line without a name")?;
    let field = |at: usize| -> anyhow::Result<u64> {
        Ok(rest.split_whitespace().nth(at).context("a short stat line")?.parse()?)
    };
    // Fields 14 and 15 of the whole line: in user mode, in the kernel.
    let ticks = field(11)?.saturating_add(field(12)?);
    Ok(Duration::from_millis(ticks.saturating_mul(1000 / TICKS_PER_SECOND)))
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(process: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().next().context("an empty VmRSS")?.parse()?;
    Ok(kib * 1024)
}

/// The sum of a metric's series on a Prometheus page; an error when there is none.
pub async fn metric(address: &str, name: &str) -> anyhow::Result<f64> {
    let page = tokio::time::timeout(PAGE_PATIENCE, page(address, "/metrics")).await;
    let page = page.with_context(|| format!("no metrics from {address}"))??;
    sum(&page, name).with_context(|| format!("no metric {name} at {address}"))
}

async fn page(address: &str, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    // HTTP/1.0: the page comes in one piece, and its end is the connection's.
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(MAX_PAGE_BYTES).read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no page")?;
    ensure!(head.contains(" 200 "), "{address}{path}: {}", head.lines().next().unwrap_or_default());
    Ok(body.to_owned())
}

fn sum(page: &str, name: &str) -> Option<f64> {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest =
            rest.strip_prefix('{').and_then(|labels| labels.rsplit_once('}').map(|(_, value)| value)).unwrap_or(rest);
        rest.strip_prefix(' ')?.split_whitespace().next()?.parse::<f64>().ok()
    });
    values.reduce(|all, one| all + one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_its_series_and_not_its_name_sakes() {
        let page = "# HELP a b\na 1\na{x=\"}\"} 2\na_total 4\nab{} 8\n";
        assert_eq!(sum(page, "a"), Some(3.0));
        assert_eq!(sum(page, "missing"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(resident_bytes(std::process::id()).unwrap() > 1 << 20);
        cpu(std::process::id()).unwrap();
    }
}
