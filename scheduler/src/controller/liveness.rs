//! Whose lease runs until when. Only in the leader's memory: renewals never go through the log, lapses do.
//!
//! A node that is silent past its lease is suspected; past the grace that follows it is to be declared down. From that verdict
//! until the ledger has settled it, renewals of that node are refused: a grant could otherwise cross the declaration, and the
//! node would run on what is being placed elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use warren_proto::ids::NodeId;

use crate::plan::liveness::Verdict;
use crate::state::node::Condition;

/// A node's next deadline.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    /// What follows when it passes.
    verdict: Condition,
}

/// Deadlines by node, and nodes by deadline.
#[derive(Debug, Default)]
pub struct Liveness {
    deadlines: BTreeMap<NodeId, Deadline>,
    by_deadline: BTreeSet<(Instant, NodeId)>,
    /// Being declared down.
    going_down: BTreeSet<NodeId>,
    /// From the lapse of a lease to the verdict that the node is down.
    grace: Duration,
}

impl Liveness {
    /// The node's lease runs until `until`, unless it runs longer already. `false`, and no lease, while it is being declared
    /// down.
    pub fn renew(&mut self, node: &NodeId, until: Instant) -> bool {
        if self.going_down.contains(node) {
            return false;
        }
        let current = self.deadlines.get(node).copied();
        if current.is_none_or(|current| current.verdict == Condition::Down || current.at < until) {
            self.arm(node, Deadline { at: until, verdict: Condition::Suspect });
        }
        true
    }

    /// Judges the node at `until`, unless it is watched already: a node may say hello and never be heard of again.
    pub fn watch(&mut self, node: &NodeId, until: Instant) {
        if !self.deadlines.contains_key(node) && !self.going_down.contains(node) {
            self.arm(node, Deadline { at: until, verdict: Condition::Suspect });
        }
    }

    fn arm(&mut self, node: &NodeId, deadline: Deadline) {
        if let Some(old) = self.deadlines.insert(node.clone(), deadline) {
            self.by_deadline.remove(&(old.at, node.clone()));
        }
        self.by_deadline.insert((deadline.at, node.clone()));
    }

    fn disarm(&mut self, node: &NodeId) {
        if let Some(old) = self.deadlines.remove(node) {
            self.by_deadline.remove(&(old.at, node.clone()));
        }
    }

    /// Starts a term: no node is judged before `until`, whatever an earlier term knew; renewals that came before this call
    /// count.
    pub fn begin_term(&mut self, nodes: impl Iterator<Item = (NodeId, Condition)>, until: Instant, grace: Duration) {
        self.grace = grace;
        self.going_down.clear();
        for (node, condition) in nodes {
            match condition {
                Condition::Ready => drop(self.renew(&node, until)),
                Condition::Suspect if !self.deadlines.contains_key(&node) => {
                    self.arm(&node, Deadline { at: until, verdict: Condition::Down });
                }
                Condition::Suspect | Condition::Down => {}
            }
        }
    }

    /// Ends a term: what was heard in it counts for nothing in the next.
    pub fn end_term(&mut self) {
        *self = Self::default();
    }

    /// Judges the nodes whose deadline has passed at `now`, at most `limit`. Those that are to be down get no lease until
    /// [`settled`](Self::settled).
    pub fn judge(&mut self, now: Instant, limit: usize) -> Vec<Verdict> {
        let passed: Vec<NodeId> =
            self.by_deadline.iter().take_while(|(at, _)| *at <= now).take(limit).map(|(_, id)| id.clone()).collect();
        passed.into_iter().map(|node| self.pass(node)).collect()
    }

    fn pass(&mut self, node: NodeId) -> Verdict {
        let deadline = self.deadlines.get(&node).copied();
        let condition = deadline.map_or(Condition::Suspect, |deadline| deadline.verdict);
        match deadline {
            Some(Deadline { at, verdict: Condition::Suspect }) => {
                self.arm(&node, Deadline { at: at + self.grace, verdict: Condition::Down });
            }
            _ => {
                self.disarm(&node);
                self.going_down.insert(node.clone());
            }
        }
        Verdict { node, condition }
    }

