//! `sandbox logs`, `stats` and `forward`.

use std::process::Stdio;

use prost_types::Timestamp;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tonic::{Code, Status};
use warren_proto::v1::process_output::Stream;
use warren_proto::v1::read_logs_response::Message;
use warren_proto::v1::*;

use crate::agent_logs::CLOSED;
use crate::fake::{Fake, error};
use crate::run::{command, ctl};

fn entry(offset: i64, stream: Stream, data: &str) -> Result<Message, Status> {
    let time = Some(Timestamp { seconds: offset, nanos: 0 });
    Ok(Message::Entry(LogEntry { offset, time, stream: stream.into(), data: data.into() }))
}

fn broken() -> Result<Message, Status> {
    Err(Status::unavailable("the agent went away"))
}

#[tokio::test]
async fn logs_are_followed_over_a_break_by_offset() {
    let fake = Fake::start().await;
    fake.book().logs = [
        vec![entry(100, Stream::Stdout, "one\n"), entry(104, Stream::Stderr, "two\n"), broken()],
        vec![broken()],
        vec![Ok(Message::Dropped(OutputDropped { from: 108, to: 120 })), entry(120, Stream::Stdout, "three\n")],
    ]
    .into();
    let ran = ctl(&fake, &["sandbox", "logs", "-f", "--tail", "2", "--since", "1970-01-01T00:01:00Z", "x"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "one\nthree\n"));
    assert_eq!(ran.stderr, "two\nbytes 108 to 120 of the log are not held any more\n");
    let reads = fake.book().log_reads.clone();
    let asked: Vec<_> = reads.iter().map(|read| (read.offset, read.tail_lines, read.follow)).collect();
    assert_eq!(asked, [(0, 2, true), (108, 0, true), (108, 0, true)]);
    let since: Vec<_> = reads.iter().map(|read| read.since_time.map(|time| time.seconds)).collect();
    assert_eq!(since, [Some(60), None, None]);
}

#[tokio::test]
async fn logs_show_times_and_are_json_for_programs() {
    let fake = Fake::start().await;
    let lines = || vec![entry(60, Stream::Stdout, "a\nb"), entry(63, Stream::Stdout, "c\n")];
    fake.book().logs = [lines(), lines()].into();
    let expected = "1970-01-01T00:01:00Z a\n1970-01-01T00:01:00Z bc\n";
    assert_eq!(ctl(&fake, &["sandbox", "logs", "-t", "x"]).await.ok(), expected);
    let json = ctl(&fake, &["sandbox", "logs", "-o", "jsonl", "x"]).await.ok();
    let first: serde_json::Value = serde_json::from_str(json.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&first["offset"], &first["stream"]), (&60.into(), &"STREAM_STDOUT".into()));
    assert_eq!(ctl(&fake, &["sandbox", "logs", "--since", "yesterday", "x"]).await.code, 2);
}

#[tokio::test]
async fn when_no_node_has_the_log_the_ledger_has_its_end() {
    let fake = Fake::start().await;
    let name = "tenants/default/sandboxes/x";
    let mut ended = Sandbox { name: name.into(), output_tail: b"last words\n".into(), ..Sandbox::default() };
    ended.set_state(SandboxState::Stopped);
    ended.end_time = Some(Timestamp::default());
    fake.book().sandboxes.insert(name.into(), ended);
    let state = || error(Code::FailedPrecondition, ErrorReason::SandboxState, "x is STOPPED");
    fake.fail("connect", [state()]);
    let ran = ctl(&fake, &["sandbox", "logs", "x"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "last words\n"));
    assert!(ran.stderr.contains("is STOPPED, and its node holds no log of it"), "{ran:?}");
    fake.book().sandboxes.clear();
    fake.fail("connect", [state()]);
    assert_eq!(ctl(&fake, &["sandbox", "logs", "x"]).await.code, 3);
}

fn figures(seconds: i64, cpu_usage_ns: i64) -> SandboxMetrics {
    SandboxMetrics {
        time: Some(Timestamp { seconds, nanos: 0 }),
        cpu_usage_ns,
        memory_working_set_bytes: 64 << 20,
        memory_limit_bytes: 256 << 20,
        network_receive_bytes: 2048,
        processes: 3,
        processes_limit: 256,
        ..SandboxMetrics::default()
    }
}

#[tokio::test]
async fn stats_show_what_was_used_between_two_rounds() {
    let fake = Fake::start().await;
    fake.book().metrics = [figures(10, 1_000_000_000), figures(12, 2_000_000_000)].into();
    let table = ctl(&fake, &["sandbox", "stats", "--no-stream", "x"]).await.ok();
    let expected = "\
SANDBOX   CPU     MEMORY             MEMORY %   DISK   NET IN / OUT   PROCESSES   PROBLEM
x         50.0%   64 MiB / 256 MiB   25.0%      0 B    2 KiB / 0 B    3 / 256
";
    assert_eq!(table, expected);
    fake.book().metrics = [figures(10, 0), figures(11, 0)].into();
    let json = ctl(&fake, &["sandbox", "stats", "--no-stream", "-o", "json", "x"]).await.ok();
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json[0]["cpuPercent"], &json[0]["metrics"]["processes"]), (&0.0.into(), &3.into()));
    fake.fail("metrics", [error(Code::Internal, ErrorReason::DriverFailed, "no counters")]);
    let ran = ctl(&fake, &["sandbox", "stats", "--no-stream", "x"]).await;
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("no counters"), "{ran:?}");
    fake.fail("metrics", [Status::unimplemented("")]);
    let ran = ctl(&fake, &["sandbox", "stats", "--no-stream", "x"]).await;
    assert!(ran.stderr.contains("the server does not know this call"), "{ran:?}");
}

#[tokio::test]
async fn forward_carries_connections_and_outlives_a_closed_port_and_a_break() {
    let fake = Fake::start().await;
    let mut command = command(&["sandbox", "forward", "x", ":80", &format!(":{CLOSED}")]);
    command.env("WARREN_ENDPOINTS", &fake.address).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("warrenctl starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut local = Vec::new();
    for remote in [80, CLOSED] {
        let line = lines.next_line().await.expect("a line").expect("a line");
        let address = line.strip_prefix("Forwarding from ").and_then(|l| l.strip_suffix(&format!(" -> {remote}")));
        local.push(address.expect("an address").to_owned());
    }
    let bytes: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    for _round in 0..2 {
        let (mut first, mut second) = (connect(&local[0]).await, connect(&local[0]).await);
        first.write_all(&bytes).await.expect("bytes");
        second.write_all(b"second").await.expect("bytes");
        assert!(all_of(second).await == b"second", "one does not wait for another");
        assert!(all_of(first).await == bytes);
        // The way there breaks: it is found again.
        fake.fail("port", [Status::unavailable("the agent went away")]);
    }
    let mut closed = connect(&local[1]).await;
    assert_eq!(closed.read(&mut [0u8; 1]).await.unwrap_or(0), 0);
    let mut told = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    assert_eq!(told.next_line().await.expect("a line").as_deref(), Some("port 81: nobody listens at port 81"));
    assert_eq!(all_of(connect(&local[0]).await).await, b"");
    child.kill().await.expect("it ends");
}

async fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address).await.expect("a connection")
}

/// Ends one direction; all that comes back then.
async fn all_of(mut connection: TcpStream) -> Vec<u8> {
    connection.shutdown().await.expect("an end");
    let mut all = Vec::new();
    connection.read_to_end(&mut all).await.expect("bytes");
    all
}
