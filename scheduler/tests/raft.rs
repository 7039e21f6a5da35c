//! The replicated log, from outside: openraft's own suite on the store, and replicas of one process over loopback.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use openraft::StorageError;
use openraft::storage::RaftLogStorage;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;
use tokio::net::TcpListener;
use warren_proto::client::ClientTls;
use warren_proto::ids::ReplicaId;
use warren_proto::v1 as pb;
use warren_proto::v1::raft_service_client::RaftServiceClient;
use warren_scheduler::raft::testing::{CheckpointDirectory, StateMachine, TypeConfig};
use warren_scheduler::raft::{
    AnnounceError, Leadership, LogStore, Member, MembershipError, ProposeError, Replica, ReplicaConfig, ReplicaStatus,
    StartError, offline,
};
use warren_scheduler::state::State;
use warren_scheduler::state::command::{
    Body, Caller, Command, LedgerId, LogTime, ReplicaRecord, RequestKey, TemplateSpec,
};
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

// --- Who is let in: ledgers, disks, builds.

/// The peers' way in, from outside.
fn peer(address: &str) -> RaftServiceClient<tonic::transport::Channel> {
    RaftServiceClient::new(warren_proto::client::channel(address, &ClientTls::default()).unwrap())
}

/// A call as a replica of `ledger` with `disk` makes it.
fn from<T>(ledger: LedgerId, disk: u128, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("warren-ledger", ledger.to_string().parse().unwrap());
    request.metadata_mut().insert("warren-disk", format!("{disk:032x}").parse().unwrap());
    request
}

/// Of replica 2, in a term that everybody would follow.
fn high_vote() -> Option<pb::StoredVote> {
    Some(pb::StoredVote { version: 1, term: 1000, voted_for: 2, committed: true })
}

async fn open_ledger(cluster: &Cluster) -> LedgerId {
    let ledger_id = LedgerId(0xa11ce);
    cluster.propose(Body::OpenLedger { ledger_id }).await;
    ledger_id
}

