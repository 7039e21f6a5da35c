//! Power cuts: what the store acknowledged is there after one, whenever it comes.
//!
//! The store lives on ext4 on a loop device. A child process writes to it and says what was acknowledged; at a random moment
//! it is stopped, the device's backing file is copied, and the child killed. The backing file holds only what was written to
//! the device: dirty pages of the mounted file system are what a cut loses. The next round goes on from the copy, so a store
//! lives through many cuts. The same without the sync must be seen to lose something, or the test would prove nothing.
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
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, RaftLogReader};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use warren_proto::ids::ReplicaId;
use warren_scheduler::raft::LogStore;
use warren_scheduler::raft::testing::{Batch, Entry, LogId, TypeConfig, Vote};
use warren_scheduler::state::command::{Body, Caller, Command as LedgerCommand, LogTime, ReplicaRecord};
use warren_scheduler::state::level::Level;

/// Cuts that one store lives through.
const CUTS: usize = 30;

/// Cuts that the store without its sync is given to lose something. The first mostly do; on a busy machine ten once lost nothing.
const CUTS_WITHOUT_SYNC: usize = 50;

/// Bytes of the disk: sparse, so only what is written costs anything.
const DISK_BYTES: u64 = 512 << 20;

/// Longest time from the first acknowledgement to the cut.
const LONGEST_RUN: Duration = Duration::from_millis(150);

/// How long anything may take: a bound against hanging, never a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// Appends that the writer has under way.
const IN_FLIGHT: usize = 16;

/// Entries that the writer leaves when it purges.
const KEPT: u64 = 300;

const MODE: &str = "WARREN_POWER_CUT_MODE";
const DIRECTORY: &str = "WARREN_POWER_CUT_DIRECTORY";

// --- The child: writes, or reads what is there. Its lines begin with `@`; the test harness prints others.

/// Not a test of its own: what the children run.
#[test]
fn child() {
    let (Ok(mode), Ok(directory)) = (std::env::var(MODE), std::env::var(DIRECTORY)) else { return };
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let directory = PathBuf::from(directory);
    let store = match mode.as_str() {
        "write-without-sync" => LogStore::open_without_sync(&directory),
        _ => LogStore::open(&directory),
    };
    let store = store.unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { if mode == "read" { print_all(store).await } else { write_for_ever(store).await } });
}

fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@{line}").and_then(|()| out.flush()).unwrap();
}

/// What stands at an index depends on its term and index alone. Sizes vary up to the largest batch, and most are of the kind
/// that sled's default segments lose in spite of the sync.
fn entry(term: u64, index: u64) -> Entry {
    let size = match index % 4 {
        0 => 47_000,
        1 | 2 => 12_000,
        _ => 100,
    };
    let letter = char::from(b'a' + u8::try_from((term.wrapping_mul(31) + index) % 26).unwrap());
    let api_address = std::iter::repeat_n(letter, size).collect();
    let record = ReplicaRecord { api_address, token_key: [7; 32], disk: 0, max_level: Level::FIRST };
    let body = Body::PutReplica { replica: ReplicaId(index), record };
    let command = LedgerCommand { caller: Caller::system("test"), time: LogTime(term), body };
    let payload = EntryPayload::Normal(Batch { commands: vec![command].into() });
    Entry { log_id: LogId::new_term_index(term, index), payload }
}

async fn print_all(mut store: LogStore) {
    let state = store.get_log_state().await.unwrap();
    let vote = store.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
    say(format_args!("v {vote}"));
    say(format_args!("p {}", state.last_purged_log_id.map_or(0, |log_id| log_id.index)));
    if let Some(committed) = store.read_committed().await.unwrap() {
        say(format_args!("c {} {}", committed.leader_id.term, committed.index));
    }
    for read in store.try_get_log_entries(..).await.unwrap() {
        let (term, index) = (read.log_id.leader_id.term, read.log_id.index);
        assert_eq!(read, entry(term, index), "an entry has changed");
        say(format_args!("e {term} {index}"));
    }
    say(format_args!("end"));
}

