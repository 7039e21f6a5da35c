//! The agent between a scripted scheduler and a driver without a runtime: what it does and what it says.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::Ordering;

use support::scheduler::Manner;
use support::*;
use tokio::time::timeout;
use tonic::{Code, Status};
use warren_node_agent::agent::Agent;
use warren_node_agent::driver::{Driver, Ended, Exit, Presence};
use warren_node_agent::network::egress::Egress;
use warren_proto::error::ErrorBuilder;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::{self, AssignedSandbox, EgressMode, ErrorReason};

/// A scheduler, a host, and an agent that holds the template, with its session.
struct Lab {
    scheduler: Scheduler,
    driver: FakeDriver,
    directory: tempfile::TempDir,
    agent: Agent,
    peer: Peer,
}

impl Lab {
    async fn new() -> Self {
        let scheduler = Scheduler::start(Manner::default()).await;
        let driver = FakeDriver::default();
        let directory = tempfile::tempdir().unwrap();
        let agent = agent("n1", directory.path(), &scheduler.address, &driver).await;
        let mut peer = scheduler.peer().await;
        // Keys and ledger are known once the first lease is granted.
        wait_ready(&agent).await;
        upload(&agent, digest(&rootfs()), &rootfs()).await.unwrap();
        peer.until("the template is reported", |peer| peer.templates == [digest(&rootfs()).to_string()]).await;
        Self { scheduler, driver, directory, agent, peer }
    }

    /// Stops the agent, lets `meanwhile` happen to the host, and starts the next one.
    async fn restart(self, meanwhile: impl FnOnce(&FakeDriver)) -> Self {
        let Self { scheduler, driver, directory, agent: old, peer } = self;
        drop(peer);
        old.stop().await;
        meanwhile(&driver);
        let agent = agent("n1", directory.path(), &scheduler.address, &driver).await;
        let peer = scheduler.peer().await;
        Self { scheduler, driver, directory, agent, peer }
    }
}

async fn wait_ready(agent: &Agent) {
    let ready = async {
        while !(agent.membership.is_registered()
            && agent.membership.lease_remaining(warren_node_agent::clock::BootInstant::now()).is_some())
        {
            look_again().await;
        }
    };
    timeout(PATIENCE, ready).await.expect("never ready");
}

#[tokio::test]
async fn what_a_sandbox_may_reach_is_changed_while_it_runs() {
    let with = |mode: EgressMode| AssignedSandbox {
        egress: Some(v1::Egress { mode: mode.into(), allow: Vec::new() }),
        ..running("a", 1)
    };
    let mut lab = Lab::new().await;
    let a = instance("a", 1);
    lab.peer.assign(1, &[with(EgressMode::Public)]).await;
    lab.peer.until_phase("a", 1, Phase::Running).await;
    assert_eq!(lab.driver.egress(&a), Some(Egress::Public));
    lab.driver.refuse("egress a@1", true);
    lab.peer.delta(1, 2, &[with(EgressMode::None)], &[]).await;
    while lab.driver.log().len() < 3 {
        look_again().await;
    }
    assert_eq!(lab.driver.egress(&a), Some(Egress::Public), "refused, and tried again");
    lab.driver.refuse("egress a@1", false);
    while lab.driver.egress(&a) != Some(Egress::None) {
        look_again().await;
    }
    assert_eq!(lab.driver.presence(&a), Some(Presence::Running), "it was not started anew");
    let lab = lab.restart(|_| {}).await;
    lab.peer.assign(3, &[with(EgressMode::Public)]).await;
    while lab.driver.egress(&a) != Some(Egress::Public) {
        look_again().await;
    }
    let starts = lab.driver.log().iter().filter(|done| done.starts_with("start")).count();
    assert_eq!(starts, 1);
}

