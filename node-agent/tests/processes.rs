//! `SandboxProcessService` of an agent, over a driver whose processes are made up.

#![allow(clippy::unwrap_used)]

mod support;

use support::scheduler::Manner;
use support::*;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use warren_node_agent::agent::Agent;
use warren_node_agent::driver::Presence;
use warren_proto::client::{ClientTls, channel};
use warren_proto::error::reason_of;
use warren_proto::token;
use warren_proto::v1::attach_process_request::Message as Up;
use warren_proto::v1::attach_process_response::Message as Down;
use warren_proto::v1::process_output::Stream as From;
use warren_proto::v1::sandbox_process_service_client::SandboxProcessServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

/// An agent that runs sandbox `a` at epoch 2.
struct Lab {
    agent: Agent,
    driver: FakeDriver,
    _scheduler: Scheduler,
    _peer: Peer,
    directory: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Self {
        let scheduler = Scheduler::start(Manner::default()).await;
        let driver = FakeDriver::default();
        driver.set(&instance("a", 2), Some(Presence::Running));
        let directory = tempfile::tempdir().unwrap();
        let agent = agent("n1", directory.path(), &scheduler.address, &driver).await;
        let mut peer = scheduler.peer().await;
        peer.assign(1, &[running("a", 2)]).await;
        // It has the keys by then.
        peer.until("generation 1", |peer| peer.generation == 1).await;
        Self { agent, driver, _scheduler: scheduler, _peer: peer, directory }
    }

    fn client(&self) -> SandboxProcessServiceClient<Channel> {
        SandboxProcessServiceClient::new(channel(&self.agent.data_plane.to_string(), &ClientTls::default()).unwrap())
    }

    async fn start(&self, id: &str, command: &str) -> Result<Process, Status> {
        let start = ExecStart { command: vec![command.to_owned()], ..ExecStart::default() };
        let request = StartProcessRequest { process_id: id.into(), start: Some(start), ..Default::default() };
        self.client().start_process(with_token(request)).await.map(tonic::Response::into_inner)
    }

    async fn list(&self) -> Vec<Process> {
        let answer = self.client().list_processes(with_token(ListProcessesRequest {})).await;
        answer.unwrap().into_inner().processes
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), Status> {
        let request = SignalProcessRequest { process_id: id.into(), signal };
        self.client().signal_process(with_token(request)).await.map(drop)
    }

    async fn attach(&self, id: &str, offset: i64) -> Result<Attached, Status> {
        let (up, rx) = mpsc::channel(16);
        let start = AttachStart { process_id: id.into(), offset, lossless: true };
        up.send(AttachProcessRequest { message: Some(Up::Attach(start)) }).await.unwrap();
        let mut down = self.client().attach_process(with_token(ReceiverStream::new(rx))).await?.into_inner();
        match down.next().await.unwrap()?.message {
            Some(Down::Attached(process)) => Ok(Attached { up, down, process }),
            other => panic!("{other:?}"),
        }
    }
}

fn with_token<T>(request: T) -> tonic::Request<T> {
    let claims = TokenClaims { sandbox: name("a").to_string(), epoch: 2, ..claims(Scope::Sandbox) };
    bearer(request, &token::sign(&claims, &key()))
}

struct Attached {
    up: mpsc::Sender<AttachProcessRequest>,
    down: Streaming<AttachProcessResponse>,
    process: Process,
}

impl Attached {
    async fn send(&self, message: Up) {
        self.up.send(AttachProcessRequest { message: Some(message) }).await.unwrap();
    }

