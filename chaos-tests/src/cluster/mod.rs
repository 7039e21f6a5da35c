//! A cluster of real processes on this host: schedulers and node agents with data directories of their own, and faults.
//!
//! Each cluster has a loopback network of its own (`127.x.y.0/24`), so ports are the same everywhere and never taken; and
//! node names of its own, so control groups are. Dropping a cluster kills every process and removes every sandbox;
//! [`Cluster::finish`] ends it in peace and checks that the host is as it was.
//!
//! Children: `process` (one server), `binaries` (where its program is), `certificates` (for TLS).

pub(crate) mod binaries;
mod certificates;
pub(crate) mod process;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use warren_proto::client::{ClientTls, TlsFiles};

use crate::client::Client;
use crate::host::Traces;
use crate::image::Image;
use binaries::Binaries;
use process::Process;

/// Name of the template that every cluster has.
pub const TEMPLATE: &str = "box";

/// Size and shape of a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    pub schedulers: usize,
    pub agents: usize,
    /// OCI runtime: `WARREN_CHAOS_RUNTIME`, or runc.
    pub runtime: String,
    /// What each node offers. CPU may be more than there is: the sandboxes of tests mostly wait.
    pub cpu_milli: u64,
    pub memory: String,
    pub disk: String,
    /// How long a node may run without hearing from the leader; the product's default where it is `None`.
    pub lease_ms: Option<u64>,
    /// How long a voter may be silent before a standby replaces it; the product's default where it is `None`.
    pub replica_grace_ms: Option<u64>,
    /// Log entries between two checkpoints; the product's default where it is `None`.
    pub checkpoint_every: Option<u64>,
    /// Give the schedulers a key to seal secrets with.
    pub secrets: bool,
    /// Speak TLS everywhere, with certificates on both sides (made by openssl).
    pub tls: bool,
    /// Begin with the build that knows only the first level of the ledger's rules.
    pub first_level: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedulers: 3,
            agents: 3,
            runtime: std::env::var("WARREN_CHAOS_RUNTIME").unwrap_or_else(|_| "runc".to_owned()),
            cpu_milli: 4000,
            memory: "3GiB".to_owned(),
            disk: "64GiB".to_owned(),
            lease_ms: None,
            replica_grace_ms: None,
            checkpoint_every: None,
            secrets: false,
            tls: false,
            first_level: false,
        }
    }
}

/// One process of a cluster, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Scheduler(usize),
    Agent(usize),
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Removed with the cluster.
    _directory: TempDir,
    layout: Layout,
    binaries: Binaries,
    schedulers: Vec<Process>,
    agents: Vec<Process>,
    endpoints: Vec<String>,
    traces: Traces,
    options: Options,
    finished: bool,
}

/// Why no cluster can run here, if so: tests that need one are then skipped, aloud.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    let runtime = Options::default().runtime;
    if Command::new(&runtime).arg("--version").stdout(Stdio::null()).status().is_err() {
        return Some(format!("no OCI runtime `{runtime}`"));
    }
    crate::image::missing()
}

impl Cluster {
    /// Starts every process, waits until each is ready, and imports `image` as template [`TEMPLATE`].
    pub async fn start(options: Options, image: &Image) -> anyhow::Result<Self> {
        let mut cluster = Self::lay_out(options)?;
        cluster.start_all()?;
        cluster.await_all().await?;
        cluster.client()?.import_template(TEMPLATE, image).await.context("import the template")?;
        Ok(cluster)
    }

    fn lay_out(options: Options) -> anyhow::Result<Self> {
        let binaries = Binaries::find()?;
        let directory = tempfile::Builder::new().prefix("warren-chaos-").tempdir().context("temporary directory")?;
        let network = format!("127.{}.{}", rand::random_range(1..=254u8), rand::random_range(0..=255u8));
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let layout = Layout { root: directory.path().to_owned(), network, unique: unique[..8].to_owned() };
        if options.secrets {
            layout.write_secrets_key()?;
        }
        if options.tls {
            certificates::make(&layout.root, &layout.network)?;
        }
        let schedulers = (0..options.schedulers).map(|at| layout.scheduler(at, &options, &binaries)).collect();
        let agents = (0..options.agents).map(|at| layout.agent(at, &options, &binaries)).collect();
        let nodes = (0..options.agents).map(|at| (layout.node(at), layout.agent_directory(at))).collect();
        Ok(Self {
            traces: Traces { directory: directory.path().to_owned(), nodes },
            endpoints: layout.endpoints(options.schedulers),
            layout,
            binaries,
            _directory: directory,
            schedulers,
            agents,
            options,
            finished: false,
        })
    }

