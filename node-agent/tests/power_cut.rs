//! Power cuts: a record that the journal acknowledged is there after one, whenever it comes.
//!
//! The journal lives on ext4 on a loop device. A child process writes records and says which were acknowledged; at a random
//! moment it is stopped, the device's backing file is copied, and the child killed. The copy holds only what reached the
//! device: dirty pages of the mounted file system are what a cut loses. The next round goes on from the copy. That the same
//! recipe without its sync is seen to lose something is shown in the scheduler's test of the same name.
//!
//! Needs root and loop devices; says so and passes without. `WARREN_SEED` repeats a run's choices.

#![allow(clippy::disallowed_methods, reason = "tests bound how long they wait")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use warren_node_agent::journal::{Entry, Journal, Opened};
use warren_node_agent::reconcile::{Reason, Record, Stage};
use warren_proto::ids::{Epoch, SandboxName};

/// Cuts that one journal lives through.
const CUTS: usize = 12;
/// Bytes of the disk: sparse, so only what is written costs anything.
const DISK_BYTES: u64 = 256 << 20;
/// Longest time from the first acknowledgement to the cut.
const LONGEST_RUN: Duration = Duration::from_millis(150);
/// How long anything may take: a bound against hanging, never a measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sandboxes that the writer changes at once.
const SANDBOXES: u64 = 24;

const MODE: &str = "WARREN_POWER_CUT_MODE";
const DIRECTORY: &str = "WARREN_POWER_CUT_DIRECTORY";

/// Not a test of its own: what the children run. Their lines begin with `@`; the test harness prints others.
#[test]
fn child() {
    let (Ok(mode), Ok(directory)) = (std::env::var(MODE), std::env::var(DIRECTORY)) else { return };
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let opened = Journal::open(Path::new(&directory)).unwrap();
    assert!(!opened.forgot, "the journal was damaged");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match mode.as_str() {
        "read" => print_all(&opened),
        _ => runtime.block_on(write_for_ever(opened)),
    }
}

fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@{line}").and_then(|()| out.flush()).unwrap();
}

fn name(number: u64) -> SandboxName {
    SandboxName::parse(&format!("tenants/t/sandboxes/s-{number}")).unwrap()
}

/// What stands under a number at an epoch depends on these alone; some are as large as records become.
fn entry(number: u64, epoch: u64) -> Entry {
    let stage = match (number + epoch) % 3 {
        0 => Stage::Starting,
        1 => Stage::Started,
        _ => Stage::Failed(Reason::new("START_FAILED", "x".repeat(4000))),
    };
    Entry { record: Record { epoch: Epoch(epoch), stage }, foreign: None }
}

fn print_all(opened: &Opened) {
    for number in 0..SANDBOXES {
        if let Some(found) = opened.entries.get(&name(number)) {
            let epoch = found.record.epoch.0;
            assert_eq!(*found, entry(number, epoch), "a record has changed");
            say(format_args!("r {number} {epoch}"));
        }
    }
    say(format_args!("end"));
}

/// As an agent does: each sandbox has one change under way at a time, all of them at once.
async fn write_for_ever(Opened { journal, entries, .. }: Opened) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..SANDBOXES {
        let mut epoch = entries.get(&name(number)).map_or(0, |entry| entry.record.epoch.0);
        let journal = journal.clone();
        tasks.spawn(async move {
            loop {
                epoch += 1;
                // Nobody waits for this one; the next covers it.
                journal.put_soon(&name(number), &entry(number, epoch)).await.unwrap();
                epoch += 1;
                journal.put(vec![(name(number), entry(number, epoch))]).await.unwrap();
                say(format_args!("r {number} {epoch}"));
            }
        });
    }
    tasks.join_next().await;
}

