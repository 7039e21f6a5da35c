//! Channels to Warren's servers, for every client: plain text to loopback, TLS elsewhere.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// How long a connection attempt may take. A dead host on a local network shows within this.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// HTTP/2 keep-alive: a silent peer is given up after interval + timeout.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Files of a client's TLS identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file of the authorities that servers' certificates are checked against.
    pub ca: Option<PathBuf>,
    /// PEM files of the client's own certificate and key.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// Why no channel can be made.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("{address} cannot be connected to: {source}")]
    Unreachable { address: String, source: tonic::transport::Error },
    #[error("`{address}` is not an address: expected `host:port`")]
    Address { address: String },
    #[error("plain text is allowed to loopback addresses only, and `{address}` is none: give a CA file (TLS)")]
    PlainTextNotLoopback { address: String },
    #[error("read TLS file {path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("a client certificate needs both its certificate file and its key file")]
    HalfIdentity,
    #[error("TLS configuration for {address}: {source}")]
    Tls { address: String, source: tonic::transport::Error },
}

/// Client TLS settings, read from files once.
#[derive(Debug, Clone, Default)]
pub struct ClientTls {
    config: Option<ClientTlsConfig>,
}

impl ClientTls {
    /// Reads the files. Without a CA file there is no TLS.
    pub fn load(files: &TlsFiles) -> Result<Self, ChannelError> {
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|source| ChannelError::File { path: path.clone(), source });
        let Some(ca) = &files.ca else { return Ok(Self::default()) };
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        config = match (&files.certificate, &files.key) {
            (Some(certificate), Some(key)) => config.identity(Identity::from_pem(read(certificate)?, read(key)?)),
            (None, None) => config,
            _ => return Err(ChannelError::HalfIdentity),
        };
        Ok(Self { config: Some(config) })
    }

    pub fn enabled(&self) -> bool {
        self.config.is_some()
    }
}

/// A channel to `host:port` that connects when first used, and again after a break.
pub fn channel(address: &str, tls: &ClientTls) -> Result<Channel, ChannelError> {
    Ok(endpoint(address, tls)?.connect_with_connector_lazy(connector()))
}

/// A channel to `host:port` that stands.
pub async fn connected(address: &str, tls: &ClientTls) -> Result<Channel, ChannelError> {
    let endpoint = endpoint(address, tls)?;
    endpoint
        .connect_with_connector(connector())
        .await
        .map_err(|source| ChannelError::Unreachable { address: address.to_owned(), source })
}

/// Given explicitly, so that [`CONNECT_TIMEOUT`] counts for TLS too: with its own connector tonic bounds TCP alone, and a
/// process that is stopped, or has not begun to serve, takes connections and never shakes hands.
fn connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    // Less than for all of it, so that a dead host is told as one that was never connected to.
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT * 3 / 4));
    connector
}

fn endpoint(address: &str, tls: &ClientTls) -> Result<Endpoint, ChannelError> {
    let invalid = || ChannelError::Address { address: address.to_owned() };
    let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(invalid());
    }
    let scheme = if tls.enabled() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
        .map_err(|_| invalid())?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    match &tls.config {
        Some(config) => endpoint
            .tls_config(config.clone())
            .map_err(|source| ChannelError::Tls { address: address.to_owned(), source }),
        None if is_loopback(host) => Ok(endpoint),
        None => Err(ChannelError::PlainTextNotLoopback { address: address.to_owned() }),
    }
}

/// Whether `host` (a name or an address, IPv6 in brackets or bare) is this machine itself.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_leaves_the_machine_never() {
        let plain = ClientTls::default();
        for good in ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.9.9.9:80"] {
            assert!(endpoint(good, &plain).is_ok(), "{good}");
        }
        assert!(matches!(endpoint("10.0.0.1:1", &plain), Err(ChannelError::PlainTextNotLoopback { .. })));
        for bad in ["", "127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:99999"] {
            assert!(matches!(endpoint(bad, &plain), Err(ChannelError::Address { .. })), "{bad}");
        }
    }
}