#[tokio::test]
async fn it_registers_runs_what_is_assigned_and_removes_every_trace() {
    let mut lab = Lab::new().await;
    let hello = &lab.peer.hello;
    assert_eq!((hello.node.as_str(), hello.drivers.as_slice()), ("nodes/n1", &["fake".to_owned()][..]));
    assert_eq!(hello.data_plane_address, lab.agent.data_plane.to_string());
    assert_eq!(hello.capacity.as_ref().unwrap().memory_bytes, 8 << 30);
    assert!(hello.ledger_id.is_empty() && hello.observation.as_ref().unwrap().full);

    lab.peer.assign(1, &[running("a", 1)]).await;
    lab.peer.until_phase("a", 1, Phase::Running).await;
    assert_eq!(lab.peer.generation, 1);
    lab.peer.delta(1, 2, &[running("b", 1)], &[]).await;
    lab.peer.until_phase("b", 1, Phase::Running).await;

    lab.peer.delta(2, 3, &[removed("a", 1), removed("never-was", 1)], &[]).await;
    lab.peer.until_phase("a", 1, Phase::Removed).await;
    lab.peer.until_phase("never-was", 1, Phase::Removed).await;
    assert_eq!(lab.driver.presence(&instance("a", 1)), None);
    lab.peer.delta(3, 4, &[], &[name("a").to_string(), name("never-was").to_string()]).await;
    lab.peer.until("generation 4", |peer| peer.generation == 4).await;
    assert_eq!(lab.driver.log(), ["start a@1", "start b@1", "remove a@1"]);
    lab.agent.stop().await;
    assert_eq!(lab.driver.presence(&instance("b", 1)), Some(Presence::Running), "sandboxes outlive the agent");
    let journal: Vec<_> = std::fs::read_dir(lab.directory.path().join("journal")).unwrap().collect();
    assert_eq!(journal.len(), 1, "what was dropped is forgotten");
}

#[tokio::test]
async fn a_delta_from_another_generation_is_answered_with_a_resync() {
    let mut lab = Lab::new().await;
    lab.peer.assign(5, &[running("a", 1)]).await;
    lab.peer.until_phase("a", 1, Phase::Running).await;
    lab.peer.delta(7, 8, &[running("b", 1)], &[]).await;
    lab.peer.until("resync", |peer| peer.resyncs == 1).await;
    assert_eq!(lab.driver.log(), ["start a@1"]);
    lab.peer.assign(8, &[running("a", 1), running("b", 1)]).await;
    lab.peer.until_phase("b", 1, Phase::Running).await;
    lab.peer.assign(4, &[]).await;
    lab.peer.delta(8, 9, &[removed("b", 1)], &[]).await;
    lab.peer.until_phase("b", 1, Phase::Removed).await;
    assert_eq!(lab.driver.log(), ["start a@1", "start b@1", "remove b@1"], "an older generation changes nothing");
    lab.agent.stop().await;
}

#[tokio::test]
async fn what_no_assignment_names_is_frozen_and_reported_and_thawed_when_named_again() {
    let lab = Lab::new().await;
    lab.driver.set(&instance("stray", 2), Some(Presence::Running));
    let mut lab = lab.restart(|_| {}).await;
    lab.peer.until_phase("stray", 2, Phase::Running).await;
    lab.peer.assign(1, &[]).await;
    lab.peer.until_phase("stray", 2, Phase::Orphan).await;
    lab.peer.assign(2, &[running("stray", 2)]).await;
    lab.peer.until_phase("stray", 2, Phase::Running).await;
    lab.agent.stop().await;
    assert_eq!(lab.driver.log(), ["freeze stray@2", "thaw stray@2"]);
}

