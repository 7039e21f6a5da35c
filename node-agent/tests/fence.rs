//! The fence: an agent that is stopped or killed, the lapse of its lease, and what runs then.
//!
//! With `runc` sandboxes count; that needs root and a static busybox, and is skipped aloud without. The same rules are checked
//! with `sim`, whose sandboxes stop where a file says so.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use support::lab::{Lab, eventually, shell};
use support::*;
use tokio::time::timeout;
use warren_node_agent::clock::BootInstant;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::*;

/// Several of them pass in a test; a renewal that is late on a busy host is still in time.
const LEASE_MS: i64 = 3000;

/// Waits until three leases are over.
async fn three_leases() {
    let begun = BootInstant::now();
    while BootInstant::now().since(begun).as_millis() <= 3 * LEASE_MS as u128 {
        look_again().await;
    }
}

#[tokio::test]
async fn a_stopped_agent_s_freeze_sandbox_stands_still_until_contact_and_its_keep_sandbox_goes_on() {
    let Some(template) = shell() else { return };
    let mut lab = Lab::new("oci", template, LEASE_MS).await;
    let mut peer = lab.start(&["--runtime", "runc"]).await;
    assert!(peer.hello.fence);
    lab.upload(&mut peer).await;
    let both = [lab.counting("freeze", OnIsolation::Freeze), lab.counting("keep", OnIsolation::Keep)];
    peer.assign(2, &both).await;
    peer.until_phase("freeze", 1, Phase::Running).await;
    peer.until_phase("keep", 1, Phase::Running).await;
    lab.goes_on("freeze").await;
    // A lease that is renewed never freezes anything.
    three_leases().await;
    lab.goes_on("freeze").await;

    lab.signal(Signal::SIGSTOP);
    lab.is_frozen().await;
    let stood = lab.count("freeze");
    three_leases().await;
    lab.goes_on("keep").await;
    assert_eq!(lab.count("freeze"), stood, "it ran without a lease");

    lab.signal(Signal::SIGCONT);
    let peer = lab.scheduler.peer().await;
    lab.goes_on("keep").await;
    assert_eq!(lab.count("freeze"), stood, "nobody has said yet that it is still this node's");
    peer.assign(2, &both).await;
    lab.goes_on("freeze").await;
    lab.clean().await;
}

#[tokio::test]
async fn a_killed_agent_s_freeze_sandbox_stands_still_and_goes_on_or_goes_as_the_ledger_says() {
    let Some(template) = shell() else { return };
    let mut lab = Lab::new("oci", template, LEASE_MS).await;
    let mut peer = lab.start(&["--runtime", "runc"]).await;
    lab.upload(&mut peer).await;
    let [stays, moves, keep] = [
        lab.counting("stays", OnIsolation::Freeze),
        lab.counting("moves", OnIsolation::Freeze),
        lab.counting("keep", OnIsolation::Keep),
    ];
    peer.assign(2, &[stays.clone(), moves, keep.clone()]).await;
    for id in ["stays", "moves", "keep"] {
        peer.until_phase(id, 1, Phase::Running).await;
    }
    for id in ["stays", "moves"] {
        lab.goes_on(id).await;
    }
    let fence = lab.fence();

    lab.kill().await;
    lab.is_frozen().await;
    let stood = [lab.count("stays"), lab.count("moves")];
    three_leases().await;
    assert_eq!([lab.count("stays"), lab.count("moves")], stood, "they ran without a lease");

    let mut peer = lab.start(&["--runtime", "runc"]).await;
    assert!(peer.hello.fence);
    assert_eq!(lab.fence(), fence, "the fence was taken over");
    peer.until_phase("moves", 1, Phase::Running).await;
    // Kept from running again while it is on its way out.
    let file = fs::File::open(lab.counted("moves")).unwrap();
    peer.assign(3, &[stays.clone(), removed("moves", 1), keep.clone()]).await;
    peer.until_phase("moves", 1, Phase::Removed).await;
    assert_eq!(file.metadata().unwrap().len(), stood[1], "it ran though the ledger moved it");
    lab.goes_on("stays").await;

    // An order that comes with the group still frozen, and a ledger that says nothing of a sandbox.
    lab.kill().await;
    lab.is_frozen().await;
    let stood = lab.count("stays");
    let mut peer = lab.start(&["--runtime", "runc"]).await;
    peer.assign(4, std::slice::from_ref(&keep)).await;
    peer.until_phase("stays", 1, Phase::Orphan).await;
    three_leases().await;
    assert_eq!(lab.count("stays"), stood, "an orphan was thawed");
    peer.assign(5, &[keep, removed("stays", 1)]).await;
    peer.until_phase("stays", 1, Phase::Removed).await;
    lab.goes_on("keep").await;
    lab.clean().await;
}

/// Where the switch of the simulated sandboxes is.
fn switch(lab: &Lab) -> PathBuf {
    lab.directory.path().join("fence/sim")
}

fn is_frozen(lab: &Lab) -> bool {
    fs::read_to_string(switch(lab)).unwrap() == "1"
}

