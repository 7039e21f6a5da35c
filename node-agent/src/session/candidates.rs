//! PURE: which scheduler to try next: those configured and those that a leader named, in turn; the leader that a follower
//! named before them.

/// Learnt addresses that are kept: more replicas than any region has.
const MAX_LEARNT: usize = 16;

/// Redirects that are followed in a row: replicas that name each other must not make the agent spin.
const MAX_REDIRECTS: u32 = 3;

/// The order of attempts. Holds at least one address.
#[derive(Debug, Clone)]
pub struct Candidates {
    configured: Vec<String>,
    learnt: Vec<String>,
    cursor: usize,
    hint: Option<String>,
    redirects: u32,
}

impl Candidates {
    /// `configured` is not empty (checked with the configuration).
    pub fn new(configured: Vec<String>) -> Self {
        Self { configured, learnt: Vec::new(), cursor: 0, hint: None, redirects: 0 }
    }

    /// The address to try now.
    pub fn next_address(&mut self) -> String {
        if let Some(leader) = self.hint.take() {
            return leader;
        }
        let all = self.all();
        let address = all.get(self.cursor % all.len()).map(|address| (*address).to_owned()).unwrap_or_default();
        self.cursor = (self.cursor + 1) % all.len();
        address
    }

    /// Tries `leader` next; `false` after too many redirects in a row.
    pub fn redirect(&mut self, leader: &str) -> bool {
        self.redirects += 1;
        if self.redirects > MAX_REDIRECTS {
            self.redirects = 0;
            return false;
        }
        self.hint = Some(leader.to_owned());
        true
    }

    /// A leader took the node: its list of replicas replaces the earlier one.
    pub fn welcomed(&mut self, learnt: &[String]) {
        self.learnt =
            learnt.iter().filter(|address| !self.configured.contains(address)).take(MAX_LEARNT).cloned().collect();
        self.redirects = 0;
    }

    /// Every address has had its try since the last pause.
    pub fn round_is_over(&self) -> bool {
        self.hint.is_none() && self.cursor == 0
    }

    fn all(&self) -> Vec<&str> {
        self.configured.iter().chain(&self.learnt).map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates() -> Candidates {
        Candidates::new(vec!["a:1".into(), "b:1".into()])
    }

    #[test]
    fn each_has_its_turn_and_then_the_round_is_over() {
        let mut candidates = candidates();
        assert_eq!(candidates.next_address(), "a:1");
        assert!(!candidates.round_is_over());
        assert_eq!(candidates.next_address(), "b:1");
        assert!(candidates.round_is_over());
        assert_eq!(candidates.next_address(), "a:1");
    }

    #[test]
    fn the_named_leader_comes_first_but_not_for_ever() {
        let mut candidates = candidates();
        assert_eq!(candidates.next_address(), "a:1");
        for _ in 0..MAX_REDIRECTS {
            assert!(candidates.redirect("c:1"));
            assert_eq!(candidates.next_address(), "c:1");
        }
        assert!(!candidates.redirect("c:1"));
        assert_eq!(candidates.next_address(), "b:1");
        candidates.welcomed(&[]);
        assert!(candidates.redirect("c:1"));
    }

    #[test]
    fn what_a_leader_names_is_tried_too() {
        let mut candidates = candidates();
        candidates.welcomed(&["b:1".into(), "c:1".into()]);
        let round: Vec<String> = (0..3).map(|_| candidates.next_address()).collect();
        assert_eq!(round, ["a:1", "b:1", "c:1"]);
        candidates.welcomed(&[]);
        let round: Vec<String> = (0..2).map(|_| candidates.next_address()).collect();
        assert_eq!(round, ["a:1", "b:1"]);
    }
}
