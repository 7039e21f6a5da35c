//! The leader's loop and the way in for every change: decide over the view, propose, let `apply` verify.
//!
//! The controller owns what only a leader's memory holds: the view's overlay of decisions in flight, and who renewed its
//! lease when. All of it can be lost: a new leader starts from state and waits a lease before it judges anybody.

mod leader;
pub mod liveness;
pub mod sessions;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use warren_proto::ids::{NodeId, SandboxName, TemplateId};
use warren_proto::units::Resources;

use crate::clock;
use crate::placement::view::View;
use crate::placement::{Request, place};
use crate::raft::{ProposeError, Replica};
use crate::signer::Signer;
use crate::state::State;
use crate::state::command::{Body, Caller, Command, Decision, Observation, Observed, Phase, RequestKey, TemplateSpec};
use crate::state::node::NodeReport;
use crate::state::outcome::{Rejected, Reply};
use crate::state::sandbox::{Life, Sandbox, SandboxSpec};
use crate::state::template::Template;
use liveness::Liveness;
use sessions::Sessions;

/// Why a change was not made, or may not have been.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error(transparent)]
    Propose(#[from] ProposeError),
}

/// What the controller must be told.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// How long a granted lease lasts.
    pub lease: Duration,
    /// `host:port` at which this replica's API is reached.
    pub api_advertise: String,
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
    sessions: Sessions,
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
            sessions: Sessions::default(),
        }));
        tokio::spawn(leader::run(controller.clone()));
        tokio::spawn(sessions::notify_changes(controller.clone()));
        controller
    }

    pub fn replica(&self) -> &Replica {
        &self.0.replica
    }

    pub fn signer(&self) -> &Signer {
        &self.0.signer
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
    pub async fn create_sandbox(
        &self,
        caller: Caller,
        sandbox: SandboxName,
        spec: SandboxSpec,
        request: Option<RequestKey>,
    ) -> Result<Arc<Sandbox>, ControlError> {
        let controller = self.clone();
        let creating = async move {
            let (decision, _in_flight) = controller.decide(&spec);
            let body = Body::CreateSandbox { sandbox, spec, decision, request };
            controller.propose(caller, body).await
        };
        sandbox_of(detached(creating).await?)
    }

    /// Begins to delete a sandbox; answers it as that left it.
    pub async fn delete_sandbox(
        &self,
        caller: Caller,
        sandbox: SandboxName,
        request: Option<RequestKey>,
    ) -> Result<Arc<Sandbox>, ControlError> {
        sandbox_of(self.propose(caller, Body::DeleteSandbox { sandbox, request }).await?)
    }

    pub async fn create_template(
        &self,
        caller: Caller,
        template: TemplateId,
        spec: TemplateSpec,
        request: Option<RequestKey>,
    ) -> Result<Arc<Template>, ControlError> {
        match self.propose(caller, Body::CreateTemplate { template, spec, request }).await? {
            Reply::Template(template) => Ok(template),
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
        self.propose(node_caller(&node), Body::RegisterNode { node: node.clone(), report }).await?;
        let missing = missing(&self.replica().state(), &node, &observation.sandboxes);
        observation.sandboxes.extend(missing);
        self.observe(node.clone(), incarnation, observation).await?;
        lock(&self.0.liveness).renew(&node, clock::monotonic() + self.lease());
        Ok(())
    }

    /// An agent saw something. What says nothing new is not proposed.
    pub async fn observe(&self, node: NodeId, incarnation: u128, observation: Observation) -> Result<(), ControlError> {
        let Observation { mut sandboxes, templates } = observation;
        sandboxes.retain(|seen| seen.phase != Phase::Starting);
        let known = self.replica().state().nodes.get(&node).is_some_and(|record| record.templates == templates);
        if sandboxes.is_empty() && known {
            return Ok(());
        }
        for part in in_parts(sandboxes) {
            let observation = Observation { sandboxes: part, templates: templates.clone() };
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
        lock(&self.0.liveness).renew(&node, received + self.lease());
        if !record.reachable {
            let body = Body::SetNodeReachable { node: node.clone(), incarnation, reachable: true };
            self.propose(node_caller(&node), body).await?;
        }
        Ok(())
    }

    async fn propose(&self, caller: Caller, body: Body) -> Result<Reply, ControlError> {
        let command = Command { caller, time: clock::log_time(), body };
        Ok(self.replica().propose(command).await??)
    }

    /// Chooses a node and holds its room in the view until the guard is dropped.
    fn decide(&self, spec: &SandboxSpec) -> (Decision, Option<InFlight>) {
        let state = self.replica().state();
        let request = Request {
            resources: spec.resources,
            template: state.templates.get(&spec.template).map(|template| template.spec.digest),
            avoid: None,
        };
        let mut view = lock(&self.0.view);
        view.sync(&state.nodes);
        match place(&view, &request) {
            Ok(node) => {
                view.reserve(&node, spec.resources);
                let in_flight = InFlight { controller: self.clone(), node: node.clone(), resources: spec.resources };
                (Decision::Place(node), Some(in_flight))
            }
            Err(unplaceable) => (Decision::Queue(unplaceable.reason()), None),
        }
    }
}

/// Room that a decision under way holds in the view.
struct InFlight {
    controller: Controller,
    node: NodeId,
    resources: Resources,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // What was applied must be in the view before the reservation goes, or the room would be free for a moment.
        let state = self.controller.replica().state();
        let mut view = lock(&self.controller.0.view);
        view.sync(&state.nodes);
        view.release(&self.node, self.resources);
    }
}

/// What the ledger says is on the node and the agent does not hold. What is only being started may not have reached it yet.
fn missing(state: &State, node: &NodeId, held: &[Observed]) -> Vec<Observed> {
    let held: BTreeSet<&SandboxName> = held.iter().map(|seen| &seen.sandbox).collect();
    let Some(record) = state.nodes.get(node) else { return Vec::new() };
    let assigned = record.sandboxes.iter().filter(|name| !held.contains(name));
    assigned
        .filter_map(|name| state.sandboxes.get(name))
        .filter(|sandbox| !matches!(sandbox.life, Life::Starting { .. }))
        .map(|sandbox| Observed { sandbox: sandbox.name.clone(), epoch: sandbox.epoch, phase: Phase::Removed })
        .collect()
}

/// Splits what was seen so that each part fits into a log entry; at least one part, for the templates.
fn in_parts(sandboxes: Vec<Observed>) -> Vec<Vec<Observed>> {
    /// Bytes of one part: half of what an entry holds, which leaves room for names and templates.
    const MAX_BYTES: usize = 24 * 1024;
    /// Names and numbers of one observation.
    const FIXED_BYTES: usize = 200;
    let mut parts = vec![Vec::new()];
    let mut bytes = 0;
    for seen in sandboxes {
        let size = FIXED_BYTES
            + match &seen.phase {
                Phase::Exited { output_tail, .. } => output_tail.len(),
                Phase::Failed { code, message } => code.len() + message.len(),
                _ => 0,
            };
        if bytes + size > MAX_BYTES && bytes > 0 {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(part) = parts.last_mut() {
            part.push(seen);
        }
    }
    parts
}

fn node_caller(node: &NodeId) -> Caller {
    Caller { principal: node.name(), role: crate::state::command::Role::Node, tenant: None }
}

fn sandbox_of(reply: Reply) -> Result<Arc<Sandbox>, ControlError> {
    match reply {
        Reply::Sandbox(sandbox) => Ok(sandbox),
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
