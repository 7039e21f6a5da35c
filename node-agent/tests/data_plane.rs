//! The data plane: whose tokens it takes, what it executes, and how templates travel.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use support::scheduler::Manner;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use warren_node_agent::agent::Agent;
use warren_node_agent::driver::Presence;
use warren_proto::client::{ClientTls, channel};
use warren_proto::error::reason_of;
use warren_proto::token;
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

/// An agent that runs sandbox `a` at epoch 2, registered.
struct Lab {
    scheduler: Scheduler,
    driver: FakeDriver,
    agent: Agent,
    peer: Peer,
    directory: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Self {
        let scheduler = Scheduler::start(Manner::default()).await;
        Self::with(scheduler, "n1").await
    }

    async fn with(scheduler: Scheduler, node: &str) -> Self {
        let driver = FakeDriver::default();
        driver.set(&instance("a", 2), Some(Presence::Running));
        let directory = tempfile::tempdir().unwrap();
        let agent = agent(node, directory.path(), &scheduler.address, &driver).await;
        let mut peer = scheduler.peer().await;
        peer.assign(1, &[running("a", 2)]).await;
        // It has the keys by then.
        peer.until("generation 1", |peer| peer.generation == 1).await;
        Self { scheduler, driver, agent, peer, directory }
    }

    /// Begins an Exec of `command` with a token that `change` may spoil.
    async fn exec(&self, command: &str, change: impl FnOnce(&mut TokenClaims)) -> Result<Process, Status> {
        let mut claims = TokenClaims { sandbox: name("a").to_string(), epoch: 2, ..claims(Scope::Sandbox) };
        change(&mut claims);
        self.exec_with(command, &token::sign(&claims, &key())).await
    }

    async fn exec_with(&self, command: &str, token: &str) -> Result<Process, Status> {
        let channel = channel(&self.agent.data_plane.to_string(), &ClientTls::default()).unwrap();
        let (up, rx) = mpsc::channel(64);
        let start = ExecStart { command: vec![command.to_owned()], ..ExecStart::default() };
        up.send(ExecRequest { message: Some(Up::Start(start)) }).await.unwrap();
        let mut client = SandboxDataServiceClient::new(channel);
        let down = client.exec(bearer(ReceiverStream::new(rx), token)).await?.into_inner();
        Ok(Process { up, down })
    }
}

struct Process {
    up: mpsc::Sender<ExecRequest>,
    down: Streaming<ExecResponse>,
}

/// stdout, stderr, and the last message.
type Output = (Vec<u8>, Vec<u8>, Option<ExitStatus>);

impl Process {
    async fn send(&self, message: Up) {
        self.up.send(ExecRequest { message: Some(message) }).await.unwrap();
    }

    async fn output(&mut self) -> Result<Output, Status> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(response) = timeout(PATIENCE, self.down.next()).await.expect("silent") {
            match response?.message {
                Some(Down::Stdout(bytes)) => stdout.extend(bytes),
                Some(Down::Stderr(bytes)) => stderr.extend(bytes),
                Some(Down::Exit(exit)) => return Ok((stdout, stderr, Some(exit))),
                Some(Down::Started(_)) | None => {}
            }
        }
        Ok((stdout, stderr, None))
    }
}

fn refusal<T>(result: Result<T, Status>) -> (Code, Option<ErrorReason>) {
    match result {
        Ok(_) => panic!("it was allowed"),
        Err(status) => (status.code(), reason_of(&status)),
    }
}

#[tokio::test]
async fn only_a_token_made_for_it_opens_a_sandbox() {
    let lab = Lab::new().await;
    let invalid = (Code::Unauthenticated, Some(ErrorReason::TokenInvalid));
    let denied = (Code::PermissionDenied, Some(ErrorReason::PermissionDenied));
    let moved = (Code::FailedPrecondition, Some(ErrorReason::SandboxMoved));
    let good = TokenClaims { sandbox: name("a").to_string(), epoch: 2, ..claims(Scope::Sandbox) };
    let other_key = ed25519_dalek::SigningKey::from_bytes(&[8; 32]);
    assert_eq!(refusal(lab.exec_with("cat", "").await), invalid);
    assert_eq!(refusal(lab.exec_with("cat", "wt1.x.y").await), invalid);
    assert_eq!(refusal(lab.exec_with("cat", &token::sign(&good, &other_key)).await), invalid);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.expire_time_ms = 1).await), invalid);
    // A new leader's key may still be on its way: try again.
    let unknown = lab.exec("cat", |claims| claims.key_id = 9).await.map(drop).unwrap_err();
    assert!(warren_proto::error::retry_after_of(&unknown).is_some(), "{unknown:?}");
    assert_eq!(refusal(Err::<(), _>(unknown)), (Code::Unavailable, Some(ErrorReason::TokenKeyUnknown)));
    assert_eq!(refusal(lab.exec("cat", |claims| claims.sandbox = "a".into()).await), invalid);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.set_scope(Scope::TemplateUpload)).await), denied);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.node = "nodes/n2".into()).await), denied);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.ledger_id = "ledger-2".into()).await), denied);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.epoch = 1).await), moved);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.epoch = 3).await), moved);
    assert_eq!(refusal(lab.exec("cat", |claims| claims.sandbox = name("b").to_string()).await), moved);
    assert!(lab.exec("cat", |claims| claims.node = "nodes/n1".into()).await.is_ok());
    lab.agent.stop().await;
}

