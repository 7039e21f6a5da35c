//! The driver `oci` against real runtimes: what a sandbox may do, how its end is known, and that nothing is left.
//!
//! Needs root, a static busybox (Debian: `busybox-static`) and runc or crun; what is missing is skipped aloud.

#![allow(clippy::disallowed_methods, reason = "tests bound how long they wait")]

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use warren_node_agent::driver::oci::{OciConfig, OciDriver};
use warren_node_agent::driver::{
    Driver, DriverError, Ended, ExecSpec, Execution, Exit, InstanceKey, InstanceSpec, Presence, TerminalSize,
};
use warren_proto::ids::{Epoch, NodeId, SandboxName};
use warren_proto::units::{Bytes, MilliCpu, Resources};

/// A test that waits longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(120);

struct World {
    dir: TempDir,
    base: PathBuf,
    runtime: String,
    node: NodeId,
    driver: Arc<OciDriver>,
}

/// Runs `test` once for each runtime that is here, each time in a world of its own, and checks that nothing is left of it.
fn with_each_runtime<F: Future<Output = ()> + Send + 'static>(test: &str, run: impl Fn(Arc<World>) -> F) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED {test}: not root");
        return;
    }
    if !Path::new("/bin/busybox").exists() {
        eprintln!("SKIPPED {test}: no /bin/busybox (install busybox-static)");
        return;
    }
    for runtime in ["runc", "crun"] {
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
    fn new(runtime: &str) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let base = dir.path().join("base");
        make_base(&base).expect("a root file system");
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let node = NodeId::parse(&format!("test-{}", &unique[..12])).expect("valid");
        let driver = Arc::new(driver(dir.path(), runtime, &node));
        Self { dir, base, runtime: runtime.to_owned(), node, driver }
    }

    fn restarted(&self) -> Arc<OciDriver> {
        Arc::new(driver(self.dir.path(), &self.runtime, &self.node))
    }

    fn spec(&self, name: &str, command: &[&str]) -> InstanceSpec {
        InstanceSpec {
            key: key(name),
            resources: Resources {
                cpu: MilliCpu(1000),
                memory: Bytes(64 * Bytes::MIB),
                disk: Bytes(0),
                ..Resources::default()
            },
            pids: 64,
            base: self.base.clone(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            environment: vec![("GREETING".into(), "hello".into())],
            working_directory: "/".into(),
        }
    }

    async fn start(&self, name: &str, command: &[&str]) -> InstanceKey {
        let spec = self.spec(name, command);
        self.driver.start(&spec).await.unwrap_or_else(|e| panic!("start {name} with {}: {e}", self.runtime));
        spec.key
    }

    async fn sh(&self, key: &InstanceKey, script: &str) -> Output {
        run(&*self.driver, key, &sh(script), &[]).await
    }

    /// A file of the pids controller of the only instance, in either version of control groups.
    fn pids_file(&self, name: &str) -> Option<String> {
        let parents = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .map(|root| Path::new(root).join("warren").join(self.node.as_str()));
        let mut groups = parents.iter().filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten();
        groups.find_map(|group| fs::read_to_string(group.path().join(name)).ok())
    }

    fn assert_nothing_left(&self) {
        let null = fs::metadata("/dev/null").expect("a device");
        assert_eq!((null.uid(), null.gid(), null.mode() & 0o777), (0, 0, 0o666), "the host's /dev/null was given away");
        let data = self.dir.path().to_str().expect("text");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounts.contains(data), "mounts are left: {mounts}");
        assert!(!self.dir.path().join("oci").exists(), "files are left");
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

fn driver(data_dir: &Path, runtime: &str, node: &NodeId) -> OciDriver {
    OciDriver::new(OciConfig {
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
    ] {
        symlink("busybox", base.join("bin").join(applet))?;
    }
    fs::write(base.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")?;
    fs::write(base.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    fs::write(base.join("etc/shared"), "from the base\n")
}

fn key(name: &str) -> InstanceKey {
    let sandbox = SandboxName::parse(&format!("tenants/acme/sandboxes/{name}")).expect("valid");
    InstanceKey { sandbox, epoch: Epoch(1) }
}

fn sh(script: &str) -> ExecSpec {
    command(&["/bin/sh", "-c", script])
}

fn command(words: &[&str]) -> ExecSpec {
    ExecSpec {
        command: words.iter().map(|&word| word.to_owned()).collect(),
        environment: Vec::new(),
        working_directory: None,
        user: (0, 0),
        terminal: None,
    }
}

#[derive(Debug)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Exit,
}

impl Output {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text").trim()
    }
}

/// Executes, writes all of `input` and then end of file, reads everything, waits.
async fn run(driver: &dyn Driver, key: &InstanceKey, spec: &ExecSpec, input: &[u8]) -> Output {
    let execution = driver.exec(key, spec).await.unwrap_or_else(|e| panic!("{:?}: {e}", spec.command));
    let Execution { mut stdin, mut stdout, stderr, control } = execution;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let write = async move {
        // The process may have closed its end.
        let _ = stdin.write_all(input).await;
        drop(stdin);
    };
    let read_err = async {
        if let Some(mut stderr) = stderr {
            stderr.read_to_end(&mut err).await.expect("reads");
        }
    };
    let (_, read, ()) = tokio::join!(write, stdout.read_to_end(&mut out), read_err);
    read.expect("reads");
    let exit = control.wait().await.expect("ends");
    assert_eq!(control.wait().await.expect("answers again"), exit);
    Output { stdout: out, stderr: err, exit }
}

fn code(code: i32) -> Exit {
    Exit { code, signal: 0, oom_killed: false }
}

fn killed_by(signal: i32) -> Exit {
    Exit { code: 128 + signal, signal, oom_killed: false }
}

#[test]
fn an_instance_is_started_seen_frozen_thawed_and_removed() {
    with_each_runtime("lifecycle", |world| async move {
        let (driver, key) = (&world.driver, key("a"));
        assert!(matches!(driver.wait(&key).await, Err(DriverError::NotFound(_))));
        assert!(matches!(driver.exec(&key, &sh("true")).await, Err(DriverError::NotFound(_))));
        driver.remove(&key).await.expect("nothing to remove");
        world.start("a", &[]).await;
        assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Running)]);
        assert!(driver.start(&world.spec("a", &[])).await.is_err(), "it is there already");
        assert_eq!(world.sh(&key, "echo $GREETING; hostname").await.text(), "hello\na");
        for _ in 0..2 {
            driver.freeze(&key).await.expect("freezes");
            assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Frozen)]);
        }
        assert!(matches!(driver.exec(&key, &sh("true")).await, Err(DriverError::NotRunning { .. })));
        for _ in 0..2 {
            driver.thaw(&key).await.expect("thaws");
            assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Running)]);
        }
        assert_eq!(world.sh(&key, "echo still here").await.text(), "still here");
        driver.freeze(&key).await.expect("freezes");
        for _ in 0..2 {
            driver.remove(&key).await.expect("removes, frozen or gone");
        }
        assert!(driver.list().await.expect("lists").is_empty());
    });
}

