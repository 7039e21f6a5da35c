//! Images of other origins, made into one canonical root file system tar: an OCI image of a layout or a registry, or any tar.
//!
//! Nothing is unpacked on the way. Each layer's table of contents is merged into a tree in memory whose files point into the layers
//! (`tree`), and the tree is written in order of its paths (`canonical`): equal images give equal bytes, hence equal digests, and
//! no path, link or device of a layer ever touches the host. Devices, sockets and pipes are left out.
//! Children: `section` (part of a file), `documents` (OCI's JSON), `layer`, `tree`, `canonical`, `archive` (what a client sends),
//! `registry`.

pub mod archive;
pub mod canonical;
mod documents;
pub mod layer;
pub mod registry;
mod section;
mod tree;

use std::collections::BTreeMap;
use std::io;

use sha2::{Digest as _, Sha256};
use warren_proto::units::Bytes;

pub use section::Section;
pub use tree::Tree;

use documents::{ConfigDocument, Index, Manifest};

/// Most layers: registries and runtimes stop at 127.
const MAX_LAYERS: usize = 512;

/// Largest manifest, index or configuration: registries refuse more than 4 MiB.
const MAX_DOCUMENT: u64 = 4 << 20;

/// Why something is not an image, or not one that can be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It will not get better by trying again.
    #[error("{0}")]
    Invalid(String),
    #[error("{what} is more than {limit}, which is allowed")]
    TooLarge { what: &'static str, limit: String },
    #[error("registry `{registry}` has no `{reference}` for these credentials: {answer}")]
    NotFound { registry: String, reference: String, answer: String },
    #[error("registry `{registry}`: {answer}")]
    Registry { registry: String, answer: String },
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

impl ImageError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }
}

/// What sandboxes get from an image where they say nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Defaults {
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub working_directory: String,
    /// Empty: root.
    pub user: String,
    /// Of the image's manifest; empty for a plain root file system.
    pub image_digest: String,
}

/// Layers, lowest first, and defaults.
#[derive(Debug)]
pub struct Image {
    pub layers: Vec<LayerBlob>,
    pub defaults: Defaults,
}

/// One layer as it came, with the digest of its tar.
#[derive(Debug)]
pub struct LayerBlob {
    pub bytes: Section,
    /// `None`: nobody said.
    pub diff_id: Option<String>,
}

/// Blobs by `sha256:` digest; whoever hands them on has not verified them.
pub type Blobs = BTreeMap<String, Section>;

/// Reads a document and holds it to its digest.
fn document(blobs: &Blobs, digest: &str) -> Result<Vec<u8>, ImageError> {
    let section = blobs.get(digest).ok_or_else(|| ImageError::invalid(format!("blob {digest} is missing")))?;
    if section.size() > MAX_DOCUMENT {
        return Err(ImageError::TooLarge {
            what: "a manifest or configuration",
            limit: Bytes(MAX_DOCUMENT).to_string(),
        });
    }
    let bytes = section.read_all().map_err(ImageError::io("read a blob"))?;
    held_to(digest, &bytes)?;
    Ok(bytes)
}

fn held_to(digest: &str, bytes: &[u8]) -> Result<(), ImageError> {
    let got = sha256(bytes);
    if got == digest { Ok(()) } else { Err(ImageError::invalid(format!("blob {digest} has digest {got}"))) }
}

fn sha256(bytes: &[u8]) -> String {
    named(Sha256::digest(bytes).into())
}

/// As OCI writes a digest.
pub fn named(hash: [u8; 32]) -> String {
    warren_proto::ids::Digest(hash).to_string()
}

/// The manifest for linux/amd64 that `digest` leads to, through an index where it names one.
fn manifest_of(blobs: &Blobs, digest: &str) -> Result<(String, Manifest), ImageError> {
    let bytes = document(blobs, digest)?;
    if !documents::is_index(&bytes)? {
        return Ok((digest.to_owned(), Manifest::parse(&bytes)?));
    }
    let chosen = Index::parse(&bytes)?.for_this_platform()?.digest.clone();
    Ok((chosen.clone(), Manifest::parse(&document(blobs, &chosen)?)?))
}

/// Puts an image together of its blobs, each verified: documents here, layers against their digests too.
pub fn assemble(blobs: &Blobs, digest: &str) -> Result<Image, ImageError> {
    let (digest, manifest) = manifest_of(blobs, digest)?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(ImageError::TooLarge { what: "the count of layers", limit: MAX_LAYERS.to_string() });
    }
    let config = ConfigDocument::parse(&document(blobs, &manifest.config.digest)?)?;
    let diff_ids = config.diff_ids();
    if !diff_ids.is_empty() && diff_ids.len() != manifest.layers.len() {
        let counts = format!("{} layers and {} diff_ids", manifest.layers.len(), diff_ids.len());
        return Err(ImageError::invalid(format!("manifest and configuration disagree: {counts}")));
    }
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for (place, layer) in manifest.layers.iter().enumerate() {
        let bytes = blobs.get(&layer.digest);
        let bytes = bytes.ok_or_else(|| ImageError::invalid(format!("layer {} is missing", layer.digest)))?;
        let got = bytes.sha256().map_err(ImageError::io("read a layer"))?;
        if got != layer.digest {
            return Err(ImageError::invalid(format!("layer {} has digest {got}", layer.digest)));
        }
        layers.push(LayerBlob { bytes: bytes.clone(), diff_id: diff_ids.get(place).cloned() });
    }
    Ok(Image { layers, defaults: config.defaults(digest) })
}

#[cfg(test)]
mod tests;