#[tokio::test]
async fn what_goes_in_comes_out_before_the_exit() {
    let lab = Lab::new().await;
    let mut process = lab.exec("cat", |_| {}).await.unwrap();
    let input: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    let (up, pieces) = (process.up.clone(), input.clone());
    let feed = tokio::spawn(async move {
        for piece in pieces.chunks(10_000) {
            up.send(ExecRequest { message: Some(Up::Stdin(piece.to_vec())) }).await.unwrap();
        }
        up.send(ExecRequest { message: Some(Up::CloseStdin(CloseStdin {})) }).await.unwrap();
    });
    let (stdout, _, exit) = process.output().await.unwrap();
    feed.await.unwrap();
    assert!(stdout == input, "{} of {} bytes came back", stdout.len(), input.len());
    assert_eq!(exit.unwrap().code, 3);

    let (stdout, stderr, exit) = lab.exec("big", |_| {}).await.unwrap().output().await.unwrap();
    assert_eq!((stdout.len(), stderr.as_slice()), (1 << 20, &b"done"[..]));
    assert_eq!(exit.unwrap().code, 0);
    lab.agent.stop().await;
}

#[tokio::test]
async fn a_signal_reaches_a_process_that_does_not_read_its_input() {
    let lab = Lab::new().await;
    let mut process = lab.exec("hang", |_| {}).await.unwrap();
    process.send(Up::Stdin(vec![0; 100_000])).await;
    process.send(Up::Signal(15)).await;
    let (_, _, exit) = process.output().await.unwrap();
    assert_eq!((exit.unwrap().code, exit.unwrap().signal), (143, 15));
    lab.agent.stop().await;
}

#[tokio::test]
async fn a_process_is_killed_when_its_client_is_gone_or_breaks_the_protocol() {
    let lab = Lab::new().await;
    let process = lab.exec("hang", |_| {}).await.unwrap();
    drop(process);
    timeout(PATIENCE, lab.driver.killed()).await.expect("never killed");

    let mut process = lab.exec("hang", |_| {}).await.unwrap();
    process.send(Up::Start(ExecStart::default())).await;
    assert_eq!(refusal(process.output().await), (Code::InvalidArgument, Some(ErrorReason::InvalidField)));
    let missing = refusal(lab.exec("nothing", |_| {}).await);
    assert_eq!(missing, (Code::InvalidArgument, Some(ErrorReason::CommandNotFound)));
    lab.agent.stop().await;
}

#[tokio::test]
async fn a_stopping_agent_says_so_to_those_who_execute() {
    let lab = Lab::new().await;
    let mut process = lab.exec("hang", |_| {}).await.unwrap();
    let stopping = tokio::spawn(lab.agent.stop());
    assert_eq!(refusal(process.output().await).0, Code::Unavailable);
    stopping.await.unwrap();
    timeout(PATIENCE, lab.driver.killed()).await.expect("never killed");
    assert_eq!(lab.driver.presence(&instance("a", 2)), Some(Presence::Running));
    drop((lab.scheduler, lab.peer, lab.directory));
}

#[tokio::test]
async fn an_upload_is_taken_once_and_only_with_its_token_and_digest() {
    let lab = Lab::new().await;
    let tar = rootfs();
    let mut flipped = tar.clone();
    flipped[700] ^= 1;
    let lost = (Code::DataLoss, Some(ErrorReason::DigestMismatch));
    assert_eq!(refusal(upload(&lab.agent, digest(&tar), &flipped).await), lost);
    assert!(!upload(&lab.agent, digest(&tar), &tar).await.unwrap().already_held);
    assert!(upload(&lab.agent, digest(&tar), &tar).await.unwrap().already_held);

    let download = |claims: TokenClaims| {
        let request = DownloadTemplateRequest { digest: digest(&tar).to_string() };
        let request = bearer(request, &token::sign(&claims, &key()));
        let mut client = template_client(&lab.agent);
        async move { client.download_template(request).await }
    };
    let good = TokenClaims { template_digest: digest(&tar).to_string(), ..claims(Scope::TemplateDownload) };
    let denied = (Code::PermissionDenied, Some(ErrorReason::PermissionDenied));
    assert_eq!(refusal(download(TokenClaims { scope: Scope::TemplateUpload.into(), ..good.clone() }).await), denied);
    let other = TokenClaims { template_digest: digest(b"other").to_string(), ..good.clone() };
    assert_eq!(refusal(download(other).await), denied);
    let mut stream = download(good).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        bytes.extend(part.chunk);
    }
    assert_eq!(bytes, tar);
    lab.agent.stop().await;
}

