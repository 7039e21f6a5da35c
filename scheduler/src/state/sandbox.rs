//! A sandbox's life.
//!
//! ```text
//!  Pending ─place─▶ Starting ─running─▶ Running ─exited─▶ Stopped{node} ─removed─▶ Stopped
//!     ▲                │ failed            │                  │
//!     └── attempts left┤                   │ lost             │ delete
//!                      └─ none ─▶ Failed ◀─┘                  ▼
//!     any state on a node ─────────delete──────────────▶ Stopping ─removed─▶ gone
//! ```
//!
//! A sandbox holds its node's resources from its placement until the node confirms that nothing is left of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use warren_proto::ids::{Epoch, NodeId, SandboxName, TemplateId};
use warren_proto::units::Resources;

use super::command::{Decision, LogTime, Observed, Phase, RequestKey};
use super::event::EventKind;
use super::outcome::{Rejected, Reply};
use super::tenant::{MAX_TENANTS, Tenant};
use super::{Context, State, node, template};

/// How often a sandbox is started before it counts as failed: twice more than once, on other nodes where there are any.
pub const MAX_START_ATTEMPTS: u32 = 3;

/// How long the record of an ended sandbox is kept, in ms of log time: long enough to read why it ended.
pub const ENDED_RETENTION_MS: u64 = 60 * 60 * 1000;

/// Most sandboxes of a region, in any state (section 7 of the design gives each at most 1 KiB).
pub const MAX_SANDBOXES: u64 = 2_000_000;

/// What a sandbox should be, as its creator says. Immutable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    pub template: TemplateId,
    /// Empty: the template's default.
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// Empty: the template's.
    pub working_directory: String,
    pub labels: BTreeMap<String, String>,
    pub resources: Resources,
    /// Most processes and threads.
    pub pids: u64,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exit {
    /// 128 + signal where a signal ended it.
    pub code: i32,
    /// 0 where none did.
    pub signal: i32,
    pub oom_killed: bool,
}

/// How a sandbox's main process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    pub exit: Exit,
    pub at: LogTime,
    /// When it had begun to run; `None` where it was never seen running.
    pub started: Option<LogTime>,
    pub output_tail: Vec<u8>,
}

/// What blocks a pending sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PendingCode {
    /// No node is registered and reachable.
    NoNodes,
    ShortOfCpu,
    ShortOfMemory,
    ShortOfDisk,
    /// It exceeds the whole capacity of every node.
    TooLarge,
    /// The chosen node was taken meanwhile; it is placed again at once.
    Conflict,
    /// The last start failed; it is tried again.
    StartFailed,
}

/// Why a sandbox waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingReason {
    pub code: PendingCode,
    pub message: String,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    Pending {
        reason: PendingReason,
        since: LogTime,
    },
    Starting {
        node: NodeId,
        since: LogTime,
    },
    Running {
        node: NodeId,
        since: LogTime,
    },
    /// Being deleted.
    Stopping {
        node: NodeId,
        since: LogTime,
    },
    /// Its main process ended; `node` still holds something of it, unless `None`.
    Stopped {
        node: Option<NodeId>,
        ending: Ending,
    },
    Failed {
        code: String,
        message: String,
        at: LogTime,
    },
}

impl Life {
    /// How many kinds there are.
    pub const KINDS: usize = 6;

    /// The node whose resources it holds.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Starting { node, .. } | Self::Running { node, .. } | Self::Stopping { node, .. } => Some(node),
            Self::Stopped { node, .. } => node.as_ref(),
            Self::Pending { .. } | Self::Failed { .. } => None,
        }
    }

    /// When it ended, if it has and no node holds it any more: from then on its record is only kept to be read.
    pub fn ended(&self) -> Option<LogTime> {
        match self {
            Self::Stopped { node: None, ending } => Some(ending.at),
            Self::Failed { at, .. } => Some(*at),
            _ => None,
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pending { .. } => "PENDING",
            Self::Starting { .. } => "STARTING",
            Self::Running { .. } => "RUNNING",
            Self::Stopping { .. } => "STOPPING",
            Self::Stopped { .. } => "STOPPED",
            Self::Failed { .. } => "FAILED",
        }
    }
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    pub name: SandboxName,
    pub spec: Arc<SandboxSpec>,
    pub life: Life,
    pub epoch: Epoch,
    /// Starts that failed.
    pub failed_starts: u32,
    /// Where the last start failed: the next one prefers another node.
    pub avoid: Option<NodeId>,
    pub created: LogTime,
    pub revision: u64,
}

