//! Connections to schedulers, by address. They are kept: after a failover none has to be made first. One set may carry the
//! sessions of several simulated agents.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::transport::Channel;
use warren_proto::client::{self, ChannelError, ClientTls};

/// Addresses that are kept: more than the replicas of a region, with those that they replaced.
const MAX_KEPT: usize = 32;

/// Clones share the connections.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tls: ClientTls,
    channels: Mutex<BTreeMap<String, Channel>>,
}

impl Connections {
    pub fn new(tls: ClientTls) -> Self {
        Self(Arc::new(Inner { tls, channels: Mutex::default() }))
    }

    /// The connection to `address`; it is made when it is first used, and again when it broke.
    pub(super) fn to(&self, address: &str) -> Result<Channel, ChannelError> {
        let mut channels = self.0.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = client::channel(address, &self.0.tls)?;
        if channels.len() >= MAX_KEPT {
            // Sessions under way have their own hold on theirs.
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}
