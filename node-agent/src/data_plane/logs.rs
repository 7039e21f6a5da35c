//! `SandboxLogService`: what a sandbox's main process wrote, also after it ended.

use std::pin::Pin;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use futures::Stream;
use futures::stream::unfold;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use warren_proto::v1::read_logs_response::Message as Down;
use warren_proto::v1::sandbox_log_service_server::SandboxLogService;
use warren_proto::v1::{GetSandboxMetricsRequest, LogEntry, ReadLogsRequest, ReadLogsResponse, SandboxMetrics};

use super::Authority;
use super::process::{request, wire};
use super::status::Refusal;
use crate::clock;
use crate::driver::stats::Stats;
use crate::driver::{DriverError, LogEvent, LogQuery, LogStream};
use crate::network::NetworkStats;
use crate::supervisor::Supervisor;

/// Logs that are read at once on a node: each costs two file descriptors and one entry.
const MAX_READERS: usize = 1024;

/// Most lines from the end that may be asked for: a log has room for 8 MiB of them.
const MAX_LINES: i32 = 8 << 20;

/// Serves logs.
#[derive(Debug)]
pub struct LogService {
    supervisor: Supervisor,
    authority: Authority,
    readers: Arc<Semaphore>,
    stop: CancellationToken,
}

impl LogService {
    pub fn new(supervisor: Supervisor, authority: Authority, stop: CancellationToken) -> Self {
        Self { supervisor, authority, readers: Arc::new(Semaphore::new(MAX_READERS)), stop }
    }

    async fn read(&self, request: Request<ReadLogsRequest>) -> Result<Reading, Refusal> {
        let key = self.authority.sandbox(request.metadata())?;
        let driver = self.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        let query = query(request.get_ref())?;
        let slot = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| Refusal::Overloaded("readers of logs"))?;
        Ok(Reading { log: driver.logs(&key, &query).await?, stop: self.stop.clone(), _slot: slot })
    }
}

/// PURE: what is asked for, checked.
fn query(request: &ReadLogsRequest) -> Result<LogQuery, Refusal> {
    let offset = u64::try_from(request.offset).map_err(|_| request::field("offset", "must be 0 or more"))?;
    let lines = request.tail_lines;
    if !(0..=MAX_LINES).contains(&lines) {
        return Err(request::field("tail_lines", "must be 0 to 8388608"));
    }
    let tail_lines = usize::try_from(lines).ok().filter(|lines| *lines > 0);
    let since_ms = request.since_time.as_ref().map(since_ms).transpose()?;
    Ok(LogQuery { offset, since_ms, tail_lines, follow: request.follow })
}

/// The first whole millisecond that is not before it.
fn since_ms(time: &prost_types::Timestamp) -> Result<i64, Refusal> {
    let nanos = i64::from(time.nanos);
    let whole = (0..1_000_000_000).contains(&nanos).then(|| time.seconds.checked_mul(1000)).flatten();
    let ms = whole.and_then(|ms| ms.checked_add((nanos + 999_999) / 1_000_000));
    ms.ok_or_else(|| request::field("since_time", "must be a time"))
}

struct Reading {
    log: Box<dyn LogStream>,
    stop: CancellationToken,
    _slot: OwnedSemaphorePermit,
}

impl Reading {
    /// The next entry; read only when the client has taken the last one.
    async fn next(mut self) -> Option<(Result<ReadLogsResponse, Status>, Option<Self>)> {
        let event = tokio::select! {
            event = self.log.next() => event.map_err(Refusal::from),
            () = self.stop.cancelled() => Err(Refusal::Stopping),
        };
        match event {
            Ok(event) => event.map(|event| (Ok(response(event)), Some(self))),
            Err(refusal) => Some((Err(refusal.into()), None)),
        }
    }
}

fn response(event: LogEvent) -> ReadLogsResponse {
    let message = match event {
        LogEvent::Entry { offset, unix_ms, stream, data } => Down::Entry(LogEntry {
            offset: wire::signed(offset),
            time: Some(wire::timestamp(unix_ms)),
            stream: wire::stream(stream).into(),
            data,
        }),
        LogEvent::Dropped { from, to } => Down::Dropped(wire::dropped(from, to)),
    };
    ReadLogsResponse { message: Some(message) }
}