#[test]
fn what_runs_while_frozen_does_not_progress() {
    with_each_runtime("freeze", |world| async move {
        let key = world.start("a", &["/bin/sh", "-c", "n=0; while :; do n=$((n+1)); echo $n > /var/n; done"]).await;
        let counter = world.dir.path().join("oci/instances/acme.a.1/upper/var/n");
        while !counter.exists() {
            tokio::task::yield_now().await;
        }
        world.driver.freeze(&key).await.expect("freezes");
        let seen = fs::read(&counter).expect("reads");
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(fs::read(&counter).expect("reads"), seen);
    });
}

#[test]
fn how_the_main_process_ended_is_known() {
    with_each_runtime("main process", |world| async move {
        let cases: [(&str, &str, Exit); 4] = [
            ("zero", "echo out; echo err >&2", code(0)),
            ("three", "exit 3", code(3)),
            ("high", "exit 137", code(137)),
            ("notfound", "exit 127", code(127)),
        ];
        for (name, script, exit) in cases {
            let key = world.start(name, &["/bin/sh", "-c", script]).await;
            let ended = world.driver.wait(&key).await.expect("ends");
            assert_eq!(ended.exit, exit, "{name}");
            if name == "zero" {
                assert_eq!(ended.output_tail, b"out\nerr\n");
            }
            assert!(world.driver.list().await.expect("lists").contains(&(key.clone(), Presence::Ended(ended))));
            assert!(matches!(world.driver.exec(&key, &sh("true")).await, Err(DriverError::NotRunning { .. })));
        }
        let key = world.start("long", &["/bin/sh", "-c", "yes | head -c 1000000; printf 'the end'"]).await;
        let tail = world.driver.wait(&key).await.expect("ends").output_tail;
        assert!(tail.len() == 4096 && tail.ends_with(b"y\nthe end"), "{}", tail.len());
    });
}