#[tokio::test]
async fn a_restarted_agent_takes_over_what_runs_and_reports_what_ended_or_is_gone() {
    let mut lab = Lab::new().await;
    let all = [running("runs", 1), running("ends", 1), running("gone", 1), running("broken", 1)];
    lab.peer.assign(1, &all).await;
    for id in ["runs", "ends", "gone", "broken"] {
        lab.peer.until_phase(id, 1, Phase::Running).await;
    }
    let mut lab = lab
        .restart(|host| {
            let exit = Exit { code: 137, signal: 9, oom_killed: true };
            host.set(&instance("ends", 1), Some(Presence::Ended(Ended { exit, output_tail: b"bye".to_vec() })));
            host.set(&instance("gone", 1), None);
            host.set(&instance("broken", 1), Some(Presence::Remnant));
        })
        .await;
    assert_eq!(lab.peer.hello.ledger_id, LEDGER);
    lab.peer.until_phase("runs", 1, Phase::Running).await;
    let ended = lab.peer.until_phase("ends", 1, Phase::Exited).await;
    assert_eq!((ended.exit_status.unwrap().code, ended.output_tail), (137, b"bye".to_vec()));
    lab.peer.until_phase("gone", 1, Phase::Failed).await;
    lab.peer.assign(1, &all).await;
    let gone = lab.peer.until_phase("gone", 1, Phase::Failed).await;
    assert_eq!(gone.reason.unwrap().code, "INSTANCE_LOST");
    let broken = lab.peer.until_phase("broken", 1, Phase::Failed).await;
    assert_eq!(broken.reason.unwrap().code, "INSTANCE_LOST");
    lab.peer.until("generation 1", |peer| peer.generation == 1).await;
    lab.agent.stop().await;
    let starts = lab.driver.log().iter().filter(|entry| entry.starts_with("start")).count();
    assert_eq!(starts, 4, "nothing was started twice");
}

#[tokio::test]
async fn an_older_epoch_is_refused_and_a_newer_one_replaces() {
    let mut lab = Lab::new().await;
    lab.peer.assign(1, &[running("a", 2)]).await;
    lab.peer.until_phase("a", 2, Phase::Running).await;
    lab.peer.assign(2, &[removed("a", 1)]).await;
    lab.peer.assign(3, &[running("a", 1)]).await;
    lab.peer.until("generation 3", |peer| peer.generation == 3).await;
    lab.peer.until_phase("a", 2, Phase::Running).await;
    assert_eq!(lab.driver.log(), ["start a@2"]);
    lab.peer.assign(4, &[running("a", 3)]).await;
    lab.peer.until_phase("a", 3, Phase::Running).await;
    assert_eq!(lab.driver.log(), ["start a@2", "remove a@2", "start a@3"]);
    lab.agent.stop().await;
}

#[tokio::test]
async fn an_end_is_reported_when_it_comes_and_a_failed_start_says_why() {
    let mut lab = Lab::new().await;
    lab.driver.refuse("start bad@1", true);
    let foreign = AssignedSandboxOf(running("foreign", 1)).driver("microvm");
    lab.peer.assign(1, &[running("a", 1), running("bad", 1), foreign]).await;
    lab.peer.until_phase("a", 1, Phase::Running).await;
    let failed = lab.peer.until_phase("bad", 1, Phase::Failed).await.reason.unwrap();
    assert_eq!(failed.code, "START_FAILED");
    assert!(failed.message.contains("told to refuse"), "{}", failed.message);
    let unknown = lab.peer.until_phase("foreign", 1, Phase::Failed).await.reason.unwrap();
    assert_eq!(unknown.code, "DRIVER_UNKNOWN");
    let ended = Ended { exit: Exit { code: 4, ..Exit::default() }, output_tail: b"tail".to_vec() };
    lab.driver.set(&instance("a", 1), Some(Presence::Ended(ended)));
    let exited = lab.peer.until_phase("a", 1, Phase::Exited).await;
    assert_eq!((exited.exit_status.unwrap().code, exited.output_tail), (4, b"tail".to_vec()));
    lab.agent.stop().await;
}

struct AssignedSandboxOf(warren_proto::v1::AssignedSandbox);

impl AssignedSandboxOf {
    fn driver(mut self, driver: &str) -> warren_proto::v1::AssignedSandbox {
        self.0.driver = driver.to_owned();
        self.0
    }
}

