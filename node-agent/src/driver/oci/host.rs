//! What the driver changes on the host outside its own directory, and how it is put back.
//!
//! Agents may share a host: what is shared is changed under a lock on [`layout::SHORT_ROOT`].

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, getrlimit};

use super::cgroup::Cgroups;
use super::layout::{Layout, SHORT_ROOT};

/// Where crun looks for the controller without which it refuses hosts that have both versions mounted.
const HUGETLB: &str = "/sys/fs/cgroup/hugetlb";
/// Says that an agent mounted it.
const HUGETLB_MARK: &str = "mounted-hugetlb";

/// Makes the driver's directories.
pub fn prepare(layout: &Layout) -> io::Result<()> {
    for dir in [&layout.root, &layout.runtime_root, &layout.instances] {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    for dir in [Path::new(SHORT_ROOT), &layout.short, &layout.rootfs] {
        fs::create_dir_all(dir)?;
        // Whatever the umask is: sandboxes' root users walk through.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
    }
    sweep_sockets(&layout.short)
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
    let _lock = lock()?;
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

/// Removes the driver's directories, and what agents share if this was the last.
pub fn restore(layout: &Layout) -> io::Result<()> {
    remove_tree(&layout.root)?;
    remove_tree(&layout.short)?;
    let lock = match lock() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mark = Path::new(SHORT_ROOT).join(HUGETLB_MARK);
    let in_use = Path::new(HUGETLB).join("warren").exists();
    if mark.exists() && !in_use {
        match unmount(HUGETLB, UnmountFlags::empty()) {
            // Not mounted: the host was restarted.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(e) => return Err(e.into()),
        }
        // A host may have made it itself.
        let _ = fs::remove_dir(HUGETLB);
        fs::remove_file(&mark)?;
    }
    drop(lock);
    // Not empty: another agent's.
    let _ = fs::remove_dir(SHORT_ROOT);
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

fn lock() -> io::Result<File> {
    let dir = File::open(SHORT_ROOT)?;
    dir.lock()?;
    Ok(dir)
}
