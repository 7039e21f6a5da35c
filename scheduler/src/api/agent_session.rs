//! The scheduler's end of an agent's session: registers the node, grants leases, pushes what changed in its assignment,
//! commits what it observes.
//!
//! A session lives on the leader and ends with its leadership, with its stream, or when the node opens a newer one. It keeps
//! nothing that a new session could not make anew from state and the agent's hello.

mod assignment;
mod wire;

use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};
use warren_proto::ids::{NodeId, ReplicaId};
use warren_proto::v1::agent_session_service_server::AgentSessionService;
use warren_proto::v1::{
    LeaseGranted, OpenSessionRequest, OpenSessionResponse, TokenKey, TokenKeys, Welcome, open_session_request,
    open_session_response,
};

use super::status;
use crate::clock;
use crate::controller::Controller;
use crate::controller::sessions::Registration;
use crate::raft::Leadership;
use crate::state::State;
use assignment::Pushed;

/// How long an agent may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an agent may read nothing.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Shortest time between two messages of changes: a burst of creates is a few messages, and one alone waits for nothing.
const PUSH_PAUSE: Duration = Duration::from_millis(5);

/// Messages that wait for a slow agent; when they are full, its session waits too and nothing else does.
const OUTBOUND_QUEUE: usize = 16;

/// Serves `AgentSessionService`.
#[derive(Debug, Clone)]
pub struct AgentSessionApi {
    controller: Controller,
}

impl AgentSessionApi {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }
}

type Responses = Pin<Box<dyn Stream<Item = Result<OpenSessionResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AgentSessionService for AgentSessionApi {
    type OpenSessionStream = Responses;

    async fn open_session(
        &self,
        request: Request<Streaming<OpenSessionRequest>>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        let leadership = self.controller.replica().leadership();
        if let Leadership::Follower { leader } = &*leadership.borrow() {
            return Err(status::not_leader(leader.as_ref()));
        }
        let mut inbound = request.into_inner();
        let hello = read_hello(&mut inbound).await?;
        check_ledger(&self.controller, hello.ledger_id.as_deref())?;
        check_incarnation(hello.report.incarnation)?;
        let incarnation = hello.report.incarnation;
        self.controller
            .register_node(hello.node.clone(), hello.report, hello.observation)
            .await
            .map_err(status::control)?;
        info!(node = %hello.node, "session opened");

        let (out, responses) = mpsc::channel(OUTBOUND_QUEUE);
        let session = Session {
            registration: self.controller.sessions().register(hello.node.clone()),
            controller: self.controller.clone(),
            node: hello.node,
            incarnation,
            leadership,
            pushed: Pushed::default(),
            pushed_at: clock::monotonic(),
            keys: TokenKeys::default(),
            out,
        };
        tokio::spawn(session.run(inbound));
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

async fn read_hello(inbound: &mut Streaming<OpenSessionRequest>) -> Result<wire::Hello, Status> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_elapsed| status::invalid_field("hello", "no hello came within 10 seconds"))??;
    match first.and_then(|request| request.message) {
        Some(open_session_request::Message::Hello(hello)) => wire::hello(hello),
        _ => Err(status::invalid_field("hello", "the first message of a session must be `hello`")),
    }
}

/// How far ahead of this host's clock an agent's incarnation may lie: further, and it would lock out every later one.
const MAX_AHEAD_MS: u64 = 60 * 1000;

/// An incarnation is a UUIDv7 that is not from the future.
fn check_incarnation(incarnation: u128) -> Result<(), Status> {
    let id = uuid::Uuid::from_u128(incarnation);
    let stamped = u64::try_from(incarnation >> 80).unwrap_or(u64::MAX);
    if id.get_version() != Some(uuid::Version::SortRand) {
        return Err(status::invalid_field("hello.incarnation", "must be a UUIDv7"));
    }
    if stamped > clock::log_time().plus_ms(MAX_AHEAD_MS).0 {
        let right = "lies more than a minute ahead of the scheduler's clock: check the host's clock";
        return Err(status::invalid_field("hello.incarnation", right));
    }
    Ok(())
}

/// An agent that belongs to another ledger must not be taken for one of ours; one of a ledger that ours was restored from is.
fn check_ledger(controller: &Controller, theirs: Option<&str>) -> Result<(), Status> {
    let state = controller.replica().state();
    if state.ledger_id.is_none() || !controller.may_sign(&state) {
        // This leader is about to open the ledger, or to make its key known: an agent must not miss either.
        return Err(status::not_leader(None));
    }
    let ours = ledger_id(&state);
    match theirs {
        Some(theirs) if state.predecessors.iter().any(|id| id.to_string() == theirs) => Ok(()),
        Some(theirs) if theirs != ours => Err(status::ledger_mismatch(&ours, theirs)),
        _ => Ok(()),
    }
}

fn ledger_id(state: &State) -> String {
    state.ledger_id.map(|id| id.to_string()).unwrap_or_default()
}

struct Session {
    controller: Controller,
    registration: Registration,
    node: NodeId,
    incarnation: u128,
    leadership: watch::Receiver<Leadership>,
    /// What the agent has been told.
    pushed: Pushed,
    pushed_at: Instant,
    keys: TokenKeys,
    out: mpsc::Sender<Result<OpenSessionResponse, Status>>,
}