/// A replica announces the disk that it has.
fn announcement(replica: &Replica, max_level: Level) -> Body {
    let record = ReplicaRecord { disk: replica.identity().disk, max_level, ..record("127.0.0.1:1") };
    Body::PutReplica { replica: replica.id(), record }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_the_history_before_a_recovery_leave_the_recovered_ledger_as_it_is() {
    let mut cluster = Cluster::start(3, 10_000).await;
    let before = open_ledger(&cluster).await;
    for number in 10..30 {
        cluster.propose(put(number)).await;
    }
    cluster.agree().await;
    for id in [1, 2, 3].map(ReplicaId) {
        cluster.stop(id).await;
    }
    let survivor = ReplicaId(1);
    let member = cluster.members[&survivor].clone();
    let renewed = offline::recover_quorum(&cluster.data_dir(survivor), survivor, member).unwrap();
    assert_eq!(renewed.predecessor, Some(before));
    cluster.start_again(survivor).await;
    cluster.propose(put(40)).await;

    for id in [2, 3].map(ReplicaId) {
        cluster.start_again(id).await;
    }
    let leads = |replica: &&Replica| matches!(*replica.leadership().borrow(), Leadership::Leader { .. });
    let pair = || cluster.running.range(ReplicaId(2)..).map(|(_, replica)| replica);
    let old = eventually("the lost pair leads itself", || pair().find(leads).cloned()).await;
    for number in 100..160 {
        old.propose(command(put(number))).await.unwrap().unwrap();
    }
    let recovered = cluster.running[&survivor].clone();
    let status = recovered.status();
    let append = pb::AppendEntriesRequest { vote: high_vote(), ..Default::default() };
    let address = &cluster.members[&survivor].peer_address;
    let refusal = peer(address).append_entries(from(before, 7, append)).await.unwrap_err();
    assert!(refusal.code() == tonic::Code::FailedPrecondition && refusal.message().contains("ledger"), "{refusal}");
    let vote = pb::VoteRequest { vote: high_vote(), ..Default::default() };
    assert!(peer(address).vote(from(before, 7, vote)).await.is_err());
    let install = futures::stream::iter([checkpoint_header(0)]);
    assert!(peer(address).install_checkpoint(from(before, 7, install)).await.is_err());
    assert_eq!(recovered.status(), ReplicaStatus { sync_count: recovered.status().sync_count, ..status });
    recovered.propose(command(put(41))).await.unwrap().unwrap();
    let state = recovered.read().await.unwrap();
    assert_eq!(state.ledger_id, Some(renewed.ledger_id));
    assert!(state.replicas.contains_key(&ReplicaId(29)) && state.replicas.contains_key(&ReplicaId(41)));
    assert!(!state.replicas.contains_key(&ReplicaId(100)), "entries of the old history got in");
}

fn checkpoint_header(size_bytes: u64) -> pb::InstallCheckpointRequest {
    let header = pb::CheckpointHeader { vote: high_vote(), size_bytes, ..Default::default() };
    pb::InstallCheckpointRequest { message: Some(pb::install_checkpoint_request::Message::Header(header)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_comes_with_another_disk_is_refused_before_anything_is_done() {
    let cluster = Cluster::start(1, 10_000).await;
    let ledger = open_ledger(&cluster).await;
    let known = ReplicaRecord { disk: 5, ..record("127.0.0.1:2") };
    cluster.propose(Body::PutReplica { replica: ReplicaId(2), record: known }).await;
    let (_, leader) = cluster.leader().await;
    let term = leader.status().term;
    let address = &cluster.members[&ReplicaId(1)].peer_address;
    let append = || pb::AppendEntriesRequest { vote: high_vote(), ..Default::default() };
    let refusal = peer(address).append_entries(from(ledger, 6, append())).await.unwrap_err();
    assert!(refusal.message().contains("another disk"), "{refusal}");
    leader.propose(command(put(9))).await.unwrap().unwrap();
    assert_eq!(leader.status().term, term, "it leads on");
    peer(address).append_entries(from(ledger, 5, append())).await.unwrap();
    let followed = || (leader.status().term >= 1000).then_some(());
    eventually("the disk that is known is followed", followed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_log_was_removed_does_not_vote_again() {
    let mut cluster = Cluster::start(3, 10_000).await;
    open_ledger(&cluster).await;
    let (leader, _) = cluster.leader().await;
    let id = *cluster.running.keys().find(|id| **id != leader).unwrap();
    cluster.propose(announcement(&cluster.running[&id], Level::FIRST)).await;
    cluster.agree().await;
    cluster.stop(id).await;
    let log = cluster.data_dir(id).join("log");
    std::fs::remove_dir_all(&log).unwrap();
    let error = cluster.try_start(id).await.unwrap_err();
    assert!(matches!(error, StartError::DiskLost(lost) if lost == id), "{error}");
    std::fs::create_dir(&log).unwrap();
    let error = cluster.try_start(id).await.unwrap_err();
    assert!(matches!(error, StartError::DiskLost(lost) if lost == id), "an empty one too: {error}");
    assert!(error.to_string().contains("--join"), "it says what to do");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_forgot_that_it_joined_is_told_that_its_disk_is_lost() {
    let cluster = Cluster::start(3, 10_000).await;
    open_ledger(&cluster).await;
    let (id, leader) = cluster.leader().await;
    let lost = *cluster.running.keys().find(|other| **other != id).unwrap();
    let member = cluster.members[&lost].clone();
    assert_eq!(leader.join(lost, member.clone(), true).await, Ok(()), "its first request was answered late");
    let replica = &cluster.running[&lost];
    let Body::PutReplica { record, .. } = announcement(replica, Level::FIRST) else { unreachable!() };
    let known = ReplicaRecord { disk: record.disk ^ 2, ..record.clone() };
    cluster.propose(Body::PutReplica { replica: lost, record: known }).await;
    assert_eq!(leader.join(lost, member.clone(), true).await, Err(MembershipError::DiskLost(lost)));
    assert_eq!(leader.join(lost, member, false).await, Ok(()), "an operator may ask twice");
    let knows = || replica.leadership().borrow().leader_id();
    eventually("it knows who leads", knows).await;
    assert_eq!(replica.announce(&record).await, Err(AnnounceError::DiskLost(lost)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_level_that_this_build_does_not_know_ends_the_replica_and_says_why() {
    let cluster = Cluster::start(1, 10_000).await;
    let (_, replica) = cluster.leader().await;
    let newer = Level::MAX.next();
    cluster.propose(announcement(&replica, newer)).await;
    for level in 2..newer.0 {
        cluster.propose(Body::SetLevel { level: Level(level) }).await;
    }
    assert_eq!(replica.failure(), None);
    let _unknown = replica.propose(command(Body::SetLevel { level: newer })).await;
    let cause = tokio::time::timeout(PATIENCE, replica.failed()).await.expect("it goes on");
    assert!(cause.contains("run a newer build"), "{cause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_a_newer_build_ends_the_replica_and_says_why() {
    let cluster = Cluster::start(1, 10_000).await;
    let ledger = open_ledger(&cluster).await;
    let (_, replica) = cluster.leader().await;
    let body_is_unknown =
        pb::StoredCommand { caller: Some(pb::StoredCaller { role: 1, ..Default::default() }), ..Default::default() };
    let payload = pb::stored_entry::Payload::Batch(pb::StoredBatch { commands: vec![body_is_unknown] });
    let log_id = Some(pb::StoredLogId { term: 1000, index: 50 });
    let entries = vec![pb::StoredEntry { version: 1, log_id, payload: Some(payload) }];
    let append = pb::AppendEntriesRequest { vote: high_vote(), entries, ..Default::default() };
    let address = &cluster.members[&ReplicaId(1)].peer_address;
    let refusal = peer(address).append_entries(from(ledger, 5, append)).await.unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::FailedPrecondition, "{refusal}");
    let cause = tokio::time::timeout(PATIENCE, replica.failed()).await.expect("it goes on");
    assert!(cause.contains("run a newer build"), "{cause}");
}

/// Sends a file to replica 1 as its leader would.
async fn install(cluster: &Cluster, ledger: LedgerId, bytes: Vec<u8>) -> Result<(), tonic::Status> {
    let chunk = pb::install_checkpoint_request::Message::Chunk(bytes.clone());
    let messages = [checkpoint_header(bytes.len() as u64), pb::InstallCheckpointRequest { message: Some(chunk) }];
    let call = from(ledger, 5, futures::stream::iter(messages));
    peer(&cluster.members[&ReplicaId(1)].peer_address).install_checkpoint(call).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_cannot_be_installed_is_refused_and_one_of_a_newer_build_says_so() {
    let cluster = Cluster::start(1, 10_000).await;
    let ledger = open_ledger(&cluster).await;
    let (_, replica) = cluster.leader().await;
    let directory = TempDir::new().unwrap();
    let checkpoints = CheckpointDirectory::open(directory.path()).unwrap();
    let written = |ledger_id, level| {
        let state = State { ledger_id: Some(ledger_id), level, ..State::default() };
        std::fs::read(checkpoints.write(&state, &Default::default()).unwrap().path).unwrap()
    };
    let mut damaged = written(ledger, Level::FIRST);
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    assert_eq!(install(&cluster, ledger, damaged).await.unwrap_err().code(), tonic::Code::DataLoss);
    let foreign = install(&cluster, ledger, written(LedgerId(1), Level::FIRST)).await.unwrap_err();
    assert!(foreign.message().contains("ledger"), "{foreign}");
    cluster.propose(put(50)).await;
    assert_eq!(replica.failure(), None, "a bad file does not end a healthy replica");
    let newer = install(&cluster, ledger, written(ledger, Level::MAX.next())).await.unwrap_err();
    assert!(newer.message().contains("run a newer build"), "{newer}");
    let cause = tokio::time::timeout(PATIENCE, replica.failed()).await.expect("it goes on");
    assert!(cause.contains("run a newer build"), "{cause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_leaves_and_a_leader_hands_over_before_it_leaves() {
    let cluster = Cluster::start(3, 10_000).await;
    cluster.propose(put(10)).await;
    let (first, leader) = cluster.leader().await;
    let follower = *cluster.running.keys().find(|id| **id != first).unwrap();
    let heard = || leader.members().iter().all(|member| member.reachable).then_some(());
    eventually("all are heard of", heard).await;
    leader.remove(follower).await.unwrap();
    assert!(leader.members().iter().all(|member| member.id != follower));
    leader.remove(first).await.unwrap();
    let last = cluster.running.keys().copied().find(|id| *id != first && *id != follower).unwrap();
    let last = cluster.running[&last].clone();
    let alone = || (last.members().len() == 1).then_some(());
    eventually("the leader is out too", alone).await;
    assert!(matches!(*last.leadership().borrow(), Leadership::Leader { .. }), "it was handed over");
    last.propose(command(put(11))).await.unwrap().unwrap();
    assert_eq!(last.remove(last.id()).await, Err(MembershipError::OnlyVoter(last.id())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_made_while_creates_go_on_is_a_prefix_of_them() {
    const LANES: u64 = 4;
    const EACH: u64 = 300;
    let cluster = Cluster::start(1, 10_000).await;
    open_ledger(&cluster).await;
    let (_, leader) = cluster.leader().await;
    let acknowledged: Arc<[AtomicU64; 4]> = Arc::default();
    let creating = (0..LANES).map(|lane| {
        let (leader, acknowledged) = (leader.clone(), acknowledged.clone());
        tokio::spawn(async move {
            for number in 0..EACH {
                leader.propose(command(put(1000 * (lane + 1) + number))).await.unwrap().unwrap();
                acknowledged[lane as usize].store(number + 1, Ordering::SeqCst);
            }
        })
    });
    let creating: Vec<_> = creating.collect();
    let under_way = || (acknowledged.iter().all(|lane| lane.load(Ordering::SeqCst) > 20)).then_some(());
    eventually("creates are under way", under_way).await;
    let before: Vec<u64> = acknowledged.iter().map(|lane| lane.load(Ordering::SeqCst)).collect();
    let backup = leader.back_up(&leader.read().await.unwrap()).await.unwrap();
    let mut bytes = vec![0; backup.size_bytes as usize];
    backup.file.read_exact_at(&mut bytes, 0).unwrap();
    for lane in creating {
        lane.await.unwrap();
    }
    let file = cluster.directory.path().join("backup.warren");
    std::fs::write(&file, bytes).unwrap();
    let (id, member) = (ReplicaId(1), cluster.members[&ReplicaId(1)].clone());
    let restored = cluster.directory.path().join("restored");
    offline::restore(&file, &restored, id, member).unwrap();
    let config = ReplicaConfig { data_dir: restored, initial_members: BTreeMap::new(), ..cluster.config(id) };
    let state = Replica::start(config).await.unwrap().state();
    for (lane, before) in (0..LANES).zip(before) {
        let has = |number: &u64| state.replicas.contains_key(&ReplicaId(1000 * (lane + 1) + number));
        let whole = (0..EACH).take_while(has).count() as u64;
        assert!(whole >= before, "lane {lane}: {before} were acknowledged, {whole} are there");
        assert_eq!((0..EACH).filter(has).count() as u64, whole, "lane {lane} has a hole");
    }
}
