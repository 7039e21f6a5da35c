//! The way to a sandbox: which agent runs it, a token for it, and another try where it has moved or its agent restarts.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tonic::transport::Channel;
use tonic::{Request, Status};
use warren_proto::v1::{ConnectSandboxRequest, ConnectSandboxResponse, ErrorReason};

use crate::client::{ATTEMPT_TIMEOUT, Client, bearing, sandboxes, within};
use crate::failure::Failure;
use crate::names;
use crate::retry::{Backoff, is_transient};

/// A stream that held for so long was a good one, whatever came through it: the next break is a new one.
pub const HELD: Duration = Duration::from_secs(10);

/// Which failures of a call are worth another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// It has effects: only those that say that nothing was begun.
    Unstarted,
    /// It may be done twice, but what the agent itself answers stands: only those of the way there too.
    Unanswered,
    /// It only reads, or does the same when it is done twice.
    Always,
}

impl Again {
    /// What to wait by, if another try is worth it.
    fn worth(self, failure: &Failure) -> Option<Status> {
        use ErrorReason::{NodeUnreachable, Overloaded, SandboxMoved, TokenInvalid, TokenKeyUnknown};
        match (failure, failure.reason()) {
            (Failure::Unreachable { .. }, _) => Some(Status::unavailable("not reachable")),
            (_, Some(SandboxMoved | NodeUnreachable | Overloaded | TokenInvalid | TokenKeyUnknown)) => {
                failure.status().cloned()
            }
            (_, reason) => {
                let tries = match self {
                    Self::Unstarted => false,
                    Self::Unanswered => reason.is_none(),
                    Self::Always => true,
                };
                failure.status().filter(|status| tries && is_transient(status)).cloned()
            }
        }
    }
}

/// A node agent, and the right to use one sandbox on it.
#[derive(Debug, Clone)]
pub struct Agent {
    pub channel: Channel,
    token: String,
}

impl Agent {
    /// A request that may take as long as it takes.
    pub fn bearing<T>(&self, message: T) -> Result<Request<T>, Failure> {
        bearing(message, &self.token)
    }

    /// A request that is answered soon or not at all.
    pub fn asking<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = self.bearing(message)?;
        request.set_timeout(ATTEMPT_TIMEOUT);
        Ok(request)
    }
}

/// One sandbox; where it runs is asked once and remembered until a call fails.
#[derive(Debug)]
pub struct Link<'a> {
    pub client: &'a Client,
    /// Resource name.
    pub name: String,
    at: Mutex<Option<Agent>>,
}

impl<'a> Link<'a> {
    /// By id or full name.
    pub fn new(client: &'a Client, sandbox: &str) -> Self {
        Self { client, name: names::sandbox(&client.tenant, sandbox), at: Mutex::default() }
    }

    /// Makes a call until it is answered, may not be made again, or time is up. A sandbox that is about to run is waited for.
    pub async fn call<T, F>(&self, again: Again, call: impl Fn(Agent) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut deadline = self.client.deadline();
        let mut backoff = Backoff::new(1, deadline);
        loop {
            let begun = Instant::now();
            let tried = match self.agent(deadline).await {
                Ok(agent) => call(agent).await,
                Err(failure @ Failure::Unreachable { .. }) => Err(failure),
                Err(failure) => return Err(failure),
            };
            let failure = match tried {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            // It may be elsewhere by now, and the token is cheap; but not after an answer of the right agent.
            if failure.reason().is_none() || Again::Always.worth(&failure).is_some() {
                self.forget();
            }
            let Some(status) = again.worth(&failure) else { return Err(failure) };
            if begun.elapsed() > HELD {
                deadline = self.client.deadline();
                backoff = Backoff::new(1, deadline);
            }
            let Some(pause) = backoff.pause(&status) else { return Err(failure) };
            tokio::time::sleep(pause).await;
        }
    }

    /// The next call asks anew where the sandbox is.
    pub fn forget(&self) {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    async fn agent(&self, deadline: Instant) -> Result<Agent, Failure> {
        let known = self.at.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(agent) = known {
            return Ok(agent);
        }
        let place = self.locate(deadline).await?;
        let channel = self.client.connect_agent(&place.address, place.tls).await?;
        let agent = Agent { channel, token: place.token };
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent.clone());
        Ok(agent)
    }

    async fn locate(&self, deadline: Instant) -> Result<ConnectSandboxResponse, Failure> {
        let request = ConnectSandboxRequest { name: self.name.clone(), token_ttl: None };
        let connect = |c| {
            let request = within(request.clone());
            async move { sandboxes(c).connect_sandbox(request).await }
        };
        self.client.call_until(deadline, connect).await
    }
}
