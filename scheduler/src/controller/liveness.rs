//! Whose lease runs until when. Only in the leader's memory: renewals never go through the log, lapses do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use warren_proto::ids::NodeId;

/// Deadlines by node, and nodes by deadline.
#[derive(Debug, Default)]
pub struct Liveness {
    deadlines: BTreeMap<NodeId, Instant>,
    by_deadline: BTreeSet<(Instant, NodeId)>,
}

impl Liveness {
    /// The node's lease runs until `deadline`, unless it runs longer already.
    pub fn renew(&mut self, node: &NodeId, deadline: Instant) {
        let current = self.deadlines.get(node).copied();
        if current.is_some_and(|current| current >= deadline) {
            return;
        }
        if let Some(current) = current {
            self.by_deadline.remove(&(current, node.clone()));
        }
        self.deadlines.insert(node.clone(), deadline);
        self.by_deadline.insert((deadline, node.clone()));
    }

    /// Starts a term: every node is given until `deadline`, whatever an earlier term knew.
    pub fn begin_term(&mut self, nodes: impl Iterator<Item = NodeId>, deadline: Instant) {
        *self = Self::default();
        for node in nodes {
            self.renew(&node, deadline);
        }
    }

    /// Takes out the nodes whose lease has lapsed at `now`, at most `limit`.
    pub fn take_lapsed(&mut self, now: Instant, limit: usize) -> Vec<NodeId> {
        let lapsed: Vec<NodeId> =
            self.by_deadline.iter().take_while(|(at, _)| *at <= now).take(limit).map(|(_, id)| id.clone()).collect();
        for node in &lapsed {
            if let Some(at) = self.deadlines.remove(node) {
                self.by_deadline.remove(&(at, node.clone()));
            }
        }
        lapsed
    }

    /// When the next lease lapses.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_renewed_lease_does_not_lapse_and_a_late_answer_does_not_shorten_it() {
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        let node = |id| NodeId::parse(id).unwrap();
        let mut liveness = Liveness::default();
        liveness.begin_term([node("a"), node("b")].into_iter(), at(10));
        liveness.renew(&node("a"), at(20));
        liveness.renew(&node("a"), at(15));
        assert_eq!(liveness.next_deadline(), Some(at(10)));
        assert_eq!(liveness.take_lapsed(at(10), 100), vec![node("b")]);
        assert_eq!(liveness.take_lapsed(at(19), 100), vec![]);
        assert_eq!(liveness.take_lapsed(at(20), 100), vec![node("a")]);
        assert_eq!(liveness.next_deadline(), None);
    }
}
