//! Many simulated agents in one process, before a scripted scheduler.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::scheduler::Manner;
use support::*;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;
use tonic::Code;
use warren_node_agent::driver::sim::SimConfig;
use warren_node_agent::fleet::{Fleet, FleetConfig, FleetCounts};
use warren_proto::client::ClientTls;
use warren_proto::error::ErrorBuilder;
use warren_proto::units;
use warren_proto::v1::ErrorReason;
use warren_proto::v1::sandbox_observation::Phase;

const AGENTS: usize = 50;

/// Three renewals fit into the patience of a test, and a change of leader fits into a lease also where 50 agents share two cores
/// with other tests.
const LEASE_MS: i64 = 12_000;

fn config(scheduler: &Scheduler) -> FleetConfig {
    FleetConfig {
        count: AGENTS,
        prefix: "sim-".into(),
        schedulers: vec![scheduler.address.clone()],
        tls: ClientTls::default(),
        capacity: units::Resources { cpu: units::MilliCpu(4000), ..units::Resources::default() },
        labels: BTreeMap::new(),
        templates: vec![digest(&rootfs())],
        ramp: Duration::from_millis(100),
        sandboxes: SimConfig::default(),
    }
}

async fn until(fleet: &Fleet, what: &str, there: impl Fn(&FleetCounts) -> bool) {
    let wait = async {
        while !there(&fleet.counts()) {
            look_again().await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {what}: {:?}", fleet.counts()));
}

/// The sessions of all agents, each with one sandbox running.
async fn settle(scheduler: &Scheduler) -> Vec<Peer> {
    let mut peers = Vec::new();
    for _ in 0..AGENTS {
        let mut peer = scheduler.peer().await;
        assert_eq!(peer.templates, [digest(&rootfs()).to_string()]);
        let id = peer.hello.node.trim_start_matches("nodes/").to_owned();
        peer.assign(1, &[running(&id, 1)]).await;
        peer.until_phase(&id, 1, Phase::Running).await;
        peers.push(peer);
    }
    peers
}

#[tokio::test]
async fn fifty_agents_register_run_renew_and_follow_the_leader() {
    let scheduler = Scheduler::start(Manner { lease_ms: LEASE_MS, ..Manner::default() }).await;
    let fleet = Fleet::start(config(&scheduler)).await.unwrap();
    let peers = settle(&scheduler).await;
    let names: BTreeSet<&String> = peers.iter().map(|peer| &peer.hello.node).collect();
    assert_eq!(names.len(), AGENTS);
    until(&fleet, "all registered", |counts| counts.registered == AGENTS).await;
    assert_eq!((fleet.counts().running, fleet.counts().reconnects()), (AGENTS, 0));
    until(&fleet, "three renewals each", |counts| counts.sessions.granted >= 3 * AGENTS as u64).await;
    assert_eq!(fleet.counts().sessions.lapses, 0);

    for peer in peers {
        let deposed = ErrorBuilder::new(Code::Unavailable, ErrorReason::NotLeader, "another replica leads");
        peer.fail(deposed.with("leader", &scheduler.address).build()).await;
    }
    let peers = settle(&scheduler).await;
    until(&fleet, "a reconnect each", |counts| counts.reconnects() == AGENTS as u64).await;
    assert_eq!((fleet.counts().running, fleet.counts().sessions.lapses), (AGENTS, 0));
    fleet.stop().await;
    for peer in peers {
        timeout(PATIENCE, peer.closed()).await.expect("a session is left");
    }
}

#[tokio::test]
async fn leases_that_are_not_renewed_are_counted() {
    let scheduler = Scheduler::start(Manner { lease_ms: 300, ..Manner::default() }).await;
    let fleet = Fleet::start(FleetConfig { count: 3, ..config(&scheduler) }).await.unwrap();
    until(&fleet, "a lease each", |counts| counts.sessions.granted >= 3).await;
    scheduler.grants.store(false, std::sync::atomic::Ordering::SeqCst);
    until(&fleet, "a lapse each", |counts| counts.sessions.lapses >= 3).await;
    fleet.stop().await;
}

#[tokio::test]
async fn the_command_runs_a_fleet_says_how_it_is_and_ends_when_told() {
    let scheduler = Scheduler::start(Manner::default()).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren-node-agent"));
    command.args([
        "fleet",
        "--count",
        "5",
        "--node-prefix",
        "f-",
        "--report",
        "0.1",
        "--schedulers",
        &scheduler.address,
    ]);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    loop {
        let line = timeout(PATIENCE, lines.next_line()).await.expect("silent").unwrap().expect("it ended");
        let counts: serde_json::Value = serde_json::from_str(&line).unwrap();
        if counts["registered"] == 5 && counts["renewals_granted"].as_u64().unwrap() >= 5 {
            break;
        }
    }
    let peer = scheduler.peer().await;
    assert!(peer.hello.node.starts_with("nodes/f-"));
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let status = timeout(PATIENCE, child.wait()).await.expect("it does not end").unwrap();
    assert!(status.success(), "{status}");
}
