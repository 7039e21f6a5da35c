//! Until when fenced sandboxes may run: what the fence is told.
//!
//! ```text
//!          renewals granted in time: published at once
//!  open ◀──────────────────────────────────────────────┐
//!   │ the published moment is over (the fence froze)    │
//!   ▼                                                   │ nothing unwanted would run
//!  closed ─▶ a new session ─▶ whole assignment + lease ─┘
//! ```
//! After a lapse the ledger may have moved sandboxes away. So the moment is published again only when a session that was
//! opened after the lapse brought a lease and the whole assignment, and each fenced instance that it does not want is frozen
//! by itself or gone. Where nothing fenced is here or assigned there is nothing to ask. What is published is always the true end of a lease, so writing it late does no harm.

use crate::clock::BootInstant;
use crate::fence::Fence;

/// A lease, and when the session that granted it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Grant {
    until: BootInstant,
    session: BootInstant,
}

/// Open while fenced sandboxes run. Without a fence to tell it is always open.
#[derive(Debug, Default)]
pub(super) struct Gate {
    fence: Option<Fence>,
    published: BootInstant,
    grant: Option<Grant>,
    /// When the session was opened that brought the last whole assignment.
    assigned: Option<BootInstant>,
}

impl Gate {
    pub fn new(fence: Option<Fence>) -> Self {
        let published = fence.as_ref().map(Fence::published).unwrap_or_default();
        Self { fence, published, grant: None, assigned: None }
    }

    pub fn is_closed(&self, now: BootInstant) -> bool {
        self.fence.is_some() && self.published <= now
    }

    /// Whether the last published moment came after a session was opened: once it is over, that session does not do, whichever
    /// agent's lease it was.
    pub fn outlasts(&self, session: BootInstant) -> bool {
        session < self.published
    }

    pub fn leased(&mut self, until: BootInstant, session: BootInstant) {
        self.grant = Some(Grant { until, session });
    }

    pub fn assigned(&mut self, session: BootInstant) {
        self.assigned = Some(session);
    }

    /// Whether the moment of the last grant can be published: `fenced` says whether anything fenced is here or assigned,
    /// `settled` whether nothing unwanted would run.
    pub fn may_extend(&self, now: BootInstant, fenced: impl FnOnce() -> bool, settled: impl FnOnce() -> bool) -> bool {
        let Some(grant) = self.grant.filter(|grant| grant.until > now) else { return false };
        if !self.is_closed(now) || !fenced() {
            return true;
        }
        let after_lapse = |session: BootInstant| session >= self.published;
        after_lapse(grant.session) && self.assigned.is_some_and(after_lapse) && settled()
    }

    /// Publishes the last grant.
    pub fn extend(&mut self) {
        let (Some(fence), Some(grant)) = (&self.fence, self.grant) else { return };
        match fence.publish(grant.until) {
            Ok(()) => {
                self.published = grant.until;
                self.grant = None;
            }
            // The next grant is a new try.
            Err(error) => {
                tracing::error!(%error, "the fence cannot be told of the lease: fenced sandboxes freeze when it ends")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> BootInstant {
        BootInstant(Duration::from_secs(seconds))
    }

    fn gate(published: u64) -> (Gate, tempfile::TempDir) {
        let directory = tempfile::tempdir().expect("directory");
        let fence = Fence::open(directory.path(), Vec::new(), None).expect("fence");
        fence.publish(at(published)).expect("publish");
        (Gate::new(Some(fence)), directory)
    }

    #[test]
    fn a_lease_renewed_in_time_goes_on_without_a_question() {
        let (mut gate, _directory) = gate(10);
        assert!(!gate.may_extend(at(5), || true, || true), "nothing was granted");
        gate.leased(at(15), at(1));
        assert!(gate.may_extend(at(9), || panic!("not asked"), || panic!("not asked")));
        gate.extend();
        assert!(!gate.is_closed(at(14)) && gate.is_closed(at(15)));
    }

    #[test]
    fn after_a_lapse_a_new_session_must_bring_lease_and_assignment_and_all_be_settled() {
        let (mut gate, _directory) = gate(10);
        gate.assigned(at(1));
        gate.leased(at(30), at(1));
        assert!(gate.may_extend(at(20), || false, || panic!("not asked")), "there is nothing that could have moved");
        assert!(!gate.may_extend(at(20), || true, || true), "a session from before the lapse");
        assert!(gate.outlasts(at(1)) && !gate.outlasts(at(12)));
        gate.leased(at(30), at(12));
        assert!(!gate.may_extend(at(20), || true, || true), "an assignment from before the lapse");
        gate.assigned(at(12));
        assert!(!gate.may_extend(at(20), || true, || false), "something unwanted would run");
        assert!(!gate.may_extend(at(30), || true, || true), "the lease is over again");
        assert!(gate.may_extend(at(20), || true, || true));
    }

    #[test]
    fn without_a_fence_nothing_waits() {
        assert!(!Gate::new(None).is_closed(at(1)));
    }
}
