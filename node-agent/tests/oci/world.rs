//! A driver of its own for each test, on a data directory of its own, and the check that nothing is left of it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use warren_node_agent::driver::oci::{NetworkOptions, OciConfig, OciDriver};
use warren_node_agent::driver::{
    Attachment, Driver, DriverError, Event, ExecSpec, Exit, InstanceKey, InstanceSpec, ProcessSpec, Stream,
};
use warren_node_agent::gpu::Gpus;
use warren_node_agent::network::egress::Egress;
use warren_proto::ids::{Epoch, NodeId, SandboxName};
use warren_proto::units::{Bytes, MilliCpu, Resources};

/// A test that waits longer than this hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Disk of an instance.
pub const DISK_MIB: u64 = 64;

/// Who is asked for names: nobody, unless a test answers there.
pub const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);

pub struct World {
    pub dir: TempDir,
    pub base: PathBuf,
    pub runtime: String,
    pub node: NodeId,
    pub driver: Arc<OciDriver>,
}

/// Waits until it is time to look again at a file: looking without a pause takes the processor from who writes it.
pub async fn look_again() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

/// Runs `test` once for each runtime that is here, each time in a world of its own, and checks that nothing is left of it.
pub fn with_each_runtime<F: Future<Output = ()> + Send + 'static>(test: &str, run: impl Fn(Arc<World>) -> F) {
    with_runtimes(&["runc", "crun", "runsc"], test, run);
}

/// As [`with_each_runtime`], of these.
pub fn with_runtimes<F: Future<Output = ()> + Send + 'static>(
    runtimes: &[&str],
    test: &str,
    run: impl Fn(Arc<World>) -> F,
) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED {test}: not root");
        return;
    }
    if !Path::new("/bin/busybox").exists() {
        eprintln!("SKIPPED {test}: no /bin/busybox (install busybox-static)");
        return;
    }
    for &runtime in runtimes {
        // One by one while something is mended: `WARREN_TEST_RUNTIMES=runsc`.
        if std::env::var("WARREN_TEST_RUNTIMES").is_ok_and(|only| !only.split(',').any(|name| name == runtime)) {
            continue;
        }
        if Command::new(runtime).arg("--version").output().is_err() {
            eprintln!("SKIPPED {test}: no {runtime}");
            continue;
        }
        let tokio =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        tokio.block_on(async {
            let world = Arc::new(World::new(runtime));
            let test = tokio::spawn(tokio::time::timeout(PATIENCE, run(Arc::clone(&world))));
            let outcome = test.await;
            // Whatever the test found: it leaves nothing.
            world.driver.clean().await.expect("cleans");
            match outcome {
                Ok(done) => done.unwrap_or_else(|_| panic!("hangs with {runtime}")),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            }
            world.assert_nothing_left();
        });
    }
}

impl World {
    pub fn new(runtime: &str) -> Self {
        Self::with_network(runtime, network())
    }

