//! `sandbox forward`: ports of this machine that lead to ports in a sandbox, wherever it runs.

use std::io;
use std::net::IpAddr;

use clap::Args;
use futures::stream::{self, FuturesUnordered, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use warren_proto::v1::open_port_request::Message as Up;
use warren_proto::v1::open_port_response::Message as Down;
use warren_proto::v1::sandbox_port_service_client::SandboxPortServiceClient;
use warren_proto::v1::{CloseWrite, OpenPortRequest, OpenPortResponse, OpenPortStart};

use super::link::{Again, Agent, Link};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::write;

/// Bytes read at a time from a connection.
const PIECE_BYTES: usize = 64 * 1024;

/// Pieces under way; then the connection waits.
const OUTBOUND: usize = 4;

/// Connections open at once: each costs a descriptor here and a stream there. More wait to be accepted.
const MAX_CONNECTIONS: usize = 512;

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox forward box 8080               port 8080 here to port 8080 in the sandbox
  warrenctl sandbox forward box 8080:80 5432       two of them
  warrenctl sandbox forward box :80                a free port here
  warrenctl sandbox forward --address 0.0.0.0 box 8080:80

Goes on until it is interrupted, also when the sandbox moves.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ForwardArgs {
    /// Address of this machine to listen at
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: IpAddr,
    /// Id or full name of the sandbox
    name: String,
    /// Port in the sandbox, with the port here before it where they differ
    #[arg(value_name = "[LOCAL:]REMOTE", required = true, value_parser = ports)]
    ports: Vec<Ports>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    /// 0: a free one.
    local: u16,
    remote: u16,
}

/// `8080`, `8080:80`, `:80`.
fn ports(text: &str) -> Result<Ports, String> {
    let wrong = || format!("`{text}` is no pair of ports: expected 8080, 8080:80 or :80");
    let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port > 0).ok_or_else(wrong);
    match text.split_once(':') {
        None => port(text).map(|port| Ports { local: port, remote: port }),
        Some(("", remote)) => Ok(Ports { local: 0, remote: port(remote)? }),
        Some((local, remote)) => Ok(Ports { local: port(local)?, remote: port(remote)? }),
    }
}

/// Listens until it is interrupted. The sandbox must be there when this begins.
pub async fn forward(client: &Client, args: ForwardArgs) -> Result<(), Failure> {
    let link = Link::new(client, &args.name);
    link.call(Again::Always, |agent| async move { Ok(agent) }).await?;
    let mut listening = Vec::new();
    for ports in args.ports {
        let what = format!("listen at {}:{}", args.address, ports.local);
        let listener = TcpListener::bind((args.address, ports.local)).await.map_err(Failure::io(what))?;
        let local = listener.local_addr().map_err(Failure::io("listen"))?;
        write(&format!("Forwarding from {local} -> {}\n", ports.remote))?;
        listening.push((listener, ports.remote));
    }
    let mut accepting = stream::select_all(listening.into_iter().map(|(listener, remote)| {
        Box::pin(stream::unfold(listener, move |listener| async move {
            let accepted = listener.accept().await.map(|(connection, _)| connection);
            Some(((accepted, remote), listener))
        }))
    }));
    let mut open = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some((accepted, remote)) = accepting.next(), if open.len() < MAX_CONNECTIONS => match accepted {
                Ok(connection) => open.push(carry(&link, connection, remote)),
                Err(error) => return Err(Failure::io("accept a connection")(error)),
            },
            Some(()) = open.next() => {}
        }
    }
}

/// One connection, until both sides have said all they have to say.
async fn carry(link: &Link<'_>, connection: TcpStream, remote: u16) {
    let (said, hearing) = match link.call(Again::Unanswered, |agent| begin(agent, remote)).await {
        Ok(tunnel) => tunnel,
        // Whoever connected sees a closed connection; why is for the person at the terminal.
        Err(failure) => return eprintln!("port {remote}: {failure}"),
    };
    // Small answers are what people wait for.
    let _slower = connection.set_nodelay(true);
    let (from, to) = connection.into_split();
    // Either may be half closed for long; a failure of one ends both, and the connection with them.
    let _ended = tokio::try_join!(send(from, &said), receive(hearing, to));
}

type Tunnel = (mpsc::Sender<Up>, Streaming<OpenPortResponse>);

async fn begin(agent: Agent, port: u16) -> Result<Tunnel, Failure> {
    let (said, saying) = mpsc::channel(OUTBOUND);
    let first = stream::iter([Up::Open(OpenPortStart { port: port.into() })]);
    let requests = first.chain(ReceiverStream::new(saying)).map(|message| OpenPortRequest { message: Some(message) });
    let request = agent.bearing(requests)?;
    let mut hearing = SandboxPortServiceClient::new(agent.channel).open_port(request).await?.into_inner();
    match hearing.message().await?.and_then(|first| first.message) {
        Some(Down::Opened(_)) => Ok((said, hearing)),
        _ => Err(Failure::Failed("the node agent did not say that the port is open".to_owned())),
    }
}

async fn send(mut from: OwnedReadHalf, said: &mpsc::Sender<Up>) -> io::Result<()> {
    let mut buffer = vec![0u8; PIECE_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        let message = if count == 0 { Up::CloseWrite(CloseWrite {}) } else { Up::Data(buffer[..count].to_vec()) };
        said.send(message).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn receive(mut hearing: Streaming<OpenPortResponse>, mut to: OwnedWriteHalf) -> io::Result<()> {
    while let Some(response) = hearing.message().await.map_err(io::Error::other)? {
        match response.message {
            Some(Down::Data(bytes)) => to.write_all(&bytes).await?,
            Some(Down::CloseWrite(_)) => return to.shutdown().await,
            Some(Down::Opened(_)) | None => {}
        }
    }
    Err(io::ErrorKind::ConnectionReset.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_people_write_them() {
        assert_eq!(ports("8080"), Ok(Ports { local: 8080, remote: 8080 }));
        assert_eq!(ports("8080:80"), Ok(Ports { local: 8080, remote: 80 }));
        assert_eq!(ports(":80"), Ok(Ports { local: 0, remote: 80 }));
        for wrong in ["", "0", "80:", "65536", "a:80", "1:2:3"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
