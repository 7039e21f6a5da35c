//! The leader's loop and the way in for every change: decide over the view, propose, let `apply` verify.
//!
//! The controller owns what only a leader's memory holds: the view's overlay of decisions in flight, and who renewed its
//! lease when. All of it can be lost: a new leader starts from state and waits a lease before it judges anybody.

mod group;
mod leader;
pub mod liveness;
pub mod log_clock;
mod parts;
pub mod sessions;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::metrics::{counter, histogram};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use warren_proto::ids::{Epoch, NodeId, ReplicaId, SandboxName, TemplateId};

use crate::clock;
use crate::disk::DiskUse;
use crate::metrics::names;
use crate::placement::view::{Reservation, View};
use crate::placement::{Request, place};
use crate::raft::{ProposeError, Replica};
use crate::secrets::Sealer;
use crate::signer::Signer;
use crate::state::State;
use crate::state::command::{
    BatchItem, Body, Caller, Change, Command, Decision, LogTime, Observation, Observed, Phase, RequestKey, Role,
    TemplateSpec,
};
use crate::state::level::{self, Level};
use crate::state::node::{Condition, NodeReport};
use crate::state::outcome::{Kept, Rejected, Reply, Subject};
use crate::state::sandbox::{Life, PendingCode, PendingReason, Sandbox, SandboxSpec};
use crate::state::template::Template;
use liveness::Liveness;
use log_clock::LogClock;
use sessions::Sessions;

/// How often the leader looks for what is due, and at what waits, although nothing changed.
pub const IDLE_PASS: Duration = Duration::from_secs(10);

/// How long a client's change waits for a ledger just formed to reach the level that it needs: what the members take to say
/// what they support, several times over.
const LEVEL_PATIENCE: Duration = Duration::from_secs(2);

/// Why a change was not made, or may not have been.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// Its lease is over for so long that it is being declared down; a moment later it may come back.
    #[error("node {0} is being declared down")]
    GoingDown(NodeId),
}

/// Configuration and metrics, without secrets.
#[derive(Debug, Clone, Default)]
pub struct DebugInfo {
    pub config: BTreeMap<String, String>,
    /// In Prometheus's text format.
    pub metrics: String,
}

/// Reads [`DebugInfo`] when somebody asks.
#[derive(Clone, Default)]
pub struct DebugSource(Option<Arc<dyn Fn() -> DebugInfo + Send + Sync>>);

impl DebugSource {
    pub fn new(read: impl Fn() -> DebugInfo + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(read)))
    }

    fn read(&self) -> DebugInfo {
        self.0.as_ref().map(|read| read()).unwrap_or_default()
    }
}

impl std::fmt::Debug for DebugSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DebugSource")
    }
}

/// What the controller must be told.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// How long a granted lease lasts.
    pub lease: Duration,
    /// `host:port` at which this replica's API is reached.
    pub api_advertise: String,
    /// How long a voter may be silent before a standby replaces it.
    pub replica_grace: Duration,
    /// Seals secrets; without it there are none.
    pub sealer: Option<Sealer>,
    pub disk: DiskUse,
    /// What operators may see of this replica's configuration and metrics.
    pub debug: DebugSource,
    /// Cancelled when this replica stops: streams that would last for ever end then.
    pub stop: CancellationToken,
}

/// Handle to one replica's controller. Clones share it.
#[derive(Clone)]
pub struct Controller(Arc<Inner>);

struct Inner {
    replica: Replica,
    signer: Signer,
    config: ControllerConfig,
    view: Mutex<View>,
    liveness: Mutex<Liveness>,
    /// Set while this replica leads and its term is open.
    log_clock: Mutex<Option<LogClock>>,
    sessions: Sessions,
    /// How full the other voters' disks are, in percent; nothing where this replica does not lead.
    other_disks: Mutex<BTreeMap<ReplicaId, u64>>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// Nothing in the guarded sections panics half-way through a change, so a poisoned lock guards sound data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controller {
    /// Starts the loop that leads whenever this replica does. It ends with the runtime.
    pub fn start(replica: Replica, signer: Signer, config: ControllerConfig) -> Self {
        let controller = Self(Arc::new(Inner {
            replica,
            signer,
            config,
            view: Mutex::new(View::default()),
            liveness: Mutex::new(Liveness::default()),
            log_clock: Mutex::new(None),
            sessions: Sessions::default(),
            other_disks: Mutex::default(),
        }));
        controller.replica().tell_disk(controller.disk().clone());
        tokio::spawn(leader::run(controller.clone()));
        tokio::spawn(sessions::notify_changes(controller.clone()));
        tokio::spawn(group::announce(controller.clone()));
        tokio::spawn(group::tend(controller.clone()));
        tokio::spawn(group::follow_disks(controller.clone()));
        controller
    }

