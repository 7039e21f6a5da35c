//! The table of answers: the same request again gives the first answer and has no second effect.
//!
//! A request id is a UUIDv7. Its answer is kept for [`RETENTION_MS`] of log time, counted from the later of its arrival and
//! its own time stamp, so an id that has left the table is always recognised as too old. A full table refuses; it never
//! evicts early.

use std::sync::Arc;

use warren_proto::ids::TenantId;

use super::State;
use super::command::{LogTime, RequestKey};
use super::level::Level;
use super::outcome::{Kept, Rejected, Reply, Subject};

/// How long an answer is kept, in ms of log time (rule 3 of the design).
pub const RETENTION_MS: u64 = 10 * 60 * 1000;

/// How far ahead of log time an id's own time stamp may lie: more than honest clocks differ.
pub const MAX_AHEAD_MS: u64 = 60 * 1000;

/// Most answers kept: 1,700 requests a second for ten minutes. Each holds names and numbers, a few hundred bytes with its place in
/// two maps: about 500 MiB at worst. One of a batch counts once for each sandbox that it names. Few in unit tests, which fill it.
pub const MAX_REQUESTS: u64 = if cfg!(test) { 1 << 10 } else { 1 << 20 };

/// Most answers of one tenant: one cannot fill the table for all others.
pub const MAX_REQUESTS_OF_TENANT: u64 = MAX_REQUESTS / 4;

/// Most expired answers that one command clears away. More than one, so the table shrinks while it is used.
const MAX_EXPIRED_AT_ONCE: usize = 4;

/// Whose ids these are: two tenants may use the same id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope {
    pub tenant: Option<TenantId>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub payload: [u8; 32],
    pub expires: LogTime,
    pub reply: Reply,
}

impl Answer {
    /// What it counts for in the table.
    fn weight(&self) -> u64 {
        match &self.reply {
            Reply::Batch(names) => (names.len() as u64).max(1),
            _ => 1,
        }
    }
}

/// All answers that are kept.
#[derive(Debug, Clone, Default)]
pub struct RequestTable {
    answers: imbl::OrdMap<(Scope, u128), Arc<Answer>>,
    by_expiry: imbl::OrdSet<(LogTime, Scope, u128)>,
    /// What each has of them, by [`Answer::weight`].
    counts: imbl::OrdMap<Scope, u64>,
    /// The sum of these.
    total: u64,
}

/// Time stamp of a UUIDv7: its first 48 bits, in ms since the Unix epoch (RFC 9562, section 5.7).
fn time_of(id: u128) -> u64 {
    (id >> 80) as u64
}

/// What is kept of an answer.
fn small(reply: &Reply) -> Reply {
    let kept = |what, created, revision| Reply::Gone(Kept { what, created, revision });
    match reply {
        Reply::Sandbox(of) => kept(Subject::Sandbox(of.name.clone()), of.created, of.revision),
        Reply::Template(of) => kept(Subject::Template(of.id.clone()), of.created, of.revision),
        other => other.clone(),
    }
}

impl State {
    /// The answer to a request that came before; `None` if it is new. What the first made or changed is answered as it is now.
    pub(super) fn answered(&self, scope: &Scope, request: Option<&RequestKey>) -> Result<Option<Reply>, Rejected> {
        let answer = self.requests.lookup(scope, request, self.log_time)?;
        Ok(answer.map(|answer| match &answer {
            Reply::Gone(kept) => self.recall(kept).unwrap_or(answer),
            _ => answer,
        }))
    }

    fn recall(&self, kept: &Kept) -> Option<Reply> {
        match &kept.what {
            Subject::Sandbox(name) => {
                let sandbox = self.sandboxes.get(name).filter(|sandbox| sandbox.created == kept.created)?;
                Some(Reply::Sandbox(sandbox.clone()))
            }
            Subject::Template(id) => {
                let template = self.templates.get(id).filter(|template| template.created == kept.created)?;
                Some(Reply::Template(template.clone()))
            }
        }
    }
}

impl RequestTable {
    /// The first answer to this request, `None` if it is new, or why it must not be tried.
    fn lookup(&self, scope: &Scope, request: Option<&RequestKey>, now: LogTime) -> Result<Option<Reply>, Rejected> {
        let Some(request) = request else { return Ok(None) };
        if let Some(answer) = self.answers.get(&(scope.clone(), request.id))
            && answer.expires > now
        {
            return if answer.payload == request.payload {
                Ok(Some(answer.reply.clone()))
            } else {
                Err(Rejected::RequestIdReused)
            };
        }
        let stamped = time_of(request.id);
        if stamped.saturating_add(RETENTION_MS) <= now.0 {
            return Err(Rejected::RequestIdExpired);
        }
        if stamped > now.0.saturating_add(MAX_AHEAD_MS) {
            return Err(Rejected::RequestIdFromFuture { ahead_ms: stamped.saturating_sub(now.0) });
        }
        let own = self.held_by(scope);
        if self.total >= MAX_REQUESTS || (scope.tenant.is_some() && own >= MAX_REQUESTS_OF_TENANT) {
            return Err(Rejected::RequestTableFull);
        }
        Ok(None)
    }

    /// Keeps the answer to a request that [`lookup`](Self::lookup) called new. A build that knows the first level alone reads
    /// checkpoints of that level, and would not know the small form: there the answer is kept as it is.
    pub(super) fn remember(
        &mut self,
        scope: &Scope,
        request: Option<&RequestKey>,
        (now, level): (LogTime, Level),
        reply: &Reply,
    ) {
        let Some(request) = request else { return };
        let expires = now.max(LogTime(time_of(request.id))).plus_ms(RETENTION_MS);
        let reply = if level >= Level::SECOND { small(reply) } else { reply.clone() };
        self.insert(scope.clone(), request.id, Answer { payload: request.payload, expires, reply });
    }

