//! The fence: an agent that is stopped or killed, the lapse of its lease, and what runs then.
//!
//! With `runc` sandboxes count; that needs root and a static busybox, and is skipped aloud without. The same rules are checked
//! with `sim`, whose sandboxes stop where a file says so.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::scheduler::Manner;
use support::*;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use warren_node_agent::clock::BootInstant;
use warren_proto::client::{ClientTls, channel};
use warren_proto::token;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

/// Several of them pass in a test; a renewal that is late on a busy host is still in time.
const LEASE_MS: i64 = 3000;

/// A scheduler, a data directory, and the agent's process on it. Whatever happens nothing is left of it.
struct Lab {
    scheduler: Scheduler,
    directory: tempfile::TempDir,
    driver: &'static str,
    node: String,
    agent: Option<Child>,
    template: Vec<u8>,
}

impl Lab {
    async fn new(driver: &'static str, template: Vec<u8>) -> Self {
        let scheduler = Scheduler::start(Manner { lease_ms: LEASE_MS, ..Manner::default() }).await;
        let node = format!("fence-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
        Self { scheduler, directory: tempfile::tempdir().unwrap(), driver, node, agent: None, template }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let data_dir = self.directory.path().to_str().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_warren-node-agent"));
        command.args(arguments).args(["--node-id", &self.node, "--data-dir", data_dir, "--drivers", self.driver]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).stdin(Stdio::null());
        command
    }

    /// Starts an agent; answers its first session.
    async fn start(&mut self, more: &[&str]) -> Peer {
        let listen =
            ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--schedulers", &self.scheduler.address];
        let mut command = self.command(&listen);
        command.args(more).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        self.agent = Some(command.spawn().unwrap());
        self.scheduler.peer().await
    }

    fn signal(&self, signal: Signal) {
        let pid = self.agent.as_ref().unwrap().id().unwrap();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.agent.take().unwrap().wait().await.unwrap();
    }

    async fn upload(&self, peer: &mut Peer) {
        peer.assign(1, &[]).await;
        peer.until("generation 1", |peer| peer.generation == 1).await;
        let digest = digest(&self.template).to_string();
        let claims = TokenClaims { template_digest: digest.clone(), ..claims(Scope::TemplateUpload) };
        let header = UploadTemplateHeader { digest, size_bytes: self.template.len() as i64 };
        let chunks = self.template.chunks(1 << 20).map(|chunk| upload_template_request::Message::Chunk(chunk.to_vec()));
        let messages: Vec<_> = std::iter::once(upload_template_request::Message::Header(header))
            .chain(chunks)
            .map(|message| UploadTemplateRequest { message: Some(message) })
            .collect();
        let channel = channel(&peer.hello.data_plane_address, &ClientTls::default()).unwrap();
        let request = bearer(tokio_stream::iter(messages), &token::sign(&claims, &key()));
        TemplateDataServiceClient::new(channel).upload_template(request).await.unwrap();
    }

    /// A sandbox that counts, in the size of a file.
    fn counting(&self, id: &str, on_isolation: OnIsolation) -> AssignedSandbox {
        let mut sandbox = running(id, 1);
        sandbox.set_on_isolation(on_isolation);
        sandbox.command = ["/bin/sh", "-c", "while :; do echo >> /var/n; done"].map(str::to_owned).to_vec();
        sandbox.template = Some(AssignedTemplate {
            digest: digest(&self.template).to_string(),
            size_bytes: self.template.len() as i64,
            ..AssignedTemplate::default()
        });
        sandbox
    }

    fn count(&self, id: &str) -> u64 {
        fs::metadata(self.counted(id)).map_or(0, |metadata| metadata.len())
    }

    /// The file that `id` writes to, as its main process sees it.
    fn counted(&self, id: &str) -> PathBuf {
        let started = self.directory.path().join(format!("oci/instances/t.{id}.1/started"));
        let pid = fs::read_to_string(started).unwrap_or_default();
        Path::new("/proc").join(pid.trim()).join("root/var/n")
    }

    /// Waits until `id` counted on.
    async fn goes_on(&self, id: &str) {
        let before = self.count(id);
        eventually(&format!("{id} goes on"), || self.count(id) > before + 20).await;
    }

    /// Waits until the kernel says that the fenced group is frozen.
    async fn is_frozen(&self) {
        let group = format!("warren/{}/fenced", self.node);
        let says = |path: PathBuf, text: &str| fs::read_to_string(path).is_ok_and(|state| state.contains(text));
        let frozen = || {
            says(Path::new("/sys/fs/cgroup/freezer").join(&group).join("freezer.state"), "FROZEN")
                || says(Path::new("/sys/fs/cgroup").join(&group).join("cgroup.events"), "frozen 1")
        };
        eventually("the group is frozen", frozen).await;
    }

    /// Processes whose command line names this lab's data directory, by their program's name.
    fn processes(&self, program: &str) -> Vec<Pid> {
        let data = self.directory.path().to_str().unwrap();
        let line = |entry: &fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let ours = |entry: &fs::DirEntry| {
            let line = String::from_utf8_lossy(&line(entry)).into_owned();
            line.contains(data) && line.split('\0').next().is_some_and(|name| name.ends_with(program))
        };
        let entries = fs::read_dir("/proc").unwrap().flatten().filter(ours);
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw).collect()
    }

