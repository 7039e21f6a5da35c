//! What the driver changes on the host outside its own directory, and how it is put back.
//!
//! Agents may share a host: what is shared is changed under a lock on [`layout::SHORT_ROOT`].

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, getrlimit};

use super::cgroup::Cgroups;
use super::layout::{self, Layout, SHORT_ROOT};

/// Where crun looks for the controller without which it refuses hosts that have both versions mounted.
const HUGETLB: &str = "/sys/fs/cgroup/hugetlb";
/// Tries to get the lock on a directory that others may remove: each failure means that another agent was cleaned away.
const LOCK_ATTEMPTS: u32 = 100;
/// Says that an agent mounted it.
const HUGETLB_MARK: &str = "mounted-hugetlb";

/// Makes the driver's directories.
pub fn prepare(layout: &Layout) -> io::Result<()> {
    for dir in [&layout.root, &layout.runtime_root, &layout.instances] {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let _lock = lock(true)?;
    make_walkable(&layout.short)?;
    make_walkable(&layout.rootfs)?;
    sweep_sockets(&layout.short)
}

fn make_walkable(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    // Whatever the umask is: sandboxes' root users walk through.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o711))
}

/// Removes console sockets that an agent left when it was killed.
fn sweep_sockets(short: &Path) -> io::Result<()> {
    for entry in fs::read_dir(short)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Mounts what crun wants, where version 1 is mounted without it.
pub fn mount_hugetlb() -> io::Result<()> {
    let _lock = lock(true)?;
    let cgroups = Cgroups::discover()?;
    if cgroups.is_unified() || cgroups.has_controller("hugetlb") || !kernel_has_hugetlb() {
        return Ok(());
    }
    fs::create_dir_all(HUGETLB)?;
    fs::write(Path::new(SHORT_ROOT).join(HUGETLB_MARK), "")?;
    Ok(mount("cgroup", HUGETLB, "cgroup", MountFlags::empty(), c"hugetlb")?)
}

fn kernel_has_hugetlb() -> bool {
    fs::read_to_string("/proc/cgroups").is_ok_and(|text| text.lines().any(|line| line.starts_with("hugetlb\t")))
}

/// Removes the driver's directories and parent control groups, and what agents share if this was the last. An agent counts
/// as there as long as its directory in [`SHORT_ROOT`] is.
pub fn restore(layout: &Layout) -> io::Result<()> {
    remove_tree(&layout.root)?;
    let _lock = match lock(false) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    remove_tree(&layout.short)?;
    let cgroups = Cgroups::discover()?;
    cgroups.remove_if_empty(&layout.fenced_parent);
    cgroups.remove_if_empty(&layout.cgroup_parent);
    let others = fs::read_dir(SHORT_ROOT)?.flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    if others {
        return Ok(());
    }
    cgroups.remove_if_empty(layout::CGROUP_ROOT);
    let mark = Path::new(SHORT_ROOT).join(HUGETLB_MARK);
    if mark.exists() {
        unmount_hugetlb()?;
        fs::remove_file(&mark)?;
    }
    match fs::remove_dir(SHORT_ROOT) {
        // Somebody keeps something there.
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other,
    }
}

fn unmount_hugetlb() -> io::Result<()> {
    match unmount(HUGETLB, UnmountFlags::empty()) {
        // Not mounted: the host was restarted.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    // It may be the host's own directory.
    let _ = fs::remove_dir(HUGETLB);
    Ok(())
}

/// To how many open files a process that this one starts may raise its limit.
pub fn open_files() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// Removes a directory and all in it; not being there is success.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes a file, or a directory and all in it; not being there is success.
pub fn remove_any(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if matches!(e.kind(), ErrorKind::IsADirectory | ErrorKind::PermissionDenied) => remove_tree(path),
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Does something that concerns all agents of the host, one agent at a time.
pub fn locked<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let _lock = lock(true)?;
    work()
}

/// Locks [`SHORT_ROOT`], where `make` says so making it first. It is removed under the lock only, so it is in place for
/// whoever has the lock.
fn lock(make: bool) -> io::Result<File> {
    for _ in 0..LOCK_ATTEMPTS {
        if make {
            make_walkable(Path::new(SHORT_ROOT))?;
        }
        let dir = match File::open(SHORT_ROOT) {
            Err(e) if make && e.kind() == ErrorKind::NotFound => continue,
            other => other?,
        };
        dir.lock()?;
        // Removed, and perhaps made anew, while we waited: then this locks nothing.
        if fs::metadata(SHORT_ROOT).is_ok_and(|there| dir.metadata().is_ok_and(|ours| ours.ino() == there.ino())) {
            return Ok(dir);
        }
    }
    Err(ErrorKind::ResourceBusy.into())
}
