//! What must survive the agent: for each sandbox the newest epoch seen here and how far its start got.
//!
//! The intent to start is on disk before the driver is asked, so an agent that was killed at any moment knows what may be on
//! the host, and never starts an epoch twice. A record is forgotten once the assignment no longer names its sandbox and
//! nothing of it is left. Records stand in sled behind the guards of `scheduler/docs/adr/0002-sled-guards.md`.
//!
//! A journal that cannot be read is put aside, and the agent goes on with what its drivers list. It is marked as one that
//! forgot until the next whole assignment: what that names and nobody lists may have run here, so it is not started at that
//! epoch (`docs/adr/0017` of the scheduler).
//!
//! children: `record` (bytes on disk), `store` (sled), `writer` (its thread), `files` (how journals were kept before).

mod files;
mod record;
mod store;
mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use warren_proto::ids::{Epoch, SandboxName};

use self::store::Store;
use self::writer::{Change, Operation};
use crate::reconcile::Record;
use crate::storage;

const DIRECTORY: &str = "journal";
/// sled's files, below [`DIRECTORY`].
const STORE: &str = "store";
/// The last store that could not be read, kept for people.
const DAMAGED: &str = "damaged";
/// Is there while the journal may lack what it once held.
const FORGOT: &str = "forgot";

/// Why the journal cannot be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    #[error("journal {path}: {source}")]
    Io { path: PathBuf, source: Arc<io::Error> },
    #[error(
        "journal {path} holds a record of version {version}; this agent reads {}: run the newer one",
        record::VERSION
    )]
    Version { path: PathBuf, version: u32 },
    /// A write failed, so nobody knows what is on disk: nothing more is written.
    #[error("the journal cannot be written any more: {reason}. Mend the disk of data_dir and restart the agent")]
    Broken { reason: String },
}

/// What is kept of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub record: Record,
    /// As in `Held`.
    pub foreign: Option<Epoch>,
}

/// What a new agent finds.
#[derive(Debug)]
pub struct Opened {
    pub journal: Journal,
    pub entries: BTreeMap<SandboxName, Entry>,
    /// It may lack what it once held.
    pub forgot: bool,
}

impl Opened {
    /// Keeps nothing: for simulated sandboxes, which end with their agent.
    pub fn nothing() -> Self {
        Self { journal: Journal { kept: None }, entries: BTreeMap::new(), forgot: false }
    }
}

/// The directory `<data_dir>/journal`. Clones share it.
#[derive(Debug, Clone)]
pub struct Journal {
    /// `None`: nothing is kept.
    kept: Option<Arc<Kept>>,
}

#[derive(Debug)]
struct Kept {
    directory: PathBuf,
    writer: Mutex<Option<Writer>>,
}

#[derive(Debug)]
struct Writer {
    queue: mpsc::Sender<Operation>,
    thread: JoinHandle<()>,
}

impl Journal {
    /// Opens or makes the journal, and takes over one that was kept in files. Blocks.
    pub fn open(data_dir: &Path) -> Result<Opened, JournalError> {
        let directory = data_dir.join(DIRECTORY);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| JournalError::Io { path, source: Arc::new(source) }
        };
        storage::create_private_directory(&directory).map_err(at(&directory))?;
        let (store, mut entries) = match Store::open(&directory.join(STORE)) {
            Ok((store, read)) => {
                if read.damaged > 0 {
                    tracing::error!(records = read.damaged, "records of the journal are damaged and are left out");
                    storage::write_atomically(&directory.join(FORGOT), b"").map_err(at(&directory))?;
                }
                (store, read.entries)
            }
            Err(store::OpenError::Damaged(reason)) => {
                tracing::error!(%reason, aside = %directory.join(DAMAGED).display(), "the journal cannot be read: it is put aside, and what the drivers list goes on");
                put_aside(&directory).map_err(at(&directory))?;
                let (store, read) = Store::open(&directory.join(STORE)).map_err(|error| error.at(&directory))?;
                (store, read.entries)
            }
            Err(error) => return Err(error.at(&directory)),
        };
        let older = files::read(&directory)?;
        if older.damaged > 0 {
            tracing::error!(records = older.damaged, "records of the older journal are damaged and are left out");
            storage::write_atomically(&directory.join(FORGOT), b"").map_err(at(&directory))?;
        }
        store.write(older.entries.iter().map(Change::put)).map_err(at(&directory))?;
        files::remove(&directory).map_err(at(&directory))?;
        entries.extend(older.entries);
        let forgot = directory.join(FORGOT).exists();
        let (queue, thread) = writer::start(store).map_err(at(&directory))?;
        let kept = Kept { directory, writer: Mutex::new(Some(Writer { queue, thread })) };
        Ok(Opened { journal: Self { kept: Some(Arc::new(kept)) }, entries, forgot })
    }

    /// On disk once this returns.
    pub async fn put(&self, entries: Vec<(SandboxName, Entry)>) -> Result<(), JournalError> {
        let Some(queue) = self.queue()? else { return Ok(()) };
        let changes = entries.iter().map(|(sandbox, entry)| Change::put((sandbox, entry))).collect();
        let (done, wait) = oneshot::channel();
        queue.send(Operation { changes, done: Some(done) }).await.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?
    }

    /// On disk soon, and after all that was put before: for what can be learnt from the host if it is lost.
    pub async fn put_soon(&self, sandbox: &SandboxName, entry: &Entry) -> Result<(), JournalError> {
        self.change_soon(Change::put((sandbox, entry))).await
    }

    /// As durable as [`Self::put_soon`]: a record too many is forgotten by the next agent.
    pub async fn forget(&self, sandbox: &SandboxName) -> Result<(), JournalError> {
        self.change_soon(Change::forget(sandbox)).await
    }

    /// What it may have lacked is in it now, or does not matter any more. Blocks.
    pub fn remembers(&self) -> io::Result<()> {
        self.kept.as_ref().map_or(Ok(()), |kept| storage::remove_durably(&kept.directory.join(FORGOT)))
    }

    /// Writes what waits and lets go of the files, so that another agent of this process can open them. Blocks.
    pub fn close(&self) {
        let Some(kept) = &self.kept else { return };
        let writer = kept.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Writer { queue, thread }) = writer {
            drop(queue);
            // It ends once every sender is gone; a panic of it was printed.
            let _ = thread.join();
        }
    }

    async fn change_soon(&self, change: Change) -> Result<(), JournalError> {
        let Some(queue) = self.queue()? else { return Ok(()) };
        queue.send(Operation { changes: vec![change], done: None }).await.map_err(|_| closed())
    }

    /// `None` where nothing is kept.
    fn queue(&self) -> Result<Option<mpsc::Sender<Operation>>, JournalError> {
        let Some(kept) = &self.kept else { return Ok(None) };
        let writer = kept.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.as_ref().map(|writer| Some(writer.queue.clone())).ok_or_else(closed)
    }
}