#[tokio::test]
async fn simulated_sandboxes_freeze_and_thaw_by_the_same_rules() {
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let mut peer = lab.start(&[]).await;
    assert!(peer.hello.fence);
    lab.upload(&mut peer).await;
    let one = [lab.counting("freeze", OnIsolation::Freeze)];
    peer.assign(2, &one).await;
    // Nothing fenced is started before the group runs.
    peer.until_phase("freeze", 1, Phase::Running).await;
    assert!(!is_frozen(&lab));

    lab.signal(Signal::SIGSTOP);
    eventually("it is frozen", || is_frozen(&lab)).await;
    lab.signal(Signal::SIGCONT);
    let peer = lab.scheduler.peer().await;
    assert!(is_frozen(&lab), "no assignment has come");
    peer.assign(2, &one).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;

    // Schedulers that do not grant are as bad as none.
    lab.scheduler.grants.store(false, std::sync::atomic::Ordering::SeqCst);
    eventually("it is frozen", || is_frozen(&lab)).await;
    lab.scheduler.grants.store(true, std::sync::atomic::Ordering::SeqCst);
    // Sessions in which no renewal was granted in time end; all that came are kept, since dropping one would end it.
    let mut peers = Vec::new();
    let contact = async {
        while is_frozen(&lab) {
            tokio::select! {
                peer = lab.scheduler.peer() => {
                    peer.offer(2, &one).await;
                    peers.push(peer);
                }
                () = look_again() => {}
            }
        }
    };
    timeout(PATIENCE, contact).await.expect("never thawed");
    lab.clean().await;
}

#[tokio::test]
async fn a_fence_that_dies_is_replaced_and_clean_ends_it() {
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let peer = lab.start(&[]).await;
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    let first = lab.fence();
    kill(first, Signal::SIGKILL).unwrap();
    eventually("another fence", || lab.processes("warren-fence").iter().any(|pid| *pid != first)).await;
    lab.signal(Signal::SIGSTOP);
    eventually("it is frozen", || is_frozen(&lab)).await;
    lab.signal(Signal::SIGCONT);
    lab.clean().await;
}

#[tokio::test]
async fn without_a_fence_the_agent_says_so_and_does_what_it_can() {
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let peer = lab.start(&["--fence", "none"]).await;
    assert!(!peer.hello.fence);
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    lab.scheduler.grants.store(false, std::sync::atomic::Ordering::SeqCst);
    eventually("it is frozen", || is_frozen(&lab)).await;
    assert!(lab.processes("warren-fence").is_empty());
    lab.clean().await;
}

/// Its directory is gone, so nobody will ever come back for it.
#[tokio::test]
async fn a_forsaken_fence_ends() {
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let peer = lab.start(&[]).await;
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    lab.kill().await;
    fs::remove_dir_all(lab.directory.path().join("fence")).unwrap();
    eventually("the fence ended", || lab.processes("warren-fence").is_empty()).await;
}

/// What the host allows of memory lock, real-time scheduling and exemption stands in `status.json` and is true of the process.
#[tokio::test]
async fn the_fence_is_protected_as_it_says() {
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let _peer = lab.start(&[]).await;
    let process = Path::new("/proc").join(lab.fence().to_string());
    let status = fs::read_to_string(lab.directory.path().join("fence/status.json")).unwrap();
    let lacks = |what: &str| {
        let lacks = status.contains(what);
        if lacks {
            eprintln!("skipped: this host gives no {what}: {status}");
        }
        lacks
    };
    let said = |file: &str| fs::read_to_string(process.join(file)).unwrap();
    if !lacks("exempt from the out-of-memory killer") {
        assert_eq!(said("oom_score_adj").trim(), "-1000");
    }
    if !lacks("locked memory") {
        let text = said("status");
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim_end_matches("kB").trim().parse::<u64>().unwrap()
        };
        assert!(kib("VmLck:") > 0 && kib("VmSwap:") == 0, "{text}");
    }
    if !lacks("real-time scheduling") {
        // proc_pid_stat(5): after the name, `policy` is the 39th field; 1 is SCHED_FIFO, 2 SCHED_RR.
        let text = said("stat");
        let policy = text.rsplit(") ").next().unwrap().split(' ').nth(38).unwrap().to_owned();
        assert!(["1", "2"].contains(&policy.as_str()), "{text}");
    }
    lab.clean().await;
}

/// A service manager ends a service by killing its whole control group.
#[tokio::test]
async fn the_fence_outlives_its_agent_s_control_group_and_an_upgrade_replaces_it() {
    let root = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new);
    let Some(root) = root.into_iter().find(|root| root.join("cgroup.procs").exists()) else {
        eprintln!("skipped: no control groups");
        return;
    };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let mut lab = Lab::new("sim", rootfs(), LEASE_MS).await;
    let group = root.join(format!("warren-{}", lab.node));
    fs::create_dir(&group).unwrap();
    let procs = group.join("cgroup.procs");
    let enter = format!("echo $$ > {} && exec \"$@\"", procs.display());
    lab.launcher = ["/bin/sh", "-c", &enter, "sh"].map(str::to_owned).to_vec();
    let peer = lab.start(&[]).await;
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    let fence = lab.fence();
    let members = || fs::read_to_string(&procs).unwrap();
    assert!(!members().is_empty(), "the agent is not in its group");
    for pid in members().lines() {
        kill(nix::unistd::Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    }
    lab.agent.take().unwrap().wait().await.unwrap();
    eventually("the group is empty", || members().is_empty()).await;
    fs::remove_dir(&group).unwrap();
    assert_eq!(lab.fence(), fence, "the fence went with its agent's group");
    eventually("it is frozen", || is_frozen(&lab)).await;

    // Another build's files: the sandboxes are guarded by the new fence once the new agent serves.
    lab.launcher.clear();
    let build = tempfile::tempdir().unwrap();
    for name in ["warren-node-agent", "warren-fence"] {
        let from = Path::new(env!("CARGO_BIN_EXE_warren-node-agent")).with_file_name(name);
        fs::copy(from, build.path().join(name)).unwrap();
    }
    lab.program = build.path().join("warren-node-agent");
    let peer = lab.start(&[]).await;
    assert!(peer.hello.fence);
    assert_ne!(lab.fence(), fence, "the old build's fence stayed");
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    lab.clean().await;
}
