//! The OCI bundle of an instance: `config.json`, and `process.json` for what is executed later.
//!
//! Pure: specification in, JSON out (OCI runtime specification 1.0.2). What an instance gets is decided here and nowhere
//! else: namespaces, ids, capabilities, limits, mounts.

use serde_json::{Value, json};
use warren_proto::units::MilliCpu;

use super::kind::Kind;
use super::record::Record;
use super::users::User;
use super::{ids, layout, seccomp};
use crate::driver::{ExecSpec, InstanceSpec, TerminalSize};
use crate::network::inside::Paths;

/// Length of the period in which the processor quota is counted, in microseconds: the kernel's default.
pub const CPU_PERIOD_US: u64 = 100_000;
/// Smallest quota that the kernel takes, in microseconds.
const MIN_CPU_QUOTA_US: u64 = 1_000;
/// Bounds of processor shares (cpu.shares); 1024 is one processor.
const CPU_SHARES: (u64, u64) = (2, 262_144);

/// Most open files of a process: the limit that it has, and the one to which it may raise it. Less where the agent itself
/// has less: nobody can raise it from within a user namespace.
const OPEN_FILES: u64 = 16_384;
const MAX_OPEN_FILES: u64 = 65_536;

/// When the host runs out of memory, sandboxes die before Warren does.
const OOM_SCORE_ADJUSTMENT: i32 = 500;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Main process where none is asked for: waits, so reaps what is orphaned, and ends on SIGTERM. As process 1 it gets only
/// signals that it has a handler for. Killing its `sleep` does not end it; that there is no `sleep` does.
const IDLE: &str = "trap 'exit 0' TERM INT; while :; do sleep 2147483647 & wait $! || sleep 1 || exit 1; done";

/// What root may do inside, in its own user namespace: own and change its files, its users, bind low ports. No raw sockets,
/// no devices, nothing that reaches the kernel.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What the host decides.
#[derive(Debug, Clone)]
pub struct Host {
    pub cgroup: String,
    pub first_id: u32,
    /// Control groups are version 2.
    pub unified_cgroups: bool,
    pub rootfs: String,
    /// The agent's own limit of open files.
    pub open_files: u64,
    pub kind: Kind,
    /// Namespaces that its shim made: the runtime joins them. `None`: it makes them, and there is no network.
    pub joins: Option<Paths>,
}

