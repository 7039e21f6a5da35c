//! The replicated log, from outside: openraft's own suite on the store, and replicas of one process over loopback.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use openraft::StorageError;
use openraft::storage::RaftLogStorage;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;
use tokio::net::TcpListener;
use warren_proto::client::ClientTls;
use warren_proto::ids::ReplicaId;
use warren_scheduler::raft::testing::{CheckpointDirectory, StateMachine, TypeConfig};
use warren_scheduler::raft::{Leadership, LogStore, Member, ProposeError, Replica, ReplicaConfig, StartError};
use warren_scheduler::state::State;
use warren_scheduler::state::command::{Body, Caller, Command, LogTime, ReplicaRecord, RequestKey, TemplateSpec};
use warren_scheduler::state::level::Level;
use warren_scheduler::state::outcome::Reply;

/// How long something may take that should take a moment: a bound against hanging, never a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a thing is looked at that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let directory = TempDir::new().unwrap();
        let store = LogStore::open(&directory.path().join("log")).unwrap();
        let checkpoints = CheckpointDirectory::open(&directory.path().join("checkpoints")).unwrap();
        Ok((directory, store, StateMachine::open(checkpoints).unwrap()))
    }
}

#[test]
fn the_store_passes_openrafts_own_suite() {
    let suite = async { Suite::test_all(Builder).await };
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(suite).unwrap();
}

/// Three replicas, or one, and where each lives.
struct Cluster {
    directory: TempDir,
    members: BTreeMap<ReplicaId, Member>,
    checkpoint_every: u64,
    running: BTreeMap<ReplicaId, Replica>,
}