pub(super) fn create(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    spec: &SandboxSpec,
    decision: &Decision,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(Some(&name.tenant));
    if let Some(answer) = state.requests.lookup(&scope, request, state.log_time)? {
        return Ok(answer);
    }
    if let Some(existing) = state.sandboxes.get(name) {
        if *existing.spec != *spec {
            return Err(Rejected::SandboxExists(name.clone()));
        }
        let reply = Reply::Sandbox(existing.clone());
        state.requests.remember(&scope, request, state.log_time, &reply);
        return Ok(reply);
    }
    if !state.templates.contains_key(&spec.template) {
        return Err(Rejected::TemplateNotFound(spec.template.clone()));
    }
    if state.sandboxes.len() as u64 >= MAX_SANDBOXES {
        return Err(Rejected::LimitReached { what: "the table of sandboxes", limit: MAX_SANDBOXES });
    }
    count_in_tenant(state, name)?;
    template::count_user(state, &spec.template, 1);
    let mut sandbox = Sandbox {
        name: name.clone(),
        spec: Arc::new(spec.clone()),
        life: Life::Pending { reason: conflict(), since: state.log_time },
        epoch: state.epoch_floor,
        failed_starts: 0,
        avoid: None,
        created: state.log_time,
        revision: context.index,
    };
    match decision {
        Decision::Place(node) => {
            let _placed_or_queued = occupy(state, context, &mut sandbox, node);
        }
        Decision::Queue(reason) => {
            sandbox.life = Life::Pending { reason: reason.clone(), since: state.log_time };
        }
    }
    let sandbox = store(state, context, sandbox, EventKind::Created);
    let reply = Reply::Sandbox(sandbox);
    state.requests.remember(&scope, request, state.log_time, &reply);
    Ok(reply)
}

fn conflict() -> PendingReason {
    PendingReason {
        code: PendingCode::Conflict,
        message: "the chosen node was taken by another sandbox meanwhile; it is being placed again".to_owned(),
    }
}

fn count_in_tenant(state: &mut State, name: &SandboxName) -> Result<(), Rejected> {
    if let Some(tenant) = state.tenants.get_mut(&name.tenant) {
        tenant.sandboxes = tenant.sandboxes.saturating_add(1);
        return Ok(());
    }
    if state.tenants.len() as u64 >= MAX_TENANTS {
        return Err(Rejected::LimitReached { what: "the table of tenants", limit: MAX_TENANTS });
    }
    state.tenants.insert(name.tenant.clone(), Tenant { created: state.log_time, sandboxes: 1 });
    Ok(())
}

/// Puts a pending sandbox on a node, under its next epoch, if the node is reachable and has room.
fn occupy(state: &mut State, context: &Context, sandbox: &mut Sandbox, id: &NodeId) -> bool {
    let reachable = state.nodes.get(id).is_some_and(|node| node.reachable);
    if !reachable || !node::hold(state, context, id, &sandbox.name, sandbox.spec.resources) {
        return false;
    }
    sandbox.epoch = sandbox.epoch.next();
    sandbox.life = Life::Starting { node: id.clone(), since: state.log_time };
    true
}

pub(super) fn place(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    epoch: Epoch,
    id: &NodeId,
) -> Result<Reply, Rejected> {
    let mut sandbox = pending(state, name, epoch)?;
    if !state.nodes.contains_key(id) {
        return Err(Rejected::NodeNotFound(id.clone()));
    }
    if !occupy(state, context, &mut sandbox, id) {
        return Err(Rejected::DoesNotFit { sandbox: name.clone(), node: id.clone() });
    }
    Ok(Reply::Sandbox(store(state, context, sandbox, EventKind::Updated)))
}

