//! `Exec`: starts a process, attaches to it and carries its streams both ways, until it ends or the client is gone.
//!
//! ```text
//!  client ─▶ start · stdin · close_stdin · resize · signal ─▶ process
//!  client ◀─ started · stdout · stderr ······· exit ◀──────── process
//! ```
//! Output is read only as fast as the client takes it. `exit` comes after all output. Whatever ends the stream lets go of the
//! process, which kills it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use metrics::counter;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_server::SandboxDataService;
use warren_proto::v1::{ExecRequest, ExecResponse, ExecStarted};

use super::Authority;
use super::process::carry::{Input, OUTBOUND, Target, carry};
use super::process::{Slots, request, wire};
use super::status::Refusal;
use crate::driver::{Event, ProcessSpec, Stream as From};
use crate::metrics::EXECS;
use crate::supervisor::Supervisor;

/// A client knows what it wants to execute before it opens the stream.
pub(super) const START_PATIENCE: Duration = Duration::from_secs(5);

/// `SandboxDataService`.
#[derive(Debug)]
pub struct ExecService {
    supervisor: Supervisor,
    authority: Authority,
    slots: Slots,
    stop: CancellationToken,
}

impl ExecService {
    pub fn new(supervisor: Supervisor, authority: Authority, slots: Slots, stop: CancellationToken) -> Self {
        Self { supervisor, authority, slots, stop }
    }

    async fn begin(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<ReceiverStream<Result<ExecResponse, Status>>, Refusal> {
        let key = self.authority.sandbox(request.metadata())?;
        let driver = self.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        let mut inbound = request.into_inner();
        let Some(ExecRequest { message: Some(Up::Start(start)) }) = first(&mut inbound, "start").await? else {
            return Err(request::field("start", "must be the first message"));
        };
        let (exec, timeout) = request::start(start)?;
        let id = request::new_id();
        let spec = ProcessSpec { id: id.clone(), exec, kill_on_disconnect: true, no_stdin: false, timeout };
        // Not before: a client that says nothing takes nothing from others.
        let slot = self.slots.take()?;
        let attachment = driver.exec(&key, &spec).await?;
        let target = Target { driver: Arc::clone(&driver), key, id };
        slot.hold_until_ended(&target);
        tracing::debug!(sandbox = %target.key.sandbox, epoch = %target.key.epoch, process = target.id, "executing");
        let (responses, rx) = mpsc::channel(OUTBOUND);
        let started = response(Down::Started(ExecStarted { process_id: target.id.clone() }));
        responses.try_send(Ok(started)).expect("it is empty");
        let stop = self.stop.clone();
        tokio::spawn(async move {
            // The client has said all that it will say: that is the end of the input too.
            let inbound = Input::closing_at_end(inbound, input);
            let result = carry(attachment, inbound, &responses, stop, &target, output).await;
            counter!(EXECS, "result" => result).increment(1);
        });
        Ok(ReceiverStream::new(rx))
    }
}

/// The first message of a client that does not keep it back.
pub(super) async fn first<T>(inbound: &mut Streaming<T>, what: &'static str) -> Result<Option<T>, Refusal> {
    match timeout(START_PATIENCE, inbound.message()).await {
        Ok(message) => message.map_err(|status| Refusal::Stream(Box::new(status))),
        Err(_) => Err(request::field(what, "must come within 5 s of opening the stream")),
    }
}

fn input(request: ExecRequest) -> Result<Input, Refusal> {
    match request.message {
        Some(Up::Stdin(piece)) => Ok(Input::Stdin(piece)),
        Some(Up::CloseStdin(_)) => Ok(Input::CloseStdin),
        Some(Up::Resize(size)) => Ok(Input::Resize(request::terminal("resize", size)?)),
        Some(Up::Signal(signal)) => Ok(Input::Signal(request::signal(signal)?)),
        Some(Up::Start(_)) => Err(request::field("start", "must come once, first")),
        None => Err(request::field("message", "must be set")),
    }
}

fn output(event: Event) -> Option<ExecResponse> {
    match event {
        Event::Output { stream: From::Stdout, data, .. } => Some(response(Down::Stdout(data))),
        Event::Output { stream: From::Stderr, data, .. } => Some(response(Down::Stderr(data))),
        // It is attached from the beginning, and lossless.
        Event::Dropped { .. } => None,
        Event::Exited(status) => Some(response(Down::Exit(wire::exit(status.exit.unwrap_or_default())))),
    }
}

fn response(message: Down) -> ExecResponse {
    ExecResponse { message: Some(message) }
}

#[tonic::async_trait]
impl SandboxDataService for ExecService {
    type ExecStream = Pin<Box<dyn Stream<Item = Result<ExecResponse, Status>> + Send>>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        match self.begin(request).await {
            Ok(stream) => Ok(Response::new(Box::pin(stream))),
            Err(refusal) => {
                counter!(EXECS, "result" => "refused").increment(1);
                Err(refusal.into())
            }
        }
    }
}
