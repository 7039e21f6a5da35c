//! Enters a running group: asks its replicas, again and again, until the leader has taken this one in.

use std::time::Duration;

use anyhow::{Context, bail};
use tracing::{info, warn};
use warren_proto::client::{self, ClientTls};
use warren_proto::error::reason_of;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::{ErrorReason, JoinReplicaRequest};

use crate::config::Config;
use crate::raft::Replica;

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(15);

const PAUSE: Duration = Duration::from_secs(1);

/// Rounds over all addresses: five minutes of a group without a leader.
const ROUNDS: usize = 300;

/// Returns once the group has taken this replica in. Without `join` and `initial_members` there is nothing to do but to wait for
/// somebody to add it.
pub async fn ask(config: &Config, tls: &ClientTls, replica: &Replica) -> anyhow::Result<()> {
    if config.join.is_empty() {
        if config.initial_members.is_empty() {
            warn!("in no group yet: start it with --join, or add it with `warrenctl server join`");
        }
        return Ok(());
    }
    let request = JoinReplicaRequest {
        replica_id: config.replica_id.0,
        api_address: config.api_advertise.clone(),
        peer_address: config.peer_advertise.clone(),
        standby: config.standby,
        itself: true,
    };
    for _ in 0..ROUNDS {
        for address in &config.join {
            // An earlier request was heard, and its answer lost.
            if replica.is_member() {
                return Ok(());
            }
            match ask_one(address, tls, &request).await {
                Ok(()) => {
                    info!(by = %address, "joined the group");
                    return Ok(());
                }
                Err(status)
                    if matches!(reason_of(&status), Some(ErrorReason::Membership | ErrorReason::InvalidField))
                        && status.code() != tonic::Code::Unavailable =>
                {
                    bail!("join: {}", status.message());
                }
                Err(status) => warn!(%address, reason = status.message(), "not joined yet"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    bail!("join: none of {} took this replica in", config.join.join(", "))
}

async fn ask_one(address: &str, tls: &ClientTls, request: &JoinReplicaRequest) -> Result<(), tonic::Status> {
    let channel = client::channel(address, tls).with_context(|| format!("join: {address}"));
    let channel = channel.map_err(|error| tonic::Status::unavailable(format!("{error:#}")))?;
    let mut call = tonic::Request::new(request.clone());
    call.set_timeout(TIMEOUT);
    ClusterServiceClient::new(channel).join_replica(call).await.map(drop)
}
