//! Following a watch over breaks, and waiting by it: nothing is polled.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tonic::Status;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{
    ErrorReason, ListSandboxesRequest, Sandbox, SandboxState, WatchSandboxesRequest, WatchSandboxesResponse,
};

use crate::client::{Client, sandboxes, within};
use crate::failure::Failure;
use crate::retry::{Backoff, is_transient};
use crate::sandbox::state_word;

/// Where to begin, and until when to go on.
#[derive(Debug, Clone)]
pub struct Follow {
    pub parent: String,
    /// Empty: with what there is.
    pub token: String,
    /// `None`: for as long as it goes well.
    pub deadline: Option<Instant>,
}

impl Follow {
    /// From now on: what is done after this call will be seen.
    pub async fn from_now(client: &Client, parent: String, wait: Duration) -> Result<Self, Failure> {
        let request = ListSandboxesRequest {
            parent: parent.clone(),
            page_size: 1,
            page_token: String::new(),
            ..Default::default()
        };
        let list = |c| {
            let request = within(request.clone());
            async move { sandboxes(c).list_sandboxes(request).await }
        };
        let token = client.call(list).await?.watch_token;
        Ok(Self { parent, token, deadline: Some(Instant::now() + wait) })
    }

    /// Hands every event to `seen` until that breaks off. A watch that breaks goes on from its last token, elsewhere; it
    /// fails when that fails for as long as calls are tried.
    pub async fn each<F>(mut self, client: &Client, mut seen: F) -> Result<(), Failure>
    where
        F: FnMut(&WatchSandboxesResponse) -> Result<ControlFlow<()>, Failure>,
    {
        let mut patience = Patience::new(client, self.deadline);
        loop {
            let request = WatchSandboxesRequest {
                parent: self.parent.clone(),
                watch_token: self.token.clone(),
                ..Default::default()
            };
            let begin = |c| {
                let request = request.clone();
                async move { sandboxes(c).watch_sandboxes(request).await }
            };
            let begun = client.call_until(patience.until, begin).await;
            let mut events = begun.map_err(|failure| self.or_timed_out(&patience, failure))?;
            let broken = loop {
                match self.before_deadline(events.message()).await? {
                    Ok(Some(event)) => {
                        patience = Patience::new(client, self.deadline);
                        // While the current ones are still coming, the token would leave some of them out.
                        if event.kind() != Kind::Current {
                            self.token.clone_from(&event.watch_token);
                        }
                        if seen(&event)?.is_break() {
                            return Ok(());
                        }
                    }
                    Ok(None) => break Status::unavailable("the watch ended"),
                    Err(status) => break status,
                }
            };
            if !is_transient(&broken) {
                return Err(broken.into());
            }
            let Some(pause) = patience.backoff.pause(&broken) else {
                let gave_up = Failure::GaveUp { endpoint: "the watch".to_owned(), status: Box::new(broken) };
                return Err(self.or_timed_out(&patience, gave_up));
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn before_deadline<T>(&self, event: impl Future<Output = T>) -> Result<T, Failure> {
        match self.deadline {
            None => Ok(event.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), event).await.map_err(|_elapsed| timed_out()),
        }
    }

    /// Giving up is timing out where it was the deadline that ended the tries.
    fn or_timed_out(&self, patience: &Patience, failure: Failure) -> Failure {
        match failure {
            Failure::GaveUp { .. } if self.deadline == Some(patience.until) => timed_out(),
            failure => failure,
        }
    }
}

fn timed_out() -> Failure {
    Failure::TimedOut("timed out".to_owned())
}

/// How long a watch that makes no progress is tried.
struct Patience {
    until: Instant,
    backoff: Backoff,
}

impl Patience {
    fn new(client: &Client, deadline: Option<Instant>) -> Self {
        let until = deadline.map_or(client.deadline(), |deadline| deadline.min(client.deadline()));
        Self { until, backoff: Backoff::new(1, until) }
    }
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    Running,
    Gone,
}

/// How the wait for one sandbox ended.
#[derive(Debug)]
pub enum Outcome {
    Reached,
    /// It never will; why.
    Never(String),
}

/// The sandboxes that are waited for, in their latest states.
#[derive(Debug)]
pub struct Wait {
    goal: Goal,
    waiting: BTreeMap<String, Sandbox>,
    /// Those that a watch which began anew has shown.
    shown: BTreeSet<String>,
}

impl Wait {
    pub fn new(goal: Goal) -> Self {
        Self { goal, waiting: BTreeMap::new(), shown: BTreeSet::new() }
    }

    /// Adds one as its change left it, or says how its wait has ended already.
    pub fn add(&mut self, name: String, sandbox: Sandbox) -> Option<Outcome> {
        let outcome = self.judge(Kind::Updated, &sandbox);
        if outcome.is_none() {
            self.waiting.insert(name, sandbox);
        }
        outcome
    }

    pub fn left(&self) -> impl Iterator<Item = &Sandbox> {
        self.waiting.values()
    }

    /// Waits for all of them; `ended` hears of each. Those that are left when this fails are in [`left`](Self::left).
    pub async fn all<F>(&mut self, client: &Client, mut follow: Follow, mut ended: F) -> Result<(), Failure>
    where
        F: FnMut(Sandbox, Outcome) -> Result<(), Failure>,
    {
        while !self.waiting.is_empty() {
            let result = follow.clone().each(client, |event| {
                for (sandbox, outcome) in self.take(event) {
                    ended(sandbox, outcome)?;
                }
                Ok(if self.waiting.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            });
            match result.await {
                // Too many changes meanwhile: begin with what there is.
                Err(failure) if failure.reason() == Some(ErrorReason::Compacted) && !follow.token.is_empty() => {
                    follow.token.clear();
                    self.shown.clear();
                }
                result => return result,
            }
        }
        Ok(())
    }

    /// Those whose wait the event ends.
    fn take(&mut self, event: &WatchSandboxesResponse) -> Vec<(Sandbox, Outcome)> {
        if event.kind() == Kind::Synced {
            return self.take_vanished();
        }
        let Some(sandbox) = event.sandbox.as_ref().filter(|s| self.waiting.contains_key(&s.name)) else {
            return Vec::new();
        };
        self.shown.insert(sandbox.name.clone());
        let Some(outcome) = self.judge(event.kind(), sandbox) else {
            self.waiting.insert(sandbox.name.clone(), sandbox.clone());
            return Vec::new();
        };
        self.waiting.remove(&sandbox.name);
        vec![(sandbox.clone(), outcome)]
    }

    /// What a fresh watch did not show is not there any more.
    fn take_vanished(&mut self) -> Vec<(Sandbox, Outcome)> {
        let shown = std::mem::take(&mut self.shown);
        let vanished: Vec<String> = self.waiting.keys().filter(|name| !shown.contains(*name)).cloned().collect();
        let removed = vanished.iter().filter_map(|name| self.waiting.remove(name));
        let removed: Vec<Sandbox> = removed.collect();
        removed.into_iter().map(|s| (self.judge(Kind::Deleted, &s), s)).filter_map(|(o, s)| Some((s, o?))).collect()
    }

    fn judge(&self, kind: Kind, sandbox: &Sandbox) -> Option<Outcome> {
        use SandboxState::{Cancelled, Failed, Lost, Running, Stopped, Stopping};
        match (self.goal, kind, sandbox.state()) {
            (Goal::Gone, Kind::Deleted, _) => Some(Outcome::Reached),
            // A delete that was answered with anything else had nothing to stop.
            (Goal::Gone, ..) => None,
            (Goal::Running, Kind::Deleted, _) => Some(Outcome::Never("was deleted".to_owned())),
            (Goal::Running, _, Running) => Some(Outcome::Reached),
            // It ran, and ended well before it was looked at.
            (Goal::Running, _, Stopped) if sandbox.exit_status.is_some_and(|exit| exit.code == 0) => {
                Some(Outcome::Reached)
            }
            (Goal::Running, _, Failed | Cancelled | Lost | Stopped | Stopping) => Some(Outcome::Never(plight(sandbox))),
            (Goal::Running, ..) => None,
        }
    }
}

/// `is PENDING: SHORT_OF_CPU: no node has ...`
pub fn plight(sandbox: &Sandbox) -> String {
    let mut text = format!("is {}", state_word(sandbox));
    if let Some(exit) = &sandbox.exit_status {
        text += &format!(" with exit code {}", exit.code);
    }
    if let Some(reason) = &sandbox.reason {
        text += &format!(": {}: {}", reason.code, reason.message);
    }
    text
}
