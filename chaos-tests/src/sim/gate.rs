//! Until when fenced sandboxes may run: what an agent tells the fence, and when, as `supervisor::gate` decides it.

use std::time::Duration;

/// A lease, and when the session that granted it was opened.
#[derive(Debug, Clone, Copy)]
struct Grant {
    until: Duration,
    session: Duration,
}

/// What an agent knows of its fence.
#[derive(Debug)]
pub struct Gate {
    /// What the fence was told last.
    pub published: Duration,
    grant: Option<Grant>,
    /// When the session was opened that brought the last whole assignment.
    assigned: Option<Duration>,
}

impl Gate {
    pub fn new(published: Duration) -> Self {
        Self { published, grant: None, assigned: None }
    }

    pub fn is_closed(&self, now: Duration) -> bool {
        self.published <= now
    }

    pub fn leased(&mut self, until: Duration, session: Duration) {
        self.grant = Some(Grant { until, session });
    }

    pub fn assigned(&mut self, session: Duration) {
        self.assigned = Some(session);
    }

    /// Whether the last published moment came after a session was opened.
    pub fn outlasts(&self, session: Duration) -> bool {
        session < self.published
    }

    /// The moment to publish, if the last grant may be. After a lapse, if anything is `fenced`, only a session that was opened
    /// since counts, once it has brought the whole assignment and nothing unwanted would run.
    pub fn extend(&mut self, now: Duration, fenced: bool, settled: impl FnOnce() -> bool) -> Option<Duration> {
        let grant = self.grant.filter(|grant| grant.until > now)?;
        let after_lapse = |session: Duration| session >= self.published;
        if self.is_closed(now)
            && fenced
            && !(after_lapse(grant.session) && self.assigned.is_some_and(after_lapse) && settled())
        {
            return None;
        }
        self.published = grant.until;
        self.grant = None;
        Some(grant.until)
    }
}
