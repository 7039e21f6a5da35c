//! The agent, or a shim, is killed at every step of a start and of a removal: after a restart host and ledger agree within one
//! round trip of the first session, and nothing is left of what is gone.
//!
//! Needs root, a static busybox and runc; says so and passes without.

#![allow(clippy::unwrap_used)]

mod support;

use support::lab::{Lab, eventually, shell};
use support::*;
use tokio::time::timeout;
use warren_node_agent::failpoint;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::*;

/// None lapses in these tests.
const LEASE_MS: i64 = 30_000;

const RUNC: [&str; 2] = ["--runtime", "runc"];

/// An agent beside a sandbox that must live through everything.
struct Round {
    lab: Lab,
    keep: AssignedSandbox,
    generation: u64,
}

impl Round {
    async fn new(template: Vec<u8>) -> Self {
        let mut lab = Lab::new("oci", template, LEASE_MS).await;
        let mut peer = lab.start(&RUNC).await;
        lab.upload(&mut peer).await;
        let keep = lab.counting("keep", OnIsolation::Keep);
        peer.assign(2, std::slice::from_ref(&keep)).await;
        peer.until_phase("keep", 1, Phase::Running).await;
        Self { lab, keep, generation: 2 }
    }

    /// Another agent, which ends at `point`.
    async fn restart(&mut self, point: Option<&'static str>) -> Peer {
        if self.lab.agent.is_some() {
            self.lab.kill().await;
        }
        self.lab.failpoint = point;
        self.lab.start(&RUNC).await
    }

    async fn assign(&mut self, peer: &Peer, sandbox: &AssignedSandbox) {
        self.generation += 1;
        peer.assign(self.generation, &[self.keep.clone(), sandbox.clone()]).await;
    }

    async fn dies(&mut self, point: &str) {
        let ended = timeout(PATIENCE, self.lab.agent.as_mut().unwrap().wait()).await;
        ended.unwrap_or_else(|_| panic!("{point}: the agent passed it")).unwrap();
        self.lab.agent = None;
    }

    /// Waits until `id` is said to run or to have failed, and checks that it is so.
    async fn settles(&self, peer: &mut Peer, id: &str, point: &str) {
        let key = (name(id).to_string(), 1);
        let phase = |peer: &Peer| peer.seen.get(&key).map(SandboxObservation::phase);
        peer.until(point, |peer| matches!(phase(peer), Some(Phase::Running | Phase::Failed))).await;
        if phase(peer) == Some(Phase::Running) {
            assert!(self.lab.main_process(id).is_some(), "{point}: said to run");
            self.lab.goes_on(id).await;
        } else {
            let left = self.lab.remains(id);
            assert!(left.is_empty(), "{point}: said to have failed: {left:?}");
        }
    }

    async fn goes(&mut self, peer: &mut Peer, id: &str, point: &str) {
        self.assign(peer, &removed(id, 1)).await;
        peer.until_phase(id, 1, Phase::Removed).await;
        let left = self.lab.remains(id);
        assert!(left.is_empty(), "{point}: said to be gone: {left:?}");
        peer.until_phase("keep", 1, Phase::Running).await;
    }
}

/// A name that a point may have: no dot.
fn id_of(point: &str) -> String {
    point.replace('.', "-")
}

#[tokio::test]
async fn an_agent_killed_at_any_step_of_a_start_or_a_removal_leaves_nothing_half_there() {
    let Some(template) = shell() else { return };
    let mut round = Round::new(template).await;
    let main = round.lab.main_process("keep");
    for point in failpoint::START {
        let id = id_of(point);
        let wanted = round.lab.counting(&id, OnIsolation::Keep);
        let peer = round.restart(Some(point)).await;
        round.assign(&peer, &wanted).await;
        round.dies(point).await;
        let mut peer = round.restart(None).await;
        if peer.seen.get(&(name(&id).to_string(), 1)).is_some_and(|o| o.phase() == Phase::Running) {
            assert!(round.lab.main_process(&id).is_some(), "{point}: the Hello says that it runs");
        }
        round.assign(&peer, &wanted).await;
        round.settles(&mut peer, &id, point).await;
        round.goes(&mut peer, &id, point).await;
    }
    for point in failpoint::REMOVE {
        let id = id_of(point);
        let wanted = round.lab.counting(&id, OnIsolation::Keep);
        let mut peer = round.restart(Some(point)).await;
        round.assign(&peer, &wanted).await;
        peer.until_phase(&id, 1, Phase::Running).await;
        round.assign(&peer, &removed(&id, 1)).await;
        round.dies(point).await;
        let mut peer = round.restart(None).await;
        round.goes(&mut peer, &id, point).await;
    }
    round.lab.goes_on("keep").await;
    assert_eq!(round.lab.main_process("keep"), main, "it was started anew");
    round.lab.clean().await;
}