    pub fn with_network(runtime: &str, network: NetworkOptions) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let base = dir.path().join("base");
        make_base(&base).expect("a root file system");
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let node = NodeId::parse(&format!("test-{}", &unique[..12])).expect("valid");
        let driver = Arc::new(driver_with(dir.path(), runtime, &node, Arc::default(), network));
        Self { dir, base, runtime: runtime.to_owned(), node, driver }
    }

    /// The runtime's program.
    pub fn runtime_path(&self) -> PathBuf {
        let paths = std::env::var_os("PATH").expect("a PATH");
        let found = std::env::split_paths(&paths).map(|dir| dir.join(&self.runtime)).find(|path| path.exists());
        found.expect("it runs, so it is somewhere")
    }

    /// A driver of the same directory that offers these devices.
    pub fn with_gpus(&self, gpus: Gpus) -> Arc<OciDriver> {
        Arc::new(driver_with(self.dir.path(), &self.runtime, &self.node, Arc::new(gpus), network()))
    }

    pub fn restarted(&self) -> Arc<OciDriver> {
        Arc::new(driver(self.dir.path(), &self.runtime, &self.node))
    }

    pub fn spec(&self, name: &str, command: &[&str]) -> InstanceSpec {
        InstanceSpec {
            gpus: Vec::new(),
            key: key(name),
            resources: Resources {
                cpu: MilliCpu(1000),
                memory: Bytes(if self.has_own_kernel() { 256 } else { 64 } * Bytes::MIB),
                disk: Bytes(DISK_MIB * Bytes::MIB),
                ..Resources::default()
            },
            pids: 64,
            base: self.base.clone(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            environment: vec![("GREETING".into(), "hello".into())],
            working_directory: "/".into(),
            fenced: false,
            runtime: None,
            egress: Egress::None,
        }
    }

    pub async fn start(&self, name: &str, command: &[&str]) -> InstanceKey {
        let spec = self.spec(name, command);
        self.driver.start(&spec).await.unwrap_or_else(|e| panic!("start {name} with {}: {e}", self.runtime));
        spec.key
    }

    pub async fn sh(&self, key: &InstanceKey, script: &str) -> Output {
        run(&*self.driver, key, &sh(script), &[]).await
    }

    /// Whether processes run on a kernel of their own, which dies as a whole, and shows what it likes in /proc.
    pub fn has_own_kernel(&self) -> bool {
        self.runtime == "runsc"
    }

    /// The root file system of a running instance, as its shim mounted it.
    pub fn root(&self, key: &InstanceKey) -> PathBuf {
        let name = format!("{}.{}.{}", key.sandbox.tenant, key.sandbox.id, key.epoch);
        let directory = self.dir.path().join("oci/instances").join(name);
        let record = fs::read(directory.join("record.json")).expect("a record");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
        let rootfs = record["rootfs"].as_str().expect("a path").trim_start_matches('/');
        // The shim stands in the directory; so does the runtime while it starts something, in its own mount namespace.
        let mut roots = fs::read_dir("/proc").expect("processes").flatten().filter_map(|process| {
            let here = fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == directory);
            let root = process.path().join("root").join(rootfs);
            (here && root.join("bin/busybox").exists()).then_some(root)
        });
        roots.next().expect("a shim")
    }

    /// A file of the pids controller of the only instance, in either version of control groups.
    pub fn pids_file(&self, name: &str) -> Option<String> {
        let parents = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .map(|root| Path::new(root).join("warren").join(self.node.as_str()));
        let mut groups = parents.iter().filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten();
        groups.find_map(|group| fs::read_to_string(group.path().join(name)).ok())
    }

    pub fn assert_nothing_left(&self) {
        let null = fs::metadata("/dev/null").expect("a device");
        assert_eq!((null.uid(), null.gid(), null.mode() & 0o777), (0, 0, 0o666), "the host's /dev/null was given away");
        let data = self.dir.path().to_str().expect("text");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounts.contains(data), "mounts are left: {mounts}");
        assert!(!self.dir.path().join("oci").exists(), "files are left");
        for entry in fs::read_dir("/sys/block").expect("devices").flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            assert!(!backing.contains(data), "a loop device is left: {backing}");
        }
        for entry in fs::read_dir("/sys/fs/cgroup").expect("control groups").flatten() {
            let group = entry.path().join("warren").join(self.node.as_str());
            assert!(!group.exists(), "{} is left", group.display());
        }
        assert!(!Path::new("/sys/fs/cgroup/warren").join(self.node.as_str()).exists());
        for entry in fs::read_dir("/proc").expect("processes").flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            assert!(!line.contains(data), "a process is left: {line}");
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            assert!(!cwd.starts_with(self.dir.path()), "a process is left in {}", cwd.display());
        }
    }
}

pub fn driver(data_dir: &Path, runtime: &str, node: &NodeId) -> OciDriver {
    driver_with(data_dir, runtime, node, Arc::default(), network())
}

fn network() -> NetworkOptions {
    NetworkOptions { upstreams: vec![RESOLVER], ..NetworkOptions::default() }
}

