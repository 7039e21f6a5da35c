//! The handle to one replica of the log.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use ::metrics::counter;
use futures::future::join_all;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{InitializeError, LinearizableReadError, RaftError};
use openraft::{Config, Instant, ReadPolicy, ServerState, SnapshotPolicy};
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Server, ServerTlsConfig};
use tracing::{error, info};
use warren_proto::client::ClientTls;
use warren_proto::ids::ReplicaId;
use warren_proto::v1::raft_service_server::RaftServiceServer;

use super::batcher::{self, Proposal};
use super::checkpoint::{Backup, CheckpointDirectory, CheckpointError};
use super::confirm;
use super::failure::Failure;
use super::hash::Hashes;
use super::identity::{Identity, IdentityError};
use super::log_store::{LogStore, OpenError};
use super::members;
use super::network::{MAX_MESSAGE_BYTES, Network};
use super::offline;
use super::origin::Origin;
use super::proposer::Proposer;
use super::service::RaftApi;
use super::state_machine::StateMachine;
use super::types::{Member, Outcome, Raft, TypeConfig};
use crate::disk::DiskUse;
use crate::metrics::names;
use crate::state::State;
use crate::state::command::Command;

/// Threads of Raft's own runtime: what the API does cannot hold up heartbeats.
const RAFT_THREADS: usize = 2;

/// Most entries that stay in the log after a checkpoint, for followers that are a little behind; at most an interval's. More
/// would let a damaged checkpoint be made up for more often, but sled's file grows with the live log.
const KEPT_AFTER_CHECKPOINT: u64 = 2_000;

/// How many checkpoint intervals a follower may lag before it is sent a checkpoint instead of entries.
const LAG_INTERVALS: u64 = 2;

/// How long one round of hearing from a quorum may take, in election timeouts.
const READ_TIMEOUT_ELECTIONS: u32 = 4;

/// A member that was heard from within this counts as reachable, for what people are shown and for who may leave. Thirty
/// heartbeats of the default: under load one that is late by an election timeout is no news.
pub const REACHABLE_WITHIN: Duration = Duration::from_secs(3);

/// What a replica must be told.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    pub id: ReplicaId,
    pub data_dir: PathBuf,
    /// Used when the data directory is empty: the first members of a new ledger, this one among them.
    pub initial_members: BTreeMap<ReplicaId, Member>,
    pub heartbeat: Duration,
    /// A silent leader is replaced after 2⅓ to 2⅔ of it: elections are randomised up to a third longer.
    pub election_timeout: Duration,
    pub tls: ClientTls,
    /// Log entries between two checkpoints.
    pub checkpoint_every: u64,
}

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(
        "the data directory of replica {0} remembers nothing, but the group knows this replica: its disk was lost or \
         replaced, or its log was removed. It must not vote again under this id. Take it out (`warrenctl server leave {0}`), \
         and start it with a new replica_id, an empty directory and `--join`"
    )]
    DiskLost(ReplicaId),
    #[error(transparent)]
    Log(#[from] OpenError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(
        "the log begins after entry {purged} and the newest whole checkpoint ends at {applied}: what lies between is \
         lost. Keep a copy of the directory, and let the replica join again, empty and under a new id"
    )]
    Gap { purged: u64, applied: u64 },
    #[error(
        "a restore or a recovery of {0} was begun and not finished: run the same command (`restore FILE` or \
         `recover-quorum`) again, it goes on where it stopped"
    )]
    Unfinished(PathBuf),
    #[error("raft configuration: {0}")]
    Config(#[from] openraft::ConfigError),
    #[error("start raft: {0}")]
    Raft(String),
    #[error("start raft's threads: {0}")]
    Threads(#[from] io::Error),
}

/// Why a command was not committed, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nothing happened, for certain.
    #[error("this replica does not lead")]
    NotLeader { leader: Option<LeaderInfo> },
    #[error("leadership was lost or the quorum did not answer: the command may or may not take effect")]
    OutcomeUnknown,
    /// Nothing happened, for certain.
    #[error("too many proposals are waiting")]
    Overloaded,
    /// Nothing happened, for certain.
    #[error("the command has {bytes} bytes, the limit is {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error("this replica is stopping")]
    Stopped,
}

