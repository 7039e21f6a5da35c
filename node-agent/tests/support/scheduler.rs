//! A scheduler that says what the test tells it to.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use warren_proto::error::ErrorBuilder;
use warren_proto::v1::agent_session_service_server::{AgentSessionService, AgentSessionServiceServer};
use warren_proto::v1::open_session_request::Message as Up;
use warren_proto::v1::open_session_response::Message as Down;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::*;

use super::{KEY_ID, LEDGER, PATIENCE, key};

type Answers = mpsc::Sender<Result<OpenSessionResponse, Status>>;

/// How it meets an agent.
#[derive(Clone)]
pub struct Manner {
    /// Another replica leads, at this address.
    pub not_leader: Option<String>,
    pub ledger_id: String,
    /// The ledger that this one was restored from.
    pub predecessor: Option<String>,
    pub lease_ms: i64,
}

impl Default for Manner {
    fn default() -> Self {
        Self { not_leader: None, ledger_id: LEDGER.into(), predecessor: None, lease_ms: 10_000 }
    }
}

/// Serves until dropped.
pub struct Scheduler {
    pub address: String,
    /// Whether renewals are granted.
    pub grants: Arc<AtomicBool>,
    /// Agents of other ledgers that were refused.
    pub strangers: watch::Receiver<usize>,
    peers: Mutex<mpsc::Receiver<Peer>>,
    _stop: DropGuard,
}

struct Service {
    manner: Manner,
    grants: Arc<AtomicBool>,
    strangers: watch::Sender<usize>,
    peers: mpsc::Sender<Peer>,
}

impl Scheduler {
    pub async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (peers, rx) = mpsc::channel(16);
        let grants = Arc::new(AtomicBool::new(true));
        let (strangers, refused) = watch::channel(0);
        let service = Service { manner, grants: Arc::clone(&grants), strangers, peers };
        let stop = CancellationToken::new();
        let (until, guard) = (stop.clone(), stop.drop_guard());
        tokio::spawn(async move {
            let server = Server::builder().add_service(AgentSessionServiceServer::new(service));
            let serving = server.serve_with_incoming(TcpIncoming::from(listener));
            tokio::select! {
                result = serving => result.unwrap(),
                () = until.cancelled() => {}
            }
        });
        Self { address, grants, strangers: refused, peers: Mutex::new(rx), _stop: guard }
    }

    /// The next agent that said Hello.
    pub async fn peer(&self) -> Peer {
        let mut peers = self.peers.lock().await;
        timeout(PATIENCE, peers.recv()).await.expect("no agent came").unwrap()
    }
}

#[tonic::async_trait]
impl AgentSessionService for Service {
    type OpenSessionStream = Pin<Box<dyn Stream<Item = Result<OpenSessionResponse, Status>> + Send>>;

