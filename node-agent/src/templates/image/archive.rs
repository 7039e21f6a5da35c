//! What a client sends: a tar, plain or gzip, of a root file system or of an OCI image layout. What is in it says which.

use std::path::Path;

use tar::{Archive, EntryType};

use super::documents::Index;
use super::tree::key_of;
use super::{Blobs, Defaults, Image, ImageError, LayerBlob, Section, assemble, layer};

const MARKER: &[u8] = b"oci-layout";
const INDEX: &[u8] = b"index.json";
const BLOBS: &[u8] = b"blobs/sha256/";

/// Opens an archive. `tag` chooses the image of a layout that has several.
pub fn open(archive: Section, tag: &str, scratch: &Path) -> Result<Image, ImageError> {
    let mut spent = 0;
    let tar = layer::tar_of(&LayerBlob { bytes: archive, diff_id: None }, scratch, &mut spent)?;
    match layout(&tar)? {
        Some(layout) => layout.image(tag),
        None if tag.is_empty() => {
            Ok(Image { layers: vec![LayerBlob { bytes: tar, diff_id: None }], defaults: Defaults::default() })
        }
        None => Err(ImageError::invalid(format!("tag `{tag}` was asked for, and the archive is no OCI image layout"))),
    }
}

/// The parts of an image layout, wherever they lie in the tar.
struct Layout {
    index: Section,
    blobs: Blobs,
}

/// `None`: it is none.
fn layout(tar: &Section) -> Result<Option<Layout>, ImageError> {
    let malformed =
        |error: std::io::Error| ImageError::invalid(format!("not a tar: {}", crate::templates::chain(&error)));
    let (mut marked, mut index, mut blobs) = (false, None, Blobs::new());
    let mut archive = Archive::new(tar.reader());
    for entry in archive.entries_with_seek().map_err(malformed)? {
        let entry = entry.map_err(malformed)?;
        if entry.header().entry_type() != EntryType::Regular {
            continue;
        }
        let path = key_of(&entry.path_bytes())?;
        let content = || tar.part(entry.raw_file_position(), entry.size());
        match path.as_slice() {
            MARKER => marked = true,
            INDEX => index = content(),
            path => {
                let hex = path.strip_prefix(BLOBS).and_then(|hex| std::str::from_utf8(hex).ok());
                if let (Some(hex), Some(content)) = (hex, content()) {
                    blobs.insert(format!("sha256:{hex}"), content);
                }
            }
        }
    }
    Ok(match index {
        Some(index) if marked => Some(Layout { index, blobs }),
        _ => None,
    })
}

impl Layout {
    fn image(&self, tag: &str) -> Result<Image, ImageError> {
        let index = Index::parse(&self.index.read_all().map_err(ImageError::io("read an image layout"))?)?;
        let tags = || {
            let tags: Vec<_> = index.manifests.iter().filter_map(|manifest| manifest.tag()).collect();
            format!("it has {}", if tags.is_empty() { "no tags".to_owned() } else { tags.join(", ") })
        };
        let manifest = match (tag, index.manifests.as_slice()) {
            ("", [only]) => only,
            ("", _) => index
                .for_this_platform()
                .map_err(|_| ImageError::invalid(format!("the layout has several images: name a tag; {}", tags())))?,
            (tag, manifests) => manifests
                .iter()
                .find(|manifest| manifest.tag() == Some(tag))
                .ok_or_else(|| ImageError::invalid(format!("the layout has no tag `{tag}`; {}", tags())))?,
        };
        assemble(&self.blobs, &manifest.digest)
    }
}
