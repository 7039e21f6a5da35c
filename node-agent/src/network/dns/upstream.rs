//! Asks the resolvers that the host uses, one after another, until one answers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::MAX_DATAGRAM;
use super::decide::Question;

/// Where hosts say who resolves names for them.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Resolvers that are asked: as many as hosts' own libraries ask.
const MAX_UPSTREAMS: usize = 3;
/// For one resolver; programs inside ask again after 3 s.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who is asked.
#[derive(Debug)]
pub struct Upstreams(Vec<SocketAddr>);

/// How a sandbox asked, and so how the resolver is asked: an answer that is too long for the one comes by the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

impl Upstreams {
    /// None configured: those of the host, which may change.
    pub fn new(configured: Vec<SocketAddr>) -> Self {
        Self(configured)
    }

    /// The answer of the first that gives one.
    pub async fn ask(&self, question: &Question, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        for upstream in self.current().into_iter().take(MAX_UPSTREAMS) {
            let asked = async {
                match transport {
                    Transport::Udp => by_udp(upstream, question, message).await,
                    Transport::Tcp => by_tcp(upstream, message).await,
                }
            };
            match timeout(PATIENCE, asked).await {
                Ok(Ok(answer)) if question.is_answered_by(&answer) => return Some(answer),
                Ok(Ok(_)) => tracing::debug!(%upstream, "a resolver answered something else"),
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "a resolver cannot be asked"),
                Err(_) => tracing::debug!(%upstream, "a resolver does not answer"),
            }
        }
        None
    }

    fn current(&self) -> Vec<SocketAddr> {
        if self.0.is_empty() {
            parse(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
        } else {
            self.0.clone()
        }
    }
}

/// The resolvers that a file in the format of `resolv.conf(5)` names.
fn parse(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
    };
    text.lines().filter_map(address).map(|address| SocketAddr::new(address, super::PORT)).collect()
}

/// From a port of its own for each question, so that nobody can guess where the answer is waited for.
async fn by_udp(upstream: SocketAddr, question: &Question, message: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if upstream.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(message).await?;
    let mut buffer = vec![0u8; MAX_DATAGRAM];
    loop {
        let count = socket.recv(&mut buffer).await?;
        if question.is_answered_by(&buffer[..count]) {
            return Ok(buffer[..count].to_vec());
        }
    }
}

async fn by_tcp(upstream: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await?;
    let mut answer = vec![0u8; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_s_resolvers_are_read() {
        let text = "# x\nsearch a.example\nnameserver 10.0.0.53\nnameserver fd00::53 # y\nnameserver\noptions rotate\n";
        assert_eq!(parse(text), ["10.0.0.53:53", "[fd00::53]:53"].map(|a| a.parse().expect("an address")));
    }
}
