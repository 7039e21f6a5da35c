//! An instance's place on the node's network, and what it may reach.
//!
//! The policy is in the record as it was at the start, and in a file of its own once it was changed: the file is written
//! before the rules are, so that whatever an agent dies of, the next one makes the rules what was last asked for.

use std::path::Path;

use super::kind::Kind;
use super::layout::{self, Layout};
use super::record::{EgressRecord, Record};
use super::{NetworkOptions, OciDriver, blocking, host, io_error};
use crate::driver::{DriverError, InstanceKey, InstanceSpec};
use crate::network::egress::Egress;
use crate::network::inside::Assigned;
use crate::network::{Member, Network, NetworkConfig, NetworkError, NetworkStats};

/// The node's network, or why there is none: then sandboxes have loopback only, and one that may reach anything is refused.
pub(super) type Connections = Result<Network, String>;

/// Opens the node's network for the instances that are here.
pub(super) fn open(layout: &Layout, options: NetworkOptions, here: &[InstanceKey]) -> Connections {
    let members = here.iter().filter_map(|key| member(&layout.instance(key))).collect();
    let config = NetworkConfig {
        root: layout::SHORT_ROOT.into(),
        short: layout.short.clone(),
        hash: layout.short_name(),
        range: options.range,
        upstreams: options.upstreams,
    };
    let opened = host::locked(|| Ok(Network::open(config, members)));
    let opened = opened.map_err(|e| e.to_string()).and_then(|opened| opened.map_err(|e| e.to_string()));
    match &opened {
        Ok(network) => tracing::info!(addresses = %network.slice(), "sandboxes have a network"),
        Err(why) => {
            tracing::warn!(%why, "sandboxes have no network: one whose egress is not NONE cannot be started here");
        }
    }
    opened
}

fn member(directory: &Path) -> Option<Member> {
    let record = Record::read(directory).ok()?;
    let assigned = record.network?;
    // A policy that cannot be read allows nothing.
    let egress = match EgressRecord::read(directory) {
        Ok(changed) => changed.unwrap_or(record.egress),
        Err(_) => Egress::None,
    };
    Some((record.container_id, assigned, egress))
}

impl OciDriver {
    /// What an instance that is to start has of the network; `None`: loopback only, which is all that it asked for.
    pub(super) async fn connect(&self, spec: &InstanceSpec, kind: Kind) -> Result<Option<Assigned>, DriverError> {
        let why = match &self.network {
            Ok(_) if !kind.joins_network() => "its runtime has no network but loopback: ask for runc or crun",
            Ok(network) => {
                let joined = network.join(&layout::container_id(&spec.key), &spec.egress).await;
                return joined.map(Some).map_err(refused("connect the sandbox"));
            }
            Err(why) => why,
        };
        match spec.egress {
            Egress::None => Ok(None),
            _ => Err(DriverError::Runtime {
                what: "this node cannot let the sandbox reach anything".to_owned(),
                output: why.to_owned(),
            }),
        }
    }

    /// Takes all of an instance off the network. Nothing of it may run any more.
    pub(super) async fn disconnect(&self, container_id: &str) -> Result<(), DriverError> {
        let Ok(network) = &self.network else { return Ok(()) };
        network.leave(container_id).await.map_err(refused("disconnect the sandbox"))
    }

    pub(super) async fn change_egress(&self, key: &InstanceKey, egress: &Egress) -> Result<(), DriverError> {
        let no_network = |_| DriverError::Unsupported { driver: super::NAME, what: "change what a sandbox may reach" };
        let network = self.network.as_ref().map_err(no_network)?;
        let directory = self.layout.instance(key);
        let record = EgressRecord::new(egress.clone());
        blocking("write down what the sandbox may reach", move || record.write(&directory)).await?;
        network.set_egress(&layout::container_id(key), egress).await.map_err(refused("change what it may reach"))
    }

    pub(super) async fn traffic(&self, key: &InstanceKey) -> Result<NetworkStats, DriverError> {
        let no_network = |_| DriverError::Unsupported { driver: super::NAME, what: "count packets" };
        let network = self.network.as_ref().map_err(no_network)?;
        network.stats(&layout::container_id(key)).await.map_err(refused("count the sandbox's packets"))
    }

    /// Takes the node's network off the host.
    pub(super) fn clean_network(&self) -> Result<(), DriverError> {
        let Ok(network) = &self.network else { return Ok(()) };
        let cleaned = host::locked(|| Ok(network.clean())).map_err(io_error("lock the directory of short paths"))?;
        cleaned.map_err(refused("take the network off the host"))
    }
}

fn refused(what: &'static str) -> impl FnOnce(NetworkError) -> DriverError {
    move |error| DriverError::Runtime { what: what.to_owned(), output: error.to_string() }
}
