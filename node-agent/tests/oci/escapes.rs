//! Ways out of a sandbox, each tried as its root: none may work.
//!
//! Each attempt is a script that exits 0 only if it reached what it must not: a file of the host, the kernel's settings, a device, a
//! neighbour. Afterwards the host is looked at: nothing of it has changed.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};
use warren_node_agent::driver::ExecSpec;

use super::world::*;

/// Key of a neighbour's shared memory.
const SHM: &str = "0x57415252";

/// One way out.
struct Attempt {
    what: &'static str,
    script: &'static str,
}

const fn attempt(what: &'static str, script: &'static str) -> Attempt {
    Attempt { what, script }
}

/// `$CANARY` is the path of a file of the host; `$DISKS` are `major minor` of its disks.
const HOST_FILES: &[Attempt] = &[
    attempt("the root of process 1", "cat /proc/1/root$CANARY"),
    attempt(
        "the root or directory of any process",
        "for p in /proc/[0-9]*; do cat $p/root$CANARY $p/cwd$CANARY && exit 0; done; exit 1",
    ),
    attempt("up from the root", "cat /../../../../../../../..$CANARY"),
    attempt("a link to the root", "ln -s / /tmp/up && cat /tmp/up$CANARY"),
    attempt("a link through a process", "ln -s /proc/self/root/../../.. /tmp/far && cat /tmp/far$CANARY"),
    attempt(
        "a directory that a runtime left open",
        "for fd in /proc/[0-9]*/fd/*; do for up in . .. ../.. ../../.. ../../../../../..; do cat $fd/$up$CANARY && exit 0; done; done; exit 1",
    ),
    attempt("a chroot that is left", "attack chroot $CANARY"),
    attempt("the handle of the disk's root", "attack handle $CANARY"),
    attempt(
        "a node of a disk",
        "set -- $DISKS; while [ $# -gt 1 ]; do mknod /tmp/d$1-$2 b $1 $2; head -c 1 /tmp/d$1-$2 | grep -q . && exit 0; shift 2; done; exit 1",
    ),
    attempt(
        "a disk that is mounted",
        "mkdir -p /tmp/m; for d in /dev/vda /dev/sda /dev/nvme0n1 /tmp/d*; do mount $d /tmp/m && exit 0; done; exit 1",
    ),
    attempt(
        "a loop device",
        "mknod /tmp/loop0 b 7 0; losetup /tmp/loop0 /etc/passwd || losetup /dev/loop0 /etc/passwd",
    ),
];

const MOUNTS: &[Attempt] = &[
    attempt(
        "a process file system without its masks",
        "mkdir -p /tmp/p; mount -t proc p /tmp/p && echo 1 > /tmp/p/sys/kernel/panic",
    ),
    attempt("a writable /sys", "mkdir -p /tmp/s; mount -t sysfs s /tmp/s && echo x > /tmp/s/kernel/uevent_helper"),
    attempt(
        "control groups of version 1",
        "mkdir -p /tmp/c; mount -t cgroup -o memory c /tmp/c && echo /x > /tmp/c/release_agent",
    ),
    attempt(
        "control groups of version 2",
        "mkdir -p /tmp/c2; mount -t cgroup2 c /tmp/c2 && echo 0 > /tmp/c2/cgroup.procs",
    ),
    attempt("/proc/sys made writable", "mount -o bind,remount,rw /proc/sys; echo 1 > /proc/sys/kernel/panic"),
    attempt("the mask of /proc/kcore taken off", "umount /proc/kcore; head -c 1 /proc/kcore | grep -q ."),
    attempt("the whole of /proc taken off", "umount -l /proc/sysrq-trigger; echo h > /proc/sysrq-trigger"),
    attempt("another root", "attack pivot"),
    attempt("the newer calls for mounting", "attack fsopen"),
    attempt("a tree that is cloned", "attack open-tree"),
    attempt("debugfs", "mkdir -p /tmp/dbg; mount -t debugfs d /tmp/dbg && ls /tmp/dbg | grep -q ."),
    attempt("tracefs", "mkdir -p /tmp/trc; mount -t tracefs t /tmp/trc && ls /tmp/trc | grep -q ."),
    attempt("a file system of its own making", "head -c 1 /dev/fuse"),
];

const NAMESPACES: &[Attempt] = &[
    attempt("a user namespace by unshare", "attack unshare-user"),
    attempt("a user namespace by clone", "attack clone-user"),
    attempt("a user namespace by clone3", "attack clone3-user"),
    attempt("a mount namespace by clone", "attack clone-mount"),
    attempt("the namespaces of another process", "nsenter -t 1 -m -n -u -i true"),
];