/// Appends, now and then truncates, commits and purges, and says each time what was acknowledged.
async fn write_for_ever(mut store: LogStore) {
    let state = store.get_log_state().await.unwrap();
    let mut term = store.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
    let mut next = state.last_log_id.map_or(1, |log_id| log_id.index + 1);
    loop {
        term += 1;
        store.save_vote(&Vote::new_committed(term, 1)).await.unwrap();
        say(format_args!("v {term}"));
        append_burst(&mut store, term, &mut next).await;
        let acknowledged = next - 1;
        if term % 3 == 0 {
            // One append that nobody waits for before its end is cut off.
            append(&mut store, term, next, 4).await;
            say(format_args!("t {}", next + 1));
            store.truncate_after(Some(LogId::new_term_index(term, next))).await.unwrap();
            say(format_args!("a {term} {next} 1"));
            next += 1;
        }
        if term % 4 == 0 && acknowledged > KEPT {
            store.purge(entry(term, acknowledged - KEPT).log_id).await.unwrap();
            say(format_args!("p {}", acknowledged - KEPT));
        }
    }
}

type Done = tokio::sync::oneshot::Receiver<std::io::Result<()>>;

async fn append(store: &mut LogStore, term: u64, first: u64, count: u64) -> Done {
    let (sender, done) = TypeConfig::oneshot();
    let entries: Vec<_> = (first..first + count).map(|index| entry(term, index)).collect();
    store.append(entries, IOFlushed::signal(sender)).await.unwrap();
    done
}

/// Many appends under way at once, acknowledged in order.
async fn append_burst(store: &mut LogStore, term: u64, next: &mut u64) {
    let mut under_way = Vec::new();
    for number in 0..IN_FLIGHT as u64 {
        let (first, count) = (*next, number % 4 + 1);
        under_way.push((first, count, append(store, term, first, count).await));
        *next += count;
    }
    // As on a follower: committed elsewhere before it is synced here.
    store.save_committed(Some(LogId::new_term_index(term, *next - 1))).await.unwrap();
    for (first, count, done) in under_way {
        done.await.unwrap().unwrap();
        say(format_args!("a {term} {first} {count}"));
    }
}

// --- The parent.

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

    /// Stops every thread. One inside a system call, a sync say, finishes that first.
    fn freeze(&self) {
        let pid = self.child.id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGSTOP).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !all_threads_stopped(pid) {
            assert!(Instant::now() < deadline, "the writer does not stop");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// What it says until it ends or falls silent for ever; whether it ended by itself.
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

fn all_threads_stopped(pid: u32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    })
}