/// Who leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderInfo {
    pub id: ReplicaId,
    pub api_address: String,
}

impl LeaderInfo {
    pub(super) fn new(id: Option<u64>, member: Option<&Member>) -> Option<Self> {
        Some(Self { id: ReplicaId(id?), api_address: member?.api_address.clone() })
    }
}

/// Whether this replica leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leadership {
    /// It does, and has applied the first entry of its term.
    Leader {
        term: u64,
    },
    Follower {
        leader: Option<LeaderInfo>,
    },
}

impl Leadership {
    /// Who leads, where another does.
    pub fn leader_id(&self) -> Option<ReplicaId> {
        match self {
            Self::Follower { leader: Some(leader) } => Some(leader.id),
            Self::Follower { leader: None } | Self::Leader { .. } => None,
        }
    }
}

/// What a replica knows of itself. Indexes are 0 where there is nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    pub id: ReplicaId,
    pub leader: Option<ReplicaId>,
    pub term: u64,
    pub last_log_index: u64,
    pub applied_index: u64,
    pub checkpoint_index: u64,
    /// The log begins after it.
    pub purged_index: u64,
    /// Durable syncs of the log since the start.
    pub sync_count: u64,
}

/// What a member is in the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberRole {
    Leader,
    Follower,
    Learner,
    /// A learner that waits to replace a voter.
    Standby,
}

/// A member, as this replica sees it. Only a leader knows what the others have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    pub id: ReplicaId,
    pub api_address: String,
    pub peer_address: String,
    pub role: MemberRole,
    pub matched_index: u64,
    /// Heard from within the last seconds.
    pub reachable: bool,
}

/// One replica. Clones share it.
#[derive(Clone)]
pub struct Replica(Arc<Inner>);

struct Inner {
    id: ReplicaId,
    origin: Origin,
    failure: Failure,
    hashes: Hashes,
    tls: ClientTls,
    raft: Raft,
    store: LogStore,
    checkpoints: CheckpointDirectory,
    leadership: watch::Receiver<Leadership>,
    proposals: mpsc::Sender<Proposal>,
    in_flight: Arc<Semaphore>,
    /// Told to other replicas.
    disk: Arc<OnceLock<DiskUse>>,
    confirmations: mpsc::Sender<confirm::Asker>,
    election_timeout: Duration,
    runtime: Handle,
    stop: CancellationToken,
    /// Ends with the last clone.
    _threads: Threads,
}

/// Raft's own runtime. Dropped anywhere, in asynchronous code too, where dropping a plain runtime would panic.
struct Threads(Option<Runtime>);

impl Threads {
    fn start() -> io::Result<(Self, Handle)> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RAFT_THREADS)
            .thread_name("raft")
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok((Self(Some(runtime)), handle))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica").field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn raft_config(config: &ReplicaConfig) -> Result<Config, openraft::ConfigError> {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: "warren".to_owned(),
        heartbeat_interval: ms(config.heartbeat),
        election_timeout_min: ms(config.election_timeout),
        // A follower waits for the longest of these, and then for one drawn from between them: what is drawn keeps two
        // followers apart, and a third of it does.
        election_timeout_max: ms(config.election_timeout).saturating_mul(4) / 3,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.checkpoint_every),
        // Longer than an interval, or a follower would be sent checkpoints for ever.
        replication_lag_threshold: config.checkpoint_every.saturating_mul(LAG_INTERVALS),
        max_in_snapshot_log_to_keep: KEPT_AFTER_CHECKPOINT.min(config.checkpoint_every),
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        ..Config::default()
    }
    .validate()
}