pub(super) fn explain(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    epoch: Epoch,
    reason: &PendingReason,
) -> Result<Reply, Rejected> {
    let mut sandbox = pending(state, name, epoch)?;
    if let Life::Pending { reason: old, .. } = &mut sandbox.life {
        *old = reason.clone();
    }
    Ok(Reply::Sandbox(store(state, context, sandbox, EventKind::Updated)))
}

/// A copy of the sandbox, if it waits at this epoch.
fn pending(state: &State, name: &SandboxName, epoch: Epoch) -> Result<Sandbox, Rejected> {
    let sandbox = get(state, name)?;
    if sandbox.epoch != epoch {
        return Err(Rejected::StaleEpoch { sandbox: name.clone(), seen: sandbox.epoch, got: epoch });
    }
    match sandbox.life {
        Life::Pending { .. } => Ok(Sandbox::clone(sandbox)),
        ref other => Err(Rejected::WrongState { sandbox: name.clone(), state: other.kind() }),
    }
}

fn get<'a>(state: &'a State, name: &SandboxName) -> Result<&'a Arc<Sandbox>, Rejected> {
    state.sandboxes.get(name).ok_or_else(|| Rejected::SandboxNotFound(name.clone()))
}

pub(super) fn delete(
    state: &mut State,
    context: &Context,
    name: &SandboxName,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    let scope = context.scope(Some(&name.tenant));
    if let Some(answer) = state.requests.lookup(&scope, request, state.log_time)? {
        return Ok(answer);
    }
    let mut sandbox = Sandbox::clone(get(state, name)?);
    let reply = match (&sandbox.life, sandbox.life.node().cloned()) {
        (Life::Stopping { .. }, _) => Reply::Sandbox(Arc::new(sandbox)),
        (_, Some(id)) => {
            sandbox.life = Life::Stopping { node: id.clone(), since: state.log_time };
            node::reassign(state, context, &id);
            Reply::Sandbox(store(state, context, sandbox, EventKind::Updated))
        }
        (_, None) => Reply::Sandbox(forget(state, context, &sandbox)),
    };
    state.requests.remember(&scope, request, state.log_time, &reply);
    Ok(reply)
}

/// What a node saw of a sandbox that it holds in the ledger too; anything else is out of date and changes nothing.
pub(super) fn observe(state: &mut State, context: &Context, id: &NodeId, seen: &Observed) {
    let Some(sandbox) = held(state, id, &seen.sandbox).filter(|s| s.epoch == seen.epoch) else { return };
    match &seen.phase {
        Phase::Starting | Phase::Orphan => {}
        Phase::Running => observe_running(state, context, sandbox, id),
        Phase::Exited { exit, output_tail } => observe_exit(state, context, sandbox, id, *exit, output_tail),
        Phase::Failed { code, message } => observe_failure(state, context, sandbox, id, code, message),
        Phase::Removed => observe_removed(state, context, sandbox, id),
    }
}

/// A copy of the sandbox, if it holds this node.
fn held(state: &State, id: &NodeId, name: &SandboxName) -> Option<Sandbox> {
    let sandbox = state.sandboxes.get(name)?;
    (sandbox.life.node() == Some(id)).then(|| Sandbox::clone(sandbox))
}

fn observe_running(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId) {
    if matches!(sandbox.life, Life::Starting { .. }) {
        sandbox.life = Life::Running { node: id.clone(), since: state.log_time };
        sandbox.avoid = None;
        store(state, context, sandbox, EventKind::Updated);
    }
}