    pub fn replica(&self) -> &Replica {
        &self.0.replica
    }

    pub fn signer(&self) -> &Signer {
        &self.0.signer
    }

    /// Whether the ledger knows the key that this replica signs with, so that agents can: before, no token is worth anything.
    pub fn may_sign(&self, state: &State) -> bool {
        let known = state.replicas.get(&self.replica().id());
        known.is_some_and(|record| record.token_key == self.0.signer.public_key())
    }

    /// `None`: no secrets can be taken.
    pub fn sealer(&self) -> Option<&Sealer> {
        self.0.config.sealer.as_ref()
    }

    pub fn disk(&self) -> &DiskUse {
        &self.0.config.disk
    }

    /// A voter whose disk is so full that creates are refused, and how full it is. A replica that is heard of and full counts wherever
    /// it is: with its disk at its end it stops, and with it goes what the group can lose. One that is silent is lost already.
    pub fn full_disk(&self) -> Option<(ReplicaId, u64)> {
        let own = self.disk();
        if own.is_full() {
            return Some((self.replica().id(), own.percent()));
        }
        let others = lock(&self.0.other_disks);
        others.iter().map(|(id, percent)| (*id, *percent)).find(|(_, percent)| own.would_be_full(*percent))
    }

    pub fn debug_info(&self) -> DebugInfo {
        self.0.config.debug.read()
    }

    pub fn sessions(&self) -> &Sessions {
        &self.0.sessions
    }

    /// Returns when this replica stops.
    pub async fn stopping(&self) {
        self.0.config.stop.cancelled().await;
    }

    pub fn lease(&self) -> Duration {
        self.0.config.lease
    }

    /// Creates a sandbox: placed where there is room, queued with a reason otherwise. Goes on when the caller goes away.
    pub async fn create_sandbox(&self, caller: Caller, new: NewSandbox) -> Result<Answered<Sandbox>, ControlError> {
        let controller = self.clone();
        let creating = async move {
            let (decision, _in_flight) = controller.decide(&new.spec);
            let NewSandbox { name: sandbox, spec, request } = new;
            let body = Body::CreateSandbox { sandbox, spec, decision, request };
            controller.propose(caller, body).await
        };
        sandbox_of(detached(creating).await?)
    }

    /// Creates each of these for itself; answers in their order. Goes on when the caller goes away.
    pub async fn create_each(
        &self,
        caller: Caller,
        items: Vec<NewSandbox>,
    ) -> Result<Vec<Result<Answered<Sandbox>, ControlError>>, ControlError> {
        let controller = self.clone();
        let creating = async move {
            let creates = items.into_iter().map(|item| {
                let (decision, in_flight) = controller.decide(&item.spec);
                let body = Body::CreateSandbox { sandbox: item.name, spec: item.spec, decision, request: item.request };
                let proposed = controller.propose(caller.clone(), body);
                async move {
                    let created = proposed.await.and_then(sandbox_of);
                    drop(in_flight);
                    created
                }
            });
            Ok(join_all(creates).await)
        };
        detached(creating).await
    }

    /// Creates all of these in one step, or none; answers their names.
    pub async fn create_all(
        &self,
        caller: Caller,
        items: Vec<NewSandbox>,
        request: Option<RequestKey>,
    ) -> Result<Vec<SandboxName>, ControlError> {
        let controller = self.clone();
        let creating = async move {
            let mut in_flight = Vec::new();
            let mut decided = Vec::new();
            for item in items {
                let (decision, held) = controller.decide(&item.spec);
                in_flight.push(held);
                decided.push(BatchItem { sandbox: item.name, spec: item.spec, decision });
            }
            controller.propose(caller, Body::CreateBatch { items: decided, request }).await
        };
        match detached(creating).await? {
            Reply::Batch(names) => Ok(names),
            other => Err(foreign(&other)),
        }
    }

    /// Changes what may change of a sandbox; answers it as that left it.
    pub async fn update_sandbox(
        &self,
        caller: Caller,
        sandbox: SandboxName,
        change: Change,
        if_revision: Option<u64>,
        request: Option<RequestKey>,
    ) -> Result<Answered<Sandbox>, ControlError> {
        sandbox_of(self.propose(caller, Body::UpdateSandbox { sandbox, change, if_revision, request }).await?)
    }