/// `config.json` of an instance.
pub fn bundle(spec: &InstanceSpec, host: &Host) -> Value {
    let ids = json!([{ "containerID": 0, "hostID": host.first_id, "size": ids::RANGE }]);
    let mut namespaces: Vec<Value> = ["pid", "mount", "ipc", "uts"].map(|kind| json!({ "type": kind })).to_vec();
    match &host.joins {
        Some(Paths { users, network }) => {
            namespaces.extend([json!({ "type": "network", "path": network }), json!({ "type": "user", "path": users })])
        }
        None => namespaces.extend(["network", "user"].map(|kind| json!({ "type": kind }))),
    }
    if host.unified_cgroups {
        namespaces.push(json!({ "type": "cgroup" }));
    }
    json!({
        "ociVersion": "1.0.2",
        "hostname": spec.key.sandbox.id.as_str(),
        "root": { "path": host.rootfs, "readonly": false },
        "process": main_process(spec, host.open_files),
        "mounts": mounts(spec, host.unified_cgroups),
        "linux": {
            "cgroupsPath": host.cgroup,
            "namespaces": namespaces,
            "uidMappings": ids,
            "gidMappings": ids,
            "resources": resources(spec, host.kind),
            "seccomp": seccomp::profile(),
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    })
}

/// `process.json` of an execution.
pub fn exec_process(record: &Record, spec: &ExecSpec, user: &User, open_files: u64) -> Value {
    let mut environment = environment(&record.environment, &spec.environment);
    if let Some(home) = user.home.as_ref().filter(|_| !environment.iter().any(|entry| entry.starts_with("HOME="))) {
        environment.push(format!("HOME={home}"));
    }
    if spec.terminal.is_some() && !environment.iter().any(|entry| entry.starts_with("TERM=")) {
        environment.push("TERM=xterm".to_owned());
    }
    let directory = spec.working_directory.as_deref().unwrap_or(&record.working_directory);
    process(&spec.command, environment, directory, user, spec.terminal, open_files)
}

fn main_process(spec: &InstanceSpec, open_files: u64) -> Value {
    let idle = ["/bin/sh", "-c", IDLE].map(str::to_owned);
    let command: &[String] = if spec.command.is_empty() { &idle } else { &spec.command };
    process(command, environment(&spec.environment, &[]), &spec.working_directory, &User::default(), None, open_files)
}

fn process(
    command: &[String],
    environment: Vec<String>,
    directory: &str,
    user: &User,
    terminal: Option<TerminalSize>,
    open_files: u64,
) -> Value {
    // Only root holds what it may hold; others have a bound, and no way to gain.
    let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    let most_files = open_files.min(MAX_OPEN_FILES);
    let mut process = json!({
        "terminal": terminal.is_some(),
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "args": command,
        "env": environment,
        "cwd": if directory.is_empty() { "/" } else { directory },
        "capabilities": { "bounding": CAPABILITIES, "effective": held, "permitted": held, "inheritable": [], "ambient": [] },
        "noNewPrivileges": true,
        "oomScoreAdj": OOM_SCORE_ADJUSTMENT,
        "rlimits": [
            { "type": "RLIMIT_NOFILE", "soft": OPEN_FILES.min(most_files), "hard": most_files },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ],
    });
    if let Some(TerminalSize { columns, rows }) = terminal {
        process["consoleSize"] = json!({ "width": columns, "height": rows });
    }
    process
}

/// `KEY=value` of both, those of `over` winning, with a PATH in any case.
fn environment(base: &[(String, String)], over: &[(String, String)]) -> Vec<String> {
    let overridden = |key: &str| over.iter().any(|(k, _)| k == key);
    let kept = base.iter().filter(|(key, _)| !overridden(key));
    let mut entries: Vec<String> = kept.chain(over).map(|(key, value)| format!("{key}={value}")).collect();
    if !entries.iter().any(|entry| entry.starts_with("PATH=")) {
        entries.insert(0, DEFAULT_PATH.to_owned());
    }
    entries
}

fn resources(spec: &InstanceSpec, kind: Kind) -> Value {
    let (quota, shares) = (cpu_quota_us(spec.resources.cpu), cpu_shares(spec.resources.cpu));
    let memory = signed(spec.resources.memory.0);
    json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "cpu": { "quota": signed(quota), "period": CPU_PERIOD_US, "shares": shares },
        // `swap` is memory and swap together: none.
        "memory": { "limit": memory, "swap": memory },
        // 0 would mean no limit.
        "pids": { "limit": signed(spec.pids.max(1).saturating_add(kind.extra_pids())) },
    })
}

/// Processor time in each period, in microseconds.
pub fn cpu_quota_us(cpu: MilliCpu) -> u64 {
    (cpu.0.saturating_mul(CPU_PERIOD_US) / 1000).max(MIN_CPU_QUOTA_US)
}

/// Part of a busy host, as version 1 counts it.
pub fn cpu_shares(cpu: MilliCpu) -> u64 {
    (cpu.0.saturating_mul(1024) / 1000).clamp(CPU_SHARES.0, CPU_SHARES.1)
}

/// The same as version 2 counts it, 1 to 10,000, by the formula of the OCI runtimes.
pub fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(CPU_SHARES.0, CPU_SHARES.1) - CPU_SHARES.0) * 9_999 / (CPU_SHARES.1 - CPU_SHARES.0)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn mounts(spec: &InstanceSpec, unified_cgroups: bool) -> Vec<Value> {
    let mount = |to: &str, kind: &str, options: &[&str]| json!({ "destination": to, "type": kind, "source": kind, "options": options });
    // Its pages count against the memory limit; half of it, so that a full one does not end the sandbox.
    let half = format!("size={}k", (spec.resources.memory.0 / 2048).max(64));
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", &half]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    if unified_cgroups {
        mounts.push(mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]));
    }
    mounts
}

