//! What the rest of the agent may know of the session: whether the node is registered, its lease, its ledger and the keys
//! that sign tokens. Keys and ledger outlive a session: clients are served while the schedulers are away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ed25519_dalek::VerifyingKey;
use tokio::sync::Notify;
use warren_proto::v1::TokenKeys;

use crate::clock::BootInstant;

/// Shared by the session, which writes, and the data plane and the probes, which read.
#[derive(Debug, Clone, Default)]
pub struct Membership(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    lease_moved: Notify,
}

#[derive(Debug, Default)]
struct State {
    registered: bool,
    lease_until: Option<BootInstant>,
    ledger_id: Option<String>,
    keys: Arc<BTreeMap<u64, VerifyingKey>>,
}

/// A leader sent a key that is none.
#[derive(Debug, thiserror::Error)]
#[error("token key {0} is not an Ed25519 public key")]
pub struct BadKey(pub u64);

impl Membership {
    pub fn new(ledger_id: Option<String>) -> Self {
        let state = State { ledger_id, ..State::default() };
        Self(Arc::new(Inner { state: Mutex::new(state), lease_moved: Notify::new() }))
    }

    pub fn ledger_id(&self) -> Option<String> {
        self.state().ledger_id.clone()
    }

    pub fn keys(&self) -> Arc<BTreeMap<u64, VerifyingKey>> {
        Arc::clone(&self.state().keys)
    }

    pub fn is_registered(&self) -> bool {
        self.state().registered
    }

    /// `None`: it lapsed, or there never was one.
    pub fn lease_remaining(&self, now: BootInstant) -> Option<Duration> {
        self.lease_until().map(|until| until.since(now)).filter(|left| !left.is_zero())
    }

    /// Whether a lease that still ran at `moment` is over at `now`.
    pub(super) fn lapsed_since(&self, moment: BootInstant, now: BootInstant) -> bool {
        self.lease_until().is_some_and(|until| moment < until && until <= now)
    }

    pub(super) fn lease_until(&self) -> Option<BootInstant> {
        self.state().lease_until
    }

    pub(super) async fn lease_moved(&self) {
        self.0.lease_moved.notified().await;
    }

    pub(super) fn register(&self, ledger_id: &str) {
        let mut state = self.state();
        state.ledger_id = Some(ledger_id.to_owned());
        state.registered = true;
    }

    pub(super) fn unregister(&self) {
        self.state().registered = false;
    }

    /// A lease only ever moves forward.
    pub(super) fn extend_lease(&self, until: BootInstant) {
        let mut state = self.state();
        if state.lease_until.is_none_or(|have| have < until) {
            state.lease_until = Some(until);
            drop(state);
            self.0.lease_moved.notify_one();
        }
    }

    pub(super) fn replace_keys(&self, wire: &TokenKeys) -> Result<(), BadKey> {
        let parse = |key: &warren_proto::v1::TokenKey| {
            let bytes: [u8; 32] = key.public_key.as_slice().try_into().map_err(|_| BadKey(key.key_id))?;
            Ok((key.key_id, VerifyingKey::from_bytes(&bytes).map_err(|_| BadKey(key.key_id))?))
        };
        let keys = wire.keys.iter().map(parse).collect::<Result<BTreeMap<_, _>, _>>()?;
        self.state().keys = Arc::new(keys);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_moves_forward_only_and_runs_out() {
        let membership = Membership::new(None);
        let at = |seconds| BootInstant(Duration::from_secs(seconds));
        assert_eq!(membership.lease_remaining(at(0)), None);
        membership.extend_lease(at(10));
        membership.extend_lease(at(5));
        assert_eq!(membership.lease_remaining(at(4)), Some(Duration::from_secs(6)));
        assert_eq!(membership.lease_remaining(at(10)), None);
        assert!(membership.lapsed_since(at(9), at(10)));
        assert!(!membership.lapsed_since(at(10), at(11)) && !membership.lapsed_since(at(9), at(9)));
    }
}