    /// Puts back an answer, as a checkpoint holds it.
    pub fn insert(&mut self, scope: Scope, id: u128, answer: Answer) {
        let (key, expires, weight) = ((scope, id), answer.expires, answer.weight());
        if let Some(older) = self.answers.insert(key.clone(), Arc::new(answer)) {
            self.by_expiry.remove(&(older.expires, key.0.clone(), id));
            self.discount(&key.0, older.weight());
        }
        let count = self.counts.entry(key.0.clone()).or_default();
        *count = count.saturating_add(weight);
        self.total = self.total.saturating_add(weight);
        self.by_expiry.insert((expires, key.0, id));
    }

    /// Clears away a few answers whose time is over.
    pub(super) fn expire(&mut self, now: LogTime) {
        for _ in 0..MAX_EXPIRED_AT_ONCE {
            match self.by_expiry.get_min() {
                Some((expires, scope, id)) if *expires <= now => {
                    let (expires, scope, id) = (*expires, scope.clone(), *id);
                    self.by_expiry.remove(&(expires, scope.clone(), id));
                    if let Some(answer) = self.answers.remove(&(scope.clone(), id)) {
                        self.discount(&scope, answer.weight());
                    }
                }
                _ => return,
            }
        }
    }

    fn discount(&mut self, scope: &Scope, weight: u64) {
        self.total = self.total.saturating_sub(weight);
        let left = self.counts.get(scope).map_or(0, |count| count.saturating_sub(weight));
        if left == 0 {
            self.counts.remove(scope);
        } else {
            self.counts.insert(scope.clone(), left);
        }
    }

    /// Every answer, in the order of scope and id.
    pub fn iter(&self) -> impl Iterator<Item = (&Scope, u128, &Answer)> {
        self.answers.iter().map(|((scope, id), answer)| (scope, *id, answer.as_ref()))
    }

    /// By scope and id.
    pub fn answers(&self) -> &imbl::OrdMap<(Scope, u128), Arc<Answer>> {
        &self.answers
    }

    /// How many one has.
    pub fn held_by(&self, scope: &Scope) -> u64 {
        self.counts.get(scope).copied().unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: LogTime = LogTime(1 << 40);

    fn scope(tenant: Option<u64>) -> Scope {
        Scope { tenant: tenant.map(|n| TenantId::parse(&format!("t{n}")).unwrap()) }
    }

    fn key(salt: u64) -> RequestKey {
        RequestKey { id: u128::from(NOW.0) << 80 | u128::from(salt), payload: [1; 32] }
    }

    /// Answers as many requests as there is room for, up to `most`; how many there were.
    fn fill(table: &mut RequestTable, scope: &Scope, most: u64) -> u64 {
        let fits = |table: &mut RequestTable, salt: &u64| {
            let new = table.lookup(scope, Some(&key(*salt)), NOW) == Ok(None);
            if new {
                table.remember(scope, Some(&key(*salt)), (NOW, Level::SECOND), &Reply::Done);
            }
            new
        };
        (0..most).take_while(|salt| fits(table, salt)).count() as u64
    }

    #[test]
    fn a_full_table_refuses_and_never_evicts_early() {
        let mut table = RequestTable::default();
        let most = MAX_REQUESTS;
        for tenant in 0..4 {
            assert_eq!(fill(&mut table, &scope(Some(tenant)), most), MAX_REQUESTS_OF_TENANT, "a share for each");
        }
        assert_eq!(table.len(), usize::try_from(MAX_REQUESTS).unwrap());
        for other in [scope(Some(9)), scope(None)] {
            assert_eq!(table.lookup(&other, Some(&key(0)), NOW), Err(Rejected::RequestTableFull));
        }
        let before = LogTime(NOW.0 + RETENTION_MS - 1);
        table.expire(before);
        for salt in [0, MAX_REQUESTS_OF_TENANT - 1] {
            let known = table.lookup(&scope(Some(0)), Some(&key(salt)), before);
            assert_eq!(known, Ok(Some(Reply::Done)), "the first answer and the last are still there");
        }
        assert_eq!(
            table.lookup(&scope(None), None, before),
            Ok(None),
            "a request without an id is none of its business"
        );
    }

    #[test]
    fn what_is_over_makes_room_and_is_known_as_too_old() {
        let mut table = RequestTable::default();
        fill(&mut table, &scope(Some(0)), MAX_REQUESTS_OF_TENANT);
        let after = NOW.plus_ms(RETENTION_MS);
        assert_eq!(table.lookup(&scope(Some(0)), Some(&key(0)), after), Err(Rejected::RequestIdExpired));
        for _ in 0..MAX_REQUESTS_OF_TENANT {
            table.expire(after);
        }
        assert!(table.is_empty() && table.held_by(&scope(Some(0))) == 0);
    }

    #[test]
    fn one_tenants_full_share_is_no_others() {
        let mut table = RequestTable::default();
        fill(&mut table, &scope(Some(0)), MAX_REQUESTS_OF_TENANT);
        let refused = table.lookup(&scope(Some(0)), Some(&key(u64::MAX)), NOW);
        assert_eq!(refused, Err(Rejected::RequestTableFull));
        assert_eq!(table.lookup(&scope(Some(1)), Some(&key(u64::MAX)), NOW), Ok(None));
    }
}