    /// Whether there is a build of the scheduler that knows only the first level.
    pub fn has_first_level() -> bool {
        Binaries::find().is_ok_and(|binaries| binaries.first_level_scheduler.is_some())
    }

    /// A further scheduler, with the next replica id, an empty disk, and these flags; it is not started.
    pub fn add_scheduler(&mut self, flags: &[(&str, &str)]) -> usize {
        let at = self.schedulers.len();
        let mut process = self.layout.scheduler(at, &self.options, &self.binaries);
        process.set_flag("initial-members", None);
        for (key, value) in flags {
            process.set_flag(key, Some(value));
        }
        self.schedulers.push(process);
        self.endpoints.push(self.layout.scheduler_address(at, 7070));
        at
    }

    /// Sets or takes away a flag of a server; it counts from its next start.
    pub fn set_flag(&mut self, server: Server, key: &str, value: Option<&str>) {
        self.process(server).set_flag(key, value);
    }

    /// From its next start on, a scheduler is the build under test.
    pub fn upgrade(&mut self, scheduler: usize) {
        let program = self.binaries.scheduler.clone();
        self.schedulers[scheduler].set_program(program);
    }

    /// Removes a scheduler's data directory.
    pub fn wipe(&mut self, scheduler: usize) -> anyhow::Result<()> {
        std::fs::remove_dir_all(self.layout.scheduler_directory(scheduler)).context("remove a data directory")
    }

    /// Where a scheduler keeps its checkpoints.
    pub fn checkpoints(&self, scheduler: usize) -> PathBuf {
        self.layout.scheduler_directory(scheduler).join("checkpoints")
    }

    /// Whether a scheduler that was started has not ended by itself.
    pub fn runs(&mut self, scheduler: usize) -> anyhow::Result<bool> {
        self.schedulers[scheduler].goes_on()
    }

    /// Runs a subcommand of a scheduler that does not serve, on its data.
    pub fn run_offline(&self, scheduler: usize, subcommand: &[&str]) -> anyhow::Result<String> {
        self.schedulers[scheduler].run(subcommand)
    }

    /// Starts a scheduler that is to end by itself, and answers what it said.
    pub async fn await_refusal(&mut self, scheduler: usize) -> anyhow::Result<String> {
        self.start_only(scheduler)?;
        self.await_end(scheduler).await
    }

    /// Starts a scheduler, and waits for nothing.
    pub fn start_only(&mut self, scheduler: usize) -> anyhow::Result<()> {
        self.schedulers[scheduler].start()
    }

    /// Waits until a scheduler has ended by itself, and answers what it said.
    pub async fn await_end(&mut self, scheduler: usize) -> anyhow::Result<String> {
        self.schedulers[scheduler].await_end().await
    }

    /// Waits until a scheduler has logged this so often.
    pub async fn await_log(&mut self, scheduler: usize, words: &str, times: usize) -> anyhow::Result<()> {
        self.schedulers[scheduler].await_log(words, times).await
    }

    /// All that a server has logged.
    pub fn log(&mut self, server: Server) -> anyhow::Result<String> {
        self.process(server).whole_log()
    }