fn closed() -> JournalError {
    JournalError::Broken { reason: "it is closed".to_owned() }
}

/// Marked first: an agent that is killed in between must not take an empty journal for a true one.
fn put_aside(directory: &Path) -> io::Result<()> {
    storage::write_atomically(&directory.join(FORGOT), b"")?;
    let aside = directory.join(DAMAGED);
    match fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(directory.join(STORE), &aside)?;
    storage::sync_parent(&aside)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::reconcile::{Reason, Stage};

    fn name(id: &str) -> SandboxName {
        SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).expect("name")
    }

    fn entry(epoch: u64, stage: Stage) -> Entry {
        Entry { record: Record { epoch: Epoch(epoch), stage }, foreign: None }
    }

    #[tokio::test]
    async fn records_survive_and_are_forgotten() {
        let directory = tempfile::tempdir().expect("directory");
        let Opened { journal, entries, forgot } = Journal::open(directory.path()).expect("open");
        assert!(entries.is_empty() && !forgot);
        let failed = Entry { foreign: Some(Epoch(1)), ..entry(2, Stage::Failed(Reason::new("START_FAILED", "no"))) };
        let started = entry(1, Stage::Started);
        journal.put(vec![(name("a"), started.clone()), (name("b"), started.clone())]).await.expect("put");
        journal.put_soon(&name("a"), &failed).await.expect("put");
        journal.close();
        let opened = Journal::open(directory.path()).expect("open");
        assert_eq!(opened.entries, BTreeMap::from([(name("a"), failed), (name("b"), started)]));
        opened.journal.forget(&name("a")).await.expect("forget");
        opened.journal.close();
        assert!(opened.journal.put(Vec::new()).await.is_err(), "closed");
        assert_eq!(Journal::open(directory.path()).expect("open").entries.len(), 1);
    }

    #[tokio::test]
    async fn a_journal_kept_in_files_is_taken_over_once() {
        let directory = tempfile::tempdir().expect("directory");
        let kept = directory.path().join(DIRECTORY);
        fs::create_dir(&kept).expect("directory");
        let started = entry(3, Stage::Started);
        fs::write(kept.join("t.a.record"), record::encode(&name("a"), &started)).expect("write");
        fs::write(kept.join("t.b.record.tmp"), b"torn").expect("write");
        let Opened { journal, entries, forgot } = Journal::open(directory.path()).expect("open");
        assert_eq!(entries, BTreeMap::from([(name("a"), started)]));
        assert!(!forgot && !kept.join("t.a.record").exists() && !kept.join("t.b.record.tmp").exists());
        journal.forget(&name("a")).await.expect("forget");
        journal.close();
        assert!(Journal::open(directory.path()).expect("open").entries.is_empty(), "it came back");
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_put_aside_and_remembered_as_forgotten() {
        let directory = tempfile::tempdir().expect("directory");
        let kept = directory.path().join(DIRECTORY);
        let opened = Journal::open(directory.path()).expect("open");
        opened.journal.put(vec![(name("a"), entry(1, Stage::Started))]).await.expect("put");
        opened.journal.close();
        let file = fs::File::options().write(true).open(kept.join(STORE).join("conf")).expect("sled's file");
        file.write_all_at(&[0xff; 64], 0).expect("damage");
        let opened = Journal::open(directory.path()).expect("open");
        assert!(opened.forgot && opened.entries.is_empty() && kept.join(DAMAGED).join("db").exists());
        opened.journal.close();
        let opened = Journal::open(directory.path()).expect("open");
        assert!(opened.forgot, "only a whole assignment settles it");
        opened.journal.remembers().expect("mark");
        opened.journal.close();
        assert!(!Journal::open(directory.path()).expect("open").forgot);
        // A record of the older kind that is damaged.
        let directory = tempfile::tempdir().expect("directory");
        let kept = directory.path().join(DIRECTORY);
        fs::create_dir(&kept).expect("directory");
        fs::write(kept.join("t.a.record"), b"\xff\xff").expect("write");
        assert!(Journal::open(directory.path()).expect("open").forgot);
    }

    #[test]
    fn a_newer_build_s_record_is_refused_and_stays() {
        let directory = tempfile::tempdir().expect("directory");
        let kept = directory.path().join(DIRECTORY);
        fs::create_dir(&kept).expect("directory");
        fs::write(kept.join("t.a.record"), b"\x08\x02").expect("write");
        assert!(matches!(Journal::open(directory.path()), Err(JournalError::Version { version: 2, .. })));
        assert!(kept.join("t.a.record").exists());
    }
}
