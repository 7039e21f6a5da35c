//! A sandbox's life.
//!
//! ```text
//!  Pending ─place─▶ Starting ─running─▶ Running ─exited─▶ Stopped{node} ─removed─▶ Stopped
//!     ▲ ▲              │ failed            │                  │      └─restart policy─▶ Pending
//!     │ └ attempts left┤                   │ lost             │ delete
//!     │                └─ none ─▶ Failed   └──────▶ Lost      ▼
//!     └─ node down, frozen          any state on a node ─▶ Stopping ─removed─▶ gone
//!  Pending ─waited too long─▶ Cancelled
//! ```
//!
//! A sandbox holds its node's resources from its placement until the node confirms that nothing is left of it, or is forgotten.

mod change;
mod create;
mod observe;
mod weight;

use std::sync::Arc;

use warren_proto::ids::{Epoch, NodeId, SandboxName, TemplateId};
use warren_proto::units::Resources;

use super::command::LogTime;
use super::event::{Event, EventKind, Position};
use super::gpu::GpuHolds;
use super::level::Level;
use super::node::Holding;
use super::pairs::Pairs;
use super::settings::{Egress, Expiry, Isolation, Restart, Settings};
use super::{Context, State, template, tenant};
pub(super) use change::{delete, end_due, explain, forget_ended, give_up, place, requeue, touch, update};
pub(super) use create::{create, create_batch};
pub(super) use observe::observe;

/// How often a sandbox is started before it counts as failed: twice more than once, on other nodes where there are any.
pub const MAX_START_ATTEMPTS: u32 = 3;

/// How long the record of an ended sandbox is kept, in ms of log time: long enough to read why it ended.
pub const ENDED_RETENTION_MS: u64 = 60 * 60 * 1000;

/// Most sandboxes of a region, in any state (section 7 of the design gives each at most 1 KiB).
pub const MAX_SANDBOXES: u64 = 2_000_000;

/// First wait before a failed start is tried again, or an ended sandbox restarted, in ms; each further one doubles it.
const FIRST_BACKOFF_MS: u64 = 500;

/// Longest such wait: five minutes, as Kubernetes waits at most between restarts of a container.
const MAX_BACKOFF_MS: u64 = 5 * 60 * 1000;

/// What a sandbox should be, as its creator says. Immutable; what may change later stands in the sandbox's own settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    pub template: TemplateId,
    /// Empty: the template's default.
    pub command: Vec<String>,
    pub environment: Pairs,
    /// Variables whose values are sealed: only the schedulers' key opens them.
    pub secrets: Pairs<Box<[u8]>>,
    /// Empty: the template's.
    pub working_directory: String,
    pub resources: Resources,
    /// Most processes and threads.
    pub pids: u64,
    pub restart: Restart,
    pub isolation: Isolation,
    /// How long it may wait for a node, in ms; `None`: for ever.
    pub queue_timeout_ms: Option<u64>,
    /// As it was created with.
    pub settings: Settings,
}

impl SandboxSpec {
    /// The first level that knows all that this says.
    pub fn level(&self) -> Level {
        let Settings { labels: _, annotations, expiry, egress, priority } = &self.settings;
        let of_first = self.secrets.is_empty()
            && self.restart == Restart::Never
            && self.isolation == Isolation::Keep
            && self.queue_timeout_ms.is_none()
            && self.resources.gpus.0 == 0
            && annotations.is_empty()
            && *expiry == Expiry::Never
            && *egress == Egress::None
            && *priority == 0;
        if of_first { Level::FIRST } else { Level::SECOND }
    }
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
    ShortOfGpus,
    /// An operator paused placement in the region.
    Paused,
    /// Its main process ended, and its restart policy starts it again.
    Restarting,
    /// Its node went down, and it freezes on isolation: it is placed elsewhere.
    NodeDown,
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
        /// Not placed before.
        not_before: LogTime,
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
        ending: Box<Ending>,
    },
    /// It came to an end that it did not choose.
    Failed {
        kind: FailedKind,
        code: Box<str>,
        message: Box<str>,
        at: LogTime,
    },
}

/// How a sandbox came to an end that it did not choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailedKind {
    /// It could not be started.
    Failed,
    /// It waited too long for a node.
    Cancelled,
    /// Its node lost it, or was forgotten.
    Lost,
}

impl Life {
    /// Every [`kind`](Self::kind) that there is.
    pub const KINDS: [&'static str; 8] =
        ["PENDING", "STARTING", "RUNNING", "STOPPING", "STOPPED", "FAILED", "CANCELLED", "LOST"];

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
            Self::Failed { kind: FailedKind::Failed, .. } => "FAILED",
            Self::Failed { kind: FailedKind::Cancelled, .. } => "CANCELLED",
            Self::Failed { kind: FailedKind::Lost, .. } => "LOST",
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
    /// What an update made of the spec's settings.
    pub updated: Option<Arc<Settings>>,
    /// Starts that failed since it last ran.
    pub failed_starts: u32,
    /// How often its restart policy started it again.
    pub restarts: u32,
    /// Devices that it holds, while a node holds it.
    pub gpus: GpuHolds,
    /// Where the last start failed: the next one prefers another node.
    pub avoid: Option<NodeId>,
    pub created: LogTime,
    pub revision: u64,
}

impl Sandbox {
    /// What it holds of its node.
    pub fn holding(&self) -> Holding {
        Holding { resources: self.spec.resources, gpus: self.gpus.clone() }
    }