#[test]
fn a_main_process_that_is_killed_or_told_to_end_says_so() {
    with_each_runtime("signals of the main process", |world| async move {
        let key = world.start("idle", &[]).await;
        world.sh(&key, "kill -TERM 1").await;
        assert_eq!(world.driver.wait(&key).await.expect("ends").exit, code(0));
        let key = world.start("killed", &[]).await;
        let pid = fs::read_to_string(world.dir.path().join("oci/instances/acme.killed.1/started")).expect("pid");
        Command::new("kill").args(["-KILL", pid.trim()]).status().expect("kill");
        assert_eq!(world.driver.wait(&key).await.expect("ends").exit, killed_by(9));
    });
}

#[test]
fn the_idle_main_process_reaps_and_survives_the_loss_of_its_sleep() {
    with_each_runtime("reaping", |world| async move {
        let key = world.start("a", &[]).await;
        // The shell ends before its child, so the child becomes process 1's.
        let orphan = world.sh(&key, "(sh -c 'sleep 0.05' & ) ; echo").await;
        assert_eq!(orphan.exit, code(0));
        let script =
            "for i in 1 2 3 4 5 6 7 8 9 10; do ps -o stat,comm | grep -q '^Z' || exit 0; sleep 0.2; done; ps; exit 1";
        let output = world.sh(&key, script).await;
        assert_eq!(output.exit, code(0), "{}", output.text());
        world.sh(&key, "kill $(ps -o pid,comm | grep sleep | grep -v grep | while read p c; do echo $p; done)").await;
        assert_eq!(world.sh(&key, "echo alive").await.text(), "alive");
    });
}

#[test]
fn a_program_that_is_not_there_is_told_from_one_that_exits_127() {
    with_each_runtime("command not found", |world| async move {
        let key = world.start("a", &[]).await;
        assert_eq!(world.sh(&key, "exit 127").await.exit, code(127));
        assert_eq!(world.sh(&key, "exit 126").await.exit, code(126));
        for missing in ["nope", "/nope", "/etc/passwd"] {
            match world.driver.exec(&key, &command(&[missing])).await {
                Err(DriverError::CommandNotFound { command }) => assert_eq!(command, missing),
                Err(other) => panic!("{missing}: {other}"),
                Ok(_) => panic!("{missing} was executed"),
            }
        }
        let spec = ExecSpec { working_directory: Some("/nope".into()), ..sh("true") };
        match world.driver.exec(&key, &spec).await {
            Err(DriverError::Runtime { output, .. }) => {
                assert!(output.contains("/nope") && output.len() <= 4096, "{output}")
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("executed in a directory that is not there"),
        }
        match world.driver.start(&world.spec("b", &["/nope"])).await {
            Err(DriverError::CommandNotFound { command }) => assert_eq!(command, "/nope"),
            other => panic!("{other:?}"),
        }
        assert_eq!(world.driver.list().await.expect("lists").len(), 1, "nothing is left of a failed start");
    });
}

#[test]
fn streams_are_binary_separate_and_close_one_by_one() {
    with_each_runtime("streams", |world| async move {
        let key = world.start("a", &[]).await;
        let input: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let output = run(&*world.driver, &key, &command(&["cat"]), &input).await;
        assert!(output.stdout == input && output.stderr.is_empty());
        assert_eq!(output.exit, code(0));
        let output = world.sh(&key, "echo out; echo err >&2; exit 5").await;
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.exit, code(5));
        assert_eq!(world.sh(&key, "yes | head -n 2").await.text(), "y\ny");
        // A process that closed its standard output is waited for still.
        let output = world.sh(&key, "exec >&- 2>&-; sleep 0.1; exit 9").await;
        assert_eq!(output.exit, code(9));
    });
}