fn driver_with(data_dir: &Path, runtime: &str, node: &NodeId, gpus: Arc<Gpus>, network: NetworkOptions) -> OciDriver {
    OciDriver::new(OciConfig {
        gpus,
        network,
        runtime: runtime.to_owned(),
        data_dir: data_dir.to_owned(),
        node_id: node.clone(),
        shim_exe: env!("CARGO_BIN_EXE_warren-node-agent").into(),
    })
    .expect("a driver")
}

fn make_base(base: &Path) -> io::Result<()> {
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "var"] {
        fs::create_dir_all(base.join(dir))?;
    }
    fs::copy("/bin/busybox", base.join("bin/busybox"))?;
    fs::set_permissions(base.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for applet in [
        "sh",
        "cat",
        "sleep",
        "stty",
        "id",
        "dd",
        "tail",
        "head",
        "yes",
        "kill",
        "env",
        "true",
        "false",
        "echo",
        "ls",
        "touch",
        "chown",
        "stat",
        "mount",
        "unshare",
        "ps",
        "ip",
        "hostname",
        "tty",
        "mkdir",
        "wc",
        "grep",
        "tr",
        "sha256sum",
        "mkfifo",
        "nc",
        "nslookup",
        "rm",
        "ln",
        "nsenter",
        "readlink",
        "find",
        "nice",
        "umount",
        "losetup",
        "mknod",
        "df",
    ] {
        symlink("busybox", base.join("bin").join(applet))?;
    }
    fs::write(base.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")?;
    fs::write(base.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    fs::write(base.join("etc/shared"), "from the base\n")
}

pub fn key(name: &str) -> InstanceKey {
    let sandbox = SandboxName::parse(&format!("tenants/acme/sandboxes/{name}")).expect("valid");
    InstanceKey { sandbox, epoch: Epoch(1) }
}

pub fn sh(script: &str) -> ExecSpec {
    command(&["/bin/sh", "-c", script])
}

pub fn command(words: &[&str]) -> ExecSpec {
    ExecSpec { command: words.iter().map(|&word| word.to_owned()).collect(), ..ExecSpec::default() }
}

/// A process with an id that no other has, which ends with whoever is attached.
pub fn process(exec: ExecSpec) -> ProcessSpec {
    let id = uuid::Uuid::new_v4().simple().to_string();
    ProcessSpec { id, exec, kill_on_disconnect: true, no_stdin: false, timeout: None }
}

/// Starts a process and attaches to it.
pub async fn exec(driver: &dyn Driver, key: &InstanceKey, spec: &ExecSpec) -> Result<Attachment, DriverError> {
    driver.exec(key, &process(spec.clone())).await
}

#[derive(Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
}

impl Output {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text").trim()
    }
}

/// Executes, writes all of `input` and then end of file, reads everything, waits.
pub async fn run(driver: &dyn Driver, key: &InstanceKey, spec: &ExecSpec, input: &[u8]) -> Output {
    let attachment = exec(driver, key, spec).await.unwrap_or_else(|e| panic!("{:?}: {e}", spec.command));
    let Attachment { output, input: mut stdin, .. } = attachment;
    let write = async move {
        // The process may have closed its end.
        let _ = stdin.write(input).await;
        let _ = stdin.close().await;
    };
    tokio::join!(read_all(output), write).0
}

/// Reads everything, waits.
pub async fn read_all(mut output: Box<dyn warren_node_agent::driver::ProcessOutput>) -> Output {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match output.next().await.expect("reads") {
            Event::Output { stream: Stream::Stdout, data, .. } => stdout.extend(data),
            Event::Output { stream: Stream::Stderr, data, .. } => stderr.extend(data),
            Event::Dropped { from, to } => panic!("bytes {from} to {to} were dropped"),
            Event::Exited(status) => return Output { stdout, stderr, exit: status.exit.expect("it ended") },
        }
    }
}

pub fn code(code: i32) -> Exit {
    Exit { code, signal: 0, oom_killed: false }
}

pub fn killed_by(signal: i32) -> Exit {
    Exit { code: 128 + signal, signal, oom_killed: false }
}