const KERNEL_FILES: &[Attempt] = &[
    attempt("system request", "echo h > /proc/sysrq-trigger"),
    attempt("who gets core dumps", "echo '|/tmp/x' > /proc/sys/kernel/core_pattern"),
    attempt("who loads modules", "echo /tmp/x > /proc/sys/kernel/modprobe"),
    attempt("who runs foreign programs", "echo ':x:M::MZ::/tmp/x:' > /proc/sys/fs/binfmt_misc/register"),
    attempt("who hears of devices", "echo /tmp/x > /sys/kernel/uevent_helper"),
    attempt("the host's caches", "echo 3 > /proc/sys/vm/drop_caches"),
    attempt("the kernel's memory", "head -c 1 /proc/kcore | grep -q ."),
    attempt("keys", "cat /proc/keys | grep -q ."),
    attempt("the kernel's log", "head -c 1 /proc/kmsg | grep -q . || attack kernel-log"),
    attempt("immunity when memory is short", "echo -1000 > /proc/self/oom_score_adj"),
    attempt(
        "interrupts",
        "for f in /proc/irq/*/smp_affinity /proc/irq/default_smp_affinity; do echo 1 > $f && exit 0; done; exit 1",
    ),
    attempt("power", "echo mem > /sys/power/state"),
    attempt(
        "a device through /sys",
        "for f in /sys/block/*/queue/* /sys/module/*/parameters/* /sys/class/*/*/uevent; do echo 1 > $f && exit 0; done; exit 1",
    ),
    attempt(
        "a limit through control groups",
        "for f in $(find /sys/fs/cgroup -name '*.max' -o -name '*limit_in_bytes' -o -name tasks -o -name cgroup.procs); do echo 0 > $f && exit 0; done; exit 1",
    ),
];

const DEVICES: &[Attempt] = &[
    attempt(
        "physical memory",
        "mknod /tmp/mem c 1 1; head -c 1 /tmp/mem | grep -q . || head -c 1 /dev/mem | grep -q .",
    ),
    attempt(
        "the log device",
        "mknod /tmp/kmsg c 1 11; for f in /tmp/kmsg /dev/kmsg; do test -c $f && echo escaped > $f && exit 0; done; exit 1",
    ),
    attempt("virtual machines", "mknod /tmp/kvm c 10 232; : < /tmp/kvm || : < /dev/kvm"),
    attempt("network tunnels", "mknod /tmp/tun c 10 200; : < /tmp/tun || : < /dev/net/tun"),
    attempt(
        "the host's console",
        "mknod /tmp/tty c 4 0; for f in /tmp/tty /dev/tty0; do test -c $f && echo escaped > $f && exit 0; done; exit 1",
    ),
    attempt("input and output ports", "attack iopl"),
];

const KERNEL_CALLS: &[Attempt] = &[
    attempt("programs in the kernel", "attack bpf"),
    attempt("performance counters", "attack perf"),
    attempt("page faults of others", "attack userfaultfd"),
    attempt("submission rings", "attack io-uring"),
    attempt("a module", "attack module"),
    attempt("another kernel", "attack kexec"),
    attempt("keyrings", "attack keyring"),
    attempt("swap", "attack swap"),
    attempt("accounting", "attack acct"),
    attempt("quotas of a disk", "attack quota"),
    attempt("a reboot", "attack reboot"),
    attempt("the clock", "attack time"),
    attempt("the hostname of a namespace", "attack hostname"),
    attempt("every file event", "attack fanotify"),
    attempt("real-time scheduling", "attack real-time"),
    attempt("precedence over others", "nice -n -20 sh -c 'exit $(( $(nice) == -20 ? 0 : 1 ))'"),
    attempt("more open files", "attack open-files"),
    attempt("packets as they are on the wire", "attack packets"),
    attempt("packets of any protocol", "attack raw-ip"),
    attempt("the hypervisor", "attack vsock"),
    attempt("a user that is none of its own", "touch /tmp/f; chown 70000 /tmp/f"),
];

/// `$SOCKET` is a socket of the host without a path, `$PORT` one on its loopback, `$SHM` a neighbour's shared memory, `$PID` a process
/// of the host.
const NEIGHBOURS: &[Attempt] = &[
    attempt("a socket of the host", "attack abstract $SOCKET"),
    attempt("a port on the host's loopback", "echo | nc -w 1 127.0.0.1 $PORT"),
    attempt("shared memory of a neighbour", "attack shm $SHM"),
    attempt("memory files of a neighbour", "cat /dev/shm/neighbour"),
    attempt("processes of a neighbour", "for p in /proc/[0-9]*; do grep -q 8639[9] $p/cmdline && exit 0; done; exit 1"),
    attempt("a process of the host", "kill -0 $PID && ! [ -d /proc/$PID ]"),
];

/// At what is beyond the sandbox, whatever kernel it runs on.
const BEYOND: [&[Attempt]; 2] = [HOST_FILES, NEIGHBOURS];

/// At its kernel: where that is its own, what works reaches nobody else, and only the host is looked at.
const AT_THE_KERNEL: [&[Attempt]; 5] = [MOUNTS, NAMESPACES, KERNEL_FILES, DEVICES, KERNEL_CALLS];

/// Each attempt, with whether it may work on a kernel that is the sandbox's own.
fn all() -> impl Iterator<Item = (&'static Attempt, bool)> {
    let beyond = BEYOND.into_iter().flatten().map(|attempt| (attempt, false));
    beyond.chain(AT_THE_KERNEL.into_iter().flatten().map(|attempt| (attempt, true)))
}

