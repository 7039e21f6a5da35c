//! Processes and logs of real sandboxes through the kill of the agent's own process.
//!
//! Needs root, a static busybox and runc or crun; what is missing is skipped aloud.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use support::scheduler::Manner;
use support::*;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use warren_proto::client::{ClientTls, channel};
use warren_proto::token;
use warren_proto::v1::attach_process_request::Message as Up;
use warren_proto::v1::attach_process_response::Message as Down;
use warren_proto::v1::read_logs_response::Message as Log;
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::sandbox_log_service_client::SandboxLogServiceClient;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::sandbox_process_service_client::SandboxProcessServiceClient;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

/// A scheduler, a data directory, and the agent's process on it. Whatever happens nothing is left of it.
struct Lab {
    scheduler: Scheduler,
    directory: tempfile::TempDir,
    runtime: &'static str,
    node: String,
    template: Vec<u8>,
}

impl Lab {
    async fn new(runtime: &'static str) -> Option<Self> {
        let busybox = Path::new("/bin/busybox");
        let found = std::process::Command::new(runtime).arg("--version").output().is_ok();
        if !rustix::process::geteuid().is_root() || !busybox.exists() || !found {
            eprintln!("SKIPPED: needs root, /bin/busybox (busybox-static) and {runtime}");
            return None;
        }
        let node = format!("live-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
        let scheduler = Scheduler::start(Manner::default()).await;
        Some(Self { scheduler, directory: tempfile::tempdir().unwrap(), runtime, node, template: shell(busybox) })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let data_dir = self.directory.path().to_str().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_warren-node-agent"));
        command.args(arguments).args(["--node-id", &self.node, "--data-dir", data_dir, "--drivers", "oci"]);
        command.args(["--runtime", self.runtime]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).stdin(Stdio::null());
        command
    }

    /// Starts an agent; answers its session.
    async fn start(&self) -> (Child, Peer) {
        let listen =
            ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--schedulers", &self.scheduler.address];
        let mut command = self.command(&listen);
        let agent = command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        (agent, self.scheduler.peer().await)
    }

    async fn upload(&self, peer: &Peer) {
        let digest = digest(&self.template).to_string();
        let claims = TokenClaims { template_digest: digest.clone(), ..claims(Scope::TemplateUpload) };
        let header = UploadTemplateHeader { digest, size_bytes: self.template.len() as i64 };
        let chunks = self.template.chunks(1 << 20).map(|chunk| upload_template_request::Message::Chunk(chunk.to_vec()));
        let messages: Vec<_> = std::iter::once(upload_template_request::Message::Header(header))
            .chain(chunks)
            .map(|message| UploadTemplateRequest { message: Some(message) })
            .collect();
        let request = bearer(tokio_stream::iter(messages), &token::sign(&claims, &key()));
        TemplateDataServiceClient::new(to(peer)).upload_template(request).await.unwrap();
    }

    fn sandbox(&self, script: &str) -> AssignedSandbox {
        let mut sandbox = running("a", 1);
        sandbox.command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        sandbox.template = Some(AssignedTemplate {
            digest: digest(&self.template).to_string(),
            size_bytes: self.template.len() as i64,
            ..AssignedTemplate::default()
        });
        sandbox
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let cleaned = self.command(&["clean"]).as_std_mut().output();
        assert!(std::thread::panicking() || cleaned.is_ok_and(|output| output.status.success()), "it is cleaned");
    }
}

/// A root file system with a shell.
fn shell(busybox: &Path) -> Vec<u8> {
    let root = tempfile::tempdir().unwrap();
    for dir in ["bin", "var", "proc", "sys", "dev", "tmp"] {
        fs::create_dir(root.path().join(dir)).unwrap();
    }
    fs::copy(busybox, root.path().join("bin/busybox")).unwrap();
    fs::set_permissions(root.path().join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["sh", "cat", "sleep"] {
        std::os::unix::fs::symlink("busybox", root.path().join("bin").join(name)).unwrap();
    }
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all("", root.path()).unwrap();
    tar.into_inner().unwrap()
}

fn to(peer: &Peer) -> Channel {
    channel(&peer.hello.data_plane_address, &ClientTls::default()).unwrap()
}

fn with_token<T>(request: T) -> tonic::Request<T> {
    let claims = TokenClaims { sandbox: name("a").to_string(), epoch: 1, ..claims(Scope::Sandbox) };
    bearer(request, &token::sign(&claims, &key()))
}

fn start(id: &str, script: &str) -> StartProcessRequest {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    StartProcessRequest {
        process_id: id.into(),
        start: Some(ExecStart { command, ..ExecStart::default() }),
        ..Default::default()
    }
}

struct Attached {
    up: mpsc::Sender<AttachProcessRequest>,
    down: Streaming<AttachProcessResponse>,
}

impl Attached {
    async fn to(peer: &Peer, id: &str, offset: i64) -> Self {
        let (up, rx) = mpsc::channel(16);
        let start = AttachStart { process_id: id.into(), offset, lossless: true };
        up.send(AttachProcessRequest { message: Some(Up::Attach(start)) }).await.unwrap();
        let mut client = SandboxProcessServiceClient::new(to(peer));
        let down = client.attach_process(with_token(ReceiverStream::new(rx))).await.unwrap().into_inner();
        Self { up, down }
    }

    /// Reads until `wanted` was seen, or the process ended.
    async fn until(&mut self, wanted: &str) -> (String, Option<Process>) {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            match timeout(PATIENCE, self.down.message()).await.expect("silent").unwrap().expect("no end").message {
                Some(Down::Output(output)) => seen.push_str(std::str::from_utf8(&output.data).unwrap()),
                Some(Down::Exited(process)) => return (seen, Some(process)),
                Some(Down::Attached(_)) => {}
                other => panic!("{other:?} after {seen}"),
            }
        }
        (seen, None)
    }
}

async fn list(peer: &Peer) -> Vec<Process> {
    let mut client = SandboxProcessServiceClient::new(to(peer));
    client.list_processes(with_token(ListProcessesRequest {})).await.unwrap().into_inner().processes
}

async fn logs(peer: &Peer, follow: bool) -> Streaming<ReadLogsResponse> {
    let request = ReadLogsRequest { follow, ..ReadLogsRequest::default() };
    SandboxLogServiceClient::new(to(peer)).read_logs(with_token(request)).await.unwrap().into_inner()
}

async fn text(mut log: Streaming<ReadLogsResponse>) -> String {
    let mut text = String::new();
    while let Some(response) = timeout(PATIENCE, log.message()).await.expect("silent").unwrap() {
        match response.message {
            Some(Log::Entry(entry)) => text.push_str(std::str::from_utf8(&entry.data).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    text
}

async fn processes_and_logs_survive(runtime: &'static str) {
    let Some(lab) = Lab::new(runtime).await else { return };
    let (mut agent, mut peer) = lab.start().await;
    peer.assign(1, &[]).await;
    // It has the keys by then.
    peer.until("generation 1", |peer| peer.generation == 1).await;
    lab.upload(&peer).await;
    let sandbox = lab.sandbox("echo up; trap 'echo down >&2; exit 7' TERM; while :; do sleep 0.05; done");
    peer.assign(2, std::slice::from_ref(&sandbox)).await;
    peer.until_phase("a", 1, Phase::Running).await;
    let mut client = SandboxProcessServiceClient::new(to(&peer));
    let request = start("kept", "echo one; read x; echo got $x; echo last >&2; exit 5");
    client.start_process(with_token(request.clone())).await.unwrap();
    Attached::to(&peer, "kept", 0).await.until("one\n").await;
    let exec = ExecStart { command: vec!["cat".into()], ..ExecStart::default() };
    let exec = ExecRequest { message: Some(exec_request::Message::Start(exec)) };
    let (up, rx) = mpsc::channel(1);
    up.send(exec).await.unwrap();
    let mut bound = SandboxDataServiceClient::new(to(&peer));
    let mut bound = bound.exec(with_token(ReceiverStream::new(rx))).await.unwrap().into_inner();
    let Some(exec_response::Message::Started(started)) = bound.message().await.unwrap().unwrap().message else {
        panic!("not started")
    };

    agent.kill().await.unwrap();
    let (mut agent, mut peer) = lab.start().await;
    peer.assign(2, &[sandbox]).await;
    peer.until("generation 2", |peer| peer.generation == 2).await;
    assert!(bound.message().await.is_err(), "the stream broke");
    let mut attached = Attached::to(&peer, &started.process_id, 0).await;
    let (_, exited) = attached.until("never").await;
    assert_eq!(exited.unwrap().exit_status.unwrap().signal, 9, "an Exec ends with its stream");
    let kept = list(&peer).await.into_iter().find(|process| process.process_id == "kept").unwrap();
    assert_eq!((kept.state(), kept.output_start, kept.output_end), (ProcessState::Running, 0, 4));
    let mut client = SandboxProcessServiceClient::new(to(&peer));
    let again = client.start_process(with_token(request)).await.unwrap().into_inner();
    assert_eq!(again.start_time, kept.start_time, "the same again is the same process");
    let mut attached = Attached::to(&peer, "kept", 0).await;
    attached.up.send(AttachProcessRequest { message: Some(Up::Stdin(b"it\n".to_vec())) }).await.unwrap();
    let (seen, exited) = attached.until("never").await;
    assert_eq!(seen, "one\ngot it\nlast\n");
    assert_eq!(exited.unwrap().exit_status.unwrap().code, 5);

    // The log: followed to the end of the main process, and read after it.
    assert_eq!(text(logs(&peer, false).await).await, "up\n");
    let followed = tokio::spawn(text(logs(&peer, true).await));
    client.start_process(with_token(start("end", "kill 1"))).await.unwrap();
    assert_eq!(followed.await.unwrap(), "up\ndown\n");
    let exited = peer.until_phase("a", 1, Phase::Exited).await;
    assert_eq!(exited.exit_status.unwrap().code, 7);
    assert_eq!(text(logs(&peer, false).await).await, "up\ndown\n");
    // Its directory is another's then.
    agent.kill().await.unwrap();
}

#[tokio::test]
async fn processes_and_logs_survive_a_killed_agent_with_runc() {
    processes_and_logs_survive("runc").await;
}

#[tokio::test]
async fn processes_and_logs_survive_a_killed_agent_with_crun() {
    processes_and_logs_survive("crun").await;
}