impl Replica {
    /// Opens the store, starts Raft on its own threads, and forms a new ledger with the initial members where the store is
    /// empty.
    pub async fn start(config: ReplicaConfig) -> Result<Self, StartError> {
        let raft_config = Arc::new(raft_config(&config)?);
        if offline::is_unfinished(&config.data_dir) {
            return Err(StartError::Unfinished(config.data_dir.clone()));
        }
        let known = Identity::load(&config.data_dir, config.id)?;
        // It is made after the log.
        if known.is_some() && !config.data_dir.join("log").exists() {
            return Err(StartError::DiskLost(config.id));
        }
        let (threads, runtime) = Threads::start()?;
        let opening = config.clone();
        let opened = runtime.spawn_blocking(move || open(&opening)).await;
        let (store, machine, checkpoints) = match opened {
            Ok(opened) => opened?,
            Err(error) => return Err(StartError::Raft(error.to_string())),
        };
        refuse_lost_disk(&config, &store).await?;
        let identity = Identity::load_or_create(&config.data_dir, config.id)?;
        let (states, hashes) = (machine.subscribe(), machine.hashes());
        let origin = Origin { identity, states };
        let network = Network { tls: config.tls.clone(), origin: origin.clone() };
        let (id, log) = (config.id.0, store.clone());
        let started = runtime.spawn(async move { Raft::new(id, raft_config, network, log, machine).await }).await;
        let raft =
            started.map_err(|e| StartError::Raft(e.to_string()))?.map_err(|e| StartError::Raft(e.to_string()))?;
        initialize(&raft, &config).await?;

        let (leading, leadership) = watch::channel(Leadership::Follower { leader: None });
        let (failure, stop) = (Failure::default(), CancellationToken::new());
        runtime.spawn(watch_raft(raft.clone(), leading, failure.clone(), stop.clone()));
        let (proposals, queue) = mpsc::channel(batcher::QUEUE);
        let in_flight = Arc::new(Semaphore::new(batcher::MAX_IN_FLIGHT));
        runtime.spawn(batcher::run(raft.clone(), queue, in_flight.clone()));
        let (confirmations, askers) = mpsc::channel(confirm::QUEUE);
        let (asked, limit) = (raft.clone(), config.election_timeout * READ_TIMEOUT_ELECTIONS);
        runtime.spawn(confirm::run(askers, move || {
            let raft = asked.clone();
            async move { linearizer(&raft, limit).await.map(drop) }
        }));
        Ok(Self(Arc::new(Inner {
            id: config.id,
            origin,
            failure,
            hashes,
            tls: config.tls.clone(),
            raft,
            store,
            checkpoints,
            leadership,
            proposals,
            in_flight,
            disk: Arc::default(),
            confirmations,
            election_timeout: config.election_timeout,
            runtime,
            stop,
            _threads: threads,
        })))
    }

