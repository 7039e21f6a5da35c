//! Makes the host what the assignment says: carries out what `reconcile` asks for, and is the only caller of
//! `Driver::{start, remove, freeze, thaw}`.
//!
//! The model (assignment and what is held) lives behind one lock that is never held across an await. Each sandbox has at most
//! one action under way, in a task of its own; when it ends the model is changed and `reconcile` is asked again. A second
//! task waits for the main process. What a driver refuses is tried again with a growing pause, except a start, which is
//! reported failed.
//!
//! children: `model` (what is known), `work` (one action), `start`, `watch` (waits for main processes), `gate` (what the fence is told).

mod gate;
mod model;
mod start;
mod watch;
mod work;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use warren_proto::ids::{Digest, Generation, SandboxName};

use crate::assignment::{Outcome, Update};
use crate::changes::{Changes, Listener};
use crate::clock::BootInstant;
use crate::driver::{Driver, DriverError, InstanceKey, Presence};
use crate::drivers::Drivers;
use crate::fence::Fence;
use crate::journal::{Entry, Journal, JournalError, Opened};
use crate::reconcile::{self, Action, Held, Instance, Phase};
use crate::templates::fetch::Fetcher;
use gate::Gate;
use model::Model;
use work::Done;

/// Starts at once: a runtime's start is mostly work of the host's CPUs, and more only make each one slower.
const MAX_STARTS: usize = 8;

/// Removals, freezes and thaws at once.
const MAX_OTHERS: usize = 16;

/// How long a stopping agent waits for what its drivers are doing; what is cut off is a remnant for the next one.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Why a supervisor cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("driver `{driver}` cannot list its sandboxes: {source}")]
    List { driver: &'static str, source: DriverError },
}

/// Runs the node's sandboxes. Clones share it.
#[derive(Debug, Clone)]
pub struct Supervisor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    drivers: Drivers,
    fetcher: Fetcher,
    journal: Journal,
    changes: Changes,
    starts: Semaphore,
    others: Semaphore,
    stopping: CancellationToken,
    tasks: TaskTracker,
    model: Mutex<Model>,
}

/// What the node holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub generation: Generation,
    pub reports: BTreeMap<InstanceKey, Phase>,
    pub templates: Vec<Digest>,
}

impl Supervisor {
    /// Takes over what the host and the journal hold, whichever agent left it there.
    pub async fn adopt(
        drivers: Drivers,
        fetcher: Fetcher,
        opened: Opened,
        changes: Changes,
        fence: Option<Fence>,
    ) -> Result<Self, SuperviseError> {
        let Opened { journal, entries, forgot } = opened;
        let mut held: BTreeMap<SandboxName, Held> = BTreeMap::new();
        for (sandbox, Entry { record, foreign }) in entries {
            held.insert(sandbox, Held { record: Some(record), foreign, ..Held::default() });
        }
        for driver in drivers.all() {
            let name = driver.name();
            let listed = driver.list().await.map_err(|source| SuperviseError::List { driver: name, source })?;
            for (key, presence) in listed {
                let (fenced, egress) = (driver.is_fenced(&key), driver.egress(&key));
                let instance = Instance { driver: name.to_owned(), presence, fenced, egress };
                held.entry(key.sandbox).or_default().instances.insert(key.epoch, instance);
            }
        }
        let mut learnt = Vec::new();
        for (sandbox, held) in &mut held {
            let before = held.record.clone();
            held.adopt();
            if let Some(record) = held.record.as_ref().filter(|record| before.as_ref() != Some(record)) {
                learnt.push((sandbox.clone(), Entry { record: record.clone(), foreign: held.foreign }));
            }
        }
        journal.put(learnt).await?;
        let inner = Inner {
            drivers,
            fetcher,
            journal,
            changes,
            starts: Semaphore::new(MAX_STARTS),
            others: Semaphore::new(MAX_OTHERS),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            model: Mutex::new(Model { held, forgot, gate: Gate::new(fence), ..Model::default() }),
        };
        let supervisor = Self(Arc::new(inner));
        supervisor.take_up();
        Ok(supervisor)
    }

    /// Takes an update of the assignment, which a session opened at `session` brought, and begins what it asks for.
    pub fn apply(&self, update: Update, session: BootInstant) -> Outcome {
        let mut model = self.model();
        let whole = matches!(update, Update::Full { .. });
        let outcome = model.assignment.apply(update);
        if outcome == Outcome::Applied {
            if whole {
                model.gate.assigned(session);
                self.remember(&mut model);
            }
            model.know_the_named();
            model.call_off_obsolete_starts();
            self.extend_gate(&mut model);
            self.settle(&mut model);
            drop(model);
            self.0.changes.ring();
        }
        outcome
    }

    /// The leader granted a lease until `until` in a session that was opened at `session`.
    pub fn leased(&self, until: BootInstant, session: BootInstant) {
        let mut model = self.model();
        model.gate.leased(until, session);
        self.extend_gate(&mut model);
    }

    /// Whether, after a lapse of the lease, a session from before it does not do: what is fenced may have moved meanwhile.
    /// `lapsed`: a lease of this agent lapsed since the session was opened; that of an earlier agent the gate knows.
    pub fn needs_new_session(&self, opened: BootInstant, lapsed: bool) -> bool {
        let model = self.model();
        let from_before = lapsed || model.gate.outlasts(opened);
        from_before && model.gate.is_closed(BootInstant::now()) && model.is_fenced()
    }

    /// The node belongs to another ledger from now on, restored from the one before: what is here is that one's until this
    /// one names it. Durable once this returns.
    pub async fn change_ledger(&self) -> Result<(), JournalError> {
        let entries = self.model().disown();
        self.0.journal.put(entries).await
    }