#[tokio::test]
async fn a_removal_that_the_driver_refuses_is_tried_again() {
    let mut lab = Lab::new().await;
    lab.peer.assign(1, &[running("a", 1)]).await;
    lab.peer.until_phase("a", 1, Phase::Running).await;
    lab.driver.refuse("remove a@1", true);
    lab.peer.assign(2, &[removed("a", 1)]).await;
    let tried_twice = async {
        while lab.driver.log().iter().filter(|entry| *entry == "remove a@1").count() < 2 {
            look_again().await;
        }
    };
    timeout(PATIENCE, tried_twice).await.expect("never tried again");
    lab.driver.refuse("remove a@1", false);
    lab.peer.until_phase("a", 1, Phase::Removed).await;
    lab.agent.stop().await;
}

#[tokio::test]
async fn it_follows_the_leader_and_says_everything_again_after_a_break() {
    let leader = Scheduler::start(Manner::default()).await;
    let not_leader = Some(leader.address.clone());
    let follower = Scheduler::start(Manner { not_leader, ..Manner::default() }).await;
    let driver = FakeDriver::default();
    driver.set(&instance("a", 1), Some(Presence::Running));
    let directory = tempfile::tempdir().unwrap();
    let agent = agent("n1", directory.path(), &follower.address, &driver).await;
    let mut first = leader.peer().await;
    first.until_phase("a", 1, Phase::Running).await;
    let incarnation = first.hello.incarnation.clone();
    first.fail(Status::unavailable("leadership lost")).await;
    let mut second = leader.peer().await;
    assert_eq!(second.hello.incarnation, incarnation);
    second.until_phase("a", 1, Phase::Running).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_leader_that_is_deposed_names_the_next_and_a_dead_scheduler_is_no_obstacle() {
    let [first, second] = [Scheduler::start(Manner::default()).await, Scheduler::start(Manner::default()).await];
    let driver = FakeDriver::default();
    let directory = tempfile::tempdir().unwrap();
    // Nobody listens on the first.
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let schedulers = format!("{dead},{}", first.address);
    let agent = agent("n1", directory.path(), &schedulers, &driver).await;
    let peer = first.peer().await;
    let refusal = ErrorBuilder::new(Code::Unavailable, ErrorReason::NotLeader, "another replica leads");
    peer.fail(refusal.with("leader", &second.address).build()).await;
    let peer = second.peer().await;
    wait_ready(&agent).await;
    // And back, without being told where to: it tries all that it knows.
    peer.fail(Status::unavailable("gone")).await;
    let _peer = first.peer().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_lapse_of_the_lease_stops_nothing_and_the_agent_looks_for_another_leader() {
    let scheduler = Scheduler::start(Manner { lease_ms: 3000, ..Manner::default() }).await;
    let driver = FakeDriver::default();
    driver.set(&instance("a", 1), Some(Presence::Running));
    let directory = tempfile::tempdir().unwrap();
    let agent = agent("n1", directory.path(), &scheduler.address, &driver).await;
    let first = scheduler.peer().await;
    wait_ready(&agent).await;
    scheduler.grants.store(false, Ordering::SeqCst);
    let mut second = scheduler.peer().await;
    drop(first);
    assert_eq!(agent.membership.lease_remaining(warren_node_agent::clock::BootInstant::now()), None);
    second.until_phase("a", 1, Phase::Running).await;
    assert!(driver.log().is_empty(), "nothing was frozen or removed");
    scheduler.grants.store(true, Ordering::SeqCst);
    wait_ready(&agent).await;
    agent.stop().await;
}

#[tokio::test]
async fn another_ledger_is_not_served_and_the_sandboxes_are_kept() {
    let lab = Lab::new().await;
    lab.driver.set(&instance("a", 1), Some(Presence::Running));
    lab.agent.stop().await;
    let other = Scheduler::start(Manner { ledger_id: "ledger-2".into(), ..Manner::default() }).await;
    let agent = agent("n1", lab.directory.path(), &other.address, &lab.driver).await;
    let refused = timeout(PATIENCE, other.strangers.clone().wait_for(|n| *n > 0)).await.map(|r| *r.unwrap());
    assert_eq!(refused, Ok(1));
    assert!(!agent.membership.is_registered());
    assert_eq!(agent.membership.ledger_id().as_deref(), Some(LEDGER));
    agent.stop().await;
    assert!(lab.driver.log().is_empty(), "nothing was frozen or removed");
}

/// A backup from before `lost` was created and `moved` came here was restored: nothing that the new ledger does not name at
/// its very epoch is ended, and old tokens are void.
#[tokio::test]
async fn a_restored_ledger_is_followed_and_what_it_does_not_know_is_frozen_not_ended() {
    let mut lab = Lab::new().await;
    lab.peer.assign(9, &[running("kept", 1), running("lost", 1), running("moved", 2)]).await;
    for (id, epoch) in [("kept", 1), ("lost", 1), ("moved", 2)] {
        lab.peer.until_phase(id, epoch, Phase::Running).await;
    }
    let Lab { scheduler, driver, directory, agent: old, peer } = lab;
    drop((peer, scheduler));
    old.stop().await;
    let manner = Manner { ledger_id: "ledger-2".into(), predecessor: Some(LEDGER.into()), ..Manner::default() };
    let restored = Scheduler::start(manner).await;
    let second = agent("n1", directory.path(), &restored.address, &driver).await;
    let mut peer = restored.peer().await;
    assert_eq!(peer.hello.ledger_id, LEDGER);
    // A lower generation than the old ledger's.
    peer.assign(3, &[running("kept", 1), running("moved", 3)]).await;
    peer.until_phase("lost", 1, Phase::Orphan).await;
    let in_the_way = peer.until_phase("moved", 3, Phase::Failed).await;
    assert_eq!(in_the_way.reason.unwrap().code, "ORPHAN_IN_THE_WAY");
    wait_ready(&second).await;
    let refused = upload(&second, digest(b"x"), b"x").await.unwrap_err();
    assert_eq!(warren_proto::error::reason_of(&refused), Some(warren_proto::v1::ErrorReason::PermissionDenied));
    second.stop().await;

    // Whoever comes next still knows whose they are.
    let third = agent("n1", directory.path(), &restored.address, &driver).await;
    let mut peer = restored.peer().await;
    assert_eq!(peer.hello.ledger_id, "ledger-2");
    peer.assign(4, &[running("kept", 1), running("moved", 3)]).await;
    peer.until_phase("moved", 3, Phase::Failed).await;
    peer.assign(5, &[running("kept", 1), removed("moved", 2), removed("lost", 1)]).await;
    peer.until_phase("moved", 2, Phase::Removed).await;
    peer.until_phase("lost", 1, Phase::Removed).await;
    third.stop().await;
    let ended: Vec<String> = driver.log().into_iter().filter(|entry| entry.starts_with("remove")).collect();
    let mut sorted = ended.clone();
    sorted.sort();
    assert_eq!(sorted, ["remove lost@1", "remove moved@2"], "by order only");
    assert_eq!(driver.presence(&instance("kept", 1)), Some(Presence::Running));
}

/// The ledger moved `a` away while the node was away, and an operator wants the orphan gone.
#[tokio::test]
async fn leftovers_and_orphans_are_removed_by_their_very_epoch_on_order_and_nothing_else_is() {
    let lab = Lab::new().await;
    for id in ["a", "stray", "other"] {
        lab.driver.set(&instance(id, 2), Some(Presence::Running));
    }
    let mut lab = lab.restart(|_| {}).await;
    lab.peer.assign(1, &[removed("a", 2), removed("stray", 1)]).await;
    let gone = lab.peer.until_phase("a", 2, Phase::Removed).await;
    assert_eq!(gone.epoch, 2);
    lab.peer.until_phase("other", 2, Phase::Orphan).await;
    lab.peer.delta(1, 2, &[removed("stray", 2)], &[name("a").to_string()]).await;
    lab.peer.until_phase("stray", 2, Phase::Removed).await;
    assert_eq!(lab.driver.presence(&instance("other", 2)), Some(Presence::Frozen));
    lab.agent.stop().await;
    let log = lab.driver.log();
    let mut ended: Vec<&String> = log.iter().filter(|entry| entry.starts_with("remove")).collect();
    ended.sort();
    assert_eq!(ended, ["remove a@2", "remove stray@2"]);
}

#[tokio::test]
async fn an_agent_killed_in_the_middle_of_a_start_clears_up_and_reports_it() {
    let mut lab = Lab::new().await;
    lab.driver.hold_starts(true);
    lab.peer.assign(1, &[running("half", 1), running("nothing", 1)]).await;
    let both_begun = async {
        while lab.driver.log().len() < 2 {
            look_again().await;
        }
    };
    timeout(PATIENCE, both_begun).await.expect("never begun");
    // What a power cut would leave: the journal as it is now, one start half done and one not begun.
    let cut = tempfile::tempdir().unwrap();
    let store = "journal/store";
    std::fs::create_dir_all(cut.path().join(store)).unwrap();
    for entry in std::fs::read_dir(lab.directory.path().join(store)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, cut.path().join(store).join(path.file_name().unwrap())).unwrap();
        }
    }
    let host = FakeDriver::default();
    host.set(&instance("half", 1), Some(Presence::Remnant));
    let next = agent("n1", cut.path(), &lab.scheduler.address, &host).await;
    let mut peer = lab.scheduler.peer().await;
    for id in ["half", "nothing"] {
        let failed = peer.until_phase(id, 1, Phase::Failed).await;
        assert_eq!(failed.reason.unwrap().code, "START_INTERRUPTED");
    }
    peer.assign(1, &[running("half", 1), running("nothing", 1)]).await;
    peer.until("generation 1", |peer| peer.generation == 1).await;
    assert_eq!(host.log(), ["remove half@1"], "not started a second time");
    next.stop().await;
    lab.driver.hold_starts(false);
    lab.peer.until_phase("half", 1, Phase::Running).await;
    lab.agent.stop().await;
}