    /// Serves the other replicas on `listener`, on Raft's own threads, until [`shutdown`](Self::shutdown).
    pub fn serve_peers(
        &self,
        listener: TcpListener,
        tls: Option<ServerTlsConfig>,
    ) -> Result<(), tonic::transport::Error> {
        let api = RaftApi {
            raft: self.0.raft.clone(),
            checkpoints: self.0.checkpoints.clone(),
            origin: self.0.origin.clone(),
            proposer: self.proposer(),
            failure: self.0.failure.clone(),
            told: Mutex::default(),
            disk: self.0.disk.clone(),
        };
        let service = RaftServiceServer::new(api)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls)?;
        }
        let (stop, failure) = (self.0.stop.clone(), self.0.failure.clone());
        self.0.runtime.spawn(async move {
            // Set here: the server's own setting does not count for connections that it is given.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let served = server.add_service(service).serve_with_incoming_shutdown(incoming, stop.cancelled());
            if let Err(error) = served.await {
                failure.report(format!("serve peers: {error}"));
            }
        });
        Ok(())
    }

    pub fn id(&self) -> ReplicaId {
        self.0.id
    }

    /// Whether this replica is in a group, as far as it knows.
    pub fn is_member(&self) -> bool {
        self.metrics().membership_config.membership().get_node(&self.0.id.0).is_some()
    }

    /// Writes a checkpoint of `state` that `restore` reads, beside this replica's own; the file goes when it is dropped.
    pub async fn back_up(&self, state: &Arc<State>) -> Result<Backup, CheckpointError> {
        let (checkpoints, state) = (self.0.checkpoints.clone(), state.clone());
        let membership = self.metrics().membership_config.as_ref().clone();
        let writing = tokio::task::spawn_blocking(move || checkpoints.export(&state, membership)).await;
        writing.map_err(|error| CheckpointError::Damaged { path: PathBuf::new(), what: error.to_string() })?
    }

    pub fn identity(&self) -> Identity {
        self.0.origin.identity
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.0.origin
    }

    /// Says why this replica cannot go on; the process is to end.
    pub fn fail(&self, cause: String) {
        self.0.failure.report(cause);
    }

    /// Why it cannot go on, if so.
    pub fn failure(&self) -> Option<String> {
        self.0.failure.cause()
    }

    /// Returns once this replica cannot go on, with the cause: Raft has stopped by itself, or somebody called [`fail`](Self::fail).
    pub async fn failed(&self) -> String {
        self.0.failure.wait().await
    }

    /// Commands that wait to be put into an entry.
    pub fn pending_proposals(&self) -> usize {
        self.proposer().waiting()
    }

    /// Lets the other replicas know how full this one's disk is, from now on. Said once.
    pub fn tell_disk(&self, disk: DiskUse) {
        let _said_before = self.0.disk.set(disk);
    }

    /// Nothing more is put into the log until what this answers is dropped: for tests of what happens behind a slow one.
    #[doc(hidden)]
    pub async fn hold_back(&self) -> impl Send + use<> {
        let all = u32::try_from(batcher::MAX_IN_FLIGHT).unwrap_or(u32::MAX);
        self.0.in_flight.clone().acquire_many_owned(all).await
    }

    /// Hashes of the states that this replica has had, newest last.
    pub fn hashes(&self) -> Vec<(u64, u128)> {
        self.0.hashes.all()
    }

    pub(super) fn tls(&self) -> &ClientTls {
        &self.0.tls
    }

    pub(super) fn raft(&self) -> &Raft {
        &self.0.raft
    }

    fn proposer(&self) -> Proposer {
        Proposer { leadership: self.0.leadership.clone(), proposals: self.0.proposals.clone() }
    }

    /// Commits a command; the answer is what `apply` made of it. Goes on when the caller goes away.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        self.proposer().propose(command).await
    }

    /// The state as of the last applied entry here.
    pub fn state(&self) -> Arc<State> {
        self.0.origin.states.borrow().clone()
    }

    /// Follows the state; a value is there before those who caused it are answered.
    pub fn watch_state(&self) -> watch::Receiver<Arc<State>> {
        self.0.origin.states.clone()
    }

    /// A state that holds everything that was acknowledged before the call. On the leader only.
    pub async fn read(&self) -> Result<Arc<State>, ProposeError> {
        let linearizer = self.linearizer().await?;
        match linearizer.await_ready(&self.0.raft).await {
            Ok(_ready) => Ok(self.state()),
            Err(_fatal) => Err(ProposeError::Stopped),
        }
    }

    /// Returns once a quorum has acknowledged this leader later than the call. Shared with others who ask meanwhile, and
    /// later by some milliseconds for that.
    pub async fn confirm_leadership(&self) -> Result<(), ProposeError> {
        let (answer, wait) = oneshot::channel();
        self.0.confirmations.try_send(answer).map_err(|_| ProposeError::Overloaded)?;
        wait.await.unwrap_or(Err(ProposeError::Stopped))
    }

    async fn linearizer(&self) -> Result<Linearizer, ProposeError> {
        linearizer(&self.0.raft, self.0.election_timeout * READ_TIMEOUT_ELECTIONS).await
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership.clone()
    }

    pub fn status(&self) -> ReplicaStatus {
        let metrics = self.metrics();
        ReplicaStatus {
            id: self.0.id,
            leader: metrics.current_leader.map(ReplicaId),
            term: metrics.current_term,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: metrics.last_applied.map_or(0, |log_id| log_id.index),
            checkpoint_index: metrics.snapshot.map_or(0, |log_id| log_id.index),
            purged_index: metrics.purged.map_or(0, |log_id| log_id.index),
            sync_count: self.0.store.sync_count(),
        }
    }

    pub(super) fn metrics(&self) -> openraft::RaftMetrics<TypeConfig> {
        self.0.raft.metrics().borrow_watched().clone()
    }

    /// The group as this replica knows it, by id.
    pub fn members(&self) -> Vec<MemberStatus> {
        let metrics = self.metrics();
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let own = self.0.id.0;
        membership
            .nodes()
            .map(|(id, member)| {
                let matched = metrics.replication.as_ref().and_then(|all| all.get(id).copied().flatten());
                let heard = metrics.heartbeat.as_ref().and_then(|all| all.get(id).copied().flatten());
                let reachable = *id == own || is_reachable(heard.map(|at| at.elapsed()), self.0.election_timeout);
                MemberStatus {
                    id: ReplicaId(*id),
                    api_address: member.api_address.clone(),
                    peer_address: member.peer_address.clone(),
                    role: match metrics.current_leader {
                        Some(leader) if leader == *id => MemberRole::Leader,
                        _ if voters.contains(id) => MemberRole::Follower,
                        _ if member.standby => MemberRole::Standby,
                        _ => MemberRole::Learner,
                    },
                    matched_index: match matched {
                        _ if *id == own => metrics.last_log_index.unwrap_or(0),
                        matched => matched.map_or(0, |log_id| log_id.index),
                    },
                    reachable,
                }
            })
            .collect()
    }

    /// Stops Raft and its server. The store is closed when the last clone goes.
    pub async fn shutdown(&self) {
        self.0.stop.cancel();
        if let Err(error) = self.0.raft.shutdown().await {
            error!(%error, "stop raft");
        }
    }
}

