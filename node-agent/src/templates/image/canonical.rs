//! Writes a tree as the one tar that stands for it: in order of paths, with nothing in it that the tree does not say.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;

use super::tree::{Inode, Kind, Meta, Tree};
use super::{ImageError, Section};
use crate::templates::MAX_TEMPLATE;

/// Longest target that a header holds by itself.
const LINK_NAME: usize = 100;

/// Writes `tree` to `file`; its digest and size.
pub fn write(tree: &Tree, file: File) -> Result<(Digest, Bytes), ImageError> {
    let mut builder = Builder::new(Hashing { file: io::BufWriter::new(file), hasher: Sha256::new(), written: 0 });
    let written = write_entries(tree, &mut builder).and_then(|()| builder.into_inner()).and_then(Hashing::finish);
    let (digest, size) = written.map_err(ImageError::io("write a template"))?;
    if size > MAX_TEMPLATE {
        return Err(ImageError::TooLarge { what: "the size of the root file system", limit: MAX_TEMPLATE.to_string() });
    }
    Ok((digest, size))
}

fn write_entries(tree: &Tree, builder: &mut Builder<Hashing>) -> io::Result<()> {
    // First path of each file that has several.
    let mut first: BTreeMap<*const Inode, &[u8]> = BTreeMap::new();
    for (path, inode) in tree.entries() {
        let shared = Arc::strong_count(inode) > 1;
        match first.get(&Arc::as_ptr(inode)) {
            Some(other) => append_hard_link(builder, path, other, &inode.meta)?,
            None => append(builder, path, inode)?,
        }
        if shared {
            first.entry(Arc::as_ptr(inode)).or_insert(path);
        }
    }
    Ok(())
}

fn append(builder: &mut Builder<Hashing>, path: &[u8], inode: &Inode) -> io::Result<()> {
    let xattrs = inode.meta.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()));
    let xattrs: Vec<(String, &[u8])> = xattrs.collect();
    if !xattrs.is_empty() {
        builder.append_pax_extensions(xattrs.iter().map(|(name, value)| (name.as_str(), *value)))?;
    }
    match &inode.kind {
        Kind::Directory => {
            let mut header = header(EntryType::Directory, &inode.meta, 0);
            let path = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
            builder.append_data(&mut header, name(&path), io::empty())
        }
        Kind::File(content) => append_file(builder, path, content, &inode.meta),
        Kind::Symlink(target) => {
            let mut header = header(EntryType::Symlink, &inode.meta, 0);
            if target.len() > LINK_NAME {
                return builder.append_link(&mut header, name(path), name(target));
            }
            header.set_link_name_literal(target)?;
            builder.append_data(&mut header, name(path), io::empty())
        }
    }
}

fn append_file(builder: &mut Builder<Hashing>, path: &[u8], content: &Section, meta: &Meta) -> io::Result<()> {
    let mut header = header(EntryType::Regular, meta, content.size());
    let mut reader = io::BufReader::with_capacity(256 << 10, content.reader());
    builder.append_data(&mut header, name(path), &mut reader)
}

fn append_hard_link(builder: &mut Builder<Hashing>, path: &[u8], target: &[u8], meta: &Meta) -> io::Result<()> {
    builder.append_link(&mut header(EntryType::Link, meta, 0), name(path), name(target))
}

fn header(kind: EntryType, meta: &Meta, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    header.set_uid(meta.uid);
    header.set_gid(meta.gid);
    header.set_mtime(meta.mtime);
    header.set_size(size);
    header
}

fn name(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Hashes and counts what is written.
struct Hashing {
    file: io::BufWriter<File>,
    hasher: Sha256,
    written: u64,
}

impl Hashing {
    fn finish(mut self) -> io::Result<(Digest, Bytes)> {
        self.file.flush()?;
        Ok((Digest(self.hasher.finalize().into()), Bytes(self.written)))
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
