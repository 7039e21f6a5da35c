//! The agent's process on a data directory of its own, beside a scripted scheduler; with real sandboxes where the host has
//! what it takes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use warren_node_agent::agent::DataDir;
use warren_proto::client::{ClientTls, channel};
use warren_proto::token;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

use super::scheduler::Manner;
use super::{PATIENCE, Peer, Scheduler, bearer, claims, digest, key, look_again, running};

/// A scheduler, a data directory, and the agent's process on it. Whatever happens nothing is left of it.
pub struct Lab {
    pub scheduler: Scheduler,
    pub directory: tempfile::TempDir,
    pub driver: &'static str,
    pub node: String,
    pub agent: Option<Child>,
    pub template: Vec<u8>,
    /// The agent's program.
    pub program: PathBuf,
    /// Goes before the agent's own command line.
    pub launcher: Vec<String>,
    /// Where the agent ends: see `warren_node_agent::failpoint`.
    pub failpoint: Option<&'static str>,
}

impl Lab {
    pub async fn new(driver: &'static str, template: Vec<u8>, lease_ms: i64) -> Self {
        let scheduler = Scheduler::start(Manner { lease_ms, ..Manner::default() }).await;
        let node = format!("test-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
        Self {
            scheduler,
            directory: tempfile::tempdir().unwrap(),
            driver,
            node,
            agent: None,
            template,
            program: env!("CARGO_BIN_EXE_warren-node-agent").into(),
            launcher: Vec::new(),
            failpoint: None,
        }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let data_dir = self.directory.path().to_str().unwrap();
        let mut words = self.launcher.iter().map(AsRef::as_ref).chain([self.program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(arguments).args([
            "--node-id",
            &self.node,
            "--data-dir",
            data_dir,
            "--drivers",
            self.driver,
        ]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).stdin(Stdio::null());
        command
    }

    /// Starts an agent; answers its first session.
    pub async fn start(&mut self, more: &[&str]) -> Peer {
        let listen =
            ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--schedulers", &self.scheduler.address];
        let mut command = self.command(&listen);
        command.envs(self.failpoint.map(|point| ("WARREN_FAILPOINT", point)));
        command.args(more).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        self.agent = Some(command.spawn().unwrap());
        self.scheduler.peer().await
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.agent.as_ref().unwrap().id().unwrap();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    pub async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.agent.take().unwrap().wait().await.unwrap();
        // A launcher is gone a moment before what it launched.
        eventually("the agent let go of its directory", || DataDir::hold(self.directory.path()).is_ok()).await;
    }

    pub async fn upload(&self, peer: &mut Peer) {
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
    pub fn counting(&self, id: &str, on_isolation: OnIsolation) -> AssignedSandbox {
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

    pub fn count(&self, id: &str) -> u64 {
        fs::metadata(self.counted(id)).map_or(0, |metadata| metadata.len())
    }

    /// The file that `id` writes to, as its main process sees it.
    pub fn counted(&self, id: &str) -> PathBuf {
        let pid = fs::read_to_string(self.instance_directory(id).join("started")).unwrap_or_default();
        Path::new("/proc").join(pid.trim()).join("root/var/n")
    }

    /// Waits until `id` counted on.
    pub async fn goes_on(&self, id: &str) {
        let before = self.count(id);
        eventually(&format!("{id} goes on"), || self.count(id) > before + 20).await;
    }

    /// Waits until the kernel says that the fenced group is frozen.
    pub async fn is_frozen(&self) {
        let group = format!("warren/{}/fenced", self.node);
        let says = |path: PathBuf, text: &str| fs::read_to_string(path).is_ok_and(|state| state.contains(text));
        let frozen = || {
            says(Path::new("/sys/fs/cgroup/freezer").join(&group).join("freezer.state"), "FROZEN")
                || says(Path::new("/sys/fs/cgroup").join(&group).join("cgroup.events"), "frozen 1")
        };
        eventually("the group is frozen", frozen).await;
    }

    /// Directory of what the driver `oci` keeps of `id` at epoch 1.
    pub fn instance_directory(&self, id: &str) -> PathBuf {
        self.directory.path().join(format!("oci/instances/t.{id}.1"))
    }

    /// The main process of `id`, where it runs.
    pub fn main_process(&self, id: &str) -> Option<Pid> {
        let pid: i32 = fs::read_to_string(self.instance_directory(id).join("started")).ok()?.trim().parse().ok()?;
        Path::new("/proc").join(format!("{pid}")).join("ns").exists().then(|| Pid::from_raw(pid))
    }

    /// All that the host holds of `id` at epoch 1, as text.
    pub fn remains(&self, id: &str) -> Vec<String> {
        let directory = self.instance_directory(id);
        let container = container_id(&format!("t.{id}.1"));
        let mut places = vec![directory.clone(), self.directory.path().join("oci/run").join(&container)];
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path());
        for root in hierarchies.chain(["/sys/fs/cgroup".into()]) {
            let parent = root.join("warren").join(&self.node);
            places.extend([parent.join(&container), parent.join("fenced").join(&container)]);
        }
        let mut found: Vec<String> = places.iter().filter(|p| p.exists()).map(|p| p.display().to_string()).collect();
        for device in fs::read_dir("/sys/block").unwrap().flatten() {
            let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
            if Path::new(&backing).starts_with(&directory) {
                found.push(format!("loop device of {backing}"));
            }
        }
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let cwd = fs::read_link(process.path().join("cwd")).unwrap_or_default();
            let line = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            if cwd.starts_with(&directory) || line.contains(&container) {
                found.push(format!("process {:?} {line}", process.file_name()));
            }
        }
        found
    }

    /// Processes whose command line names this lab's data directory, by their program's name.
    pub fn processes(&self, program: &str) -> Vec<Pid> {
        let data = self.directory.path().to_str().unwrap();
        let line = |entry: &fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let ours = |entry: &fs::DirEntry| {
            let line = String::from_utf8_lossy(&line(entry)).into_owned();
            line.contains(data) && line.split('\0').next().is_some_and(|name| name.ends_with(program))
        };
        let entries = fs::read_dir("/proc").unwrap().flatten().filter(ours);
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw).collect()
    }

    pub fn fence(&self) -> Pid {
        let all = self.processes("warren-fence");
        assert_eq!(all.len(), 1, "one fence");
        all[0]
    }

    pub async fn clean(&mut self) {
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

/// As the driver `oci` names containers.
fn container_id(directory: &str) -> String {
    Sha256::digest(directory).iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// Waits until it is so.
pub async fn eventually(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            look_again().await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A root file system with a shell; `None`, said aloud, where the host has not what it takes.
pub fn shell() -> Option<Vec<u8>> {
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