#[tokio::test]
async fn a_start_fetches_its_template_from_a_peer_and_notices_a_wrong_byte() {
    let (good, bad) = (Lab::new().await, Lab::new().await);
    let scheduler = Scheduler::start(Manner::default()).await;
    let mut lab = Lab::with(scheduler, "n2").await;
    let tar = rootfs();
    for holder in [&good, &bad] {
        upload(&holder.agent, digest(&tar), &tar).await.unwrap();
    }
    let spoilt = bad.directory.path().join("templates").join(digest(&tar).hex()).join("rootfs.tar");
    let mut bytes = tar.clone();
    bytes[1000] ^= 1;
    std::fs::write(spoilt, bytes).unwrap();

    let token = TokenClaims { template_digest: digest(&tar).to_string(), ..claims(Scope::TemplateDownload) };
    let from = |id: &str, holders: &[&Lab]| {
        let mut sandbox = running(id, 1);
        let template = sandbox.template.as_mut().unwrap();
        template.download_token = token::sign(&token, &key());
        let source = |lab: &&Lab| TemplateSource { address: lab.agent.data_plane.to_string(), tls: false };
        template.sources = holders.iter().map(source).collect();
        sandbox
    };
    lab.peer.assign(2, &[running("a", 2), from("only-bad", &[&bad])]).await;
    let failed = lab.peer.until_phase("only-bad", 1, Phase::Failed).await.reason.unwrap();
    assert_eq!(failed.code, "TEMPLATE_UNAVAILABLE");
    assert!(failed.message.contains("the bytes that came have digest"), "{}", failed.message);
    assert!(lab.peer.templates.is_empty());

    lab.peer.assign(3, &[running("a", 2), from("b", &[&bad, &good]), from("c", &[&bad, &good])]).await;
    lab.peer.until_phase("b", 1, Phase::Running).await;
    lab.peer.until_phase("c", 1, Phase::Running).await;
    lab.peer.until("the template is reported", |peer| peer.templates == [digest(&tar).to_string()]).await;
    for lab in [lab, good, bad] {
        lab.agent.stop().await;
    }
}

