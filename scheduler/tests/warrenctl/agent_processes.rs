//! The processes of the fake's node agent.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use warren_proto::v1::attach_process_request::Message as Up;
use warren_proto::v1::attach_process_response::Message as Down;
use warren_proto::v1::sandbox_process_service_server::SandboxProcessService;
use warren_proto::v1::*;

use crate::agent::authorized;
use crate::fake::{Region, error};

#[tonic::async_trait]
impl SandboxProcessService for Region {
    type AttachProcessStream = Pin<Box<dyn Stream<Item = Result<AttachProcessResponse, Status>> + Send>>;

    async fn start_process(&self, request: Request<StartProcessRequest>) -> Result<Response<Process>, Status> {
        authorized(&request)?;
        let request = request.into_inner();
        self.book().starts.push(request.clone());
        self.check("start")?;
        let start = request.start.unwrap_or_default();
        let mut process = Process { process_id: request.process_id, command: start.command, ..Process::default() };
        process.set_state(ProcessState::Running);
        Ok(Response::new(process))
    }

    async fn list_processes(
        &self,
        request: Request<ListProcessesRequest>,
    ) -> Result<Response<ListProcessesResponse>, Status> {
        authorized(&request)?;
        self.check("processes")?;
        Ok(Response::new(ListProcessesResponse { processes: self.book().processes.clone() }))
    }

    async fn signal_process(
        &self,
        request: Request<SignalProcessRequest>,
    ) -> Result<Response<SignalProcessResponse>, Status> {
        authorized(&request)?;
        self.book().kills.push(request.into_inner());
        self.check("signal")?;
        Ok(Response::new(SignalProcessResponse {}))
    }

    async fn attach_process(
        &self,
        request: Request<Streaming<AttachProcessRequest>>,
    ) -> Result<Response<Self::AttachProcessStream>, Status> {
        authorized(&request)?;
        self.check("attach")?;
        let mut requests = request.into_inner();
        let Some(Up::Attach(start)) = requests.message().await?.and_then(|request| request.message) else {
            return Err(error(Code::InvalidArgument, ErrorReason::InvalidField, "attach comes first"));
        };
        self.book().attaches.push(start.clone());
        let script = self.book().attachments.pop_front().unwrap_or_default();
        let (to, responses) = mpsc::channel(4);
        tokio::spawn(play(self.clone(), start.offset, script, requests, to));
        let wire = |message: Result<Down, Status>| message.map(|m| AttachProcessResponse { message: Some(m) });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses).map(wire))))
    }
}

pub fn output(offset: i64, stream: process_output::Stream, data: &[u8]) -> Down {
    Down::Output(ProcessOutput { offset, stream: stream.into(), data: data.to_vec() })
}

pub fn exited(code: i32) -> Down {
    Down::Exited(Process { exit_status: Some(ExitStatus { code, ..ExitStatus::default() }), ..Process::default() })
}

/// The script; where that ends nothing, it gives back its input until that ends, and exits 7.
async fn play(
    region: Region,
    mut offset: i64,
    script: Vec<Result<Down, Status>>,
    mut requests: Streaming<AttachProcessRequest>,
    to: mpsc::Sender<Result<Down, Status>>,
) {
    let _gone = to.send(Ok(Down::Attached(Process::default()))).await;
    let ends = matches!(script.last(), Some(Err(_) | Ok(Down::Exited(_))));
    for message in script {
        let _gone = to.send(message).await;
    }
    if ends {
        return;
    }
    while let Ok(Some(request)) = requests.message().await {
        match request.message {
            Some(Up::Stdin(bytes)) => {
                let echo = output(offset, process_output::Stream::Stdout, &bytes);
                offset += i64::try_from(bytes.len()).unwrap_or(0);
                let _gone = to.send(Ok(echo)).await;
            }
            Some(Up::Resize(size)) => {
                region.book().resizes.push(size);
                region.changed.notify_waiters();
            }
            Some(Up::CloseStdin(_)) => return drop(to.send(Ok(exited(7))).await),
            _ => {}
        }
    }
}