/// PURE.
fn metrics(stats: &Stats, network: &NetworkStats, now_ms: i64) -> SandboxMetrics {
    let started = stats.started.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let started_ms = started.and_then(|since| i64::try_from(since.as_millis()).ok());
    SandboxMetrics {
        time: Some(wire::timestamp(now_ms)),
        cpu_usage_ns: wire::signed(stats.cpu_usage_ns),
        cpu_throttled_periods: wire::signed(stats.cpu_throttled_periods),
        cpu_throttled_ns: wire::signed(stats.cpu_throttled_ns),
        cpu_limit_milli: wire::signed(stats.limits.cpu.0),
        memory_working_set_bytes: wire::signed(stats.memory_working_set.0),
        memory_usage_bytes: wire::signed(stats.memory_usage.0),
        memory_peak_bytes: wire::signed(stats.memory_peak.0),
        memory_limit_bytes: wire::signed(stats.limits.memory.0),
        oom_kills: wire::signed(stats.oom_kills),
        disk_used_bytes: wire::signed(stats.disk_used.0),
        disk_limit_bytes: wire::signed(stats.disk_limit.0),
        inodes_used: wire::signed(stats.inodes_used),
        inodes_limit: wire::signed(stats.inodes_limit),
        network_receive_bytes: wire::signed(network.received_bytes),
        network_transmit_bytes: wire::signed(network.sent_bytes),
        network_receive_packets: wire::signed(network.received_packets),
        network_transmit_packets: wire::signed(network.sent_packets),
        network_denied_packets: wire::signed(network.denied_packets),
        processes: wire::signed(stats.pids),
        processes_limit: wire::signed(stats.limits.pids),
        start_time: started_ms.map(wire::timestamp),
    }
}

#[tonic::async_trait]
impl SandboxLogService for LogService {
    type ReadLogsStream = Pin<Box<dyn Stream<Item = Result<ReadLogsResponse, Status>> + Send>>;

    async fn read_logs(&self, request: Request<ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        let reading = self.read(request).await?;
        let next = |reading: Option<Reading>| async move { reading?.next().await };
        Ok(Response::new(Box::pin(unfold(Some(reading), next))))
    }

    async fn get_sandbox_metrics(
        &self,
        request: Request<GetSandboxMetricsRequest>,
    ) -> Result<Response<SandboxMetrics>, Status> {
        let key = self.authority.sandbox(request.metadata()).map_err(Refusal::from)?;
        let driver = self.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        let stats = driver.stats(&key).await.map_err(Refusal::from)?;
        let network = match driver.network_stats(&key).await {
            // It has none: nothing went through it.
            Err(DriverError::Unsupported { .. }) => NetworkStats::default(),
            other => other.map_err(Refusal::from)?,
        };
        Ok(Response::new(metrics(&stats, &network, clock::unix_now_ms())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_checked_field_by_field() {
        let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
        let asked = ReadLogsRequest { offset: 3, since_time: time(1, 1), tail_lines: 2, follow: true };
        let wanted = LogQuery { offset: 3, since_ms: Some(1001), tail_lines: Some(2), follow: true };
        assert_eq!(query(&asked).expect("valid"), wanted);
        assert_eq!(query(&ReadLogsRequest::default()).expect("valid"), LogQuery::default());
        let refused = |request: ReadLogsRequest| match query(&request) {
            Err(Refusal::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(ReadLogsRequest { offset: -1, ..Default::default() }), "offset");
        assert_eq!(refused(ReadLogsRequest { tail_lines: -1, ..Default::default() }), "tail_lines");
        for wrong in [time(i64::MAX, 0), time(0, -1), time(0, 1_000_000_000)] {
            assert_eq!(refused(ReadLogsRequest { since_time: wrong, ..Default::default() }), "since_time");
        }
    }
}