#[tokio::test]
async fn one_data_directory_serves_one_agent() {
    let lab = Lab::new().await;
    assert!(warren_node_agent::agent::DataDir::hold(lab.directory.path()).is_err());
    lab.agent.stop().await;
    assert!(warren_node_agent::agent::DataDir::hold(lab.directory.path()).is_ok());
    drop(lab.scheduler);
}

#[tokio::test]
async fn a_damaged_journal_ends_nothing_and_starts_no_epoch_again() {
    let lab = Lab::new().await;
    lab.peer.assign(1, &[running("runs", 1), running("ran", 1)]).await;
    let mut peer = lab.peer;
    peer.until_phase("runs", 1, Phase::Running).await;
    peer.until_phase("ran", 1, Phase::Running).await;
    lab.agent.stop().await;
    std::fs::write(lab.directory.path().join("journal/store/conf"), [0xff; 64]).unwrap();
    let host = FakeDriver::default();
    host.set(&instance("runs", 1), Some(Presence::Running));
    // Twice: the second agent is killed before anybody tells it what should run.
    for _ in 0..2 {
        let next = agent("n1", lab.directory.path(), &lab.scheduler.address, &host).await;
        let mut peer = lab.scheduler.peer().await;
        peer.until_phase("runs", 1, Phase::Running).await;
        next.stop().await;
    }
    let next = agent("n1", lab.directory.path(), &lab.scheduler.address, &host).await;
    let mut peer = lab.scheduler.peer().await;
    peer.assign(1, &[running("runs", 1), running("ran", 1)]).await;
    let failed = peer.until_phase("ran", 1, Phase::Failed).await;
    assert_eq!(failed.reason.unwrap().code, "JOURNAL_LOST");
    peer.until_phase("runs", 1, Phase::Running).await;
    assert!(host.log().is_empty(), "{:?}", host.log());
    next.stop().await;
    let next = agent("n1", lab.directory.path(), &lab.scheduler.address, &host).await;
    let mut peer = lab.scheduler.peer().await;
    peer.assign(2, &[running("runs", 1), running("ran", 2), running("new", 1)]).await;
    peer.until_phase("new", 1, Phase::Running).await;
    peer.until_phase("ran", 2, Phase::Running).await;
    next.stop().await;
}