    /// Commits what an operator wants of nodes, tenants and the region.
    pub async fn operate(&self, caller: Caller, body: Body) -> Result<(), ControlError> {
        self.propose(caller, body).await.map(drop)
    }

    /// Begins to delete a sandbox; answers it as that left it.
    pub async fn delete_sandbox(
        &self,
        caller: Caller,
        sandbox: SandboxName,
        request: Option<RequestKey>,
    ) -> Result<Answered<Sandbox>, ControlError> {
        sandbox_of(self.propose(caller, Body::DeleteSandbox { sandbox, request }).await?)
    }

    pub async fn create_template(
        &self,
        caller: Caller,
        template: TemplateId,
        spec: TemplateSpec,
        request: Option<RequestKey>,
    ) -> Result<Answered<Template>, ControlError> {
        match self.propose(caller, Body::CreateTemplate { template, spec, request }).await? {
            Reply::Template(template) => Ok(Answered::Is(template)),
            Reply::Gone(Kept { what: Subject::Template(_), revision, .. }) => Ok(Answered::WasAt { revision }),
            other => Err(foreign(&other)),
        }
    }

    pub async fn delete_template(&self, caller: Caller, template: TemplateId) -> Result<(), ControlError> {
        self.propose(caller, Body::DeleteTemplate { template }).await.map(drop)
    }

    /// An agent said hello, with all that it holds: what the ledger thinks is there and is not named is gone.
    pub async fn register_node(
        &self,
        node: NodeId,
        report: NodeReport,
        mut observation: Observation,
    ) -> Result<(), ControlError> {
        let incarnation = report.incarnation;
        // Before the ledger says that it is ready: whatever becomes of this call, the node is watched.
        lock(&self.0.liveness).watch(&node, clock::monotonic() + self.lease());
        self.propose(node_caller(&node), Body::RegisterNode { node: node.clone(), report }).await?;
        let missing = missing(&self.replica().state(), &node, &observation.sandboxes);
        observation.sandboxes.extend(missing);
        self.observe(node.clone(), incarnation, observation).await?;
        // A hello is a sign of life, not a lease: that comes with the first renewal.
        if lock(&self.0.liveness).renew(&node, clock::monotonic() + self.lease()) {
            Ok(())
        } else {
            Err(ControlError::GoingDown(node))
        }
    }

    /// An agent saw something. What says nothing new is not proposed.
    pub async fn observe(&self, node: NodeId, incarnation: u128, observation: Observation) -> Result<(), ControlError> {
        let state = self.replica().state();
        let known = state.nodes.get(&node).map(|record| &record.templates);
        let templates = observation.templates.filter(|templates| known != Some(templates));
        let mut sandboxes = observation.sandboxes;
        sandboxes.retain(|seen| seen.phase != Phase::Starting);
        for observation in parts::of(sandboxes, templates, known.cloned().unwrap_or_default(), state.level) {
            let body = Body::Observe { node: node.clone(), incarnation, observation };
            self.propose(node_caller(&node), body).await?;
        }
        Ok(())
    }

    /// Grants a lease that was asked for at `received`, once a quorum has confirmed this leader after that moment.
    pub async fn renew_lease(&self, node: NodeId, incarnation: u128, received: Instant) -> Result<(), ControlError> {
        self.replica().confirm_leadership().await?;
        let state = self.replica().state();
        let record = state.nodes.get(&node).ok_or_else(|| Rejected::NodeNotFound(node.clone()))?;
        if record.report.incarnation != incarnation {
            return Err(Rejected::StaleIncarnation(node).into());
        }
        if !lock(&self.0.liveness).renew(&node, received + self.lease()) {
            return Err(ControlError::GoingDown(node));
        }
        counter!(names::RENEWALS).increment(1);
        if !record.is_ready() {
            let body = match state.level {
                Level::FIRST => Body::SetNodeReachable { node: node.clone(), incarnation, reachable: true },
                _ => Body::SetNodeCondition { node: node.clone(), incarnation, to: Condition::Ready },
            };
            self.propose(node_caller(&node), body).await?;
        }
        Ok(())
    }

    /// Nodes whose lease this leader watches.
    pub fn watched_leases(&self) -> usize {
        lock(&self.0.liveness).len()
    }

    /// Log time as this leader has it; what the ledger has where no term is open here.
    pub fn log_now(&self, state: &State) -> LogTime {
        let clock = *lock(&self.0.log_clock);
        clock.map_or(state.log_time, |clock| clock.read(clock::monotonic()).max(state.log_time))
    }