#[tokio::test]
async fn a_start_under_way_is_called_off_when_it_is_not_wanted_any_more() {
    let mut lab = Lab::new().await;
    // A holder that accepts and never answers: the start hangs in its template.
    let silent = Arc::new(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
    let mut stuck = running("stuck", 1);
    stuck.template.as_mut().unwrap().sources =
        vec![TemplateSource { address: silent.local_addr().unwrap().to_string(), tls: false }];
    lab.peer.assign(2, &[running("a", 2), stuck]).await;
    lab.peer.until_phase("stuck", 1, Phase::Starting).await;
    lab.peer.assign(3, &[running("a", 2), removed("stuck", 1)]).await;
    lab.peer.until_phase("stuck", 1, Phase::Removed).await;
    assert!(lab.driver.log().is_empty());
    lab.agent.stop().await;
}

async fn get(agent: &Agent, path: &str) -> String {
    let mut stream = TcpStream::connect(agent.http).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn probes_and_metrics_say_how_it_is() {
    let lonely = tempfile::tempdir().unwrap();
    let alone = agent("n9", lonely.path(), "127.0.0.1:9", &FakeDriver::default()).await;
    assert!(get(&alone, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(&alone, "/readyz").await.starts_with("HTTP/1.1 503"));
    alone.stop().await;

    let mut lab = Lab::new().await;
    upload(&lab.agent, digest(&rootfs()), &rootfs()).await.unwrap();
    lab.peer.assign(2, &[running("a", 2), running("b", 1)]).await;
    lab.peer.until_phase("b", 1, Phase::Running).await;
    let ready = async {
        while !get(&lab.agent, "/readyz").await.starts_with("HTTP/1.1 200") {
            look_again().await;
        }
    };
    timeout(PATIENCE, ready).await.expect("never ready");
    let metrics = get(&lab.agent, "/metrics").await;
    for line in
        ["warren_agent_sandboxes{phase=\"running\"}", "warren_agent_driver_operation_seconds_bucket{driver=\"fake\""]
    {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    assert!(!metrics.contains("sandboxes/a") && !metrics.contains("sha256"), "no ids");
    lab.agent.stop().await;
}

#[tokio::test]
async fn reflection_and_health_are_served() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::{v1, v1alpha};
    let lab = Lab::new().await;
    let channel = channel(&lab.agent.data_plane.to_string(), &ClientTls::default()).unwrap();
    for service in ["warren.v1.SandboxDataService", "warren.v1.SandboxProcessService"] {
        let request = HealthCheckRequest { service: service.into() };
        let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
        assert_eq!(health.status, 1, "{service}");
    }

    let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = format!("{:?}", answers.next().await.unwrap().unwrap());
    assert!(answer.contains("warren.v1.SandboxProcessService") && answer.contains("warren.v1.TemplateDataService"));
    assert!(!answer.contains("AgentSessionService"), "only what is served: {answer}");

    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().is_ok());
    lab.agent.stop().await;
}

/// A certificate for 127.0.0.1 that is its own authority, and its key.
fn certificate(directory: &std::path::Path) -> Option<(String, String)> {
    let (certificate, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=warren-test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args([std::ffi::OsStr::new("-keyout"), key.as_os_str(), std::ffi::OsStr::new("-out"), certificate.as_os_str()])
        .output()
        .ok()?;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Some((certificate.to_string_lossy().into_owned(), key.to_string_lossy().into_owned()))
}

#[tokio::test]
async fn with_a_certificate_both_servers_speak_tls_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let Some((certificate, key_file)) = certificate(directory.path()) else {
        eprintln!("SKIPPED: there is no openssl to make a certificate with");
        return;
    };
    let layer = warren_node_agent::config::Layer {
        tls_cert: Some(certificate.clone()),
        tls_key: Some(key_file),
        ..layer("n1", directory.path(), "127.0.0.1:9")
    };
    let agent = agent_with(layer, &FakeDriver::default()).await;
    let files = warren_proto::client::TlsFiles { ca: Some(certificate.into()), ..Default::default() };
    let tls = ClientTls::load(&files).unwrap();
    let request = || tonic_health::pb::HealthCheckRequest { service: String::new() };
    let client = |tls: &ClientTls| {
        tonic_health::pb::health_client::HealthClient::new(channel(&agent.data_plane.to_string(), tls).unwrap())
    };
    assert!(client(&tls).check(request()).await.is_ok());
    assert!(client(&ClientTls::default()).check(request()).await.is_err());
    let plain = TcpStream::connect(agent.http).await.unwrap();
    let (mut read, mut write) = plain.into_split();
    write.write_all(b"GET /healthz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, read.read_to_end(&mut answer)).await.expect("it hangs up");
    assert!(!answer.starts_with(b"HTTP"), "plain text was answered");
    agent.stop().await;
}

/// More clients than a node executes processes open a stream and say nothing.
#[tokio::test]
async fn a_client_that_says_nothing_takes_no_place_and_is_sent_away() {
    let lab = Lab::new().await;
    let sandbox = TokenClaims { sandbox: name("a").to_string(), epoch: 2, ..claims(Scope::Sandbox) };
    let token = token::sign(&sandbox, &key());
    let mut silent = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let channel = channel(&lab.agent.data_plane.to_string(), &ClientTls::default()).unwrap();
        for _ in 0..190 {
            let (mut client, token) = (SandboxDataServiceClient::new(channel.clone()), token.clone());
            silent.spawn(async move { client.exec(bearer(tokio_stream::pending(), &token)).await.map(drop) });
        }
        tokio::task::yield_now().await;
        // Behind them on the same connection.
        let start = ExecStart { command: vec!["nope".into()], ..ExecStart::default() };
        let start = ExecRequest { message: Some(Up::Start(start)) };
        let mut client = SandboxDataServiceClient::new(channel);
        let behind = client.exec(bearer(tokio_stream::iter([start]), &token)).await;
        assert_eq!(refusal(behind), (Code::InvalidArgument, Some(ErrorReason::CommandNotFound)));
    }
    let (_, _, exit) = lab.exec("big", |_| {}).await.unwrap().output().await.unwrap();
    assert_eq!(exit.unwrap().code, 0);
    while let Some(sent_away) = silent.join_next().await {
        assert_eq!(refusal(sent_away.unwrap()), (Code::InvalidArgument, Some(ErrorReason::InvalidField)));
    }
    lab.agent.stop().await;
}
