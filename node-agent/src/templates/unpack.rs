//! Unpacks a root file system tar: modes, numeric owners, hard links and extended attributes kept; devices left out (a
//! runtime makes its own); nothing ever outside the target directory.

use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tar::{Archive, EntryType};

const BUFFER: usize = 256 << 10;

/// Mode of the root directory where the tar does not say.
const ROOT_MODE: u32 = 0o755;

/// Unpacks `file` into the new directory `target`.
pub fn unpack(mut file: File, target: &Path) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    fs::create_dir(target)?;
    fs::set_permissions(target, Permissions::from_mode(ROOT_MODE))?;
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER, file));
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(true);
    // Only root may give files away; an agent that is not root runs the sim driver only.
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    unpack_entries(&mut archive, target)
}

/// Directories come last and deepest first: their modes and times must outlive what is written into them.
fn unpack_entries<R: Read>(archive: &mut Archive<R>, target: &Path) -> io::Result<()> {
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        match entry.header().entry_type() {
            EntryType::Char | EntryType::Block | EntryType::Fifo => {}
            EntryType::Directory => directories.push(entry),
            _ => {
                if !entry.unpack_in(target)? {
                    return Err(outside(&entry.path()?));
                }
            }
        }
    }
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut directory in directories {
        if !directory.unpack_in(target)? {
            return Err(outside(&directory.path()?));
        }
    }
    Ok(())
}

fn outside(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("`{}` leads out of the root file system", path.display()))
}