    async fn propose(&self, caller: Caller, body: Body) -> Result<Reply, ControlError> {
        if matches!(caller.role, Role::Operator | Role::Tenant) {
            self.await_level(body.level()).await;
        }
        let time = self.log_now(&self.replica().state());
        let command = Command { caller, time, body };
        Ok(self.replica().propose(command).await??)
    }

    /// Waits while the ledger is about to reach `needed`: a ledger begins at the first level, and its members say what they
    /// support just after it is formed. Where one of them supports less there is nothing to wait for.
    async fn await_level(&self, needed: Level) {
        if needed <= self.replica().state().level {
            return;
        }
        let mut states = self.replica().watch_state();
        let settled =
            states.wait_for(|state| needed <= state.level || level::supported(state).is_some_and(|all| all < needed));
        let _ = tokio::time::timeout(LEVEL_PATIENCE, settled).await;
    }

    /// Chooses a node and holds its room in the view until the guard is dropped.
    fn decide(&self, spec: &SandboxSpec) -> (Decision, Option<InFlight>) {
        let mut view = lock(&self.0.view);
        // Taken under the lock, so that the view never goes back.
        let state = self.replica().state();
        view.sync(&state);
        if state.region.pauses.placement {
            let message = "placement is paused in this region".to_owned();
            return (Decision::Queue(PendingReason { code: PendingCode::Paused, message }), None);
        }
        let began = clock::monotonic();
        let placed = place(&view, &Request::new(&state, spec));
        histogram!(names::PLACEMENT_SECONDS).record(began.elapsed().as_secs_f64());
        match placed {
            Ok(spot) => {
                let reservation = view.reserve(&spot, spec.resources);
                let in_flight = InFlight { controller: self.clone(), reservation };
                (Decision::Place(spot), Some(in_flight))
            }
            Err(unplaceable) => (Decision::Queue(unplaceable.reason()), None),
        }
    }
}

/// A sandbox to create.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    pub name: SandboxName,
    pub spec: Arc<SandboxSpec>,
    pub request: Option<RequestKey>,
}

/// Room that a decision under way holds in the view.
struct InFlight {
    controller: Controller,
    reservation: Reservation,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut view = lock(&self.controller.0.view);
        // What was applied must be in the view before the reservation goes, or the room would be free for a moment.
        view.sync(&self.controller.replica().state());
        view.release(&self.reservation);
    }
}

/// What the ledger says is on the node and the agent does not hold. What is only being started may not have reached it yet.
fn missing(state: &State, node: &NodeId, held: &[Observed]) -> Vec<Observed> {
    let held: BTreeSet<(&SandboxName, Epoch)> = held.iter().map(|seen| (&seen.sandbox, seen.epoch)).collect();
    let Some(record) = state.nodes.get(node) else { return Vec::new() };
    let lives = record.sandboxes.iter().filter_map(|name| state.sandboxes.get(name));
    let lives = lives.filter(|sandbox| !matches!(sandbox.life, Life::Starting { .. })).map(|s| (&s.name, s.epoch));
    let leftovers = record.leftovers.keys().map(|(name, epoch)| (name, *epoch));
    lives
        .chain(leftovers)
        .filter(|instance| !held.contains(instance))
        .map(|(name, epoch)| Observed { sandbox: name.clone(), epoch, phase: Phase::Removed })
        .collect()
}

fn node_caller(node: &NodeId) -> Caller {
    Caller { principal: node.name(), role: crate::state::command::Role::Node, tenant: None }
}

/// What became of something that a request was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answered<T> {
    Is(Arc<T>),
    /// The request came before, and what it made or changed is gone since; the first attempt took effect at `revision`.
    WasAt {
        revision: u64,
    },
}

fn sandbox_of(reply: Reply) -> Result<Answered<Sandbox>, ControlError> {
    match reply {
        Reply::Sandbox(sandbox) => Ok(Answered::Is(sandbox)),
        Reply::Gone(Kept { what: Subject::Sandbox(_), revision, .. }) => Ok(Answered::WasAt { revision }),
        other => Err(foreign(&other)),
    }
}

/// A request id that was used for another kind of request gives that request's answer.
fn foreign(_reply: &Reply) -> ControlError {
    ControlError::Rejected(Rejected::RequestIdReused)
}

/// Runs to its end even when the caller is dropped.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ControlError>> + Send + 'static,
) -> Result<T, ControlError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        // The runtime is shutting down.
        Err(_cancelled) => Err(ControlError::Propose(ProposeError::OutcomeUnknown)),
    }
}
