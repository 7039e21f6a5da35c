//! A hash of the state, kept as it changes: replicas that have applied the same entries have the same one.
//!
//! It is the sum, modulo 2^128, of a hash of every entity's stored bytes. A sum does not depend on the order, so a change costs
//! what changed: the old entity's hash goes, the new one's comes. Stored bytes leave defaults out, so two builds agree as long
//! as they hold the same facts. What is derived (indexes, a node's list of sandboxes) and the ring of events are left out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use prost::Message;
use sha2::{Digest, Sha256};
use warren_proto::ids::{NodeId, SandboxName, TemplateId, TenantId};
use warren_proto::v1 as pb;

use super::codec::entity::{replica_to, tenant_to};
use super::codec::region::region_to;
use crate::state::State;
use crate::state::event::Position;
use crate::state::node::Node;
use crate::state::request::{Answer, Scope};
use crate::state::sandbox::Sandbox;
use crate::state::template::Template;
use crate::state::tenant::Tenant;

/// Every replica takes the hash at the indexes that this divides, however it batches; so there are indexes to compare at.
pub(super) const EVERY: u64 = 256;

/// Hashes that are kept for comparison.
const KEPT: usize = 64;

/// What kind of thing bytes are of: equal bytes of different kinds have different hashes.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Head,
    Replica,
    Node,
    Template,
    Tenant,
    Sandbox,
    Answer,
}

fn hash(kind: Kind, bytes: &[u8]) -> u128 {
    let digest = Sha256::new().chain_update([kind as u8]).chain_update(bytes).finalize();
    digest.iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// The hash of one state, without its head, and the state that it is of.
#[derive(Debug, Default)]
pub(super) struct Hasher {
    sum: u128,
    of: State,
}

impl Hasher {
    /// Brings the hash up to date with `state`, and answers it.
    pub fn update(&mut self, state: &State) -> u128 {
        self.nodes(&state.nodes);
        self.templates(&state.templates);
        self.tenants(&state.tenants);
        self.sandboxes(&state.sandboxes);
        self.answers(state);
        self.of = state.clone();
        let replicas = state.replicas.iter();
        let replicas = replicas.map(|(id, record)| hash(Kind::Replica, &replica_to(*id, record).encode_to_vec()));
        replicas.fold(self.sum, u128::wrapping_add).wrapping_add(head(state))
    }

    fn change(&mut self, old: Option<u128>, new: Option<u128>) {
        self.sum = self.sum.wrapping_sub(old.unwrap_or(0)).wrapping_add(new.unwrap_or(0));
    }

    fn diff<K: Ord + Clone, V: PartialEq + Clone>(
        &mut self,
        old: &OrdMap<K, V>,
        new: &OrdMap<K, V>,
        of: impl Fn(&K, &V) -> u128,
    ) {
        for change in old.diff(new) {
            match change {
                DiffItem::Add(key, value) => self.change(None, Some(of(key, value))),
                DiffItem::Remove(key, value) => self.change(Some(of(key, value)), None),
                DiffItem::Update { old: (key, before), new: (_, after) } => {
                    self.change(Some(of(key, before)), Some(of(key, after)));
                }
            }
        }
    }

    fn nodes(&mut self, new: &OrdMap<NodeId, Arc<Node>>) {
        let old = self.of.nodes.clone();
        self.diff(&old, new, |_, node| {
            let own = Node { sandboxes: imbl::OrdSet::new(), ..Node::clone(node) };
            hash(Kind::Node, &pb::StoredNode::from(&own).encode_to_vec())
        });
    }

    fn templates(&mut self, new: &OrdMap<TemplateId, Arc<Template>>) {
        let old = self.of.templates.clone();
        self.diff(&old, new, |_, template| {
            hash(Kind::Template, &pb::StoredTemplate::from(template.as_ref()).encode_to_vec())
        });
    }

    fn tenants(&mut self, new: &OrdMap<TenantId, Tenant>) {
        let old = self.of.tenants.clone();
        self.diff(&old, new, |id, tenant| hash(Kind::Tenant, &tenant_to(id, tenant).encode_to_vec()));
    }

    fn sandboxes(&mut self, new: &OrdMap<SandboxName, Arc<Sandbox>>) {
        let old = self.of.sandboxes.clone();
        self.diff(&old, new, |_, sandbox| {
            hash(Kind::Sandbox, &pb::StoredSandbox::from(sandbox.as_ref()).encode_to_vec())
        });
    }

    /// Which ids are known, with what payload and until when: what they answer is in the log.
    fn answers(&mut self, state: &State) {
        let old = self.of.requests.answers().clone();
        self.diff(&old, state.requests.answers(), |key: &(Scope, u128), answer: &Arc<Answer>| {
            let tenant = key.0.tenant.as_ref().map(ToString::to_string).unwrap_or_default();
            let id = key.1.to_be_bytes();
            let expires = answer.expires.0.to_be_bytes();
            hash(Kind::Answer, &[tenant.as_bytes(), &[0], &id, &answer.payload, &expires].concat())
        });
    }
}

/// What the ledger has beside its entities.
fn head(state: &State) -> u128 {
    let region = region_to(state, Position::default());
    let ledger = state.ledger_id.unwrap_or_default().0.to_be_bytes();
    let numbers = [state.log_time.0.to_be_bytes(), state.epoch_floor.0.to_be_bytes()].concat();
    hash(Kind::Head, &[&ledger[..], &numbers, &region.encode_to_vec()].concat())
}

/// The hashes that a replica has taken, newest last. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Hashes(Arc<Mutex<VecDeque<(u64, u128)>>>);

impl Hashes {
    pub(super) fn put(&self, index: u64, hash: u128) {
        let mut hashes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Between two comparable ones only the newest is worth keeping.
        if hashes.back().is_some_and(|(last, _)| last % EVERY != 0 || *last == index) {
            hashes.pop_back();
        }
        hashes.push_back((index, hash));
        if hashes.len() > KEPT {
            hashes.pop_front();
        }
    }

    pub fn all(&self) -> Vec<(u64, u128)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{Body, Caller, Command, Decision, LogTime};
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn apply(state: &mut State, body: Body) {
        let index = state.revision + 1;
        let command = Command { caller: Caller::system("test"), time: LogTime(index), body };
        let _outcome = state.apply(index, &command);
    }

    #[test]
    fn a_hash_kept_by_changes_is_the_hash_made_anew_and_returns_with_the_state() {
        let mut state = with_node_and_template("a", resources(1000, 1000));
        let mut kept = Hasher::default();
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..20 {
            let decision = Decision::Place(node("a").into());
            let create = Body::CreateSandbox {
                sandbox: name(&format!("s{n}")),
                spec: spec(100, 10).into(),
                decision,
                request: None,
            };
            apply(&mut state, create);
            if n % 3 == 0 {
                apply(&mut state, Body::DeleteSandbox { sandbox: name(&format!("s{n}")), request: None });
            }
            let hash = kept.update(&state);
            assert_eq!(hash, Hasher::default().update(&state), "after create {n}");
            assert!(seen.insert(hash), "each state has a hash of its own");
        }
    }
}