    /// What the leader should know now.
    pub fn observe(&self) -> Snapshot {
        let model = self.model();
        Snapshot {
            generation: model.assignment.generation(),
            reports: reconcile::report_all(&model.assignment, &model.held),
            templates: self.0.fetcher.store.digests(),
        }
    }

    pub fn listen(&self) -> Listener {
        self.0.changes.listen()
    }

    /// The driver of an instance that is here and not being removed.
    pub fn driver_of(&self, key: &InstanceKey) -> Option<Arc<dyn Driver>> {
        let model = self.model();
        let held = model.held.get(&key.sandbox)?;
        let instance = held.instances.get(&key.epoch)?;
        let going = held.busy == Some(Action::Remove(key.epoch)) || instance.presence == Presence::Remnant;
        if going { None } else { self.0.drivers.get(Some(&instance.driver)) }
    }

    /// All instances that are here, running or not.
    pub fn instances(&self) -> Vec<(InstanceKey, Arc<dyn Driver>)> {
        let model = self.model();
        let keys = model.held.iter().flat_map(|(sandbox, held)| {
            held.instances.keys().map(|epoch| InstanceKey { sandbox: sandbox.clone(), epoch: *epoch })
        });
        let keys: Vec<InstanceKey> = keys.collect();
        drop(model);
        keys.into_iter().filter_map(|key| self.driver_of(&key).map(|driver| (key, driver))).collect()
    }

    /// Begins nothing more and waits, within bounds, for what drivers are doing. Sandboxes run on.
    pub async fn stop(&self) {
        self.0.stopping.cancel();
        self.model().watches.clear();
        self.0.tasks.close();
        if tokio::time::timeout(STOP_PATIENCE, self.0.tasks.wait()).await.is_err() {
            tracing::warn!("a driver did not finish in time; the next agent clears up what it was doing");
        }
        let journal = self.0.journal.clone();
        // It does not panic.
        let _ = tokio::task::spawn_blocking(move || journal.close()).await;
    }

    /// After a journal that forgot: what a whole assignment names and nobody lists may have run here at that epoch.
    fn remember(&self, model: &mut Model) {
        if !std::mem::take(&mut model.forgot) {
            return;
        }
        let doubtful = model.doubt_the_unknown();
        let journal = self.0.journal.clone();
        self.0.tasks.spawn(async move {
            // Marked until it is on disk: the next agent doubts again.
            let written = match journal.put(doubtful).await {
                Ok(()) => tokio::task::spawn_blocking(move || journal.remembers()).await.expect("does not panic"),
                Err(error) => Err(std::io::Error::other(error)),
            };
            if let Err(error) = written {
                tracing::error!(%error, "the journal stays marked as one that forgot");
            }
        });
    }

    fn take_up(&self) {
        let mut model = self.model();
        let found: Vec<(InstanceKey, String)> = model
            .held
            .iter()
            .flat_map(|(sandbox, held)| held.instances.iter().map(move |(epoch, instance)| (sandbox, epoch, instance)))
            .filter(|(_, _, instance)| matches!(instance.presence, Presence::Running | Presence::Frozen))
            .map(|(s, e, instance)| (InstanceKey { sandbox: s.clone(), epoch: *e }, instance.driver.clone()))
            .collect();
        if !model.held.is_empty() {
            tracing::info!(sandboxes = model.held.len(), running = found.len(), "took over what was here");
        }
        for (key, driver) in found {
            self.watch(&mut model, key, &driver);
        }
        self.settle(&mut model);
    }

    /// Begins every action that is due.
    fn settle(&self, model: &mut Model) {
        let closed = model.gate.is_closed(BootInstant::now());
        for (sandbox, action) in reconcile::diff(&model.assignment, &model.held, closed) {
            self.launch(model, sandbox, action);
        }
    }

    /// Tells the fence of the last grant, where it may be told; what waited for that begins.
    fn extend_gate(&self, model: &mut Model) {
        let now = BootInstant::now();
        if model.gate.may_extend(now, || model.is_fenced(), || model.is_settled()) {
            let opens = model.gate.is_closed(now);
            model.gate.extend();
            if opens {
                self.settle(model);
            }
        }
    }

    /// Begins the next action of one sandbox.
    fn settle_one(&self, model: &mut Model, sandbox: &SandboxName) {
        let nothing = Held::default();
        let held = model.held.get(sandbox).unwrap_or(&nothing);
        let goal = model.assignment.goal(sandbox);
        let closed = model.gate.is_closed(BootInstant::now());
        if let Some(action) = reconcile::next_action(goal, model.assignment.is_known(), held, closed) {
            self.launch(model, sandbox.clone(), action);
        }
    }

    fn launch(&self, model: &mut Model, sandbox: SandboxName, action: Action) {
        if self.0.stopping.is_cancelled() {
            return;
        }
        let Some(job) = model.job(&sandbox, action) else { return };
        model.held.entry(sandbox.clone()).or_default().busy = Some(action);
        let this = self.clone();
        self.0.tasks.spawn(async move { this.perform(sandbox, action, job).await });
    }

    /// Records how an action ended and begins the next one.
    fn conclude(&self, sandbox: &SandboxName, action: Action, done: Done) {
        let mut model = self.model();
        if let Done::Started { driver, .. } = &done
            && let Action::Start(epoch) = action
        {
            self.watch(&mut model, InstanceKey { sandbox: sandbox.clone(), epoch }, driver);
        }
        model.conclude(sandbox, action, done);
        self.settle_one(&mut model, sandbox);
        self.extend_gate(&mut model);
        drop(model);
        self.0.changes.ring();
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        // The model is changed in whole steps; a panic between them leaves it as it was.
        self.0.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
