//! The node's templates: content-addressed, verified, unpacked, shared by every sandbox that starts from them.
//!
//! `<data_dir>/templates/<hex>/` holds `rootfs.tar` (for peers), `rootfs/` (for drivers) and `complete`. It is made under a
//! temporary name and renamed, so a digest's directory is whole or absent; leftovers are cleared away when the store opens.
//! Requests for one digest take turns on its lock: the first does the work, the others find it done.

pub mod fetch;
pub mod image;
pub mod import;
mod ingest;
mod unpack;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use warren_proto::client::ChannelError;
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;

pub use ingest::Ingest;

use crate::changes::Changes;
use crate::storage;

const TAR: &str = "rootfs.tar";
const ROOTFS: &str = "rootfs";
const COMPLETE: &str = "complete";
const TEMPORARY_PREFIX: &str = "tmp-";

/// Largest template: root file systems with a full toolchain stay below a tenth of this.
pub const MAX_TEMPLATE: Bytes = Bytes(64 * Bytes::GIB);

/// Templates that are written at once: more would only share the disk.
const MAX_INGESTS: usize = 4;

/// An ingest slower than this on the whole is given up: it holds one of [`MAX_INGESTS`] turns, and everybody who waits for
/// its digest. A line of 2 Mbit/s is faster.
const MIN_RATE: Bytes = Bytes(128 * Bytes::KIB);
/// How long it may take to come up to that.
const RATE_GRACE: Duration = Duration::from_secs(30);

/// Why a template is not here.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("template {0} is not on this node")]
    NotHeld(Digest),
    #[error("template {digest}: {got} bytes came, {want} were announced")]
    Size { digest: Digest, got: u64, want: u64 },
    #[error("{got} bytes of an archive came, {want} were announced")]
    ArchiveSize { got: u64, want: u64 },
    #[error("template {want}: the bytes that came have digest {got}")]
    Digest { want: Digest, got: Digest },
    #[error("template {digest}: the tar cannot be unpacked: {}", chain(source))]
    Unpack { digest: Digest, source: io::Error },
    #[error("template of {size} needs {need} of disk with its unpacked files, and {free} are free")]
    NoSpace { size: Bytes, need: Bytes, free: Bytes },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("template {digest} could not be fetched from any of its holders: {tries}")]
    Unavailable { digest: Digest, tries: String },
    #[error(transparent)]
    Image(#[from] image::ImageError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("{0}")]
    Peer(Box<tonic::Status>),
    #[error("the sender was silent for {0} s")]
    Silent(u64),
    #[error("the sender was slower than {} a second", MIN_RATE)]
    Slow,
}

impl TemplateError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }
}

/// The store of `<data_dir>/templates`. Clones share it.
#[derive(Debug, Clone)]
pub struct TemplateStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    held: Mutex<BTreeSet<Digest>>,
    locks: Mutex<BTreeMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    ingests: Arc<Semaphore>,
    changes: Changes,
}

/// A turn at a digest: nobody else writes it meanwhile.
#[derive(Debug)]
pub struct Turn {
    pub(in crate::templates) digest: Digest,
    _lock: OwnedMutexGuard<()>,
    _permit: OwnedSemaphorePermit,
}

impl TemplateStore {
    /// Opens the store and clears away what a crash left unfinished.
    pub fn open(data_dir: &Path, changes: Changes) -> Result<Self, TemplateError> {
        let root = data_dir.join("templates");
        storage::create_private_directory(&root).map_err(TemplateError::io("create the template store"))?;
        let held = sweep(&root).map_err(TemplateError::io(format!("read {}", root.display())))?;
        let ingests = Arc::new(Semaphore::new(MAX_INGESTS));
        Ok(Self(Arc::new(Inner { root, held: Mutex::new(held), locks: Mutex::default(), ingests, changes })))
    }

    /// A store without a disk, for simulated sandboxes, which use no files: it holds `digests`, and what it is told to.
    pub fn simulated(digests: impl IntoIterator<Item = Digest>, changes: Changes) -> Self {
        Self(Arc::new(Inner {
            root: PathBuf::new(),
            held: Mutex::new(digests.into_iter().collect()),
            locks: Mutex::default(),
            ingests: Arc::new(Semaphore::new(0)),
            changes,
        }))
    }

    fn is_simulated(&self) -> bool {
        self.0.root.as_os_str().is_empty()
    }

    pub fn digests(&self) -> Vec<Digest> {
        lock(&self.0.held).iter().copied().collect()
    }

    pub fn holds(&self, digest: &Digest) -> bool {
        lock(&self.0.held).contains(digest)
    }

    /// The unpacked root file system.
    pub fn rootfs(&self, digest: &Digest) -> Option<PathBuf> {
        self.holds(digest).then(|| self.0.root.join(digest.hex()).join(ROOTFS))
    }

    /// The tar, for a peer.
    pub async fn open_tar(&self, digest: &Digest) -> Result<tokio::fs::File, TemplateError> {
        if !self.holds(digest) {
            return Err(TemplateError::NotHeld(*digest));
        }
        let path = self.0.root.join(digest.hex()).join(TAR);
        tokio::fs::File::open(&path).await.map_err(TemplateError::io(format!("open {}", path.display())))
    }

    /// Waits for the turn at a digest; `None`: it is held already.
    pub async fn turn(&self, digest: Digest) -> Option<Turn> {
        if self.holds(&digest) {
            return None;
        }
        let guard = self.lock_digest(digest).await?;
        let permit = Arc::clone(&self.0.ingests).acquire_owned().await.expect("never closed");
        Some(Turn { digest, _lock: guard, _permit: permit })
    }

    /// Waits until nobody else writes a digest; `None`: it is held.
    async fn lock_digest(&self, digest: Digest) -> Option<OwnedMutexGuard<()>> {
        let guard = self.mutex_of(digest).lock_owned().await;
        (!self.holds(&digest)).then_some(guard)
    }

    /// Begins to write a template of `size` bytes. The turn is held until the ingest ends.
    pub fn ingest(&self, turn: Turn, size: Bytes) -> Result<Ingest, TemplateError> {
        Ingest::begin(self.clone(), turn, size)
    }

    /// Waits for a turn to make a template whose digest is not known yet.
    pub async fn import_turn(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.0.ingests).acquire_owned().await.expect("never closed")
    }

    fn root(&self) -> &Path {
        &self.0.root
    }

    fn add(&self, digest: Digest) {
        lock(&self.0.held).insert(digest);
        self.0.changes.ring();
    }

    fn mutex_of(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = lock(&self.0.locks);
        if let Some(mutex) = locks.get(&digest).and_then(Weak::upgrade) {
            return mutex;
        }
        locks.retain(|_, mutex| mutex.strong_count() > 0);
        let mutex = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(digest, Arc::downgrade(&mutex));
        mutex
    }
}

/// The digests that are whole; everything else in `root` is removed.
fn sweep(root: &Path) -> io::Result<BTreeSet<Digest>> {
    let mut held = BTreeSet::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let digest = name.to_str().and_then(|hex| Digest::parse(&format!("sha256:{hex}")).ok());
        match digest.filter(|_| entry.path().join(COMPLETE).exists()) {
            Some(digest) => {
                held.insert(digest);
            }
            None if entry.file_type()?.is_dir() => fs::remove_dir_all(entry.path())?,
            None => fs::remove_file(entry.path())?,
        }
    }
    Ok(held)
}

/// The whole chain: `tar` names the file in one error and says what is wrong with it in the next.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// A panic elsewhere does not make the set wrong: every change is one insertion.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
