//! The load generator itself, in small: it measures what it says, loses nothing, and leaves nothing.
//!
//! Needs root (each scheduler runs in a group of its own) and says aloud what it skips. No figure is judged here.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use warren_chaos::load::create::{self, Plan};
use warren_chaos::load::failover::{self, Kind};
use warren_chaos::load::region::Shape;
use warren_chaos::load::{Place, etcd, exec};

fn shape() -> Shape {
    Shape { schedulers: 3, nodes: 3, node_cpus: 1000, scheduler_flags: Vec::new(), fleet_flags: Vec::new() }
}

/// Figures are of one leader: it stays, also where it has to wait for its turn on a busy host.
fn steady_shape() -> Shape {
    let scheduler_flags = ["--election-timeout-ms", "2000"].map(str::to_owned).to_vec();
    Shape { scheduler_flags, ..shape() }
}

fn runnable() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: not root");
    }
    root
}

/// Directories of measurements that are still there.
fn left_in(root: &Path) -> usize {
    std::fs::read_dir(root).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn creates_are_counted_beside_puts() {
    if !runnable() {
        return;
    }
    let with_etcd = etcd::find().is_ok();
    if !with_etcd {
        eprintln!("SKIPPED: etcd is not installed; Warren alone is measured");
    }
    let root = tempfile::tempdir().unwrap();
    let place = Place::new(Some(root.path().to_owned())).unwrap();
    let plan = Plan {
        clients: vec![2],
        batch_clients: 2,
        batch: 10,
        connections: 2,
        rounds: 1,
        warm_up: Duration::from_millis(200),
        measured: Duration::from_secs(1),
        with_etcd,
        shape: steady_shape(),
    };
    let report = create::run(&place, &plan).await.unwrap();
    create::check(&report).unwrap();
    let point = |system: &str, batch: usize| {
        report.points.iter().find(|point| point.system == system && point.batch == batch).unwrap()
    };
    for point in &report.points {
        assert!(point.errors.is_empty(), "{point:?}");
        assert!(point.per_second > 0.0, "{point:?}");
        // Success means that a quorum synced: the leader does, with every answer it gives alone.
        assert!(point.syncs_per_second["leader"] > 0.0, "{point:?}");
    }
    assert_eq!(point("warren", 10).clients, 2);
    assert_eq!(report.points.len(), if with_etcd { 3 } else { 2 });
    assert_eq!(left_in(root.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_the_leader_is_killed() {
    if !runnable() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let place = Place::new(Some(root.path().to_owned())).unwrap();
    let report = failover::run(&place, &shape(), Kind::Sigkill, 1).await.unwrap();
    failover::check(&report).unwrap();
    assert!(report.acknowledged > 0);
    assert!(report.runs[0].gap_ms > 0.0);
    assert_eq!(left_in(root.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_measured_beside_bare_containers() {
    if let Some(missing) = warren_chaos::cluster::missing() {
        eprintln!("SKIPPED: {missing}");
        return;
    }
    let place = Place::new(None).unwrap();
    let plan = exec::Plan { runtimes: vec![warren_chaos::cluster::Options::default().runtime], rounds: 2, many: 3 };
    let report = exec::run(&place, &plan).await.unwrap();
    exec::check(&report, &plan).unwrap();
}
