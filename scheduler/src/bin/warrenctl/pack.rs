//! A directory as a tar: modes, owners, hard and symbolic links as they are; devices, sockets, pipes and extended attributes left out.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

/// Writes everything below `root` to `out`, which it gives back.
pub fn pack(root: &Path, out: File) -> io::Result<File> {
    let mut packing = Packing { tar: Builder::new(out), seen: BTreeMap::new() };
    packing.tar.follow_symlinks(false);
    packing.directory(root, Path::new(""))?;
    packing.tar.into_inner()
}

struct Packing {
    tar: Builder<File>,
    /// Device and inode of files with several names, with the first name.
    seen: BTreeMap<(u64, u64), PathBuf>,
}

impl Packing {
    fn directory(&mut self, root: &Path, inside: &Path) -> io::Result<()> {
        let mut names: Vec<_> = fs::read_dir(root.join(inside))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let path = inside.join(name);
            let metadata = fs::symlink_metadata(root.join(&path))?;
            self.entry(root, &path, &metadata)?;
            if metadata.is_dir() {
                self.directory(root, &path)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, root: &Path, path: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || kind.is_socket() {
            return Ok(());
        }
        let key = (metadata.dev(), metadata.ino());
        if let Some(first) = self.seen.get(&key) {
            let mut header = Header::new_gnu();
            header.set_metadata(metadata);
            header.set_entry_type(EntryType::Link);
            header.set_size(0);
            return self.tar.append_link(&mut header, path, first);
        }
        if metadata.is_file() && metadata.nlink() > 1 {
            self.seen.insert(key, path.to_owned());
        }
        self.tar.append_path_with_name(root.join(path), path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_packed_with_its_links() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        fs::create_dir(root.join("d")).expect("made");
        fs::write(root.join("d/file"), b"x").expect("written");
        fs::hard_link(root.join("d/file"), root.join("other")).expect("linked");
        std::os::unix::fs::symlink("/nowhere", root.join("link")).expect("linked");
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).expect("a socket");
        let mut out = pack(root, tempfile::tempfile().expect("a file")).expect("packed");
        io::Seek::rewind(&mut out).expect("rewound");
        let mut archive = tar::Archive::new(out);
        let entries = archive.entries().expect("a tar").map(|entry| {
            let entry = entry.expect("an entry");
            let target = entry.link_name().expect("a target").map(|target| target.into_owned());
            (entry.path().expect("a path").to_string_lossy().into_owned(), target)
        });
        let expected = [
            ("d".to_owned(), None),
            ("d/file".to_owned(), None),
            ("link".to_owned(), Some("/nowhere".into())),
            ("other".to_owned(), Some("d/file".into())),
        ];
        assert_eq!(entries.collect::<Vec<_>>(), expected);
    }
}