fn observe_exit(
    state: &mut State,
    context: &Context,
    mut sandbox: Sandbox,
    id: &NodeId,
    exit: Exit,
    output_tail: &[u8],
) {
    let started = match &sandbox.life {
        Life::Starting { .. } => None,
        Life::Running { since, .. } => Some(*since),
        _ => return,
    };
    let ending = Ending { exit, at: state.log_time, started, output_tail: output_tail.to_vec() };
    sandbox.life = Life::Stopped { node: Some(id.clone()), ending };
    node::reassign(state, context, id);
    store(state, context, sandbox, EventKind::Updated);
}

fn observe_failure(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId, code: &str, message: &str) {
    if !matches!(sandbox.life, Life::Starting { .. } | Life::Running { .. }) {
        return observe_removed(state, context, sandbox, id);
    }
    node::release(state, context, id, &sandbox.name, sandbox.spec.resources);
    sandbox.failed_starts = sandbox.failed_starts.saturating_add(1);
    sandbox.avoid = Some(id.clone());
    let may_retry = matches!(sandbox.life, Life::Starting { .. }) && sandbox.failed_starts < MAX_START_ATTEMPTS;
    sandbox.life = if may_retry {
        let message = format!("start {} failed on node {id}: {message}", sandbox.failed_starts);
        let reason = PendingReason { code: PendingCode::StartFailed, message };
        Life::Pending { reason, since: state.log_time }
    } else {
        Life::Failed { code: code.to_owned(), message: format!("on node {id}: {message}"), at: state.log_time }
    };
    store(state, context, sandbox, EventKind::Updated);
}

fn observe_removed(state: &mut State, context: &Context, mut sandbox: Sandbox, id: &NodeId) {
    node::release(state, context, id, &sandbox.name, sandbox.spec.resources);
    match &mut sandbox.life {
        Life::Stopping { .. } => {
            forget(state, context, &sandbox);
            return;
        }
        Life::Stopped { node, .. } => *node = None,
        _ => {
            let message = format!("node {id} no longer has it, and nobody asked it to remove it");
            sandbox.life = Life::Failed { code: "LOST".to_owned(), message, at: state.log_time };
        }
    }
    store(state, context, sandbox, EventKind::Updated);
}

/// A node's reachability changed: what the sandbox's state means to its watchers did too.
pub(super) fn touch(state: &mut State, context: &Context, name: &SandboxName) {
    if let Some(sandbox) = state.sandboxes.get(name) {
        let sandbox = Sandbox::clone(sandbox);
        store(state, context, sandbox, EventKind::Updated);
    }
}

pub(super) fn forget_ended(state: &mut State, context: &Context, names: &[SandboxName]) -> Result<Reply, Rejected> {
    for name in names {
        let Some(sandbox) = state.sandboxes.get(name).cloned() else { continue };
        let due = sandbox.life.ended().map(|at| at.plus_ms(ENDED_RETENTION_MS));
        if due.is_some_and(|due| due <= state.log_time) {
            forget(state, context, &sandbox);
        }
    }
    Ok(Reply::Done)
}

/// Writes a sandbox's new state, its indexes and its event.
fn store(state: &mut State, context: &Context, mut sandbox: Sandbox, kind: EventKind) -> Arc<Sandbox> {
    sandbox.revision = context.index;
    let sandbox = Arc::new(sandbox);
    state.put_sandbox(sandbox.clone());
    state.events.push(context.index, kind, sandbox.clone());
    sandbox
}

/// Removes a sandbox that holds no node any more.
fn forget(state: &mut State, context: &Context, sandbox: &Sandbox) -> Arc<Sandbox> {
    let last = Arc::new(Sandbox { revision: context.index, ..sandbox.clone() });
    state.remove_sandbox(&sandbox.name);
    state.epoch_floor = state.epoch_floor.max(sandbox.epoch);
    template::count_user(state, &sandbox.spec.template, -1);
    if let Some(tenant) = state.tenants.get_mut(&sandbox.name.tenant) {
        tenant.sandboxes = tenant.sandboxes.saturating_sub(1);
        if tenant.sandboxes == 0 {
            state.tenants.remove(&sandbox.name.tenant);
        }
    }
    state.events.push(context.index, EventKind::Deleted, last.clone());
    last
}
