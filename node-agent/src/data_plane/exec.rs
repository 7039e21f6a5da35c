//! `Exec`: one process, its streams carried both ways, until it ends or the client is gone.
//!
//! ```text
//!  client ─▶ start · stdin · close_stdin · resize · signal ─▶ process
//!  client ◀─ started · stdout · stderr ······· exit ◀──────── process
//! ```
//! Output is read only as fast as the client takes it. `exit` comes after all output. Whatever ends the stream drops the
//! execution's control, which kills the process.

mod input;
mod output;
mod request;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use metrics::{counter, gauge};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_server::SandboxDataService;
use warren_proto::v1::{ExecRequest, ExecResponse, ExecStarted, ExitStatus};

use super::Authority;
use super::status::Refusal;
use crate::driver::{Execution, Exit};
use crate::metrics::{EXECS, EXECS_ACTIVE};
use crate::supervisor::Supervisor;

/// Processes executing at once on a node: each costs a few file descriptors and two buffers of 64 KiB.
const MAX_EXECS: usize = 1024;

/// A client knows what it wants to execute before it opens the stream.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// Responses under way to a client, each at most 64 KiB.
const OUTBOUND: usize = 8;

pub(super) type Responses = mpsc::Sender<Result<ExecResponse, Status>>;

/// `SandboxDataService`.
#[derive(Debug)]
pub struct ExecService {
    supervisor: Supervisor,
    authority: Authority,
    slots: Arc<Semaphore>,
    stop: CancellationToken,
}

impl ExecService {
    pub fn new(supervisor: Supervisor, authority: Authority, stop: CancellationToken) -> Self {
        Self { supervisor, authority, slots: Arc::new(Semaphore::new(MAX_EXECS)), stop }
    }

    async fn begin(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<ReceiverStream<Result<ExecResponse, Status>>, Refusal> {
        let key = self.authority.sandbox(request.metadata())?;
        let driver = self.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        let mut inbound = request.into_inner();
        let spec = request::start(first(&mut inbound).await?)?;
        // Not before: a client that says nothing takes nothing from others.
        let slot =
            Arc::clone(&self.slots).try_acquire_owned().map_err(|_| Refusal::Overloaded("executing processes"))?;
        let execution = driver.exec(&key, &spec).await?;
        tracing::debug!(sandbox = %key.sandbox, epoch = %key.epoch, "process executing");
        let (responses, rx) = mpsc::channel(OUTBOUND);
        tokio::spawn(run(execution, inbound, responses, self.stop.clone(), Active::new(slot)));
        Ok(ReceiverStream::new(rx))
    }
}

/// The first message of a client that does not keep it back.
async fn first(inbound: &mut Streaming<ExecRequest>) -> Result<Option<ExecRequest>, Refusal> {
    match timeout(START_PATIENCE, inbound.message()).await {
        Ok(message) => message.map_err(|status| Refusal::Stream(Box::new(status))),
        Err(_) => Err(request::field("start", "must come within 5 s of opening the stream")),
    }
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

/// Counts an executing process and holds its slot.
struct Active(#[allow(dead_code)] OwnedSemaphorePermit);

impl Active {
    fn new(slot: OwnedSemaphorePermit) -> Self {
        gauge!(EXECS_ACTIVE).increment(1.0);
        Self(slot)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        gauge!(EXECS_ACTIVE).decrement(1.0);
    }
}

/// Carries the streams until the process ends, the client is gone or the agent stops.
async fn run(
    execution: Execution,
    inbound: Streaming<ExecRequest>,
    responses: Responses,
    stop: CancellationToken,
    _active: Active,
) {
    let Execution { stdin, stdout, stderr, control } = execution;
    let _ = responses.send(Ok(response(Down::Started(ExecStarted::default())))).await;
    let last = tokio::select! {
        ended = output::until_end(stdout, stderr, &*control, &responses) => ended,
        refusal = input::feed(inbound, stdin, &*control) => Err(refusal),
        () = responses.closed() => {
            counter!(EXECS, "result" => "abandoned").increment(1);
            return;
        }
        () = stop.cancelled() => Err(Refusal::Stopping),
    };
    let (result, message) = match last {
        Ok(exit) => ("ended", Ok(response(Down::Exit(wire_exit(exit))))),
        Err(refusal) => ("failed", Err(refusal.into())),
    };
    counter!(EXECS, "result" => result).increment(1);
    let _ = responses.send(message).await;
}

pub(super) fn response(message: Down) -> ExecResponse {
    ExecResponse { message: Some(message) }
}

fn wire_exit(exit: Exit) -> ExitStatus {
    ExitStatus { code: exit.code, signal: exit.signal, oom_killed: exit.oom_killed }
}
