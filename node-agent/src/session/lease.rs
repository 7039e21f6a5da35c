//! Says when the lease lapses, also while no session is there to notice. What becomes of sandboxes is the fence's doing.

use std::sync::Arc;

use metrics::counter;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Counters, Membership};
use crate::clock::BootInstant;
use crate::metrics::LEASE_LAPSES;

/// Runs until `stop`.
pub async fn watch(membership: Membership, counters: Arc<Counters>, stop: CancellationToken) {
    let mut lapsed = None;
    loop {
        let until = membership.lease_until().filter(|until| lapsed != Some(*until));
        let left = until.map(|until| until.since(BootInstant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            lapsed = until;
            counter!(LEASE_LAPSES).increment(1);
            counters.lapsed();
            tracing::warn!(
                "the lease lapsed: no leader renewed it in time; sandboxes run on, except those that freeze at isolation"
            );
            continue;
        }
        let expiry = async {
            match left {
                Some(left) => sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = membership.lease_moved() => {}
            () = expiry => {}
        }
    }
}