    fn fence(&self) -> Pid {
        let all = self.processes("warren-fence");
        assert_eq!(all.len(), 1, "one fence");
        all[0]
    }

    async fn clean(&mut self) {
        if self.agent.is_some() {
            self.kill().await;
        }
        let output = self.command(&["clean"]).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(self.processes("warren-fence").is_empty(), "the fence is left");
        let left: Vec<_> = fs::read_dir(self.directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.agent.take());
        let _ = self.command(&["clean"]).as_std_mut().output();
    }
}

/// Waits until it is so.
async fn eventually(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            look_again().await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Waits until three leases are over.
async fn three_leases() {
    let begun = BootInstant::now();
    while BootInstant::now().since(begun).as_millis() <= 3 * LEASE_MS as u128 {
        look_again().await;
    }
}

/// A root file system with a shell; `None`, said aloud, where the host has not what it takes.
fn shell() -> Option<Vec<u8>> {
    let busybox = Path::new("/bin/busybox");
    let runc = std::process::Command::new("runc").arg("--version").output().is_ok();
    if !rustix::process::geteuid().is_root() || !busybox.exists() || !runc {
        eprintln!("SKIPPED: needs root, /bin/busybox (busybox-static) and runc");
        return None;
    }
    let root = tempfile::tempdir().unwrap();
    for dir in ["bin", "var", "proc", "sys", "dev", "tmp"] {
        fs::create_dir(root.path().join(dir)).unwrap();
    }
    fs::copy(busybox, root.path().join("bin/busybox")).unwrap();
    fs::set_permissions(root.path().join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("busybox", root.path().join("bin/sh")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all("", root.path()).unwrap();
    Some(tar.into_inner().unwrap())
}

#[tokio::test]
async fn a_stopped_agent_s_freeze_sandbox_stands_still_until_contact_and_its_keep_sandbox_goes_on() {
    let Some(template) = shell() else { return };
    let mut lab = Lab::new("oci", template).await;
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
    let mut lab = Lab::new("oci", template).await;
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
    let mut lab = Lab::new("sim", rootfs()).await;
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
    let mut lab = Lab::new("sim", rootfs()).await;
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
    let mut lab = Lab::new("sim", rootfs()).await;
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
    let mut lab = Lab::new("sim", rootfs()).await;
    let peer = lab.start(&[]).await;
    peer.assign(1, &[]).await;
    eventually("it is thawed", || !is_frozen(&lab)).await;
    lab.kill().await;
    fs::remove_dir_all(lab.directory.path().join("fence")).unwrap();
    eventually("the fence ended", || lab.processes("warren-fence").is_empty()).await;
}
