//! The disk of an instance: a file system of its own, of exactly the size that was asked for, so that the kernel stops who
//! writes more, in bytes and in files, and nobody else notices.
//!
//! It is an ext4 image in the instance's directory, sparse, made when the instance starts, on a loop device that goes by
//! itself with the last user of the mount. It is mounted only in the shim's own mount namespace: when the shim and the
//! instance are dead, however they died, mount and device are gone. No journal: after a crash of the host nothing that ran
//! goes on, and a journal would be 64 MiB of every image.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::mount::{MountFlags, mount};
use tokio::process::Command;

use super::layout;
use crate::driver::DriverError;
use crate::sys;

/// Smallest image: what ext4 needs for itself, and a little to write on.
pub const MIN_BYTES: u64 = 4 << 20;

/// Bytes of disk for each file that can be: what mke2fs takes by default (`inode_ratio` in its mke2fs.conf). A gibibyte holds
/// 65,536 files.
const BYTES_AN_INODE: u64 = 16 << 10;

/// What stays free where the images lie, so that the agent can still write its own files: journal, records, templates' state.
const HOST_RESERVE: u64 = 64 << 20;

/// Tries to get a free loop device before somebody else does.
const LOOP_ATTEMPTS: u32 = 64;

const LOOP_CONTROL: &str = "/dev/loop-control";
const MKE2FS: &str = "mke2fs";

/// How writes of an instance are held to its disk's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// By a file system of its own.
    Image,
    /// Not at all: the host has no loop devices, or no mke2fs.
    None,
}

impl Quota {
    /// What this host can do, and why not more.
    pub fn probe() -> (Self, Option<String>) {
        let control = File::options().read(true).write(true).open(LOOP_CONTROL);
        let device = control.and_then(|control| sys::free_loop_device(control.as_fd()));
        if let Err(error) = device {
            return (Self::None, Some(format!("{LOOP_CONTROL}: {error}")));
        }
        let tool = std::process::Command::new(MKE2FS).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        match tool {
            Ok(status) if status.success() => (Self::Image, None),
            Ok(status) => (Self::None, Some(format!("{MKE2FS} -V: {status}"))),
            Err(error) => (Self::None, Some(format!("{MKE2FS} (Debian: e2fsprogs): {error}"))),
        }
    }
}

/// Makes the image in an instance's directory.
pub async fn make(directory: &Path, bytes: u64) -> Result<(), DriverError> {
    let image = directory.join(layout::IMAGE);
    let what = || format!("make a disk of {bytes} bytes at {}", image.display());
    let failed = |source: io::Error| DriverError::Io { what: what(), source };
    has_room(directory)?;
    let file = File::create_new(&image).map_err(failed)?;
    file.set_len(bytes.max(MIN_BYTES)).map_err(failed)?;
    let mut command = Command::new(MKE2FS);
    command.args(arguments()).arg(&image).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    has_room(directory)?;
    Err(DriverError::Runtime { what: what(), output: format!("{MKE2FS}: {}: {said}", output.status) })
}

/// Whether the host's own disk has room for one more image to grow on.
fn has_room(directory: &Path) -> Result<(), DriverError> {
    let what = || format!("look at the disk of {}", directory.display());
    let free = free_bytes(directory).map_err(|source| DriverError::Io { what: what(), source })?;
    if free < HOST_RESERVE {
        return Err(DriverError::HostDiskFull {
            directory: directory.to_owned(),
            free_bytes: free,
            reserve_bytes: HOST_RESERVE,
        });
    }
    Ok(())
}

fn free_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Few blocks are written, whatever the size: no journal, no spare copies of the superblock, tables that count as zeroed
/// (a sparse file reads as zeros). Nothing is kept for root, who is nobody here.
fn arguments() -> Vec<String> {
    let ratio = BYTES_AN_INODE.to_string();
    let words = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-i",
        &ratio,
        "-O",
        "^has_journal,^resize_inode,sparse_super2",
        "-E",
        "nodiscard,num_backup_sb=0,lazy_itable_init=1,assume_storage_prezeroed=1",
    ];
    words.map(str::to_owned).to_vec()
}

/// Mounts an image on a free loop device. The mount is its only holder.
pub fn mount_image(image: &Path, at: &Path) -> io::Result<()> {
    let control = File::options().read(true).write(true).open(LOOP_CONTROL)?;
    let file = File::options().read(true).write(true).open(image)?;
    let (path, device) = attach(&control, &file)?;
    // What is deleted inside is free again outside. Tables are zeros already.
    mount(&path, at, "ext4", MountFlags::NODEV | MountFlags::NOATIME, c"discard,noinit_itable")?;
    // Only now: without an opener or a mount the device lets go of the image.
    drop(device);
    Ok(())
}

fn attach(control: &File, image: &File) -> io::Result<(PathBuf, File)> {
    for _ in 0..LOOP_ATTEMPTS {
        let number = sys::free_loop_device(control.as_fd())?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::options().read(true).write(true).open(&path)?;
        match sys::configure_loop(device.as_fd(), image.as_fd()) {
            // Somebody was faster.
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
            done => return done.map(|()| (path, device)),
        }
    }
    Err(io::Error::new(ErrorKind::ResourceBusy, "every free loop device was taken by others first"))
}

/// Whether a loop device still holds the image: it lets go a moment after the last mount is gone.
pub fn is_attached(image: &Path) -> io::Result<bool> {
    let inode = match fs::symlink_metadata(image) {
        Ok(metadata) => (metadata.dev(), metadata.ino()),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    for entry in fs::read_dir("/sys/block")?.flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(b"loop") {
            continue;
        }
        // A device that is free has no such file. Paths may be seen from another root: the inode says which it is.
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        let same = fs::symlink_metadata(backing.trim_end_matches('\n')).is_ok_and(|m| (m.dev(), m.ino()) == inode);
        if same {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_is_sparse_and_has_a_file_for_each_sixteen_kib() {
        if Quota::probe().0 == Quota::None {
            eprintln!("skipped: no loop devices or no mke2fs");
            return;
        }
        let dir = tempfile::tempdir().expect("temporary directory");
        make(dir.path(), 1 << 30).await.expect("makes");
        let image = dir.path().join(layout::IMAGE);
        let metadata = fs::metadata(&image).expect("there");
        assert_eq!(metadata.len(), 1 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
        // The superblock's `s_inodes_count`, 1024 bytes into the file system.
        let mut superblock = [0u8; 4];
        std::os::unix::fs::FileExt::read_exact_at(&File::open(&image).expect("opens"), &mut superblock, 1024)
            .expect("reads");
        assert_eq!(u64::from(u32::from_le_bytes(superblock)), (1 << 30) / BYTES_AN_INODE);
        assert!(!is_attached(&image).expect("looks"));
    }

    #[tokio::test]
    async fn a_full_host_is_named_as_such() {
        let error = has_room(Path::new("/proc")).expect_err("no room there");
        assert!(error.to_string().contains("/proc") && error.to_string().contains("free"), "{error}");
    }
}
