//! `OpenPort`: one TCP connection into a sandbox, carried both ways until both are closed.
//!
//! Each direction is read only as fast as the other side takes it, and is closed by itself.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::open_port_request::Message as Up;
use warren_proto::v1::open_port_response::Message as Down;
use warren_proto::v1::sandbox_port_service_server::SandboxPortService;
use warren_proto::v1::{CloseWrite, OpenPortRequest, OpenPortResponse, PortOpened};

use super::held::{Held, Instances};
use super::status::Refusal;
use crate::driver::DriverError;

/// Connections into sandboxes of a node: each costs a descriptor, two tasks and some buffers of 64 KiB.
const MAX_TUNNELS: usize = 4096;

/// A client knows which port it wants before it opens the stream.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// Responses under way to a client, each at most [`PIECE`].
const OUTBOUND: usize = 4;

/// How much is read at a time.
const PIECE: usize = 64 << 10;

type Responses = mpsc::Sender<Result<OpenPortResponse, Status>>;

/// `SandboxPortService`.
#[derive(Debug)]
pub struct PortService {
    instances: Instances,
    slots: Arc<Semaphore>,
}

/// A connection, with its share of what is bounded.
struct Tunnel {
    held: Arc<Held>,
    port: u16,
    _slots: [OwnedSemaphorePermit; 2],
}

impl PortService {
    pub fn new(instances: Instances) -> Self {
        Self { instances, slots: Arc::new(Semaphore::new(MAX_TUNNELS)) }
    }

    async fn begin(
        &self,
        request: Request<Streaming<OpenPortRequest>>,
    ) -> Result<ReceiverStream<Result<OpenPortResponse, Status>>, Refusal> {
        let held = self.instances.enter(request.metadata())?;
        let mut inbound = request.into_inner();
        let port = first(&mut inbound).await?;
        let slot =
            |from: &Arc<Semaphore>, what| Arc::clone(from).try_acquire_owned().map_err(|_| Refusal::Overloaded(what));
        let own = slot(&held.tunnels, "connections to ports of this sandbox")?;
        let all = slot(&self.slots, "connections to ports")?;
        let stream = held.driver.connect(&held.key, port).await?;
        let (responses, rx) = mpsc::channel(OUTBOUND);
        tokio::spawn(run(Tunnel { held, port, _slots: [own, all] }, stream, inbound, responses));
        Ok(ReceiverStream::new(rx))
    }
}

async fn first(inbound: &mut Streaming<OpenPortRequest>) -> Result<u16, Refusal> {
    let field = |what: &str| Refusal::Field { field: "open", what: what.to_owned() };
    let message = match timeout(START_PATIENCE, inbound.message()).await {
        Ok(message) => message.map_err(|status| Refusal::Stream(Box::new(status)))?,
        Err(_) => return Err(field("must come within 5 s of opening the stream")),
    };
    let Some(Up::Open(open)) = message.and_then(|message| message.message) else {
        return Err(field("must come first"));
    };
    u16::try_from(open.port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| Refusal::Field { field: "open.port", what: format!("{} is not from 1 to 65535", open.port) })
}

#[tonic::async_trait]
impl SandboxPortService for PortService {
    type OpenPortStream = Pin<Box<dyn Stream<Item = Result<OpenPortResponse, Status>> + Send>>;

    async fn open_port(
        &self,
        request: Request<Streaming<OpenPortRequest>>,
    ) -> Result<Response<Self::OpenPortStream>, Status> {
        Ok(Response::new(Box::pin(self.begin(request).await?)))
    }
}

async fn run(tunnel: Tunnel, stream: TcpStream, inbound: Streaming<OpenPortRequest>, responses: Responses) {
    let (read, write) = stream.into_split();
    let both = async { tokio::try_join!(carry_down(&tunnel, read, &responses), carry_up(write, inbound)) };
    tokio::select! {
        done = both => {
            if let Err(refusal) = done {
                let _ = responses.send(Err(refusal.into())).await;
            }
        }
        refusal = tunnel.held.ended() => drop(responses.try_send(Err(refusal.into()))),
        () = responses.closed() => {}
    }
}

async fn carry_down(tunnel: &Tunnel, mut read: OwnedReadHalf, responses: &Responses) -> Result<(), Refusal> {
    let send = |message| responses.send(Ok(OpenPortResponse { message: Some(message) }));
    let mut message = Down::Opened(PortOpened {});
    loop {
        let last = matches!(message, Down::CloseWrite(_));
        // A client that has gone ends all of it, by `closed`.
        if send(message).await.is_err() || last {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(PIECE);
        message = match read.read_buf(&mut bytes).await {
            Ok(0) => Down::CloseWrite(CloseWrite {}),
            Ok(_) => Down::Data(bytes),
            Err(_) => return Err(broken(tunnel)),
        };
    }
}

async fn carry_up(mut write: OwnedWriteHalf, mut inbound: Streaming<OpenPortRequest>) -> Result<(), Refusal> {
    loop {
        let message = inbound.message().await.map_err(|status| Refusal::Stream(Box::new(status)))?;
        let done = match message {
            None => write.shutdown().await.map(|()| true),
            Some(OpenPortRequest { message: Some(Up::Data(bytes)) }) => write.write_all(&bytes).await.map(|()| false),
            Some(OpenPortRequest { message: Some(Up::CloseWrite(_)) }) => write.shutdown().await.map(|()| true),
            Some(OpenPortRequest { message: Some(Up::Open(_)) | None }) => {
                return Err(Refusal::Field { field: "message", what: "must be `data` or `close_write`".to_owned() });
            }
        };
        match done {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // Whoever listened is gone; what it sent before is still on its way down.
            Err(_) => return Ok(()),
        }
    }
}

/// The connection was reset from inside.
fn broken(tunnel: &Tunnel) -> Refusal {
    DriverError::PortClosed(tunnel.port).into()
}