#[test]
fn arguments_environment_directory_and_user_arrive_as_they_are() {
    with_each_runtime("exec specification", |world| async move {
        let key = world.start("a", &[]).await;
        let output = run(&*world.driver, &key, &command(&["echo", "a b", "$HOME", "ü\n*"]), &[]).await;
        assert_eq!(output.text(), "a b $HOME ü\n*");
        let spec = ExecSpec {
            environment: vec![("GREETING".into(), "over".into()), ("X".into(), "a=b c".into())],
            working_directory: Some("/etc".into()),
            user: (1000, 1000),
            ..sh("echo $GREETING; echo $X; pwd; id -u; id -g; grep -E 'Cap(Eff|Prm)' /proc/self/status | tr -d '\\t'")
        };
        let output = run(&*world.driver, &key, &spec, &[]).await;
        let none = "0000000000000000";
        assert_eq!(output.text(), format!("over\na=b c\n/etc\n1000\n1000\nCapPrm:{none}\nCapEff:{none}"));
    });
}

#[test]
fn signals_reach_an_execution_and_letting_go_kills_it() {
    with_each_runtime("exec signals", |world| async move {
        let key = world.start("a", &[]).await;
        let execution =
            world.driver.exec(&key, &sh("trap 'exit 42' USR1; echo ready; while :; do sleep 0.01; done")).await;
        let mut execution = execution.expect("executes");
        let mut ready = [0u8; 6];
        execution.stdout.read_exact(&mut ready).await.expect("ready");
        assert!(execution.control.signal(0).await.is_err() && execution.control.signal(65).await.is_err());
        execution.control.signal(libc_signal("USR1")).await.expect("signals");
        assert_eq!(execution.control.wait().await.expect("ends"), code(42));
        execution.control.signal(9).await.expect("no effect");

        let execution = world.driver.exec(&key, &command(&["sleep", "1000"])).await.expect("executes");
        execution.control.signal(libc_signal("TERM")).await.expect("signals");
        assert_eq!(execution.control.wait().await.expect("ends"), killed_by(15));

        let execution = world.driver.exec(&key, &command(&["sleep", "1001"])).await.expect("executes");
        let Execution { mut stdout, control, .. } = execution;
        drop(control);
        assert_eq!(stdout.read(&mut [0u8; 1]).await.expect("reads"), 0, "its pipe closes when it is killed");
        let task = tokio::spawn({
            let (driver, key) = (Arc::clone(&world.driver), key.clone());
            async move {
                let execution =
                    driver.exec(&key, &sh("echo ready > /var/ready; exec sleep 1002")).await.expect("executes");
                execution.control.wait().await
            }
        });
        let ready = world.dir.path().join("oci/instances/acme.a.1/upper/var/ready");
        while !ready.exists() {
            tokio::task::yield_now().await;
        }
        task.abort();
        let gone = "for i in $(seq 100); do ps -o args | grep -q '[s]leep 100[12]' || exit 0; sleep 0.1; done; exit 1";
        assert_eq!(world.sh(&key, &gone.replace("$(seq 100)", &"x ".repeat(100))).await.exit, code(0));
    });
}

fn libc_signal(name: &str) -> i32 {
    match name {
        "USR1" => 10,
        "TERM" => 15,
        other => panic!("{other}"),
    }
}

