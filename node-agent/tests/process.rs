//! The program itself: its configuration errors, its signals, a kill, and `clean`.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::scheduler::Manner;
use support::*;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use warren_proto::client::{ClientTls, channel};
use warren_proto::token;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren-node-agent"));
    command
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn serve(data_dir: &Path, scheduler: &Scheduler) -> Child {
    let data_dir = data_dir.to_string_lossy();
    let flags = ["--node-id", "n1", "--data-dir", &data_dir, "--schedulers", &scheduler.address, "--drivers", "sim"];
    let listen = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"];
    program(&[&flags[..], &listen[..]].concat()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

async fn run(arguments: &[&str]) -> Output {
    timeout(PATIENCE, program(arguments).output()).await.expect("it does not end").unwrap()
}

/// Uploads the template to the agent that said this Hello, once it has the keys.
async fn upload_to(peer: &mut Peer) {
    peer.assign(1, &[]).await;
    peer.until("generation 1", |peer| peer.generation == 1).await;
    let tar = rootfs();
    let digest = digest(&tar).to_string();
    let claims = TokenClaims { template_digest: digest.clone(), ..claims(Scope::TemplateUpload) };
    let header = UploadTemplateHeader { digest, size_bytes: tar.len() as i64 };
    let messages = [upload_template_request::Message::Header(header), upload_template_request::Message::Chunk(tar)];
    let stream = tokio_stream::iter(messages.map(|message| UploadTemplateRequest { message: Some(message) }));
    let channel = channel(&peer.hello.data_plane_address, &ClientTls::default()).unwrap();
    let request = bearer(stream, &token::sign(&claims, &key()));
    TemplateDataServiceClient::new(channel).upload_template(request).await.unwrap();
}

#[tokio::test]
async fn a_killed_agent_comes_back_knowing_what_it_had_and_a_told_one_leaves_cleanly() {
    let scheduler = Scheduler::start(Manner::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let mut first = serve(directory.path(), &scheduler);
    let mut peer = scheduler.peer().await;
    upload_to(&mut peer).await;
    peer.assign(2, &[running("a", 1)]).await;
    peer.until_phase("a", 1, Phase::Running).await;
    signal(&first, Signal::SIGKILL);
    first.wait().await.unwrap();

    let mut second = serve(directory.path(), &scheduler);
    let mut peer = scheduler.peer().await;
    assert_eq!(peer.templates, [digest(&rootfs()).to_string()]);
    // The simulated host forgot it, as a reboot does.
    peer.assign(2, &[running("a", 1)]).await;
    let failed = peer.until_phase("a", 1, Phase::Failed).await;
    assert_eq!(failed.reason.unwrap().code, "INSTANCE_LOST");
    signal(&second, Signal::SIGTERM);
    let status = timeout(PATIENCE, second.wait()).await.expect("it does not end").unwrap();
    assert!(status.success(), "{status}");
    assert!(timeout(PATIENCE, peer.closed()).await.is_ok());

    let data_dir = directory.path().to_string_lossy();
    let clean = run(&["clean", "--node-id", "n1", "--data-dir", &data_dir, "--drivers", "sim"]).await;
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stderr));
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_explained() {
    let output = run(&["--node-id", "N1", "--listen", "0.0.0.0:7080", "--data-dir", "/nowhere"]).await;
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    for key in ["node_id: `N1`", "schedulers: is required", "listen: `0.0.0.0:7080` is not loopback"] {
        assert!(text.contains(key), "{key} is not in {text}");
    }
}

#[tokio::test]
async fn a_shim_that_is_called_wrongly_fails_at_once() {
    assert!(!run(&["shim"]).await.status.success());
}
