//! Answers names for sandboxes, at the gateway's address, by asking the host's resolvers.
//!
//! What a policy does not name is refused. What a list names is answered only once its addresses are allowed, so a program
//! that connects at once is let through. `decide` (pure) says what becomes of a question, `upstream` asks.

mod decide;
mod upstream;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use self::decide::{Decision, Question};
use self::upstream::{Transport, Upstreams};
use super::{Inner, NetworkError};

const PORT: u16 = 53;
/// Questions under way of the whole node. One more is not answered; who asks asks again.
const MAX_QUESTIONS: usize = 1024;
/// Connections at a time of the whole node, each one question after another.
const MAX_CONNECTIONS: usize = 256;
/// How long a connection may rest, and an answer may take to be written.
const IDLE: Duration = Duration::from_secs(10);
/// Largest message over UDP that is taken: what extensions allow at most in practice.
pub(super) const MAX_DATAGRAM: usize = 4096;
/// Pause before the address is tried again: another agent process of this node may be about to end.
const BIND_PAUSE: Duration = Duration::from_millis(500);

/// Serves until it is dropped.
pub async fn serve(inner: &Arc<Inner>) {
    let address = SocketAddr::from((inner.claim.slice.gateway(), PORT));
    let (udp, tcp) = bind(address).await;
    let server = Server {
        inner: Arc::clone(inner),
        upstreams: Upstreams::new(inner.config.upstreams.clone()),
        questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    };
    let server = Arc::new(server);
    tokio::join!(server.clone().serve_udp(Arc::new(udp)), server.serve_tcp(tcp));
}

async fn bind(address: SocketAddr) -> (UdpSocket, TcpListener) {
    let mut told = false;
    loop {
        let both = async { Ok::<_, io::Error>((UdpSocket::bind(address).await?, TcpListener::bind(address).await?)) };
        match both.await {
            Ok(both) => return both,
            Err(error) if !told => {
                tracing::warn!(%address, %error, "names of sandboxes cannot be answered yet: is something else on port 53 of every address?");
                told = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(BIND_PAUSE).await;
    }
}

struct Server {
    inner: Arc<Inner>,
    upstreams: Upstreams,
    questions: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0u8; MAX_DATAGRAM];
        loop {
            // An error here is about an earlier answer that could not be delivered.
            let Ok((count, from)) = socket.recv_from(&mut buffer).await else { continue };
            let Some((question, permit)) = self.admit(from, &buffer[..count]) else { continue };
            let (this, socket) = (Arc::clone(&self), Arc::clone(&socket));
            tokio::spawn(async move {
                if let Some(answer) = this.answer(question, Transport::Udp).await {
                    let _ = socket.send_to(&answer, from).await;
                }
                drop(permit);
            });
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Ok((stream, from)) = listener.accept().await else {
                tokio::time::sleep(BIND_PAUSE).await;
                continue;
            };
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else { continue };
            let this = Arc::clone(&self);
            tokio::spawn(async move {
                // It ends with the sandbox's connection, or when it rests for too long.
                let _ = this.converse(stream, from).await;
                drop(permit);
            });
        }
    }

    async fn converse(&self, mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        loop {
            let length = timeout(IDLE, stream.read_u16()).await??;
            let mut message = vec![0u8; usize::from(length)];
            timeout(IDLE, stream.read_exact(&mut message)).await??;
            let Some((question, _permit)) = self.admit(from, &message) else { return Ok(()) };
            let Some(answer) = self.answer(question, Transport::Tcp).await else { return Ok(()) };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let framed = [&length.to_be_bytes(), answer.as_slice()].concat();
            timeout(IDLE, stream.write_all(&framed)).await??;
        }
    }

    /// What a sandbox asks, where it makes sense and there is room for it.
    fn admit(&self, from: SocketAddr, message: &[u8]) -> Option<(Asked, OwnedSemaphorePermit)> {
        let IpAddr::V4(by) = from.ip() else { return None };
        let question = Question::parse(message)?;
        let permit = Arc::clone(&self.questions).try_acquire_owned().ok()?;
        Some((Asked { by, question, message: message.to_vec() }, permit))
    }

    /// `None`: no sandbox asks.
    async fn answer(&self, asked: Asked, transport: Transport) -> Option<Vec<u8>> {
        let Asked { by, question, message } = asked;
        let egress = self.inner.policy_of(by)?;
        let ports = match decide::decide(&question, &egress) {
            Decision::Answer(answer) => return answer,
            Decision::Ask { ports } => ports,
        };
        let Some(answer) = self.upstreams.ask(&question, &message, transport).await else {
            return question.failure();
        };
        let (found, ttl) = decide::found(&answer, by, &ports);
        if !found.is_empty() {
            let (inner, egress) = (Arc::clone(&self.inner), egress);
            let learn = move || inner.learn(&egress, &found, ttl);
            match tokio::task::spawn_blocking(learn).await.map_err(io::Error::other) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return refuse(&question, &error),
                Err(source) => {
                    return refuse(&question, &NetworkError::Io { what: "allow what a name has".into(), source });
                }
            }
        }
        Some(answer)
    }
}

fn refuse(question: &Question, error: &NetworkError) -> Option<Vec<u8>> {
    tracing::warn!(%error, "a name's addresses could not be allowed");
    question.failure()
}

struct Asked {
    by: Ipv4Addr,
    question: Question,
    message: Vec<u8>,
}