/// The agent is gone; nobody is left to tell.
struct Closed;

enum End {
    Closed,
    Failed(Status),
}

impl From<Closed> for End {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl Session {
    async fn run(mut self, inbound: Streaming<OpenSessionRequest>) {
        match self.serve(inbound).await {
            Ok(()) | Err(End::Closed) => debug!(node = %self.node, "session closed"),
            Err(End::Failed(status)) => {
                info!(node = %self.node, reason = status.message(), "session ended");
                // An agent that reads nothing does not hold this up.
                let _nobody_listens = self.out.try_send(Err(status));
            }
        }
    }

    async fn serve(&mut self, mut inbound: Streaming<OpenSessionRequest>) -> Result<(), End> {
        self.welcome().await?;
        self.push_changes().await?;
        let mut due = None;
        loop {
            tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.receive(message).await?,
                    Ok(None) | Err(_) => return Ok(()),
                },
                () = self.registration.signals().changed.notified(), if due.is_none() => {
                    due = Some(self.pushed_at + PUSH_PAUSE);
                }
                () = sleep_until(due) => {
                    due = None;
                    self.push_changes().await?;
                }
                () = self.registration.signals().superseded.notified() => {
                    return Err(status::session_superseded(&self.node).into());
                }
                _ = self.leadership.changed() => self.still_leads()?,
                () = self.controller.stopping() => return Err(status::not_leader(None).into()),
                () = self.out.closed() => return Ok(()),
            }
        }
    }

    fn still_leads(&self) -> Result<(), Status> {
        match &*self.leadership.borrow() {
            Leadership::Leader { .. } => Ok(()),
            Leadership::Follower { leader } => Err(status::not_leader(leader.as_ref())),
        }
    }

    async fn receive(&mut self, request: OpenSessionRequest) -> Result<(), End> {
        let received = clock::monotonic();
        match request.message {
            Some(open_session_request::Message::RenewLease(renewal)) => self.renew(renewal.sequence, received).await,
            Some(open_session_request::Message::Observation(observation)) => {
                let observation = wire::observation(observation)?;
                self.controller
                    .observe(self.node.clone(), self.incarnation, observation)
                    .await
                    .map_err(|error| End::Failed(status::control(error)))
            }
            Some(open_session_request::Message::Resync(_)) => {
                self.pushed = Pushed::default();
                self.push_changes().await
            }
            Some(open_session_request::Message::Hello(_)) | None => {
                Err(status::invalid_field("message", "expected `renew_lease`, `observation` or `resync`").into())
            }
        }
    }

    async fn renew(&mut self, sequence: u64, received: Instant) -> Result<(), End> {
        self.controller
            .renew_lease(self.node.clone(), self.incarnation, received)
            .await
            .map_err(|error| End::Failed(status::control(error)))?;
        // Before the grant: a node that was away must not thaw what was moved away meanwhile.
        self.push_changes().await?;
        Ok(self.send(open_session_response::Message::LeaseGranted(LeaseGranted { sequence })).await?)
    }

    async fn welcome(&mut self) -> Result<(), Closed> {
        let state = self.controller.replica().state();
        self.keys = token_keys(&state);
        let welcome = Welcome {
            ledger_id: ledger_id(&state),
            lease_ms: i64::try_from(self.controller.lease().as_millis()).unwrap_or(i64::MAX),
            token_keys: Some(self.keys.clone()),
            scheduler_addresses: self.controller.replica().members().into_iter().map(|m| m.api_address).collect(),
        };
        self.send(open_session_response::Message::Welcome(welcome)).await
    }

    /// Sends what changed since the last time, if anything did.
    async fn push_changes(&mut self) -> Result<(), End> {
        self.pushed_at = clock::monotonic();
        // Before the state: what it names is complete up to a generation that the state has reached.
        let concerned = self.registration.signals().take_concerned();
        let state = self.controller.replica().state();
        let keys = token_keys(&state);
        if keys != self.keys {
            self.keys = keys.clone();
            self.send(open_session_response::Message::TokenKeys(keys)).await?;
        }
        let (signer, sealer) = (self.controller.signer(), self.controller.sealer());
        if let Some(message) = self.pushed.update(&state, &self.node, &concerned, signer, sealer) {
            self.send(message).await?;
        }
        Ok(())
    }

    async fn send(&self, message: open_session_response::Message) -> Result<(), Closed> {
        // An agent that reads nothing loses its session, and with it nothing: the next one tells it everything.
        let sending = self.out.send(Ok(OpenSessionResponse { message: Some(message) }));
        tokio::select! {
            sent = sending => sent.map_err(|_gone| Closed),
            () = self.controller.stopping() => Err(Closed),
            () = tokio::time::sleep(SEND_TIMEOUT) => Err(Closed),
        }
    }
}

/// Never, when nothing is due.
async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

fn token_keys(state: &State) -> TokenKeys {
    let in_group = |id: &ReplicaId| state.voters.contains(id) || state.learners.contains(id);
    let keys = state.replicas.iter().filter(|(id, _)| in_group(id));
    TokenKeys {
        keys: keys.map(|(id, replica)| TokenKey { key_id: id.0, public_key: replica.token_key.to_vec() }).collect(),
    }
}