    /// What holds now.
    pub fn settings(&self) -> &Settings {
        self.updated.as_deref().unwrap_or(&self.spec.settings)
    }

    /// When it ends by itself.
    pub fn deadline(&self) -> Option<LogTime> {
        match self.settings().expiry {
            Expiry::Never => None,
            Expiry::At(at) => Some(at),
            Expiry::After(ms) => Some(self.created.plus_ms(ms)),
        }
    }

    /// When it has waited too long for a node.
    pub fn queue_deadline(&self) -> Option<LogTime> {
        match &self.life {
            Life::Pending { since, .. } => self.spec.queue_timeout_ms.map(|ms| since.plus_ms(ms)),
            _ => None,
        }
    }

    /// When it ends by itself.
    pub fn due(&self) -> Option<LogTime> {
        let over = matches!(self.life, Life::Stopping { .. }) || self.life.ended().is_some();
        [self.deadline(), self.queue_deadline()].into_iter().flatten().min().filter(|_| !over)
    }

    /// Until when it is not to be placed, where its starts have failed.
    pub fn backs_off_until(&self) -> Option<LogTime> {
        match &self.life {
            Life::Pending { not_before, .. } => Some(*not_before).filter(|at| *at > LogTime::default()),
            _ => None,
        }
    }

    /// Where it stands in its tenant's queue: the higher priority first, then the older.
    pub fn rank(&self) -> (u8, LogTime) {
        (u8::MAX.saturating_sub(self.settings().priority), self.created)
    }
}

/// Waits from now on, and may be placed at once.
fn pending(state: &State, code: PendingCode, message: &str) -> Life {
    let reason = PendingReason { code, message: message.to_owned() };
    Life::Pending { reason, since: state.log_time, not_before: LogTime::default() }
}

/// Waits from now on, and a while before it is placed: `times` says how often it has waited like this.
fn backing_off(state: &State, code: PendingCode, message: String, times: u32) -> Life {
    let doublings = times.saturating_sub(1).min(20);
    let wait = FIRST_BACKOFF_MS.saturating_mul(1 << doublings).min(MAX_BACKOFF_MS);
    let not_before = if state.level >= Level::SECOND { state.log_time.plus_ms(wait) } else { LogTime::default() };
    Life::Pending { reason: PendingReason { code, message }, since: state.log_time, not_before }
}

fn lost(state: &State, code: &str, message: String) -> Life {
    Life::Failed { kind: FailedKind::Lost, code: code.into(), message: message.into(), at: state.log_time }
}

/// A copy of the sandbox, if it holds this node.
fn held(state: &State, id: &NodeId, name: &SandboxName) -> Option<Sandbox> {
    let sandbox = state.sandboxes.get(name)?;
    (sandbox.life.node() == Some(id)).then(|| Sandbox::clone(sandbox))
}

/// Writes a sandbox's new state, its indexes and its event.
fn store(state: &mut State, context: &Context, sandbox: Sandbox, kind: EventKind) -> Arc<Sandbox> {
    let (sandbox, before) = put(state, context, sandbox);
    let unreachable_before = before.as_deref().is_some_and(|before| state.is_unreachable(before));
    tell(state, context, kind, sandbox.clone(), before, unreachable_before);
    sandbox
}

/// As it is now, and as it was.
fn put(state: &mut State, context: &Context, mut sandbox: Sandbox) -> (Arc<Sandbox>, Option<Arc<Sandbox>>) {
    sandbox.revision = context.index;
    let sandbox = Arc::new(sandbox);
    let before = state.put_sandbox(sandbox.clone());
    (sandbox, before)
}

/// Writes an event: what watches will say of a change.
fn tell(
    state: &mut State,
    context: &Context,
    kind: EventKind,
    sandbox: Arc<Sandbox>,
    before: Option<Arc<Sandbox>>,
    unreachable_before: bool,
) {
    let unreachable = state.is_unreachable(&sandbox);
    let event = Event { position: Position::default(), kind, sandbox, before, unreachable, unreachable_before };
    state.events.push(context.index, event);
}

/// Removes a sandbox that holds no node any more.
fn forget(state: &mut State, context: &Context, sandbox: &Sandbox) -> Arc<Sandbox> {
    let last = Arc::new(Sandbox { revision: context.index, ..sandbox.clone() });
    let before = state.remove_sandbox(&sandbox.name);
    let unreachable_before = before.as_deref().is_some_and(|before| state.is_unreachable(before));
    state.epoch_floor = state.epoch_floor.max(sandbox.epoch);
    template::count_user(state, &sandbox.spec.template, -1);
    tenant::drop_empty(state, &sandbox.name.tenant);
    tell(state, context, EventKind::Deleted, last.clone(), before, unreachable_before);
    last
}