/// The attacks that need a program, in the base of the sandboxes. `false`: there is no compiler here.
fn install_attacks(world: &World) -> bool {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oci/attacks/attack.c");
    let program = world.base.join("bin/attack");
    match Command::new("cc").args(["-static", "-O1", "-o"]).arg(&program).arg(source).status() {
        Ok(status) => {
            assert!(status.success(), "attack.c does not compile");
            true
        }
        Err(_) => {
            eprintln!("SKIPPED escapes that need a program: no cc (install build-essential)");
            false
        }
    }
}

/// What of the host must stay as it is.
fn host_settings() -> Vec<(&'static str, Vec<u8>)> {
    let files = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/panic",
        "/proc/sys/kernel/hostname",
        "/proc/swaps",
        "/proc/modules",
        "/sys/kernel/uevent_helper",
    ];
    files.into_iter().map(|file| (file, fs::read(file).unwrap_or_default())).collect()
}

fn disks() -> String {
    let text = fs::read_to_string("/proc/partitions").expect("partitions");
    let numbers = text.lines().skip(2).map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
    numbers.take(16).collect::<Vec<_>>().join(" ")
}

#[test]
fn no_way_out_works() {
    assert!(all().count() >= 50);
    with_each_runtime("escapes", |world| async move {
        let has_attacks = install_attacks(&world);
        let canary = world.dir.path().join("canary");
        fs::write(&canary, "a secret of the host").expect("write");
        let name = format!("warren-{}", world.node);
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let _socket = UnixListener::bind_addr(&address).expect("a socket of the host");
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port of the host");
        let neighbour =
            world.start("neighbour", &["/bin/sh", "-c", "echo x > /dev/shm/neighbour; exec sleep 86399"]).await;
        if has_attacks {
            let made = world.sh(&neighbour, &format!("attack shm-make {SHM} && attack shm {SHM}")).await;
            assert_eq!(made.exit, code(0), "{made:?}");
        }
        let inside = world.start("inside", &[]).await;
        let before = host_settings();
        let environment: Vec<(String, String)> = [
            ("CANARY", canary.to_str().expect("text").to_owned()),
            ("DISKS", disks()),
            ("SOCKET", name),
            ("PORT", port.local_addr().expect("bound").port().to_string()),
            ("SHM", SHM.to_owned()),
            ("PID", std::process::id().to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        let mut escaped = Vec::new();
        for (Attempt { what, script }, of_kernel) in all() {
            if !has_attacks && script.contains("attack ") {
                continue;
            }
            let spec =
                ExecSpec { environment: environment.clone(), ..sh(&format!("{{ {script}; }} > /dev/null 2>&1")) };
            let output = run(&*world.driver, &inside, &spec, &[]).await;
            assert_ne!(output.exit.code, 99, "{what}: the attack is misspelt");
            if output.exit == code(0) && !(of_kernel && world.has_own_kernel()) {
                escaped.push(*what);
            }
        }
        assert!(escaped.is_empty(), "with {}: {escaped:?}", world.runtime);
        assert_eq!(host_settings(), before, "the host was changed");
        assert_eq!(fs::read_to_string(&canary).expect("there"), "a secret of the host");
    });
}

/// A process that a runtime brings in runs the runtime's own program for a moment, and may have descriptors of the host open.
#[test]
fn a_runtime_that_comes_in_leaves_nothing_to_hold_on_to() {
    with_each_runtime("escapes by the runtime", |world| async move {
        let lurk = "while :; do for p in /proc/[0-9]*; do case $(readlink $p/exe) in */busybox|'') ;; *) : 2> /dev/null >> $p/exe \
                    && echo overwrote $p >> /tmp/caught;; esac; done; done";
        let inside = world.start("inside", &["/bin/sh", "-c", lurk]).await;
        let programs: Vec<_> = [world.runtime_path(), env!("CARGO_BIN_EXE_warren-node-agent").into()].into();
        let hashes = |programs: &[std::path::PathBuf]| -> Vec<[u8; 32]> {
            programs.iter().map(|path| Sha256::digest(fs::read(path).expect("a program")).into()).collect()
        };
        let before = hashes(&programs);
        for _ in 0..20 {
            world.sh(&inside, "true").await;
        }
        for number in 3..12 {
            let directory = Some(format!("/proc/self/fd/{number}"));
            let spec = ExecSpec {
                working_directory: directory,
                ..sh("cat ../../../../../../../../etc/machine-id && exit 0; exit 1")
            };
            // Refused, or somewhere inside.
            if let Ok(attached) = exec(&*world.driver, &inside, &spec).await {
                assert_ne!(read_all(attached.output).await.exit, code(0), "descriptor {number} leads out");
            }
        }
        let caught = world.sh(&inside, "cat /tmp/caught").await;
        assert_eq!(caught.text(), "", "{caught:?}");
        assert_eq!(hashes(&programs), before, "a program of the host was changed");
    });
}