fn is_reachable(silent_for: Option<Duration>, election_timeout: Duration) -> bool {
    silent_for.is_some_and(|silence| silence <= REACHABLE_WITHIN.max(election_timeout))
}

type Opened = (LogStore, StateMachine, CheckpointDirectory);

/// Reads what is on disk, and makes sure that checkpoint and log meet.
fn open(config: &ReplicaConfig) -> Result<Opened, StartError> {
    let store = LogStore::open(&config.data_dir.join("log"))?;
    let checkpoints = CheckpointDirectory::open(&config.data_dir.join("checkpoints"))?;
    let machine = StateMachine::open(checkpoints.clone())?;
    // No checkpoint is older than the first vote.
    if machine.applied_index().is_some() && store.is_empty().map_err(StartError::Threads)? {
        return Err(StartError::DiskLost(config.id));
    }
    let applied = machine.applied_index().unwrap_or(0);
    match store.purged_index().map_err(StartError::Threads)? {
        Some(purged) if purged > applied => Err(StartError::Gap { purged, applied }),
        _ => Ok((store, machine, checkpoints)),
    }
}

/// Whether this replica remembers nothing although the group knows its disk, this one or another: what it had promised is gone.
/// A replica announces its disk only after it has written into its log. The other members are asked; where none answers, the group
/// is being formed, or all of it is down: then it is found out when this replica announces itself.
async fn refuse_lost_disk(config: &ReplicaConfig, store: &LogStore) -> Result<(), StartError> {
    if !store.is_empty().map_err(StartError::Threads)? {
        return Ok(());
    }
    let others = config.initial_members.iter().filter(|(id, _)| **id != config.id).map(|(_, member)| member);
    for known in join_all(others.map(|member| members::identify(member, config.id, &config.tls))).await {
        if known.is_some_and(|disk| disk != 0) {
            return Err(StartError::DiskLost(config.id));
        }
    }
    Ok(())
}