/// A child, killed at the latest when this goes.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Running {
    fn start(mode: &str, directory: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env(MODE, mode)
            .env(DIRECTORY, directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if let Some(said) = line.strip_prefix('@')
                    && sender.send(said.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    /// Stops every thread. One inside a system call, a sync say, finishes that first.
    fn freeze(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        while !std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten().all(stopped) {
            assert!(Instant::now() < deadline, "the writer does not stop");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// What it says until it ends.
    fn until_end(&self) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => said.push(line),
                Err(RecvTimeoutError::Disconnected) => return said,
                Err(RecvTimeoutError::Timeout) => panic!("a child hangs"),
            }
        }
    }
}

/// A mounted image. Its loop device goes with the mount.
struct Mounted(PathBuf);

impl Mounted {
    /// Commits of the file system's journal come from syncs alone: none runs while the image is copied.
    fn new(image: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run("mount", &["-o", "loop,commit=300", image.to_str().unwrap(), at.to_str().unwrap()]);
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmount = |arguments: &[&str]| Command::new("umount").args(arguments).arg(&self.0).status();
        if !unmount(&[]).is_ok_and(|status| status.success()) {
            let _detached_at_least = unmount(&["-l"]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Number and epoch of lines `r NUMBER EPOCH`.
fn records(lines: &[String]) -> BTreeMap<u64, u64> {
    let numbers = |line: &String| {
        let mut words = line.split(' ').skip(1).map(|word| word.parse().unwrap());
        (words.next().unwrap(), words.next().unwrap())
    };
    lines.iter().filter(|line| line.starts_with("r ")).map(numbers).collect()
}

/// A disk that lives through cuts.
struct Disk {
    directory: tempfile::TempDir,
    generation: usize,
}

impl Disk {
    fn new() -> Self {
        let disk = Self { directory: tempfile::tempdir().unwrap(), generation: 0 };
        std::fs::File::create(disk.image()).unwrap().set_len(DISK_BYTES).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", disk.image().to_str().unwrap()]);
        disk
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join(format!("{}.img", self.generation))
    }

    fn mount(&self) -> Mounted {
        Mounted::new(&self.image(), &self.directory.path().join("mnt"))
    }

    /// Lets a writer run and cuts the power at a random moment; answers what was acknowledged.
    fn run_and_cut(&mut self, random: &mut StdRng) -> Vec<String> {
        let old = self.image();
        let mut said = Vec::new();
        {
            let mounted = self.mount();
            let writer = Running::start("write", &mounted.0);
            said.push(writer.lines.recv_timeout(PATIENCE).expect("the writer does not start"));
            std::thread::sleep(random.random_range(Duration::ZERO..LONGEST_RUN));
            writer.freeze();
            self.generation += 1;
            run("cp", &["--sparse=auto", old.to_str().unwrap(), self.image().to_str().unwrap()]);
            kill(writer.pid(), Signal::SIGKILL).unwrap();
            said.extend(writer.until_end());
        }
        std::fs::remove_file(old).unwrap();
        said
    }

    /// Opens the journal in a process of its own, so that nothing holds the mount afterwards.
    fn read(&self) -> Vec<String> {
        let mounted = self.mount();
        let reader = Running::start("read", &mounted.0);
        reader.until_end()
    }
}

#[test]
fn no_acknowledged_record_is_lost_in_a_power_cut() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: power cuts need root and loop devices");
        return;
    }
    let seed = std::env::var("WARREN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("WARREN_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut disk, mut acknowledged) = (Disk::new(), BTreeMap::new());
    for cut in 1..=CUTS {
        acknowledged.extend(records(&disk.run_and_cut(&mut random)));
        let read = disk.read();
        assert_eq!(read.last().map(String::as_str), Some("end"), "cut {cut}: the journal cannot be read");
        let there = records(&read);
        for (number, epoch) in &acknowledged {
            let found = there.get(number);
            assert!(found >= Some(epoch), "cut {cut}: s-{number} at {epoch} was acknowledged; there: {found:?}");
        }
    }
    let last = acknowledged.values().max();
    eprintln!("{CUTS} cuts; {} sandboxes, newest epoch {last:?}", acknowledged.len());
    assert!(acknowledged.len() > 1 && last > Some(&20), "the writer did too little to show anything");
}
