//! Makes a template of something else: fetched or received, flattened to its canonical tar, and kept like any other.
//!
//! Everything lies in one directory of the store until the template is published, so a crash or a broken call leaves nothing that
//! the next start does not clear away. An import begins anew; what it makes depends on the image alone, so doing it twice is as once.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use bytes::Bytes as Chunk;
use tokio::sync::watch;
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;
use warren_proto::v1::ImportProgress;
use warren_proto::v1::import_progress::Stage;

use super::image::registry::{self, Credentials};
use super::image::{Defaults, Image, Section, Tree, archive, assemble, canonical, layer};
use super::ingest::{Temporary, blocking, check_space, publish};
use super::{TAR, TemplateError, TemplateStore};

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    pub digest: Digest,
    pub size: Bytes,
    pub defaults: Defaults,
}

/// How far an import is, for whoever looks; nobody must.
#[derive(Debug)]
pub struct Progress(watch::Sender<ImportProgress>);

impl Progress {
    pub fn new() -> (Self, watch::Receiver<ImportProgress>) {
        let (sender, receiver) = watch::channel(ImportProgress::default());
        (Self(sender), receiver)
    }

    pub fn begin(&self, stage: Stage, total: u64) {
        let total_bytes = i64::try_from(total).unwrap_or(i64::MAX);
        self.0.send_replace(ImportProgress { stage: stage.into(), done_bytes: 0, total_bytes });
    }

    pub fn add(&self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.0.send_modify(|progress| progress.done_bytes = progress.done_bytes.saturating_add(bytes));
    }
}

/// Pulls an image and makes a template of it.
pub async fn from_registry(
    store: &TemplateStore,
    reference: &str,
    credentials: &Credentials,
    insecure: &[String],
    progress: Progress,
) -> Result<Imported, TemplateError> {
    let _turn = store.import_turn().await;
    let directory = Temporary::new(store)?;
    let (blobs, digest) = registry::pull(reference, credentials, insecure, &directory.0, &progress).await?;
    finish(store, directory, progress, move |_| Ok(assemble(&blobs, &digest)?)).await
}

/// An archive on its way in from a client.
#[derive(Debug)]
pub struct Incoming {
    directory: Temporary,
    file: File,
    size: u64,
    written: u64,
    progress: Progress,
}

impl Incoming {
    pub fn begin(store: &TemplateStore, size: Bytes, progress: Progress) -> Result<Self, TemplateError> {
        check_space(store, size)?;
        let directory = Temporary::new(store)?;
        let file = tempfile::tempfile_in(&directory.0).map_err(TemplateError::io("make a file for an archive"))?;
        progress.begin(Stage::Receiving, size.0);
        Ok(Self { directory, file, size: size.0, written: 0, progress })
    }

    /// Adds a chunk, on a thread that may block.
    pub async fn write(mut self, chunk: Chunk) -> Result<Self, TemplateError> {
        blocking(move || {
            self.written += chunk.len() as u64;
            if self.written > self.size {
                return Err(self.wrong_size());
            }
            self.file.write_all(&chunk).map_err(TemplateError::io("write an archive"))?;
            self.progress.add(chunk.len() as u64);
            Ok(self)
        })
        .await
    }

    /// Makes a template of what came.
    pub async fn finish(self, store: &TemplateStore, tag: String) -> Result<Imported, TemplateError> {
        if self.written != self.size {
            return Err(self.wrong_size());
        }
        let bytes = Section::whole(self.file).map_err(TemplateError::io("read an archive"))?;
        finish(store, self.directory, self.progress, move |scratch| Ok(archive::open(bytes, &tag, scratch)?)).await
    }

    fn wrong_size(&self) -> TemplateError {
        TemplateError::ArchiveSize { got: self.written, want: self.size }
    }
}

/// Flattens the image that `open` yields, then publishes it, unless it is there by now.
async fn finish(
    store: &TemplateStore,
    directory: Temporary,
    progress: Progress,
    open: impl FnOnce(&Path) -> Result<Image, TemplateError> + Send + 'static,
) -> Result<Imported, TemplateError> {
    let (directory, imported, progress) = blocking(move || {
        let image = open(&directory.0)?;
        let (digest, size) = flatten(&image, &directory.0, &progress)?;
        Ok((directory, Imported { digest, size, defaults: image.defaults }, progress))
    })
    .await?;
    let Some(_turn) = store.lock_digest(imported.digest).await else { return Ok(imported) };
    let (store, digest) = (store.clone(), imported.digest);
    blocking(move || {
        check_space(&store, imported.size)?;
        progress.begin(Stage::Unpacking, imported.size.0);
        publish(&store, directory, digest)
    })
    .await?;
    Ok(imported)
}

/// Writes the canonical tar of an image into `directory`.
fn flatten(image: &Image, directory: &Path, progress: &Progress) -> Result<(Digest, Bytes), TemplateError> {
    progress.begin(Stage::Flattening, image.layers.iter().map(|layer| layer.bytes.size()).sum());
    let (mut tree, mut spent) = (Tree::default(), 0);
    for blob in &image.layers {
        let tar = layer::tar_of(blob, directory, &mut spent)?;
        layer::apply(&mut tree, &tar)?;
        progress.add(blob.bytes.size());
    }
    if tree.is_empty() {
        return Err(super::image::ImageError::Invalid("the image has no files at all".into()).into());
    }
    let file = File::create(directory.join(TAR)).map_err(TemplateError::io("create a template's file"))?;
    Ok(canonical::write(&tree, file)?)
}
