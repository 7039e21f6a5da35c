//! Removal: works on a running instance, on what a crash left at any step of a start or of another removal, and when the
//! runtime has forgotten the instance.
//!
//! Order: the record (so that a shim that is just starting gives up), processes, the runtime's state, the network, control groups, the disk's
//! device, and at last the directory, which names the instance until nothing else is left.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{sleep, timeout};

use super::cgroup::Cgroups;
use super::record::Record;
use super::{OciDriver, blocking, disk, host, io_error, layout, lifeline};
use crate::driver::{DriverError, InstanceKey};
use crate::failpoint;

/// How long shims may take to end by themselves after the processes were killed. A process in the middle of disk IO, or of
/// freeing much memory, takes a while to die.
const SHIM_PATIENCE: Duration = Duration::from_secs(5);

/// Tries of each step that may find something still busy, and the pauses between them: about 8 s in all. There is no event
/// to wait for: version 1 groups tell nobody when they become empty.
const ATTEMPTS: u32 = 100;
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// As often it is looked whether the disk is let go of, which takes milliseconds: about 1 s in all.
const DISK_ATTEMPTS: u32 = 15;

/// Tries of the runtime's own removal.
const DELETE_ATTEMPTS: u32 = 3;

pub(super) async fn remove(driver: &OciDriver, key: &InstanceKey) -> Result<(), DriverError> {
    let directory = driver.layout().instance(key);
    let id = layout::container_id(key);
    let groups = driver.layout().cgroups(&id);
    let program = Record::read(&directory).map_or_else(|_| driver.runtime().program().to_owned(), |r| r.runtime);
    let cgroups = discover()?;
    forget(&directory).map_err(io_error("remove the record"))?;
    failpoint::pass("remove.unrecorded");
    end_shims(&cgroups, &directory, &groups).await.map_err(io_error("end the shims"))?;
    retry(|| nothing_left_in(&cgroups, &groups)).await.map_err(io_error("end every process"))?;
    failpoint::pass("remove.killed");
    delete_state(driver, &program, &id).await?;
    failpoint::pass("remove.deleted");
    driver.disconnect(&id).await?;
    failpoint::pass("remove.disconnected");
    retry(|| empty_and_remove(&cgroups, &groups)).await.map_err(io_error("remove the control groups"))?;
    failpoint::pass("remove.ungrouped");
    let image = directory.join(layout::IMAGE);
    if retry_times(DISK_ATTEMPTS, || is_let_go(&image)).await.is_err() {
        // Somebody outside has a file of it open. Its space is free again when that is closed.
        tracing::warn!(instance = ?key, "the disk is still in use while its instance is removed");
    }
    blocking("remove the directory", move || host::remove_tree(&directory)).await?;
    failpoint::pass("remove.removed");
    driver.ids().give_back(&id);
    Ok(())
}

/// Removes control group and runtime state that no directory names any more.
pub(super) async fn remove_stray(driver: &OciDriver, id: &str) -> Result<(), DriverError> {
    let groups = driver.layout().cgroups(id);
    let cgroups = discover()?;
    retry(|| nothing_left_in(&cgroups, &groups)).await.map_err(io_error("end every process"))?;
    delete_state(driver, driver.runtime().program(), id).await?;
    retry(|| empty_and_remove(&cgroups, &groups)).await.map_err(io_error("remove the control groups"))
}

/// Anew each time: where another agent mounted a further hierarchy, runtimes use it at once.
fn discover() -> Result<Cgroups, DriverError> {
    Cgroups::discover().map_err(io_error("find the control groups"))
}

fn forget(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(layout::RECORD)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Kills the instance's processes; its shims see that, note it, and end. One that has nothing to see is killed.
async fn end_shims(cgroups: &Cgroups, directory: &Path, groups: &[String]) -> io::Result<()> {
    kill(cgroups, groups);
    let busy = directory.join(layout::BUSY);
    if !directory.join(layout::STARTED).exists() {
        retry(|| kill_who_stands_in(directory)).await?;
        kill(cgroups, groups);
    }
    if let Ok(done) = timeout(SHIM_PATIENCE, lifeline::released(&busy)).await {
        return done;
    }
    kill(cgroups, groups);
    retry(|| kill_who_stands_in(directory)).await?;
    timeout(SHIM_PATIENCE, lifeline::released(&busy)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Kills the processes whose working directory is the instance's: shims, and runtime processes that they started. Succeeds
/// once there are none, so that nothing is started behind our back afterwards.
fn kill_who_stands_in(directory: &Path) -> io::Result<()> {
    let mut found = false;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        // Opened before it is looked at, so it is the same process that is killed. It may be gone at any point.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory) {
            let _ = pidfd_send_signal(process, Signal::KILL);
            found = true;
        }
    }
    if found { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
}

fn kill(cgroups: &Cgroups, groups: &[String]) -> usize {
    groups.iter().map(|group| cgroups.kill(group)).sum()
}

fn nothing_left_in(cgroups: &Cgroups, groups: &[String]) -> io::Result<()> {
    match kill(cgroups, groups) {
        0 => Ok(()),
        _ => Err(io::ErrorKind::ResourceBusy.into()),
    }
}

/// The last mount of the disk goes with the last process, and its device a moment later.
fn is_let_go(image: &Path) -> io::Result<()> {
    if disk::is_attached(image)? { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
}

fn empty_and_remove(cgroups: &Cgroups, groups: &[String]) -> io::Result<()> {
    kill(cgroups, groups);
    groups.iter().try_for_each(|group| cgroups.remove(group))
}

/// Has the runtime forget the instance. Nothing of it runs, so where the runtime cannot, its files are removed.
async fn delete_state(driver: &OciDriver, program: &str, id: &str) -> Result<(), DriverError> {
    let states = || driver.runtime().states(id).map_err(io_error("look for the runtime's state"));
    // Not forced first: that waits at least 100 ms in runc.
    let mut arguments = vec!["delete", id];
    for _ in 0..DELETE_ATTEMPTS {
        // gVisor's state is files only, and it waits for seconds before it removes them.
        if !states()?.iter().any(|state| state.is_dir()) {
            break;
        }
        if let Err(error) = driver.runtime().call(program, &arguments).await {
            tracing::debug!(container = id, %error, "the runtime did not delete an instance");
        }
        arguments = vec!["delete", "--force", id];
    }
    let states = states()?;
    blocking("remove the runtime's state", move || states.iter().try_for_each(|state| host::remove_any(state))).await
}

async fn retry(step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    retry_times(ATTEMPTS, step).await
}

async fn retry_times(attempts: u32, mut step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..attempts {
        if step().is_ok() {
            return Ok(());
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    step()
}