#[tokio::test]
async fn a_shim_killed_at_any_step_leaves_nothing_half_there() {
    let Some(template) = shell() else { return };
    let mut round = Round::new(template).await;
    for point in failpoint::SHIM {
        let id = id_of(point);
        let wanted = round.lab.counting(&id, OnIsolation::Keep);
        let mut peer = round.restart(Some(point)).await;
        round.assign(&peer, &wanted).await;
        peer.until_phase(&id, 1, Phase::Failed).await;
        let left = round.lab.remains(&id);
        assert!(left.is_empty(), "{point}: {left:?}");
        round.goes(&mut peer, &id, point).await;
    }
    round.lab.goes_on("keep").await;
    round.lab.clean().await;
}

/// Processes, mounts and /run of one boot go together, as in a reboot; the data directory stays.
#[tokio::test]
async fn after_a_reboot_the_ledger_hears_what_became_of_each_sandbox() {
    let Some(template) = shell() else { return };
    let mut lab = Lab::new("oci", template, LEASE_MS).await;
    let boot = "mount -t tmpfs none /run && exec \"$@\"";
    let machine = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "/bin/sh", "-c", boot];
    let agent_only = std::mem::take(&mut lab.launcher);
    lab.launcher = machine.iter().chain(&["sh"]).map(|&word| word.to_owned()).collect();
    let mut peer = lab.start(&RUNC).await;
    lab.upload(&mut peer).await;
    let ran = lab.counting("ran", OnIsolation::Keep);
    let mut ended = lab.counting("ended", OnIsolation::Keep);
    ended.command = ["/bin/sh", "-c", "exit 3"].map(str::to_owned).to_vec();
    peer.assign(2, &[ran.clone(), ended.clone()]).await;
    peer.until_phase("ran", 1, Phase::Running).await;
    peer.until_phase("ended", 1, Phase::Exited).await;

    lab.kill().await;
    eventually("all processes are gone", || lab.processes("warren-node-agent").is_empty()).await;
    eventually("no disk is attached", || {
        lab.remains("ran").iter().all(|left| !left.starts_with("loop") && !left.starts_with("process"))
    })
    .await;
    // Control groups go with a boot too.
    for left in lab.remains("ran").iter().chain(&lab.remains("ended")) {
        if left.starts_with("/sys/fs/cgroup") {
            eventually(left, || std::fs::remove_dir(left).is_ok() || !std::path::Path::new(left).exists()).await;
        }
    }
    assert!(lab.instance_directory("ran").exists(), "the disk is kept over the boot");

    let mut peer = lab.start(&RUNC).await;
    peer.assign(2, &[ran, ended]).await;
    let lost = peer.until_phase("ran", 1, Phase::Failed).await;
    assert_eq!(lost.reason.unwrap().code, "INSTANCE_LOST");
    assert!(lab.remains("ran").is_empty(), "{:?}", lab.remains("ran"));
    let exited = peer.until_phase("ended", 1, Phase::Exited).await;
    assert_eq!(exited.exit_status.unwrap().code, 3);
    // As the ledger restarts it: under a new epoch.
    let mut again = lab.counting("ran", OnIsolation::Keep);
    again.epoch = 2;
    peer.assign(3, &[again, removed("ended", 1)]).await;
    peer.until_phase("ran", 2, Phase::Running).await;
    peer.until_phase("ended", 1, Phase::Removed).await;
    peer.assign(4, &[removed("ran", 2)]).await;
    peer.until_phase("ran", 2, Phase::Removed).await;
    lab.kill().await;
    eventually("all processes are gone", || lab.processes("warren-node-agent").is_empty()).await;
    lab.launcher = agent_only;
    lab.clean().await;
}

/// Another build's agent serves what the first one's shims hold, and no process notices.
#[tokio::test]
async fn sandboxes_run_on_through_an_upgrade_of_the_agent() {
    let Some(template) = shell() else { return };
    let mut round = Round::new(template).await;
    let main = round.lab.main_process("keep");
    let build = tempfile::tempdir().unwrap();
    for name in ["warren-node-agent", "warren-fence"] {
        std::fs::copy(round.lab.program.with_file_name(name), build.path().join(name)).unwrap();
    }
    round.lab.program = build.path().join("warren-node-agent");
    let mut peer = round.restart(None).await;
    let (keep, late) = (round.keep.clone(), round.lab.counting("late", OnIsolation::Keep));
    peer.assign(3, &[keep.clone(), late]).await;
    peer.until_phase("late", 1, Phase::Running).await;
    peer.until_phase("keep", 1, Phase::Running).await;
    round.lab.goes_on("keep").await;
    assert_eq!(round.lab.main_process("keep"), main);
    // And back, with the new build's program gone from the disk.
    round.lab.program = env!("CARGO_BIN_EXE_warren-node-agent").into();
    drop(build);
    let mut peer = round.restart(None).await;
    peer.assign(4, &[keep, removed("late", 1)]).await;
    peer.until_phase("late", 1, Phase::Removed).await;
    round.lab.goes_on("keep").await;
    peer.assign(5, &[removed("keep", 1)]).await;
    peer.until_phase("keep", 1, Phase::Removed).await;
    // As an agent leaves it that was killed while it wrote the file.
    std::fs::write(round.lab.directory.path().join("ledger.tmp"), "torn").unwrap();
    round.lab.clean().await;
}
