//! Rule 3 for updates and batches: an update is neither lost nor made twice, and only on what its caller had seen where it says
//! so; a batch is whole or absent.

use std::collections::BTreeSet;

use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Change, Command, LogTime, RequestKey};
use warren_scheduler::state::event::{Event, EventKind};
use warren_scheduler::state::outcome::Rejected;
use warren_scheduler::state::settings::{Expiry, Settings};

use super::super::log::Outcome;
use super::Oracle;

impl Oracle {
    /// Whether this request was answered before: it must not have an effect again.
    fn is_repeated(&self, command: &Command, request: Option<RequestKey>) -> bool {
        request.is_some_and(|key| self.answered.contains_key(&(command.caller.tenant.clone(), key.id)))
    }

    pub(super) fn check_update(&mut self, before: &State, command: &Command, outcome: &Outcome, events: &[Event]) {
        if let Body::UpdateSandbox { sandbox, change, if_revision, request } = &command.body
            && !self.is_repeated(command, *request)
        {
            let was = before.sandboxes.get(sandbox).map(|sandbox| sandbox.revision);
            let stale = if_revision.is_some() && *if_revision != was;
            match outcome {
                Ok(_) if stale => self.wrong(3, format!("{sandbox} at {was:?} is updated as of {if_revision:?}")),
                Ok(_) if events.is_empty() => self.wrong(3, format!("an update of {sandbox} had no effect")),
                Ok(_) => {
                    let now = self.state.log_time;
                    self.settings.entry(sandbox.clone()).and_modify(|settings| make(settings, change, now));
                }
                Err(Rejected::Changed { .. }) if !stale => {
                    self.wrong(3, format!("{sandbox} is as its caller saw it, and its update was refused"));
                }
                Err(_) => {}
            }
        }
        self.check_settings(events);
    }

    /// Whatever happens to a sandbox, its settings are what its creator and all updates made of them.
    fn check_settings(&mut self, events: &[Event]) {
        for event in events {
            let sandbox = &event.sandbox;
            match event.kind {
                EventKind::Created => {
                    self.settings.insert(sandbox.name.clone(), sandbox.spec.settings.clone());
                }
                EventKind::Deleted => drop(self.settings.remove(&sandbox.name)),
                EventKind::Updated => {}
            }
            let wanted = self.settings.get(&sandbox.name);
            if event.kind != EventKind::Deleted && wanted != Some(sandbox.settings()) {
                let what = format!("{} has {:?}, and should have {wanted:?}", sandbox.name, sandbox.settings());
                self.wrong(3, what);
            }
        }
    }

    pub(super) fn check_batch(&mut self, before: &State, command: &Command, outcome: &Outcome, events: &[Event]) {
        let Body::CreateBatch { items, request } = &command.body else { return };
        if self.is_repeated(command, *request) {
            return;
        }
        let new = items.iter().map(|item| &item.sandbox).filter(|name| !before.sandboxes.contains_key(*name));
        let new: BTreeSet<_> = new.collect();
        let made: BTreeSet<_> =
            events.iter().filter(|e| e.kind == EventKind::Created).map(|e| &e.sandbox.name).collect();
        match outcome {
            Ok(_) if new != made => self.wrong(3, format!("of a batch of {new:?}, {made:?} were created")),
            Err(_) if !made.is_empty() => self.wrong(3, format!("a batch was rejected, and {made:?} were created")),
            Err(_) if before.tenants != self.state.tenants || before.templates != self.state.templates => {
                self.wrong(3, "a batch was rejected, and still counts somewhere");
            }
            _ => {}
        }
    }
}

/// What an update means, in the oracle's own words.
fn make(settings: &mut Settings, change: &Change, now: LogTime) {
    let Change { labels, annotations, expiry, egress, priority } = change.clone();
    let old = settings.clone();
    *settings = Settings {
        labels: labels.unwrap_or(old.labels),
        annotations: annotations.unwrap_or(old.annotations),
        expiry: match expiry {
            None => old.expiry,
            Some(Expiry::After(ms)) => Expiry::At(LogTime(now.0 + ms)),
            Some(other) => other,
        },
        egress: egress.unwrap_or(old.egress),
        priority: priority.unwrap_or(old.priority),
    };
}
