//! `SandboxProcessService`: processes that outlive the stream, and the agent, that started them.
//!
//! Children: `request` checks what is asked for, `wire` says what there is, `carry` moves input and output, `slots` bounds how
//! many run.

pub(super) mod carry;
pub(super) mod request;
mod slots;
pub(super) mod wire;

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use metrics::counter;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::attach_process_request::Message as Up;
use warren_proto::v1::sandbox_process_service_server::SandboxProcessService;
use warren_proto::v1::{
    AttachProcessRequest, AttachProcessResponse, ListProcessesRequest, ListProcessesResponse, Process,
    SignalProcessRequest, SignalProcessResponse, StartProcessRequest,
};

pub use slots::Slots;

use self::carry::{Input, OUTBOUND, Target, carry};
use super::Authority;
use super::exec::first;
use super::status::Refusal;
use crate::driver::{AttachFrom, Driver, InstanceKey};
use crate::metrics::EXECS;
use crate::supervisor::Supervisor;

/// Serves processes.
#[derive(Debug)]
pub struct ProcessService {
    supervisor: Supervisor,
    authority: Authority,
    slots: Slots,
    stop: CancellationToken,
}

type Attached = Pin<Box<dyn Stream<Item = Result<AttachProcessResponse, Status>> + Send>>;

impl ProcessService {
    pub fn new(supervisor: Supervisor, authority: Authority, slots: Slots, stop: CancellationToken) -> Self {
        Self { supervisor, authority, slots, stop }
    }

    fn open<T>(&self, request: &Request<T>) -> Result<(InstanceKey, Arc<dyn Driver>), Refusal> {
        let key = self.authority.sandbox(request.metadata())?;
        let driver = self.supervisor.driver_of(&key).ok_or_else(|| Refusal::Moved(key.clone()))?;
        Ok((key, driver))
    }

    async fn start(&self, request: Request<StartProcessRequest>) -> Result<Process, Refusal> {
        let (key, driver) = self.open(&request)?;
        let spec = request::process(request.into_inner())?;
        let slot = self.slots.take()?;
        let status = driver.start_process(&key, &spec).await?;
        if status.exit.is_none() {
            slot.hold_until_ended(&Target { driver, key, id: spec.id });
        }
        Ok(wire::process(status))
    }

    async fn list(&self, request: Request<ListProcessesRequest>) -> Result<Vec<Process>, Refusal> {
        let (key, driver) = self.open(&request)?;
        let mut all = driver.processes(&key).await?;
        all.sort_by(|a, b| (a.started_ms, &a.id).cmp(&(b.started_ms, &b.id)));
        Ok(all.into_iter().map(wire::process).collect())
    }

    async fn attach(&self, request: Request<Streaming<AttachProcessRequest>>) -> Result<Attached, Refusal> {
        let (key, driver) = self.open(&request)?;
        let mut inbound = request.into_inner();
        let Some(AttachProcessRequest { message: Some(Up::Attach(start)) }) = first(&mut inbound, "attach").await?
        else {
            return Err(request::field("attach", "must be the first message"));
        };
        let id = request::id("attach.process_id", start.process_id)?;
        let offset = u64::try_from(start.offset).map_err(|_| request::field("attach.offset", "must be 0 or more"))?;
        let attachment = driver.attach(&key, &id, AttachFrom { offset, lossless: start.lossless }).await?;
        let (responses, rx) = mpsc::channel(OUTBOUND);
        responses.try_send(Ok(wire::attached(attachment.status.clone()))).expect("it is empty");
        let (target, stop) = (Target { driver, key, id }, self.stop.clone());
        tokio::spawn(async move {
            let inbound = Input::open_ended(inbound, input);
            carry(attachment, inbound, &responses, stop, &target, |event| Some(wire::event(event))).await;
        });
        Ok(Box::pin(ReceiverStream::new(rx)))
    }

    async fn signal(&self, request: Request<SignalProcessRequest>) -> Result<(), Refusal> {
        let (key, driver) = self.open(&request)?;
        let SignalProcessRequest { process_id, signal } = request.into_inner();
        let (id, signal) = (request::id("process_id", process_id)?, request::signal(signal)?);
        Ok(driver.signal_process(&key, &id, signal).await?)
    }
}

fn input(request: AttachProcessRequest) -> Result<Input, Refusal> {
    match request.message {
        Some(Up::Stdin(piece)) => Ok(Input::Stdin(piece)),
        Some(Up::CloseStdin(_)) => Ok(Input::CloseStdin),
        Some(Up::Resize(size)) => Ok(Input::Resize(request::terminal("resize", size)?)),
        Some(Up::Signal(signal)) => Ok(Input::Signal(request::signal(signal)?)),
        Some(Up::Attach(_)) => Err(request::field("attach", "must come once, first")),
        None => Err(request::field("message", "must be set")),
    }
}

#[tonic::async_trait]
impl SandboxProcessService for ProcessService {
    async fn start_process(&self, request: Request<StartProcessRequest>) -> Result<Response<Process>, Status> {
        let started = self.start(request).await;
        counter!(EXECS, "result" => if started.is_ok() { "detached" } else { "refused" }).increment(1);
        Ok(Response::new(started?))
    }

    async fn list_processes(
        &self,
        request: Request<ListProcessesRequest>,
    ) -> Result<Response<ListProcessesResponse>, Status> {
        Ok(Response::new(ListProcessesResponse { processes: self.list(request).await? }))
    }

    type AttachProcessStream = Attached;

    async fn attach_process(
        &self,
        request: Request<Streaming<AttachProcessRequest>>,
    ) -> Result<Response<Attached>, Status> {
        Ok(Response::new(self.attach(request).await?))
    }

    async fn signal_process(
        &self,
        request: Request<SignalProcessRequest>,
    ) -> Result<Response<SignalProcessResponse>, Status> {
        self.signal(request).await?;
        Ok(Response::new(SignalProcessResponse {}))
    }
}
