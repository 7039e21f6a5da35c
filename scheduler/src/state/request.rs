//! The table of answers: the same request again gives the first answer and has no second effect.
//!
//! A request id is a UUIDv7. Its answer is kept for [`RETENTION_MS`] of log time, counted from the later of its arrival and
//! its own time stamp, so an id that has left the table is always recognised as too old. A full table refuses; it never
//! evicts early.

use std::sync::Arc;

use warren_proto::ids::TenantId;

use super::command::{LogTime, RequestKey};
use super::outcome::{Rejected, Reply};

/// How long an answer is kept, in ms of log time (rule 3 of the design).
pub const RETENTION_MS: u64 = 10 * 60 * 1000;

/// How far ahead of log time an id's own time stamp may lie: more than honest clocks differ.
pub const MAX_AHEAD_MS: u64 = 60 * 1000;

/// Most answers kept: 1,700 requests a second for ten minutes, about 500 MiB at worst.
pub const MAX_REQUESTS: usize = 1 << 20;

/// Most answers of one tenant: one cannot fill the table for all others.
pub const MAX_REQUESTS_OF_TENANT: u64 = (MAX_REQUESTS as u64) / 4;

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

/// All answers that are kept.
#[derive(Debug, Clone, Default)]
pub struct RequestTable {
    answers: imbl::OrdMap<(Scope, u128), Arc<Answer>>,
    by_expiry: imbl::OrdSet<(LogTime, Scope, u128)>,
    /// How many each has.
    counts: imbl::OrdMap<Scope, u64>,
}

/// Time stamp of a UUIDv7: its first 48 bits, in ms since the Unix epoch (RFC 9562, section 5.7).
fn time_of(id: u128) -> u64 {
    (id >> 80) as u64
}

impl RequestTable {
    /// The first answer to this request, `None` if it is new, or why it must not be tried.
    pub(super) fn lookup(
        &self,
        scope: &Scope,
        request: Option<&RequestKey>,
        now: LogTime,
    ) -> Result<Option<Reply>, Rejected> {
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
        let own = self.counts.get(scope).copied().unwrap_or(0);
        if self.answers.len() >= MAX_REQUESTS || (scope.tenant.is_some() && own >= MAX_REQUESTS_OF_TENANT) {
            return Err(Rejected::RequestTableFull);
        }
        Ok(None)
    }

    /// Keeps the answer to a request that [`lookup`](Self::lookup) called new.
    pub(super) fn remember(&mut self, scope: &Scope, request: Option<&RequestKey>, now: LogTime, reply: &Reply) {
        let Some(request) = request else { return };
        let expires = now.max(LogTime(time_of(request.id))).plus_ms(RETENTION_MS);
        self.insert(scope.clone(), request.id, Answer { payload: request.payload, expires, reply: reply.clone() });
    }

    /// Puts back an answer, as a checkpoint holds it.
    pub fn insert(&mut self, scope: Scope, id: u128, answer: Answer) {
        let (key, expires) = ((scope, id), answer.expires);
        match self.answers.insert(key.clone(), Arc::new(answer)) {
            Some(older) => drop(self.by_expiry.remove(&(older.expires, key.0.clone(), id))),
            None => {
                let count = self.counts.entry(key.0.clone()).or_default();
                *count = count.saturating_add(1);
            }
        }
        self.by_expiry.insert((expires, key.0, id));
    }

    /// Clears away a few answers whose time is over.
    pub(super) fn expire(&mut self, now: LogTime) {
        for _ in 0..MAX_EXPIRED_AT_ONCE {
            match self.by_expiry.get_min() {
                Some((expires, scope, id)) if *expires <= now => {
                    let (expires, scope, id) = (*expires, scope.clone(), *id);
                    self.by_expiry.remove(&(expires, scope.clone(), id));
                    self.answers.remove(&(scope.clone(), id));
                    self.discount(scope);
                }
                _ => return,
            }
        }
    }

    fn discount(&mut self, scope: Scope) {
        let left = self.counts.get(&scope).map_or(0, |count| count.saturating_sub(1));
        if left == 0 {
            self.counts.remove(&scope);
        } else {
            self.counts.insert(scope, left);
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

    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }
}