impl Cluster {
    async fn start(size: u64, checkpoint_every: u64) -> Self {
        let mut listeners = BTreeMap::new();
        let mut members = BTreeMap::new();
        for id in (1..=size).map(ReplicaId) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let peer_address = listener.local_addr().unwrap().to_string();
            members.insert(id, Member { peer_address, api_address: format!("127.0.0.1:{}", id.0), standby: false });
            listeners.insert(id, listener);
        }
        let directory = TempDir::new().unwrap();
        let mut cluster = Self { directory, members, checkpoint_every, running: BTreeMap::new() };
        for (id, listener) in listeners {
            let replica = Replica::start(cluster.config(id)).await.unwrap();
            replica.serve_peers(listener, None).unwrap();
            cluster.running.insert(id, replica);
        }
        cluster
    }

    fn data_dir(&self, id: ReplicaId) -> PathBuf {
        self.directory.path().join(id.0.to_string())
    }

    fn config(&self, id: ReplicaId) -> ReplicaConfig {
        ReplicaConfig {
            id,
            data_dir: self.data_dir(id),
            initial_members: self.members.clone(),
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(500),
            tls: ClientTls::default(),
            checkpoint_every: self.checkpoint_every,
        }
    }

    async fn stop(&mut self, id: ReplicaId) {
        let replica = self.running.remove(&id).unwrap();
        replica.shutdown().await;
        drop(replica);
        // The writer thread closes the store a moment after the last handle went.
        let log = self.data_dir(id).join("log");
        eventually("the store is closed", || LogStore::open(&log).ok()).await;
    }

    async fn start_again(&mut self, id: ReplicaId) {
        let replica = self.try_start(id).await.unwrap();
        let address: SocketAddr = self.members[&id].peer_address.parse().unwrap();
        let listener = bind(address).await;
        replica.serve_peers(listener, None).unwrap();
        self.running.insert(id, replica);
    }

    /// Tries again while an earlier handle of the store is still being closed.
    async fn try_start(&self, id: ReplicaId) -> Result<Replica, StartError> {
        let started = tokio::time::timeout(PATIENCE, async {
            loop {
                match Replica::start(self.config(id)).await {
                    Err(StartError::Log(error)) if error.to_string().contains("lock") => {
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                    other => return other,
                }
            }
        });
        started.await.expect("the store is never closed")
    }

    /// The replica that leads and has applied the first entry of its term.
    async fn leader(&self) -> (ReplicaId, Replica) {
        let leads = |replica: &&Replica| matches!(*replica.leadership().borrow(), Leadership::Leader { .. });
        eventually("there is a leader", || self.running.values().find(leads).map(|r| (r.id(), r.clone()))).await
    }

    async fn propose(&self, body: Body) -> Reply {
        let command = command(body);
        let acknowledged = tokio::time::timeout(PATIENCE, async {
            loop {
                match self.leader().await.1.propose(command.clone()).await {
                    Ok(outcome) => return outcome.unwrap(),
                    Err(ProposeError::NotLeader { .. } | ProposeError::OutcomeUnknown | ProposeError::Stopped) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        acknowledged.await.expect("nobody acknowledges")
    }

    /// Waits until every running replica has applied what the leader has, and compares them.
    async fn agree(&self) -> Arc<State> {
        let (_, leader) = self.leader().await;
        let expected = leader.read().await.unwrap();
        for replica in self.running.values() {
            let mut states = replica.watch_state();
            let reached = states.wait_for(|state| state.revision >= expected.revision);
            let state = tokio::time::timeout(PATIENCE, reached).await.expect("a replica lags").unwrap().clone();
            assert_eq!(state.revision, expected.revision, "nothing is proposed meanwhile");
            assert_same(&state, &expected);
        }
        expected
    }
}

async fn bind(address: SocketAddr) -> TcpListener {
    let bound = tokio::time::timeout(PATIENCE, async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_still_held) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    });
    bound.await.expect("the port is never given back")
}

async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let seen = tokio::time::timeout(PATIENCE, async {
        loop {
            match look() {
                Some(seen) => return seen,
                None => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    });
    seen.await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

fn assert_same(one: &State, other: &State) {
    assert_eq!(one.ledger_id, other.ledger_id);
    assert_eq!((one.log_time, one.epoch_floor), (other.log_time, other.epoch_floor));
    assert_eq!(one.replicas, other.replicas);
    assert!(one.indexes == other.indexes && one.region == other.region && one.level == other.level);
    assert!(one.nodes == other.nodes && one.templates == other.templates);
    assert!(one.sandboxes == other.sandboxes && one.tenants == other.tenants);
    assert!(one.requests.iter().eq(other.requests.iter()));
}

fn command(body: Body) -> Command {
    Command { caller: Caller::system("test"), time: LogTime(60_000), body }
}

fn record(api_address: &str) -> ReplicaRecord {
    ReplicaRecord { api_address: api_address.into(), token_key: [7; 32], disk: 0, max_level: Level::FIRST }
}

fn put(number: u64) -> Body {
    Body::PutReplica { replica: ReplicaId(number), record: record(&format!("127.0.0.1:{number}")) }
}

fn template(name: &str, request: Option<RequestKey>) -> Body {
    let spec = TemplateSpec {
        digest: warren_proto::ids::Digest([3; 32]),
        size_bytes: 5,
        default_command: vec!["sh".into()],
        environment: BTreeMap::new(),
        working_directory: "/".into(),
    };
    Body::CreateTemplate { template: warren_proto::ids::TemplateId::parse(name).unwrap(), spec, request }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_hold_the_same_state_and_only_the_leader_takes_proposals() {
    let cluster = Cluster::start(3, 10_000).await;
    cluster.propose(put(0)).await;
    let (id, leader) = cluster.leader().await;
    let before = (leader.status().last_log_index, leader.status().sync_count);
    let outcomes = join_all((1..=2_000).map(|number| leader.propose(command(put(number))))).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Ok(Ok(Reply::Done))));
    let after = (leader.status().last_log_index, leader.status().sync_count);
    assert!(after.0 - before.0 < 1_000, "commands share entries: {}", after.0 - before.0);
    assert!(after.1 - before.1 < 1_000, "and entries share syncs: {}", after.1 - before.1);
    assert_eq!(cluster.agree().await.replicas.len(), 2_001);

    let (_, follower) = cluster.running.iter().find(|(other, _)| **other != id).unwrap();
    match follower.propose(command(put(9))).await {
        Err(ProposeError::NotLeader { leader: Some(leader) }) => assert_eq!(leader.id, id),
        other => panic!("{other:?}"),
    }
    assert!(matches!(follower.read().await, Err(ProposeError::NotLeader { .. })));
    leader.confirm_leadership().await.unwrap();
    assert_eq!(leader.members().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stops_takes_nothing_acknowledged_with_it() {
    let mut cluster = Cluster::start(3, 10_000).await;
    for number in 0..20 {
        cluster.propose(put(number)).await;
    }
    let (old, _) = cluster.leader().await;
    cluster.stop(old).await;
    for number in 20..40 {
        cluster.propose(put(number)).await;
    }
    assert_eq!(cluster.agree().await.replicas.len(), 40);
    cluster.start_again(old).await;
    assert_eq!(cluster.agree().await.replicas.len(), 40, "and it comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_the_restart_of_all() {
    let mut cluster = Cluster::start(3, 20).await;
    let request = RequestKey { id: (60_000u128 << 80) | 5, payload: [1; 32] };
    let first = cluster.propose(template("base", Some(request))).await;
    for number in 0..50 {
        cluster.propose(put(number)).await;
    }
    let before = cluster.agree().await;
    let ids: Vec<_> = cluster.running.keys().copied().collect();
    for id in &ids {
        cluster.stop(*id).await;
    }
    for id in &ids {
        cluster.start_again(*id).await;
    }
    assert_same(&*cluster.agree().await, &before);
    assert_eq!(cluster.propose(template("base", Some(request))).await, first, "the table of answers came back too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_away_too_long_is_sent_a_checkpoint() {
    let mut cluster = Cluster::start(3, 20).await;
    cluster.propose(put(0)).await;
    let (leader, _) = cluster.leader().await;
    let away = *cluster.running.keys().find(|id| **id != leader).unwrap();
    cluster.stop(away).await;
    for number in 1..=150 {
        cluster.propose(put(number)).await;
    }
    let has = last_index(&cluster, away).await;
    let nobody = || cluster.running.values().all(|replica| replica.status().purged_index > has).then_some(());
    eventually("nobody has the entries any more that it needs next", nobody).await;
    cluster.start_again(away).await;
    assert_eq!(cluster.agree().await.replicas.len(), 151);
    let checkpoints = cluster.data_dir(away).join("checkpoints");
    assert!(std::fs::read_dir(&checkpoints).unwrap().all(|e| e.unwrap().path().extension().unwrap() != "tmp"));
    cluster.stop(away).await;
    cluster.start_again(away).await;
    assert_eq!(cluster.agree().await.replicas.len(), 151, "also after it restarts from that checkpoint");
}

/// Last index of a replica that is stopped.
async fn last_index(cluster: &Cluster, id: ReplicaId) -> u64 {
    let log = cluster.data_dir(id).join("log");
    let mut store = eventually("the store is closed", || LogStore::open(&log).ok()).await;
    store.get_log_state().await.unwrap().last_log_id.map_or(0, |log_id| log_id.index)
}

fn newest_checkpoint(directory: &Path) -> Option<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "warren"));
    files.sort();
    files.pop()
}

/// Changes one byte in the middle.
fn damage(path: &Path) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], middle).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_made_up_for_or_stops_the_start() {
    let id = ReplicaId(1);
    let mut cluster = Cluster::start(1, 20).await;
    let checkpoints = cluster.data_dir(id).join("checkpoints");
    for number in 0..30 {
        cluster.propose(put(number)).await;
    }
    let first = eventually("a first checkpoint", || newest_checkpoint(&checkpoints)).await;
    for number in 30..50 {
        cluster.propose(put(number)).await;
    }
    let newer = || newest_checkpoint(&checkpoints).filter(|newest| *newest != first);
    eventually("a second checkpoint", newer).await;
    let before = cluster.agree().await;
    cluster.stop(id).await;
    damage(&newest_checkpoint(&checkpoints).unwrap());
    cluster.start_again(id).await;
    assert_same(&*cluster.agree().await, &before);
    cluster.stop(id).await;
    for entry in std::fs::read_dir(&checkpoints).unwrap() {
        let file = entry.unwrap().path();
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(40).unwrap();
    }
    let error = cluster.try_start(id).await.unwrap_err();
    assert!(matches!(error, StartError::Checkpoint(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lacks_entries_after_the_checkpoint_stops_the_start() {
    let id = ReplicaId(1);
    let mut cluster = Cluster::start(1, 20).await;
    for number in 0..100 {
        cluster.propose(put(number)).await;
    }
    let checkpoints = cluster.data_dir(id).join("checkpoints");
    eventually("the log was cut", || (cluster.running[&id].status().checkpoint_index > 60).then_some(())).await;
    cluster.stop(id).await;
    std::fs::remove_dir_all(&checkpoints).unwrap();
    let error = cluster.try_start(id).await.unwrap_err();
    assert!(matches!(error, StartError::Gap { applied: 0, .. }), "{error}");
    assert!(error.to_string().contains("under a new id"), "it says what to do");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_sled_cannot_read_says_that_the_disk_is_lost() {
    let id = ReplicaId(1);
    let mut cluster = Cluster::start(1, 10_000).await;
    for number in 0..100 {
        cluster.propose(put(number)).await;
    }
    cluster.stop(id).await;
    let log = cluster.data_dir(id).join("log");
    for entry in std::fs::read_dir(&log).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.file_name().unwrap() != "db" {
            std::fs::write(&path, [0xff; 64]).unwrap();
        }
    }
    let error = cluster.try_start(id).await.unwrap_err();
    assert!(error.to_string().contains("Treat this replica's disk as lost"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_no_entry_can_hold_is_refused_and_nothing_happens() {
    let cluster = Cluster::start(1, 10_000).await;
    let (_, leader) = cluster.leader().await;
    let before = leader.status().last_log_index;
    let huge = Body::PutReplica { replica: ReplicaId(1), record: record(&"x".repeat(60_000)) };
    let refused = leader.propose(command(huge)).await;
    assert!(matches!(refused, Err(ProposeError::TooLarge { .. })), "{refused:?}");
    assert_eq!(leader.status().last_log_index, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proposer_that_goes_away_cancels_nothing() {
    let cluster = Cluster::start(1, 10_000).await;
    let (_, leader) = cluster.leader().await;
    {
        let proposing = leader.propose(command(put(77)));
        tokio::pin!(proposing);
        // Polled once: queued, and then forgotten.
        let _pending = futures::poll!(&mut proposing);
    }
    let mut states = leader.watch_state();
    let applied = states.wait_for(|state| state.replicas.contains_key(&ReplicaId(77)));
    assert!(tokio::time::timeout(PATIENCE, applied).await.is_ok());
}