    /// Offset of the first byte, all bytes of stdout, and the process at its end.
    async fn rest(mut self) -> Result<(i64, Vec<u8>, Process), Status> {
        let (mut first, mut stdout) = (None, Vec::new());
        loop {
            match timeout(PATIENCE, self.down.next()).await.expect("silent").expect("no end")?.message {
                Some(Down::Output(output)) => {
                    first.get_or_insert(output.offset);
                    if output.stream() == From::Stdout {
                        stdout.extend(output.data);
                    }
                }
                Some(Down::Exited(process)) => return Ok((first.unwrap_or(-1), stdout, process)),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn refusal<T>(result: Result<T, Status>) -> (Code, Option<ErrorReason>) {
    let status = result.map(drop).unwrap_err();
    (status.code(), reason_of(&status))
}

#[tokio::test]
async fn a_process_is_started_once_listed_attached_to_and_remembered() {
    let lab = Lab::new().await;
    let started = lab.start("web", "cat").await.unwrap();
    assert_eq!((started.process_id.as_str(), started.state()), ("web", ProcessState::Running));
    assert_eq!(lab.start("web", "cat").await.unwrap(), started, "the same again");
    let taken = refusal(lab.start("web", "hang").await);
    assert_eq!(taken, (Code::AlreadyExists, Some(ErrorReason::ProcessAlreadyExists)));
    assert!(!lab.start("", "hang").await.unwrap().process_id.is_empty());
    assert_eq!(lab.list().await.len(), 2);

    let one = lab.attach("web", 0).await.unwrap();
    assert!(one.process.attached);
    one.send(Up::Stdin(b"hello".to_vec())).await;
    let two = lab.attach("web", 2).await.unwrap();
    one.send(Up::Resize(TerminalSize { columns: 1, rows: 1 })).await;
    one.send(Up::CloseStdin(CloseStdin {})).await;
    let (one, two) = (one.rest().await.unwrap(), two.rest().await.unwrap());
    assert_eq!((one.0, one.1.as_slice()), (0, &b"hello"[..]));
    assert_eq!((two.0, two.1.as_slice()), (2, &b"llo"[..]));
    assert_eq!(one.2.exit_status.unwrap().code, 3);
    let again = lab.attach("web", 4).await.unwrap().rest().await.unwrap();
    assert_eq!((again.0, again.1.as_slice(), again.2.output_end), (4, &b"o"[..], 5));
    lab.agent.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_does_not_end_a_process_nor_does_the_agent() {
    let lab = Lab::new().await;
    lab.start("p", "hang").await.unwrap();
    drop(lab.attach("p", 0).await.unwrap());
    let attached = lab.attach("p", 0).await.unwrap();
    let scheduler = lab._scheduler.address.clone();
    let (reading, ()) = tokio::join!(attached.rest(), lab.agent.stop());
    assert_eq!(refusal(reading).0, Code::Unavailable);
    let next = agent("n1", lab.directory.path(), &scheduler, &lab.driver).await;
    let all = warren_node_agent::driver::Driver::processes(&lab.driver, &instance("a", 2)).await.unwrap();
    assert_eq!((all.len(), all[0].exit), (1, None));
    next.stop().await;
}

#[tokio::test]
async fn a_signal_ends_one_and_what_is_wrong_is_said() {
    let lab = Lab::new().await;
    lab.start("p", "hang").await.unwrap();
    let attached = lab.attach("p", 0).await.unwrap();
    // It does not read; the signal gets past what waits.
    attached.send(Up::Stdin(vec![0; 1 << 20])).await;
    lab.signal("p", 15).await.unwrap();
    lab.signal("p", 15).await.unwrap();
    let ended = attached.rest().await.unwrap().2;
    assert_eq!((ended.exit_status.unwrap().signal, ended.state()), (15, ProcessState::Exited));

    let unknown = (Code::NotFound, Some(ErrorReason::ProcessNotFound));
    assert_eq!(refusal(lab.signal("q", 15).await), unknown);
    assert_eq!(refusal(lab.attach("q", 0).await), unknown);
    let invalid = (Code::InvalidArgument, Some(ErrorReason::InvalidField));
    assert_eq!(refusal(lab.signal("p", 0).await), invalid);
    assert_eq!(refusal(lab.signal("../p", 9).await), invalid);
    assert_eq!(refusal(lab.attach("p", -1).await), invalid);
    assert_eq!(refusal(lab.start("A", "cat").await), invalid);
    assert_eq!(refusal(lab.start("x", "nothing").await), (Code::InvalidArgument, Some(ErrorReason::CommandNotFound)));
    lab.start("r", "hang").await.unwrap();
    let twice = lab.attach("r", 0).await.unwrap();
    twice.send(Up::Attach(AttachStart::default())).await;
    assert_eq!(refusal(twice.rest().await), invalid);
    lab.driver.set(&instance("a", 2), Some(Presence::Frozen));
    let frozen = refusal(lab.start("y", "cat").await);
    assert_eq!(frozen, (Code::FailedPrecondition, Some(ErrorReason::SandboxState)));
    let bare = lab.client().list_processes(ListProcessesRequest {}).await;
    assert_eq!(refusal(bare), (Code::Unauthenticated, Some(ErrorReason::TokenInvalid)));
    lab.agent.stop().await;
}