    async fn open_session(
        &self,
        request: Request<Streaming<OpenSessionRequest>>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        if let Some(leader) = &self.manner.not_leader {
            let refusal = ErrorBuilder::new(Code::Unavailable, ErrorReason::NotLeader, "another replica leads");
            return Err(refusal.with("leader", leader).build());
        }
        let mut inbound = request.into_inner();
        let Some(Up::Hello(hello)) = inbound.message().await?.and_then(|request| request.message) else {
            return Err(Status::invalid_argument("no Hello"));
        };
        let known = [Some(&self.manner.ledger_id), self.manner.predecessor.as_ref()];
        if !hello.ledger_id.is_empty() && !known.contains(&Some(&hello.ledger_id)) {
            let refusal = ErrorBuilder::new(Code::FailedPrecondition, ErrorReason::LedgerMismatch, "another ledger");
            self.strangers.send_modify(|n| *n += 1);
            return Err(refusal.with("ledger_id", &self.manner.ledger_id).build());
        }
        let (down, rx) = mpsc::channel(64);
        let public_key = key().verifying_key().to_bytes().to_vec();
        let welcome = Welcome {
            ledger_id: self.manner.ledger_id.clone(),
            lease_ms: self.manner.lease_ms,
            token_keys: Some(TokenKeys { keys: vec![TokenKey { key_id: KEY_ID, public_key }] }),
            scheduler_addresses: Vec::new(),
        };
        down.send(Ok(OpenSessionResponse { message: Some(Down::Welcome(welcome)) })).await.unwrap();
        let (heard, up) = mpsc::channel(1024);
        let (grants, answers) = (Arc::clone(&self.grants), down.clone());
        tokio::spawn(listen(inbound, heard, answers, grants));
        let mut peer = Peer {
            hello: hello.clone(),
            down,
            up,
            seen: BTreeMap::new(),
            generation: 0,
            resyncs: 0,
            templates: Vec::new(),
        };
        peer.take(Up::Observation(hello.observation.unwrap_or_default()));
        self.peers.send(peer).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

async fn listen(
    mut inbound: Streaming<OpenSessionRequest>,
    heard: mpsc::Sender<Up>,
    answers: Answers,
    grants: Arc<AtomicBool>,
) {
    while let Some(Ok(request)) = inbound.next().await {
        match request.message {
            Some(Up::RenewLease(renew)) if grants.load(Ordering::SeqCst) => {
                let granted = Down::LeaseGranted(LeaseGranted { sequence: renew.sequence });
                let _ = answers.send(Ok(OpenSessionResponse { message: Some(granted) })).await;
            }
            Some(message) => drop(heard.send(message).await),
            None => {}
        }
    }
}

/// An agent's session, and what it said so far.
pub struct Peer {
    pub hello: Hello,
    pub seen: BTreeMap<(String, u64), SandboxObservation>,
    pub generation: u64,
    pub resyncs: usize,
    pub templates: Vec<String>,
    down: Answers,
    up: mpsc::Receiver<Up>,
}

impl Peer {
    pub async fn assign(&self, generation: u64, sandboxes: &[AssignedSandbox]) {
        self.send(Down::Assignment(Assignment { generation, sandboxes: sandboxes.to_vec() })).await;
    }

    /// The same to a session that may have ended meanwhile.
    pub async fn offer(&self, generation: u64, sandboxes: &[AssignedSandbox]) {
        let assignment = Assignment { generation, sandboxes: sandboxes.to_vec() };
        let message = OpenSessionResponse { message: Some(Down::Assignment(assignment)) };
        let _ended = self.down.send(Ok(message)).await;
    }

    pub async fn delta(&self, base: u64, generation: u64, upserts: &[AssignedSandbox], removes: &[String]) {
        self.send(Down::AssignmentDelta(AssignmentDelta {
            base_generation: base,
            generation,
            upserts: upserts.to_vec(),
            removes: removes.to_vec(),
        }))
        .await;
    }

    pub async fn send(&self, message: Down) {
        self.down.send(Ok(OpenSessionResponse { message: Some(message) })).await.unwrap();
    }

    /// Waits until the agent has gone.
    pub async fn closed(&self) {
        self.down.closed().await;
    }

    /// Ends the session with an error.
    pub async fn fail(self, status: Status) {
        self.down.send(Err(status)).await.unwrap();
    }

    /// Listens until `id` is reported in `phase` at `epoch`.
    pub async fn until_phase(&mut self, id: &str, epoch: u64, phase: Phase) -> SandboxObservation {
        let key = (super::name(id).to_string(), epoch);
        let there = |peer: &Self| peer.seen.get(&key).is_some_and(|o| o.phase() == phase);
        self.until(&format!("{key:?} {phase:?}"), there).await;
        self.seen[&key].clone()
    }

    pub async fn until(&mut self, what: &str, there: impl Fn(&Self) -> bool) {
        while !there(self) {
            let message = timeout(PATIENCE, self.up.recv()).await;
            let message = message.unwrap_or_else(|_| panic!("never: {what}; heard {:#?}", self.seen));
            self.take(message.unwrap_or_else(|| panic!("session ended before: {what}")));
        }
    }

    fn take(&mut self, message: Up) {
        match message {
            Up::Observation(observation) => {
                if observation.full {
                    self.seen.clear();
                }
                self.generation = observation.generation;
                self.templates = observation.template_digests;
                self.seen.extend(observation.sandboxes.into_iter().map(|o| ((o.sandbox.clone(), o.epoch), o)));
            }
            Up::Resync(_) => self.resyncs += 1,
            _ => {}
        }
    }
}