    /// Where tests may put files; removed with the cluster.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.layout.root.join(name)
    }

    /// The operators' command line.
    pub fn ctl(&self) -> &Path {
        &self.binaries.ctl
    }

    /// API addresses of all schedulers.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// Names of the nodes, `nodes/{node}`.
    pub fn nodes(&self) -> Vec<String> {
        self.traces.nodes.iter().map(|(node, _)| format!("nodes/{node}")).collect()
    }

    /// A client that knows all schedulers.
    pub fn client(&self) -> anyhow::Result<Client> {
        Client::with_tls(&self.endpoints, self.tls()?)
    }

    /// A client that knows one scheduler.
    pub fn client_of(&self, scheduler: usize) -> anyhow::Result<Client> {
        Client::with_tls(&self.endpoints[scheduler..=scheduler], self.tls()?)
    }

    fn tls(&self) -> anyhow::Result<ClientTls> {
        if !self.options.tls {
            return Ok(ClientTls::default());
        }
        ClientTls::load(&certificates::files(&self.layout.root)).context("load the cluster's certificates")
    }

    /// What a client of a cluster with TLS needs.
    pub fn tls_files(&self) -> TlsFiles {
        certificates::files(&self.layout.root)
    }

    /// What this cluster's sandboxes have on the host.
    pub fn traces(&self) -> &Traces {
        &self.traces
    }

    /// Every process.
    pub fn servers(&self) -> Vec<Server> {
        let schedulers = (0..self.schedulers.len()).map(Server::Scheduler);
        schedulers.chain((0..self.agents.len()).map(Server::Agent)).collect()
    }

    /// The scheduler that leads now.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let status = self.client()?.cluster_status().await.context("ask for the leader")?;
        let at = usize::try_from(status.leader_id)?.checked_sub(1).context("no leader")?;
        ensure!(at < self.schedulers.len(), "replica {} leads and was never started", status.leader_id);
        Ok(at)
    }

    /// A scheduler that does not lead now.
    pub async fn follower(&self) -> anyhow::Result<usize> {
        Ok((self.leader().await? + 1) % self.schedulers.len())
    }

    /// SIGKILL.
    pub fn kill(&mut self, server: Server) -> anyhow::Result<()> {
        self.process(server).kill()
    }

    /// SIGSTOP: it neither answers nor knows that time passes.
    pub fn pause(&mut self, server: Server) -> anyhow::Result<()> {
        self.process(server).signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn unpause(&mut self, server: Server) -> anyhow::Result<()> {
        self.process(server).signal(Signal::SIGCONT)
    }

    /// Starts a process that was killed, on the same data, and waits until it is ready.
    pub async fn restart(&mut self, server: Server) -> anyhow::Result<()> {
        let process = self.process(server);
        process.start()?;
        process.await_ready().await
    }

    /// Starts every process that does not run and waits until all are ready: no scheduler is, before a quorum runs.
    pub async fn restart_all(&mut self) -> anyhow::Result<()> {
        self.start_all()?;
        self.await_all().await
    }

    fn start_all(&mut self) -> anyhow::Result<()> {
        let stopped = self.schedulers.iter_mut().chain(&mut self.agents).filter(|process| !process.runs());
        stopped.into_iter().try_for_each(Process::start)
    }

    async fn await_all(&mut self) -> anyhow::Result<()> {
        for process in self.schedulers.iter_mut().chain(&mut self.agents) {
            process.await_ready().await?;
        }
        Ok(())
    }

    fn process(&mut self, server: Server) -> &mut Process {
        match server {
            Server::Scheduler(at) => &mut self.schedulers[at],
            Server::Agent(at) => &mut self.agents[at],
        }
    }

    /// Ends every process as an operator would, removes what is left of sandboxes, and checks that nothing is.
    pub async fn finish(mut self) -> anyhow::Result<()> {
        for process in self.agents.iter_mut().chain(&mut self.schedulers) {
            process.terminate().await?;
        }
        self.clean()?;
        self.finished = true;
        let left = self.traces.of_agents();
        ensure!(left.is_empty(), "left on the host:\n{}", left.join("\n"));
        Ok(())
    }

    /// Runs every agent's own clean-up. Idempotent.
    fn clean(&self) -> anyhow::Result<()> {
        for ((node, data_dir), agent) in self.traces.nodes.iter().zip(&self.agents) {
            let output = Command::new(agent.program())
                .args(["clean", "--node-id", node, "--runtime", &self.options.runtime, "--data-dir"])
                .arg(data_dir)
                .output()
                .with_context(|| format!("run the clean-up of {node}"))?;
            if !output.status.success() {
                bail!("the clean-up of {node} failed: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        Ok(())
    }
}

impl Drop for Cluster {
    /// After `finish` nothing is left to do; otherwise something failed, and the logs go with the directory.
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let logs = self.schedulers.iter().chain(&self.agents).map(Process::log_tail);
        eprintln!("{}", logs.collect::<String>());
        for process in self.agents.iter_mut().chain(&mut self.schedulers) {
            if let Err(error) = process.kill() {
                eprintln!("{error:#}");
            }
        }
        if let Err(error) = self.clean() {
            eprintln!("{error:#}");
        }
    }
}

/// Names, addresses and directories of one cluster.
#[derive(Debug)]
struct Layout {
    root: PathBuf,
    network: String,
    unique: String,
}

impl Layout {
    fn node(&self, at: usize) -> String {
        format!("chaos-{}-{}", self.unique, at + 1)
    }

    fn agent_directory(&self, at: usize) -> PathBuf {
        self.root.join(format!("node-{}", at + 1))
    }

    fn secrets_key(&self) -> PathBuf {
        self.root.join("secrets.key")
    }

    /// 32 bytes in base64, for its owner alone.
    fn write_secrets_key(&self) -> anyhow::Result<()> {
        std::fs::write(self.secrets_key(), "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\n")?;
        std::fs::set_permissions(self.secrets_key(), std::fs::Permissions::from_mode(0o600)).context("protect the key")
    }

    fn scheduler_directory(&self, at: usize) -> PathBuf {
        self.root.join(format!("scheduler-{}", at + 1))
    }

    fn scheduler_address(&self, at: usize, port: u16) -> String {
        format!("{}.{}:{port}", self.network, at + 1)
    }

    fn agent_address(&self, at: usize, port: u16) -> String {
        format!("{}.{}:{port}", self.network, at + 101)
    }

    fn endpoints(&self, schedulers: usize) -> Vec<String> {
        (0..schedulers).map(|at| self.scheduler_address(at, 7070)).collect()
    }

    fn scheduler(&self, at: usize, options: &Options, binaries: &Binaries) -> Process {
        let members: Vec<String> = (0..options.schedulers)
            .map(|at| format!("{}={}/{}", at + 1, self.scheduler_address(at, 7071), self.scheduler_address(at, 7070)))
            .collect();
        let name = format!("scheduler-{}", at + 1);
        let http = self.scheduler_address(at, 7072);
        let mut arguments = flags(&[
            ("replica-id", (at + 1).to_string()),
            ("data-dir", self.scheduler_directory(at).display().to_string()),
            ("api-listen", self.scheduler_address(at, 7070)),
            ("peer-listen", self.scheduler_address(at, 7071)),
            ("http-listen", http.clone()),
            ("initial-members", members.join(",")),
        ]);
        let optional = [
            ("lease-ms", options.lease_ms),
            ("replica-grace-ms", options.replica_grace_ms),
            ("checkpoint-every", options.checkpoint_every),
        ];
        for (key, value) in optional {
            arguments.extend(value.iter().flat_map(|value| flags(&[(key, value.to_string())])));
        }
        if options.secrets {
            arguments.extend(flags(&[("secrets-key-file", self.secrets_key().display().to_string())]));
        }
        if options.tls {
            arguments.extend(certificates::flags(&self.root));
        }
        let first_level = binaries.first_level_scheduler.clone().filter(|_| options.first_level);
        let program = first_level.unwrap_or_else(|| binaries.scheduler.clone());
        let log = self.root.join(format!("{name}.log"));
        Process::new(name, program, arguments, http, log)
    }

    fn agent(&self, at: usize, options: &Options, binaries: &Binaries) -> Process {
        let name = format!("node-{}", at + 1);
        let http = self.agent_address(at, 7081);
        let mut arguments = flags(&[
            ("node-id", self.node(at)),
            ("data-dir", self.agent_directory(at).display().to_string()),
            ("schedulers", self.endpoints(options.schedulers).join(",")),
            ("listen", self.agent_address(at, 7080)),
            ("http-listen", http.clone()),
            ("runtime", options.runtime.clone()),
            ("cpu-milli", options.cpu_milli.to_string()),
            ("memory", options.memory.clone()),
            ("disk", options.disk.clone()),
        ]);
        let log = self.root.join(format!("{name}.log"));
        if options.tls {
            arguments.extend(certificates::flags(&self.root));
            // Its page speaks TLS too; a scenario sees by its node whether it is ready.
            return Process::new(name, binaries.agent.clone(), arguments, http, log).without_page();
        }
        Process::new(name, binaries.agent.clone(), arguments, http, log)
    }
}

fn flags(pairs: &[(&str, String)]) -> Vec<String> {
    pairs.iter().flat_map(|(key, value)| [format!("--{key}"), value.clone()]).collect()
}
