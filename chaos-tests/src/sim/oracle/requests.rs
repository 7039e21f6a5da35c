//! Rule 3: the same request has one effect and one answer, and an answer that a client heard is in the ledger.

use warren_proto::ids::SandboxName;
use warren_scheduler::state::command::{Body, Change, Command, LogTime, RequestKey};
use warren_scheduler::state::event::{Event, EventKind};
use warren_scheduler::state::outcome::{Rejected, Reply, Subject};
use warren_scheduler::state::request::RETENTION_MS;
use warren_scheduler::state::settings::Settings;

use super::super::client::{Call, Op};
use super::super::log::Outcome;
use super::Oracle;

/// The first answer to a request id.
#[derive(Debug, Clone)]
pub(super) struct Answered {
    payload: [u8; 32],
    reply: Reply,
    expires: LogTime,
}

fn key_of(body: &Body) -> Option<RequestKey> {
    match body {
        Body::CreateSandbox { request, .. }
        | Body::CreateBatch { request, .. }
        | Body::UpdateSandbox { request, .. }
        | Body::DeleteSandbox { request, .. } => *request,
        _ => None,
    }
}

/// Whether settings have what a change says.
fn shows(settings: &Settings, change: &Change) -> bool {
    let Change { labels, annotations, expiry: _, egress, priority } = change;
    labels.as_ref().is_none_or(|labels| *labels == settings.labels)
        && annotations.as_ref().is_none_or(|annotations| *annotations == settings.annotations)
        && egress.as_ref().is_none_or(|egress| *egress == settings.egress)
        && priority.is_none_or(|priority| priority == settings.priority)
}

/// Whether a later answer tells of what the first did: the same sandbox as it is by then, or that it is gone.
fn is_same(first: &Reply, later: &Reply) -> bool {
    match (first, later) {
        (Reply::Sandbox(first), Reply::Sandbox(later)) => {
            (&first.name, first.created) == (&later.name, later.created) && first.revision <= later.revision
        }
        (Reply::Sandbox(first), Reply::Gone(kept)) => {
            kept.what == Subject::Sandbox(first.name.clone())
                && (kept.created, kept.revision) == (first.created, first.revision)
        }
        (first, later) => first == later,
    }
}

impl Oracle {
    pub(super) fn check_request(&mut self, command: &Command, outcome: &Outcome, events: &[Event]) {
        let Some(key) = key_of(&command.body) else { return };
        let scope = (command.caller.tenant.clone(), key.id);
        let now = self.state.log_time;
        let Some(first) = self.answered.get(&scope) else {
            if let Ok(reply) = outcome {
                let stamped = LogTime(u64::try_from(key.id >> 80).unwrap_or(u64::MAX));
                let expires = now.max(stamped).plus_ms(RETENTION_MS);
                self.answered.insert(scope, Answered { payload: key.payload, reply: reply.clone(), expires });
            }
            return;
        };
        let right = match outcome {
            Ok(reply) => now < first.expires && key.payload == first.payload && is_same(&first.reply, reply),
            Err(Rejected::RequestIdReused) => now < first.expires && key.payload != first.payload,
            Err(Rejected::RequestIdExpired) => now >= first.expires,
            Err(Rejected::LevelTooLow { .. }) => key.payload != first.payload,
            // Nothing is looked up yet: a proposer whose clock is off is told so before all else.
            Err(Rejected::TimeStep { .. }) => true,
            Err(_) => false,
        };
        if !right || !events.is_empty() {
            let what =
                format!("request {:032x} was answered {:?} and is now answered {outcome:?}", key.id, first.reply);
            self.wrong(3, what);
        }
    }

    /// A client was told how its request ended.
    pub fn acknowledged(&mut self, call: &Call, outcome: &Outcome) {
        let sandbox = match outcome {
            Ok(Reply::Sandbox(sandbox)) => sandbox,
            Ok(Reply::Batch(names)) => return self.acknowledged_batch(call, names),
            _ => return,
        };
        self.told_revision = self.told_revision.max(sandbox.revision);
        let position = |event: &Event| event.position.index == sandbox.revision && event.sandbox.name == sandbox.name;
        let known = match call.op {
            // As it was when it was created, or as it stood when an idempotent create found it.
            Op::Create { .. } | Op::Delete { .. } => self.events.iter().any(position),
            // A repeated answer shows it as it is by then: others may have changed it again.
            Op::Update { ref change, .. } => {
                let made = |event: &Event| {
                    event.sandbox.name == sandbox.name
                        && event.position.index <= sandbox.revision
                        && shows(event.sandbox.settings(), change)
                };
                self.events.iter().any(position) && self.events.iter().any(made)
            }
            Op::Batch { .. } | Op::List => true,
        };
        if !known || sandbox.revision > self.state.revision {
            self.wrong(
                3,
                format!(
                    "a client was told of {} at revision {}, which the ledger does not hold",
                    sandbox.name, sandbox.revision
                ),
            );
        }
    }

    fn acknowledged_batch(&mut self, call: &Call, names: &[SandboxName]) {
        let created = |name: &SandboxName| {
            self.events.iter().any(|event| event.kind == EventKind::Created && event.sandbox.name == *name)
        };
        let whole = matches!(&call.op, Op::Batch { items, .. } if items.len() == names.len());
        if !whole || !names.iter().all(created) {
            self.wrong(3, format!("a client was told of a batch of {names:?}, which the ledger does not hold"));
        }
    }

    /// A linearizable list: not older than anything that anybody had been told before it was asked for.
    pub fn listed(&mut self, call: &Call, revision: u64, names: &[SandboxName]) {
        if revision < call.floor {
            self.wrong(3, format!("a list of revision {revision} was asked for when {} was known", call.floor));
        }
        let kept = self.states.iter().find(|(index, _)| *index == revision);
        if kept.is_some_and(|(_, state)| !state.sandboxes.keys().eq(names.iter())) {
            self.wrong(3, format!("a list of revision {revision} differs from the ledger"));
        }
        self.told_revision = self.told_revision.max(revision);
    }
}
