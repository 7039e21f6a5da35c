//! Writing one template: bytes in, hashed as they come; then verified, unpacked, synced and renamed into place.
//!
//! Nothing is visible before `finish`, and a dropped ingest leaves nothing behind.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes as Chunk;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;

use super::{
    COMPLETE, MIN_RATE, RATE_GRACE, ROOTFS, TAR, TEMPORARY_PREFIX, TemplateError, TemplateStore, Turn, unpack,
};
use crate::clock::BootInstant;
use crate::storage;

/// A template being written.
#[derive(Debug)]
pub struct Ingest {
    store: TemplateStore,
    turn: Turn,
    size: Bytes,
    written: u64,
    begun: BootInstant,
    hasher: Sha256,
    tar: File,
    directory: Temporary,
}

/// Removes its directory when dropped, unless it was renamed away.
#[derive(Debug)]
pub(super) struct Temporary(pub PathBuf);

impl Temporary {
    /// A new directory in the store, for a template that is being made.
    pub fn new(store: &TemplateStore) -> Result<Self, TemplateError> {
        let directory = Self(store.root().join(format!("{TEMPORARY_PREFIX}{}", Uuid::new_v4())));
        storage::create_private_directory(&directory.0).map_err(TemplateError::io("create a template's directory"))?;
        Ok(directory)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "an unfinished template stays until the next start");
            }
            _ => {}
        }
    }
}

impl Ingest {
    pub(super) fn begin(store: TemplateStore, turn: Turn, size: Bytes) -> Result<Self, TemplateError> {
        check_space(&store, size)?;
        let directory = Temporary::new(&store)?;
        let tar = File::create(directory.0.join(TAR)).map_err(TemplateError::io("create a template's file"))?;
        Ok(Self { store, turn, size, written: 0, begun: BootInstant::now(), hasher: Sha256::new(), tar, directory })
    }

    /// Adds a chunk, on a thread that may block.
    pub async fn write(mut self, chunk: Chunk) -> Result<Self, TemplateError> {
        blocking(move || {
            self.written += chunk.len() as u64;
            if self.written > self.size.0 {
                return Err(self.wrong_size());
            }
            if is_too_slow(self.written, BootInstant::now().since(self.begun)) {
                return Err(TemplateError::Slow);
            }
            self.hasher.update(&chunk);
            self.tar.write_all(&chunk).map_err(TemplateError::io("write a template"))?;
            Ok(self)
        })
        .await
    }

    /// Verifies, unpacks and publishes. After an error nothing is left.
    pub async fn finish(self) -> Result<(), TemplateError> {
        blocking(move || self.finish_blocking()).await
    }

    fn finish_blocking(self) -> Result<(), TemplateError> {
        let want = self.turn.digest;
        if self.written != self.size.0 {
            return Err(self.wrong_size());
        }
        let got = Digest(self.hasher.clone().finalize().into());
        if got != want {
            return Err(TemplateError::Digest { want, got });
        }
        publish(&self.store, self.directory, want)
    }

    fn wrong_size(&self) -> TemplateError {
        TemplateError::Size { digest: self.turn.digest, got: self.written, want: self.size.0 }
    }
}

/// Unpacks the verified tar of `directory` beside itself, syncs, and renames it into place. Whoever calls has the digest's turn.
pub(super) fn publish(store: &TemplateStore, directory: Temporary, digest: Digest) -> Result<(), TemplateError> {
    let tar = File::open(directory.0.join(TAR)).map_err(TemplateError::io("open a template"))?;
    let synced = tar.try_clone().map_err(TemplateError::io("open a template"))?;
    let unpacked = unpack::unpack(tar, &directory.0.join(ROOTFS));
    unpacked.map_err(|source| match source.kind() {
        std::io::ErrorKind::StorageFull => TemplateError::io("unpack a template")(source),
        _ => TemplateError::Unpack { digest, source },
    })?;
    fs::write(directory.0.join(COMPLETE), b"").map_err(TemplateError::io("mark a template complete"))?;
    // One sync for all of its files, of which there may be many thousand.
    rustix::fs::syncfs(&synced).map_err(|e| TemplateError::io("sync a template")(e.into()))?;
    let place = store.root().join(digest.hex());
    fs::rename(&directory.0, &place).map_err(TemplateError::io("publish a template"))?;
    storage::sync_parent(&place).map_err(TemplateError::io("sync the template store"))?;
    store.add(digest);
    Ok(())
}

fn is_too_slow(written: u64, after: Duration) -> bool {
    written < after.saturating_sub(RATE_GRACE).as_secs() * MIN_RATE.0
}

/// The tar and its files, each about its size, must fit.
pub(super) fn check_space(store: &TemplateStore, size: Bytes) -> Result<(), TemplateError> {
    let stat = rustix::fs::statvfs(store.root()).map_err(|e| TemplateError::io("read free space")(e.into()))?;
    let free = Bytes(stat.f_bavail.saturating_mul(stat.f_frsize));
    let need = Bytes(size.0.saturating_mul(2));
    if need > free { Err(TemplateError::NoSpace { size, need, free }) } else { Ok(()) }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(TemplateError::io("write a template")(std::io::Error::other(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_given_up_and_a_slow_start_is_not() {
        let after = |seconds| Duration::from_secs(seconds);
        assert!(!is_too_slow(1, RATE_GRACE));
        assert!(is_too_slow(1, RATE_GRACE + after(1)));
        assert!(!is_too_slow(MIN_RATE.0 * 60, RATE_GRACE + after(60)));
        assert!(is_too_slow(MIN_RATE.0 * 60 - 1, RATE_GRACE + after(60)));
    }
}