/// Paths in an instance's directory that must be there before its runtime starts.
pub const DIRECTORIES: [&str; 4] = [layout::LOWER, layout::DISK, layout::EXEC, layout::LOGS];

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use warren_proto::ids::{Epoch, SandboxName};
    use warren_proto::units::{Bytes, MilliCpu, Resources};

    use super::*;
    use crate::driver::InstanceKey;

    fn spec() -> InstanceSpec {
        InstanceSpec {
            gpus: Vec::new(),
            key: InstanceKey { sandbox: SandboxName::parse("tenants/a/sandboxes/b").expect("valid"), epoch: Epoch(1) },
            resources: Resources {
                cpu: MilliCpu(250),
                memory: Bytes(64 << 20),
                disk: Bytes(0),
                ..Resources::default()
            },
            pids: 32,
            base: PathBuf::from("/base"),
            command: Vec::new(),
            environment: vec![("A".into(), "1".into()), ("B".into(), "2".into())],
            working_directory: "/w".into(),
            fenced: false,
            runtime: None,
            egress: Default::default(),
        }
    }

    fn host(unified_cgroups: bool) -> Host {
        Host {
            cgroup: "/warren/n/c".into(),
            first_id: 1_065_536,
            unified_cgroups,
            rootfs: "/run/x".into(),
            open_files: 20_000,
            kind: Kind::Runc,
            joins: None,
        }
    }

    #[test]
    fn an_instance_is_limited_mapped_and_alone() {
        let config = bundle(&spec(), &host(false));
        let resources = &config["linux"]["resources"];
        assert_eq!(resources["cpu"]["quota"], 25_000);
        assert_eq!(resources["memory"], json!({ "limit": 67_108_864, "swap": 67_108_864 }));
        assert_eq!(resources["pids"]["limit"], 32);
        assert_eq!(config["linux"]["uidMappings"][0]["hostID"], 1_065_536);
        assert_eq!(config["linux"]["namespaces"].as_array().expect("list").len(), 6);
        assert_eq!(bundle(&spec(), &host(true))["linux"]["namespaces"].as_array().expect("list").len(), 7);
        assert_eq!(config["process"]["noNewPrivileges"], true);
        assert_eq!(config["process"]["args"][0], "/bin/sh");
    }

    #[test]
    fn zero_and_absurd_resources_are_limits_still() {
        let mut spec = spec();
        spec.resources =
            Resources { cpu: MilliCpu(0), memory: Bytes(u64::MAX), disk: Bytes(0), ..Resources::default() };
        spec.pids = 0;
        let resources = resources(&spec, Kind::Runc);
        assert_eq!(resources["cpu"]["quota"], 1_000);
        assert_eq!(resources["cpu"]["shares"], 2);
        assert_eq!(resources["pids"]["limit"], 1);
        assert_eq!(resources["memory"]["limit"], i64::MAX);
    }

    #[test]
    fn an_execution_s_environment_wins_and_there_is_always_a_path() {
        let over = [("B".to_owned(), "3".to_owned())];
        assert_eq!(environment(&spec().environment, &over), [DEFAULT_PATH, "A=1", "B=3"]);
        let path = [("PATH".to_owned(), "/x".to_owned())];
        assert_eq!(environment(&[], &path), ["PATH=/x"]);
    }

    #[test]
    fn only_root_holds_capabilities() {
        let process = process(&["x".into()], Vec::new(), "", &User::number(1000, 1000), None, 20_000);
        assert_eq!(process["capabilities"]["effective"], json!([]));
        assert_eq!(process["cwd"], "/");
        assert_eq!(process["rlimits"][0]["hard"], 20_000);
    }
}
