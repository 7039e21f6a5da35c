//! Logs, figures and ports of the fake's node agent.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use warren_proto::v1::open_port_request::Message as Up;
use warren_proto::v1::open_port_response::Message as Down;
use warren_proto::v1::sandbox_log_service_server::SandboxLogService;
use warren_proto::v1::sandbox_port_service_server::SandboxPortService;
use warren_proto::v1::*;

use crate::agent::authorized;
use crate::fake::{Region, error};

#[tonic::async_trait]
impl SandboxLogService for Region {
    type ReadLogsStream = Pin<Box<dyn Stream<Item = Result<ReadLogsResponse, Status>> + Send>>;

    async fn read_logs(&self, request: Request<ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        authorized(&request)?;
        self.check("logs")?;
        self.book().log_reads.push(request.into_inner());
        let messages = self.book().logs.pop_front().unwrap_or_default();
        let wire = |message: Result<_, Status>| message.map(|m| ReadLogsResponse { message: Some(m) });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages).map(wire))))
    }

    async fn get_sandbox_metrics(
        &self,
        request: Request<GetSandboxMetricsRequest>,
    ) -> Result<Response<SandboxMetrics>, Status> {
        authorized(&request)?;
        self.check("metrics")?;
        let next = self.book().metrics.pop_front();
        next.map(Response::new).ok_or_else(|| Status::internal("no more figures"))
    }
}

/// Nobody listens at this port.
pub const CLOSED: u32 = 81;

#[tonic::async_trait]
impl SandboxPortService for Region {
    type OpenPortStream = Pin<Box<dyn Stream<Item = Result<OpenPortResponse, Status>> + Send>>;

    /// Says back what it hears, once that has ended.
    async fn open_port(
        &self,
        request: Request<Streaming<OpenPortRequest>>,
    ) -> Result<Response<Self::OpenPortStream>, Status> {
        authorized(&request)?;
        self.check("port")?;
        let mut requests = request.into_inner();
        let Some(Up::Open(open)) = requests.message().await?.and_then(|request| request.message) else {
            return Err(Status::invalid_argument("open comes first"));
        };
        self.book().ports.push(open.port);
        if open.port == CLOSED {
            return Err(error(Code::Unavailable, ErrorReason::DriverFailed, "nobody listens at port 81"));
        }
        let (to, responses) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut heard = Vec::new();
            let _gone = to.send(Down::Opened(PortOpened {})).await;
            while let Ok(Some(OpenPortRequest { message: Some(message) })) = requests.message().await {
                match message {
                    Up::Data(bytes) => heard.extend(bytes),
                    _ => break,
                }
            }
            for bytes in heard.chunks(1 << 16) {
                let _gone = to.send(Down::Data(bytes.to_vec())).await;
            }
            let _gone = to.send(Down::CloseWrite(CloseWrite {})).await;
        });
        let wire = |message| Ok(OpenPortResponse { message: Some(message) });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses).map(wire))))
    }
}