    /// What came of a verdict: where the ledger does not say that the node is down, it is judged again at `again`.
    pub fn settled(&mut self, verdict: &Verdict, committed: bool, again: Instant) {
        let was_going = self.going_down.remove(&verdict.node);
        if !committed && (was_going || verdict.condition == Condition::Suspect) {
            let current = self.deadlines.get(&verdict.node).copied();
            if current.is_none_or(|current| current.verdict == Condition::Down) {
                self.arm(&verdict.node, Deadline { at: again, verdict: verdict.condition });
            }
        }
    }

    /// How many nodes are watched.
    pub fn len(&self) -> usize {
        self.deadlines.len()
    }

    pub fn is_empty(&self) -> bool {
        self.deadlines.is_empty()
    }

    /// When the next node is judged.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> NodeId {
        NodeId::parse(id).unwrap()
    }

    fn verdicts(liveness: &mut Liveness, now: Instant) -> Vec<(String, Condition)> {
        liveness.judge(now, 100).into_iter().map(|v| (v.node.to_string(), v.condition)).collect()
    }

    #[test]
    fn a_silent_node_is_suspected_then_down_and_a_late_answer_does_not_shorten_a_lease() {
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        let mut liveness = Liveness::default();
        let ready = [(node("a"), Condition::Ready), (node("b"), Condition::Ready)];
        liveness.begin_term(ready.into_iter(), at(10), Duration::from_secs(5));
        assert!(liveness.renew(&node("a"), at(20)) && liveness.renew(&node("a"), at(15)));
        assert_eq!(verdicts(&mut liveness, at(10)), [("b".into(), Condition::Suspect)]);
        assert_eq!(verdicts(&mut liveness, at(14)), []);
        assert_eq!(verdicts(&mut liveness, at(15)), [("b".into(), Condition::Down)]);
        assert_eq!(verdicts(&mut liveness, at(19)), []);
        assert_eq!(verdicts(&mut liveness, at(20)), [("a".into(), Condition::Suspect)]);
    }

    #[test]
    fn a_node_that_is_being_declared_down_gets_no_lease_until_that_is_settled() {
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        let mut liveness = Liveness::default();
        liveness.begin_term([(node("a"), Condition::Suspect)].into_iter(), at(1), Duration::ZERO);
        let verdict = liveness.judge(at(1), 10).remove(0);
        assert!(!liveness.renew(&node("a"), at(9)) && liveness.going_down.contains(&node("a")));
        liveness.settled(&verdict, false, at(2));
        assert!(liveness.renew(&node("a"), at(9)));
        assert_eq!(verdicts(&mut liveness, at(8)), [], "a renewal after it failed counts");
    }

    #[test]
    fn a_renewal_that_a_new_leader_heard_before_its_term_opened_is_kept() {
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        let mut liveness = Liveness::default();
        liveness.renew(&node("a"), at(30));
        liveness.begin_term([(node("a"), Condition::Down)].into_iter(), at(10), Duration::ZERO);
        assert_eq!(liveness.next_deadline(), Some(at(30)));
    }

    #[test]
    fn a_node_that_said_hello_and_is_never_heard_of_again_is_judged() {
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        let mut liveness = Liveness::default();
        liveness.watch(&node("a"), at(3));
        liveness.watch(&node("a"), at(9));
        let verdicts = liveness.judge(at(4), 10);
        assert_eq!(verdicts, [Verdict { node: node("a"), condition: Condition::Suspect }]);
        liveness.renew(&node("b"), at(9));
        liveness.watch(&node("b"), at(3));
        assert_eq!(liveness.judge(at(4), 10).iter().filter(|verdict| verdict.node == node("b")).count(), 0);
    }
}