#[test]
fn a_terminal_is_real_and_changes_size() {
    with_each_runtime("terminal", |world| async move {
        let key = world.start("a", &[]).await;
        let spec = ExecSpec {
            terminal: Some(TerminalSize { columns: 91, rows: 33 }),
            ..sh(
                "tty; echo go; read answer; stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.01; done",
            )
        };
        let mut execution = world.driver.exec(&key, &spec).await.expect("executes");
        assert!(execution.stderr.is_none());
        let mut seen = String::new();
        read_until(&mut execution, &mut seen, "go").await;
        execution.stdin.write_all(b"answer\n").await.expect("writes");
        read_until(&mut execution, &mut seen, "ready").await;
        assert!(seen.contains("/dev/pts/0") && seen.contains("33 91"), "{seen}");
        execution.control.resize(TerminalSize { columns: 120, rows: 40 }).await.expect("resizes");
        read_until(&mut execution, &mut seen, "40 120").await;
        assert_eq!(execution.control.wait().await.expect("ends"), code(7));
        execution.stdout.read_to_string(&mut seen).await.expect("end of file, not an error");

        let spec = ExecSpec { terminal: Some(TerminalSize { columns: 80, rows: 24 }), ..command(&["sh"]) };
        let mut shell = world.driver.exec(&key, &spec).await.expect("executes");
        shell.stdin.write_all(b"sh -c 'echo $((6*7)); exec sleep 1000'\n").await.expect("writes");
        let mut seen = String::new();
        read_until(&mut shell, &mut seen, "42").await;
        shell.stdin.write_all(b"\x03exit 4\n").await.expect("writes");
        shell.stdout.read_to_string(&mut seen).await.expect("reads");
        assert_eq!(shell.control.wait().await.expect("ends"), code(4));
        assert!(world.driver.exec(&key, &ExecSpec { command: vec!["nope".into()], ..spec }).await.is_err());
    });
}