async fn initialize(raft: &Raft, config: &ReplicaConfig) -> Result<(), StartError> {
    let error = |e: String| StartError::Raft(format!("form a new ledger: {e}"));
    if config.initial_members.is_empty() || raft.is_initialized().await.map_err(|e| error(e.to_string()))? {
        return Ok(());
    }
    let members: BTreeMap<u64, Member> = config.initial_members.iter().map(|(id, m)| (id.0, m.clone())).collect();
    info!(members = ?members.keys().collect::<Vec<_>>(), "forming a new ledger");
    match raft.initialize(members).await {
        // Another member was faster, and this one has heard of it.
        Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(other) => Err(error(other.to_string())),
    }
}

type Linearizer = openraft::raft::linearizable_read::Linearizer<TypeConfig>;

/// Hears from a quorum within `limit`.
async fn linearizer(raft: &Raft, limit: Duration) -> Result<Linearizer, ProposeError> {
    match tokio::time::timeout(limit, raft.get_read_linearizer(ReadPolicy::ReadIndex)).await {
        Ok(Ok(linearizer)) => Ok(linearizer),
        Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
            Err(ProposeError::NotLeader { leader: LeaderInfo::new(forward.leader_id, forward.leader_node.as_ref()) })
        }
        Ok(Err(RaftError::Fatal(_))) => Err(ProposeError::Stopped),
        Ok(Err(RaftError::APIError(_))) | Err(_) => Err(ProposeError::NotLeader { leader: None }),
    }
}

/// Turns openraft's metrics into [`Leadership`], until Raft stops; where nobody stopped it, that is a failure.
async fn watch_raft(raft: Raft, leading: watch::Sender<Leadership>, failure: Failure, stop: CancellationToken) {
    let mut metrics = raft.metrics();
    loop {
        let now = {
            let seen = metrics.borrow_and_update();
            if let Err(fatal) = &seen.running_state
                && !stop.is_cancelled()
            {
                failure.report(format!("raft has stopped: {fatal}"));
            }
            let applied_term = seen.last_applied.map(|log_id| log_id.leader_id.term);
            if seen.state == ServerState::Leader && applied_term == Some(seen.current_term) {
                Leadership::Leader { term: seen.current_term }
            } else {
                let leader = seen.current_leader.filter(|id| *id != seen.id);
                let member = leader.and_then(|id| seen.membership_config.get_node(&id).cloned());
                Leadership::Follower { leader: LeaderInfo::new(leader, member.as_ref()) }
            }
        };
        leading.send_if_modified(|current| {
            let changed = *current != now;
            if changed && !matches!(now, Leadership::Follower { leader: None }) {
                counter!(names::LEADER_CHANGES).increment(1);
            }
            *current = now;
            changed
        });
        if metrics.changed().await.is_err() {
            leading.send_replace(Leadership::Follower { leader: None });
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_heartbeat_is_no_silence() {
        let election_timeout = Duration::from_millis(300);
        let reachable = |ms| is_reachable(Some(Duration::from_millis(ms)), election_timeout);
        assert!(reachable(0) && reachable(301) && reachable(3000));
        assert!(!reachable(3001));
        assert!(!is_reachable(None, election_timeout), "never heard from");
        assert!(is_reachable(Some(Duration::from_secs(5)), Duration::from_secs(6)), "slow by choice");
    }
}
