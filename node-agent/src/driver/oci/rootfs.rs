//! The root file system of an instance, mounted by its shim and seen by nobody else: what it writes, on its own disk, over
//! the shared base, whose files appear as its own users'.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, openat, unlinkat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};

use super::record::Record;
use super::{disk, ids, layout};
use crate::sys;

/// Name of a file in `/tmp` while a runtime starts that would else mount memory there.
const IN_TMP: &str = ".warren-start";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RootfsError {
    pub what: &'static str,
    pub source: io::Error,
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> RootfsError {
    move |error| RootfsError { what, source: error.into() }
}

/// Mounts it at the record's `rootfs`. To be called in the instance's directory, in a process with one thread, which is in a
/// mount namespace of its own afterwards.
pub fn mount_rootfs(record: &Record) -> Result<(), RootfsError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace"))?;
    // What the host unmounts goes here too, so that no shim keeps a disk busy; nothing goes the other way.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("cut off mounts"))?;
    let image = Path::new(layout::IMAGE);
    if image.exists() {
        disk::mount_image(image, Path::new(layout::DISK)).map_err(step("mount the instance's disk"))?;
    }
    prepare_layers(record.first_id).map_err(step("make the writable layer"))?;
    let users = sys::user_namespace(record.first_id, ids::RANGE).map_err(step("make a user namespace"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let base = open_tree(CWD, &record.base, flags).map_err(step("open the template's root file system"))?;
    sys::set_id_map(base.as_fd(), users.as_fd()).map_err(step("shift the ids of the template's files"))?;
    move_mount(base, "", CWD, layout::LOWER, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step("mount the template's root file system"))?;
    // Relative paths: a `:` or `,` in an absolute one would need escaping.
    let layers = c"lowerdir=lower,upperdir=disk/upper,workdir=disk/work";
    mount("overlay", &record.rootfs, "overlay", MountFlags::empty(), layers).map_err(step("mount the overlay"))?;
    // The overlay has its own hold on it.
    unmount(layout::LOWER, UnmountFlags::DETACH).map_err(step("unmount the lower layer"))?;
    let tmp = prepare_tmp(&record.rootfs, record.first_id).map_err(step("prepare /tmp"))?;
    if let Some(tmp) = tmp.filter(|_| record.kind.hides_empty_tmp()) {
        let flags = OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(&tmp, IN_TMP, flags, Mode::empty()).map_err(step("keep /tmp from being empty"))?;
    }
    Ok(())
}

/// Takes away again what kept `/tmp` from being empty, once the runtime has looked.
pub fn show_tmp(record: &Record) {
    if record.kind.hides_empty_tmp()
        && let Ok(Some(tmp)) = open_tmp(&record.rootfs)
    {
        // It may be gone by now: the instance runs.
        let _ = unlinkat(&tmp, IN_TMP, AtFlags::empty());
    }
}

fn prepare_layers(owner: u32) -> io::Result<()> {
    for name in [layout::UPPER, layout::WORK] {
        fs::create_dir(name)?;
    }
    chown(layout::UPPER, Some(owner), Some(owner))?;
    fs::set_permissions(layout::UPPER, Permissions::from_mode(0o755))
}

/// `/tmp` lies on the disk, and everybody inside may write there. Where the template has something else than a directory of
/// that name, it has it for a reason.
fn prepare_tmp(rootfs: &Path, owner: u32) -> io::Result<Option<OwnedFd>> {
    let root = openat(CWD, rootfs, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let made = match mkdirat(&root, "tmp", Mode::from_raw_mode(0o700)) {
        Ok(()) => true,
        Err(rustix::io::Errno::EXIST) => false,
        Err(e) => return Err(e.into()),
    };
    let Some(tmp) = open_tmp(rootfs)? else { return Ok(None) };
    if made {
        fchown(&tmp, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?;
    }
    let sticky = Mode::from_raw_mode(0o1777);
    if Mode::from_raw_mode(rustix::fs::fstat(&tmp)?.st_mode) != sticky {
        fchmod(&tmp, sticky)?;
    }
    Ok(Some(tmp))
}

/// Never through a link: the template chose it, and here it would lead to the host. `None`: it is no directory.
fn open_tmp(rootfs: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(CWD, rootfs.join("tmp"), flags, Mode::empty()) {
        Ok(tmp) => Ok(Some(tmp)),
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