async fn read_until(execution: &mut Execution, seen: &mut String, wanted: &str) {
    let mut buffer = [0u8; 1024];
    while !seen.contains(wanted) {
        let count = execution.stdout.read(&mut buffer).await.expect("reads");
        assert!(count > 0, "ended before {wanted}: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

#[test]
fn a_sandbox_is_confined() {
    with_each_runtime("confinement", |world| async move {
        let a = world.start("a", &[]).await;
        let b = world.start("b", &[]).await;
        let map_a = world.sh(&a, "cat /proc/self/uid_map /proc/self/gid_map").await;
        let words: Vec<&str> = map_a.text().split_whitespace().collect();
        assert!(words.len() == 6 && words[0] == "0" && words[2] == "65536", "{words:?}");
        assert!(words[1].parse::<u32>().expect("a number") >= 1_000_000, "{words:?}");
        assert_ne!(world.sh(&b, "cat /proc/self/uid_map").await.text(), map_a.text());
        let status = world.sh(&a, "cat /proc/self/status").await;
        assert!(status.text().contains("Seccomp:\t2") && status.text().contains("NoNewPrivs:\t1"), "{}", status.text());
        assert!(!status.text().contains("CapEff:\t0000003fffffffff"));
        let denied = "mount -t tmpfs x /var; unshare -U true && exit 1; unshare -m true && exit 1; mount | grep -q ' /var ' && exit 1; \
                      echo 1 > /proc/sys/kernel/panic && exit 1; ls /sys/fs/cgroup/*/* 2>/dev/null && exit 1; exit 0";
        let output = world.sh(&a, denied).await;
        assert_eq!(output.exit, code(0), "{output:?}");
        let links = world.sh(&a, "ip -o link; ip -o addr show lo").await;
        assert!(!links.text().contains("2: ") && links.text().contains("LOOPBACK,UP"), "{}", links.text());
        assert_eq!(world.sh(&a, "ps -o pid | wc -l").await.exit, code(0));
        let host = fs::read_link("/proc/self/ns/net").expect("namespace");
        for kind in ["net", "pid", "ipc", "uts", "mnt", "user"] {
            let inside = world.sh(&a, &format!("ls -l /proc/self/ns/{kind}")).await;
            let outside = fs::read_link(format!("/proc/self/ns/{kind}")).expect("namespace");
            assert!(!inside.text().contains(outside.to_str().expect("text")), "{kind} {host:?}");
        }
    });
}

#[test]
fn what_one_writes_no_other_sees() {
    with_each_runtime("overlay", |world| async move {
        let a = world.start("a", &[]).await;
        let b = world.start("b", &[]).await;
        let change = "echo mine > /etc/shared && touch /etc/new && chown 1000:1000 /etc/new && stat -c %u:%g /etc/new /etc/passwd";
        assert_eq!(world.sh(&a, change).await.text(), "1000:1000\n0:0");
        assert_eq!(world.sh(&a, "cat /etc/shared").await.text(), "mine");
        assert_eq!(world.sh(&b, "cat /etc/shared; ls /etc").await.text(), "from the base\ngroup\npasswd\nshared");
        assert_eq!(fs::read_to_string(world.base.join("etc/shared")).expect("reads"), "from the base\n");
        world.driver.remove(&a).await.expect("removes");
        let a = world.start("a", &[]).await;
        assert_eq!(world.sh(&a, "cat /etc/shared").await.text(), "from the base");
        let tmp = world.sh(&a, "echo x > /tmp/x && echo x > /dev/shm/x && cat /tmp/x /dev/null /dev/shm/x").await;
        assert_eq!(tmp.text(), "x\nx");
    });
}

#[test]
fn memory_beyond_the_limit_ends_in_an_oom_kill_that_is_reported() {
    with_each_runtime("memory", |world| async move {
        let key = world.start("main", &["tail", "/dev/zero"]).await;
        let Ended { exit, .. } = world.driver.wait(&key).await.expect("ends");
        assert_eq!(exit, Exit { code: 137, signal: 9, oom_killed: true });
        let key = world.start("exec", &[]).await;
        let output = run(&*world.driver, &key, &command(&["tail", "/dev/zero"]), &[]).await;
        assert_eq!(output.exit, Exit { code: 137, signal: 9, oom_killed: true });
        assert_eq!(world.sh(&key, "exit 1").await.exit, code(1), "an earlier kill is not this one's");
    });
}

#[test]
fn a_fork_bomb_is_held_by_the_limit_and_can_be_removed() {
    with_each_runtime("pids", |world| async move {
        let key = world.start("a", &[]).await;
        let bomb = "echo armed; f() { while :; do f & done; }; f 2>/dev/null & wait";
        let mut execution = world.driver.exec(&key, &sh(bomb)).await.expect("executes");
        execution.stdout.read_exact(&mut [0u8; 6]).await.expect("armed");
        while world.pids_file("pids.events").is_none_or(|text| text.contains("max 0")) {
            let running: u64 = world.pids_file("pids.current").expect("a group").trim().parse().expect("a number");
            assert!(running <= 64, "{running}");
            tokio::task::yield_now().await;
        }
        world.driver.remove(&key).await.expect("removes");
        assert!(execution.control.wait().await.is_ok());
    });
}

#[test]
fn a_new_agent_adopts_what_runs_and_learns_how_it_ends() {
    with_each_runtime("adoption", |world| async move {
        let key = world.start("a", &["/bin/sh", "-c", "trap 'exit 6' TERM; while :; do sleep 0.01; done"]).await;
        let ended = world.start("b", &["/bin/sh", "-c", "exit 2"]).await;
        let driver = world.restarted();
        let _ = driver.wait(&ended).await.expect("ended");
        let list = driver.list().await.expect("lists");
        assert!(list.contains(&(key.clone(), Presence::Running)), "{list:?}");
        let waiting = tokio::spawn({
            let (driver, key) = (Arc::clone(&driver), key.clone());
            async move { driver.wait(&key).await }
        });
        // Process 1 may take it along before it ends by itself.
        run(&*driver, &key, &command(&["kill", "1"]), &[]).await;
        assert_eq!(waiting.await.expect("task").expect("ends").exit, code(6));
        assert_eq!(world.restarted().wait(&key).await.expect("known for good").exit, code(6));
        driver.remove(&key).await.expect("removes");
        driver.remove(&ended).await.expect("removes");
    });
}

#[test]
fn whatever_a_crash_left_can_be_removed() {
    with_each_runtime("remnants", |world| async move {
        let instances = world.dir.path().join("oci/instances");
        // Crashed right after the directory was made, and in the middle of writing files.
        fs::create_dir(instances.join("acme.empty.1")).expect("directory");
        fs::create_dir_all(instances.join("acme.half.1/upper")).expect("directory");
        fs::write(instances.join("acme.half.1/record.json"), "{\"vers").expect("file");
        // The runtime forgot it.
        world.start("forgotten", &[]).await;
        for entry in fs::read_dir(world.dir.path().join("oci/run")).expect("state").flatten() {
            fs::remove_dir_all(entry.path()).expect("removes");
        }
        // Its removal was cut off after the first step.
        world.start("begun", &[]).await;
        fs::remove_file(instances.join("acme.begun.1/record.json")).expect("removes");
        // Its shim was killed: nobody can say how it will end.
        let orphan = world.start("orphan", &[]).await;
        kill_standing_in(&instances.join("acme.orphan.1"));
        assert!(matches!(world.driver.wait(&orphan).await, Err(DriverError::Runtime { .. })));
        let list = world.driver.list().await.expect("lists");
        let remnants: Vec<String> = list
            .iter()
            .filter(|(_, presence)| *presence == Presence::Remnant)
            .map(|(key, _)| key.sandbox.id.to_string())
            .collect();
        assert_eq!(list.len(), 5);
        for name in ["empty", "half", "begun", "orphan"] {
            assert!(remnants.contains(&name.to_owned()), "{name}: {list:?}");
        }
        for (key, _) in list {
            world.driver.remove(&key).await.unwrap_or_else(|e| panic!("{key:?}: {e}"));
            world.driver.remove(&key).await.expect("removes again");
        }
        assert!(world.driver.list().await.expect("lists").is_empty());
        let groups = fs::read_dir(Path::new("/sys/fs/cgroup/pids/warren").join(world.node.as_str()));
        assert_eq!(groups.into_iter().flatten().flatten().filter(|e| e.path().is_dir()).count(), 0);
    });
}

fn kill_standing_in(directory: &Path) {
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory) {
            Command::new("kill").arg("-KILL").arg(entry.file_name()).status().expect("kill");
        }
    }
}

/// A start that is dropped in the middle is what a crash of the agent is to the shim.
#[test]
fn a_start_that_is_cut_off_at_any_moment_can_be_removed() {
    with_each_runtime("cut-off starts", |world| async move {
        for round in 0..20u64 {
            let spec = world.spec("a", &[]);
            let start = world.driver.start(&spec);
            let _ = tokio::time::timeout(Duration::from_millis(round * 4), start).await;
            world.driver.remove(&spec.key).await.unwrap_or_else(|e| panic!("round {round}: {e}"));
            assert!(world.driver.list().await.expect("lists").is_empty());
        }
    });
}

#[test]
fn a_hundred_instances_at_once_start_answer_and_go() {
    with_each_runtime("a hundred", |world| async move {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..100 {
            let world = Arc::clone(&world);
            tasks.spawn(async move {
                let key = world.start(&format!("s-{n}"), &[]).await;
                assert_eq!(world.sh(&key, &format!("echo {n}")).await.text(), n.to_string());
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("task");
        }
        let list = world.driver.list().await.expect("lists");
        assert_eq!(list.len(), 100);
        assert!(list.iter().all(|(_, presence)| *presence == Presence::Running));
        for (key, _) in list {
            let world = Arc::clone(&world);
            tasks.spawn(async move { world.driver.remove(&key).await.expect("removes") });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("task");
        }
        assert!(world.driver.list().await.expect("lists").is_empty());
    });
}

/// Prints, does not judge: how long it takes from asking for an instance to the first answer from inside.
#[test]
fn the_time_to_the_first_answer_is_printed() {
    with_each_runtime("latency", |world| async move {
        let mut times = Vec::new();
        for n in 0..15 {
            let before = std::time::Instant::now();
            let key = world.start(&format!("s-{n}"), &[]).await;
            let started = before.elapsed();
            assert_eq!(world.sh(&key, "echo x").await.text(), "x");
            let answered = before.elapsed();
            world.driver.remove(&key).await.expect("removes");
            times.push((answered, started, before.elapsed() - answered));
        }
        times.sort();
        let (answered, started, removed) = times[times.len() / 2];
        eprintln!("{}: median start {started:?}, first answer {answered:?}, removal {removed:?}", world.runtime);
    });
}
