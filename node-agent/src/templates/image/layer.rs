//! One layer: decompressed beside the template, held to its digest, and its table of contents applied to the tree.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use sha2::{Digest as _, Sha256};
use tar::{Archive, Entry, EntryType};
use warren_proto::units::Bytes;

use super::section::SectionReader;
use super::tree::{Kind, Meta, Tree, about, key_of};
use super::{ImageError, LayerBlob, Section};
use crate::templates::MAX_TEMPLATE;

const BUFFER: usize = 256 << 10;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A layer may grow to so many times its compressed size, beyond [`RATIO_FREE`]: source code reaches 10, and what reaches 200 is
/// made to.
const MAX_RATIO: u64 = 200;
/// So much is decompressed whatever the ratio: small layers of zeros are common and harm nobody.
const RATIO_FREE: u64 = 1 << 30;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const XATTR: &str = "SCHILY.xattr.";

/// The tar of a layer: itself, or decompressed into `scratch`. `spent` counts what all layers take.
pub fn tar_of(layer: &LayerBlob, scratch: &Path, spent: &mut u64) -> Result<Section, ImageError> {
    let mut magic = Vec::with_capacity(ZSTD.len());
    layer.bytes.reader().take(ZSTD.len() as u64).read_to_end(&mut magic).map_err(ImageError::io("read a layer"))?;
    let (tar, digest) = if magic.starts_with(&GZIP) {
        decompress(&layer.bytes, scratch, spent)?
    } else if magic == ZSTD {
        return Err(ImageError::invalid("a layer is compressed with zstd: give it as gzip or plain tar"));
    } else {
        let digest = layer.diff_id.as_ref().map(|_| layer.bytes.sha256()).transpose();
        (layer.bytes.clone(), digest.map_err(ImageError::io("read a layer"))?.unwrap_or_default())
    };
    match &layer.diff_id {
        Some(want) if *want != digest => {
            Err(ImageError::invalid(format!("a layer has diff_id {digest}, the configuration says {want}")))
        }
        _ => Ok(tar),
    }
}

/// Decompresses into a file without a name.
fn decompress(packed: &Section, scratch: &Path, spent: &mut u64) -> Result<(Section, String), ImageError> {
    let mut out: File = tempfile::tempfile_in(scratch).map_err(ImageError::io("make a file for a layer"))?;
    let mut reader = MultiGzDecoder::new(packed.reader());
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; BUFFER]);
    let most = packed.size().saturating_mul(MAX_RATIO).max(RATIO_FREE);
    let mut size = 0u64;
    loop {
        let count =
            reader.read(&mut buffer).map_err(|error| ImageError::invalid(format!("gzip of a layer: {error}")))?;
        if count == 0 {
            break;
        }
        size += count as u64;
        *spent += count as u64;
        if size > most {
            return Err(ImageError::TooLarge { what: "a layer's decompressed size", limit: Bytes(most).to_string() });
        }
        if *spent > MAX_TEMPLATE.0 {
            return Err(ImageError::TooLarge { what: "the size of all layers", limit: MAX_TEMPLATE.to_string() });
        }
        hasher.update(&buffer[..count]);
        out.write_all(&buffer[..count]).map_err(ImageError::io("write a layer"))?;
    }
    let tar = Section::whole(out).map_err(ImageError::io("read a layer"))?;
    Ok((tar, super::named(hasher.finalize().into())))
}

/// Applies a layer's tar to the tree.
pub fn apply(tree: &mut Tree, tar: &Section) -> Result<(), ImageError> {
    tree.next_layer();
    let mut archive = Archive::new(tar.reader());
    let entries = archive.entries_with_seek().map_err(malformed)?;
    for entry in entries {
        apply_entry(tree, tar, entry.map_err(malformed)?)?;
    }
    Ok(())
}

fn malformed(error: std::io::Error) -> ImageError {
    ImageError::invalid(format!("not a tar: {}", crate::templates::chain(&error)))
}

fn apply_entry(tree: &mut Tree, tar: &Section, mut entry: Entry<'_, SectionReader>) -> Result<(), ImageError> {
    let path = key_of(&entry.path_bytes())?;
    let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&b""[..], path.as_slice()),
    };
    if name == OPAQUE {
        tree.opaque(parent);
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        // `.wh..wh.*` are marks of an old union file system, of no meaning here.
        if !hidden.is_empty() && !hidden.starts_with(WHITEOUT) {
            let hidden = if parent.is_empty() { hidden.to_vec() } else { [parent, b"/", hidden].concat() };
            tree.whiteout(&key_of(&hidden)?);
        }
        return Ok(());
    }
    let target = entry.link_name_bytes().map(|target| target.into_owned());
    match entry.header().entry_type() {
        EntryType::Directory => tree.put(path, Kind::Directory, meta(&mut entry)?),
        EntryType::Regular | EntryType::Continuous => {
            let meta = meta(&mut entry)?;
            let content = tar.part(entry.raw_file_position(), entry.size());
            let content = content.ok_or_else(|| about(&path, "is cut short"))?;
            tree.put(path, Kind::File(content), meta)
        }
        EntryType::Symlink => {
            let target = target.filter(|target| !target.is_empty() && target.len() <= super::tree::MAX_PATH);
            let target = target.ok_or_else(|| about(&path, "is a symbolic link to nothing"))?;
            tree.put(path, Kind::Symlink(target), meta(&mut entry)?)
        }
        EntryType::Link => {
            let target = target.ok_or_else(|| about(&path, "is a hard link to nothing"))?;
            tree.link(path, &key_of(&target)?)
        }
        EntryType::GNUSparse => Err(about(&path, "is stored as a sparse file: make the tar without")),
        EntryType::Char | EntryType::Block | EntryType::Fifo | EntryType::XGlobalHeader => Ok(()),
        other => Err(about(&path, &format!("is of unknown type {:?}", char::from(other.as_byte())))),
    }
}

fn meta(entry: &mut Entry<'_, SectionReader>) -> Result<Meta, ImageError> {
    let header = entry.header();
    let mut meta = Meta {
        mode: header.mode().map_err(malformed)? & 0o7777,
        uid: header.uid().map_err(malformed)?,
        gid: header.gid().map_err(malformed)?,
        mtime: header.mtime().map_err(malformed)?,
        ..Meta::default()
    };
    let Some(extensions) = entry.pax_extensions().map_err(malformed)? else { return Ok(meta) };
    for extension in extensions {
        let extension = extension.map_err(malformed)?;
        let Ok(key) = extension.key() else { continue };
        if key.starts_with("GNU.sparse.") {
            return Err(ImageError::invalid("a file is stored as a sparse file: make the tar without"));
        }
        if let Some(name) = key.strip_prefix(XATTR).filter(|name| is_kept(name)) {
            meta.xattrs.insert(name.to_owned(), extension.value_bytes().to_vec());
        }
    }
    Ok(meta)
}

/// What a file system of the host may be given: never what overlayfs or a security module would take as its own.
fn is_kept(xattr: &str) -> bool {
    xattr == "security.capability" || (xattr.starts_with("user.") && !xattr.starts_with("user.overlay."))
}
