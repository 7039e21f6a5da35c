//! TCP to ports inside.

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use warren_proto::v1::open_port_request::Message as Up;
use warren_proto::v1::open_port_response::Message as Down;
use warren_proto::v1::sandbox_port_service_client::SandboxPortServiceClient;
use warren_proto::v1::*;

use crate::lab::*;
use crate::support::{PATIENCE, look_again, removed};

struct Tunnel {
    up: mpsc::Sender<OpenPortRequest>,
    down: Streaming<OpenPortResponse>,
}

async fn open(lab: &Lab, port: u32) -> Result<Tunnel, Status> {
    let (up, rx) = mpsc::channel(16);
    up.send(OpenPortRequest { message: Some(Up::Open(OpenPortStart { port })) }).await.unwrap();
    let mut client = SandboxPortServiceClient::new(lab.channel());
    let mut down = client.open_port(lab.with(ReceiverStream::new(rx))).await?.into_inner();
    let first = down.message().await?.unwrap();
    assert_eq!(first.message, Some(Down::Opened(PortOpened {})));
    Ok(Tunnel { up, down })
}

/// Once something listens: who started it is told before it does.
async fn open_soon(lab: &Lab, port: u32) -> Tunnel {
    let listening = async {
        loop {
            match open(lab, port).await {
                Ok(tunnel) => break tunnel,
                Err(_) => look_again().await,
            }
        }
    };
    timeout(PATIENCE, listening).await.expect("nobody ever listens")
}

impl Tunnel {
    async fn send(&self, message: Up) {
        self.up.send(OpenPortRequest { message: Some(message) }).await.unwrap();
    }

    /// All that comes until the other side closes.
    async fn rest(&mut self) -> Result<Vec<u8>, Status> {
        let mut bytes = Vec::new();
        loop {
            match timeout(PATIENCE, self.down.message()).await.expect("silent")?.and_then(|response| response.message) {
                Some(Down::Data(piece)) => bytes.extend(piece),
                Some(Down::CloseWrite(_)) | None => return Ok(bytes),
                Some(Down::Opened(_)) => panic!("opened twice"),
            }
        }
    }
}

#[test]
fn bytes_go_both_ways_and_each_way_closes_by_itself() {
    with_lab("ports", |lab| async move {
        let closed = (Code::Unavailable, Some(ErrorReason::PortClosed));
        assert_eq!(refused(open(&lab, 8080).await), closed);
        assert_eq!(refused(open(&lab, 0).await).0, Code::InvalidArgument);
        assert_eq!(refused(open(&lab, 65_536).await).0, Code::InvalidArgument);
        // It answers only after the end of what it is sent.
        lab.sh("busybox nc -ll -p 8080 -e /bin/sha256sum > /dev/null 2>&1 < /dev/null &").await;
        let mut tunnel = open_soon(&lab, 8080).await;
        for _ in 0..64 {
            tunnel.send(Up::Data(vec![0; 100_000])).await;
        }
        tunnel.send(Up::CloseWrite(CloseWrite {})).await;
        let sum = String::from_utf8(tunnel.rest().await.unwrap()).unwrap();
        assert_eq!(sum, lab.sh("head -c 6400000 /dev/zero | sha256sum").await + "\n");
        // It closes first, after more than fits on the way.
        lab.sh("busybox nc -ll -p 8081 -e /bin/head -c 3000000 /dev/zero > /dev/null 2>&1 < /dev/null &").await;
        let mut tunnel = open_soon(&lab, 8081).await;
        assert_eq!(tunnel.rest().await.unwrap().len(), 3_000_000);
        lab
    });
}

#[test]
fn a_connection_ends_with_the_sandbox() {
    with_lab("port of a removed sandbox", |mut lab| async move {
        lab.sh("busybox nc -ll -p 8080 -e /bin/cat > /dev/null 2>&1 < /dev/null &").await;
        let mut tunnel = open_soon(&lab, 8080).await;
        tunnel.send(Up::Data(b"echo".to_vec())).await;
        let first = tunnel.down.message().await.unwrap().unwrap();
        assert_eq!(first.message, Some(Down::Data(b"echo".to_vec())));
        lab.peer.assign(3, &[removed("a", 1)]).await;
        lab.peer.until_phase("a", 1, sandbox_observation::Phase::Removed).await;
        let _ = tunnel.rest().await;
        assert_eq!(refused(open(&lab, 8080).await), (Code::FailedPrecondition, Some(ErrorReason::SandboxMoved)));
        lab
    });
}