/// A mounted image. Its loop device goes with the mount.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Commits of the journal come from syncs alone: none runs while the image is copied.
    fn new(image: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run("mount", &["-o", "loop,commit=300", image.to_str().unwrap(), at.to_str().unwrap()]);
        Self { at: at.to_owned() }
    }

    fn store(&self) -> PathBuf {
        self.at.join("data/log")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmount = |arguments: &[&str]| Command::new("umount").args(arguments).arg(&self.at).status();
        if !unmount(&[]).is_ok_and(|status| status.success()) {
            let _detached_at_least = unmount(&["-l"]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What was acknowledged.
#[derive(Debug, Default)]
struct Acknowledged {
    vote: u64,
    purged: u64,
    /// Term by index.
    entries: BTreeMap<u64, u64>,
}

fn numbers(line: &str) -> (&str, Vec<u64>) {
    let mut words = line.split(' ');
    (words.next().unwrap(), words.map(|word| word.parse().unwrap()).collect())
}

impl Acknowledged {
    fn hear(&mut self, line: &str) {
        match numbers(line) {
            ("v", n) => self.vote = n[0],
            ("p", n) => {
                self.purged = n[0];
                self.entries.retain(|index, _| *index > n[0]);
            }
            ("t", n) => drop(self.entries.split_off(&n[0])),
            ("a", n) => self.entries.extend((n[1]..n[1] + n[2]).map(|index| (index, n[0]))),
            other => panic!("{other:?}"),
        }
    }

    /// What is wrong with what was read after a cut.
    fn compare(&self, read: &[String]) -> Result<(), String> {
        if read.last().map(String::as_str) != Some("end") {
            return Err("the store cannot be opened, or an entry has changed".to_owned());
        }
        let (mut vote, mut purged, mut committed, mut found) = (0, 0, None, BTreeMap::new());
        for line in &read[..read.len() - 1] {
            match numbers(line) {
                ("v", n) => vote = n[0],
                ("p", n) => purged = n[0],
                ("c", n) => committed = Some((n[0], n[1])),
                ("e", n) => drop(found.insert(n[1], n[0])),
                other => panic!("{other:?}"),
            }
        }
        if vote < self.vote {
            return Err(format!("vote {} was acknowledged, {vote} is there", self.vote));
        }
        if purged < self.purged {
            return Err(format!("purged to {}, {purged} is there", self.purged));
        }
        if !found.keys().copied().eq((purged + 1..).take(found.len())) {
            return Err(format!("the log has a hole after {purged}: {:?}", found.keys()));
        }
        let last = found.last_key_value().map_or(purged, |(index, _)| *index);
        if let Some((term, index)) = committed
            && index > last
        {
            return Err(format!("committed {term}-{index} is ahead of the log's end {last}"));
        }
        let missing = |(index, term): &(&u64, &u64)| **index > purged && found.get(*index) != Some(*term);
        match self.entries.iter().find(missing) {
            Some((index, term)) => Err(format!("entry {term}-{index} was acknowledged; there: {:?}", found.get(index))),
            None => Ok(()),
        }
    }
}

/// A disk that lives through cuts.
struct Disk {
    directory: tempfile::TempDir,
    generation: usize,
}

impl Disk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Self { directory, generation: 0 };
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

    /// Lets a writer run, cuts the power at a random moment, and goes on with what the device held.
    fn run_and_cut(&mut self, mode: &str, random: &mut StdRng, acknowledged: &mut Acknowledged) {
        let old = self.image();
        {
            let mounted = self.mount();
            let writer = Running::start(mode, &mounted.store());
            match writer.lines.recv_timeout(PATIENCE) {
                Ok(line) => acknowledged.hear(&line),
                Err(_) => panic!("the writer does not start"),
            }
            std::thread::sleep(random.random_range(Duration::ZERO..LONGEST_RUN));
            writer.freeze();
            self.generation += 1;
            run("cp", &["--sparse=auto", old.to_str().unwrap(), self.image().to_str().unwrap()]);
            kill(Pid::from_raw(i32::try_from(writer.child.id()).unwrap()), Signal::SIGKILL).unwrap();
            writer.until_end().iter().for_each(|line| acknowledged.hear(line));
        }
        std::fs::remove_file(old).unwrap();
    }

    /// Opens the store in a process of its own, so that nothing holds the mount afterwards.
    fn read(&self) -> Vec<String> {
        let mounted = self.mount();
        let reader = Running::start("read", &mounted.store());
        reader.until_end()
    }
}

fn may_mount() -> bool {
    let may = nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !may {
        eprintln!("SKIPPED: power cuts need root and loop devices");
    }
    may
}

fn seeded() -> StdRng {
    let seed = std::env::var("WARREN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("WARREN_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[test]
fn nothing_acknowledged_is_lost_in_a_power_cut() {
    if !may_mount() {
        return;
    }
    let (mut random, mut disk, mut acknowledged) = (seeded(), Disk::new(), Acknowledged::default());
    for cut in 1..=CUTS {
        disk.run_and_cut("write", &mut random, &mut acknowledged);
        let outcome = acknowledged.compare(&disk.read());
        assert_eq!(outcome, Ok(()), "after cut {cut}");
    }
    let last = acknowledged.entries.last_key_value().map(|(index, _)| *index);
    eprintln!("{CUTS} cuts; {last:?} entries, {} terms, purged to {}", acknowledged.vote, acknowledged.purged);
    assert!(acknowledged.purged > 0 && acknowledged.vote > 3, "the writer did too little to show anything");
}

#[test]
fn without_the_sync_a_power_cut_is_seen_to_lose_something() {
    if !may_mount() {
        return;
    }
    let mut random = seeded();
    for cut in 1..=CUTS_WITHOUT_SYNC {
        let (mut disk, mut acknowledged) = (Disk::new(), Acknowledged::default());
        // A store that was synced once is there; what follows is not synced.
        disk.run_and_cut("write", &mut random, &mut acknowledged);
        disk.run_and_cut("write-without-sync", &mut random, &mut acknowledged);
        if let Err(lost) = acknowledged.compare(&disk.read()) {
            eprintln!("seen at cut {cut}: {lost}");
            return;
        }
    }
    panic!("{CUTS_WITHOUT_SYNC} cuts without the sync lost nothing: the cuts cut nothing");
}
