//! Where things lie, and what they are called.
//!
//! ```text
//! <data_dir>/oci/                       0700
//!   run/                                the runtime's own state (`--root`)
//!   instances/<tenant>.<id>.<epoch>/    everything of one instance; going last, it names what else may be left
//!     record.json                       what was asked for; gone once removal began
//!     config.json                       OCI bundle
//!     image                             the instance's disk, a sparse file system image; absent where there is no quota
//!     disk/                             where its shim mounts the image; in it upper/ (what it wrote) and work/ (scratch)
//!     lower/                            mount point of the shifted base
//!     alive, busy                       lifelines: held by the shim of the main process, by every shim
//!     started, exit.json                left by the shim: the main process's pid, how it ended
//!     shim.pid                          the shim's pid: the disk is mounted in its mount namespace only
//!     egress.json                       what it may reach, once that was changed
//!     exec/<id>/                        a process that was started in it, see `process/files.rs`
//!     logs/                             what the main process wrote, see `log.rs`
//! /run/warren/<hash of data_dir>/       0711: a sandbox's root user must be able to walk to its root file system
//!   network.json                        which addresses this agent's sandboxes have
//!   userns, netns                       where shims bind an instance's namespaces, seen by themselves only
//!   rootfs/                             mount point, used only in the shims' private mount namespaces
//! ```

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use warren_proto::ids::{Epoch, NodeId, SandboxId, SandboxName, TenantId};

use crate::driver::InstanceKey;

/// Where short, walkable paths lie, of all agents of the host. A socket's path may have 107 characters only.
pub const SHORT_ROOT: &str = "/run/warren";

/// Parent of all agents' control groups.
pub const CGROUP_ROOT: &str = "/warren";

/// Name of the fenced instances' parent group; no container's name, which are all hexadecimal.
pub const FENCED: &str = "fenced";

pub const RECORD: &str = "record.json";
pub const CONFIG: &str = "config.json";
pub const LOWER: &str = "lower";
pub const IMAGE: &str = "image";
pub const DISK: &str = "disk";
pub const UPPER: &str = "disk/upper";
pub const WORK: &str = "disk/work";
pub const ALIVE: &str = "alive";
pub const BUSY: &str = "busy";
pub const SHIM: &str = "shim.pid";
pub const STARTED: &str = "started";
pub const EXIT: &str = "exit.json";
pub const EGRESS: &str = "egress.json";
pub const EXEC: &str = "exec";
pub const LOGS: &str = "logs";

/// Paths of one driver.
#[derive(Debug, Clone)]
pub struct Layout {
    pub root: PathBuf,
    pub runtime_root: PathBuf,
    pub instances: PathBuf,
    pub short: PathBuf,
    pub rootfs: PathBuf,
    /// Parent of the node's control groups, from the root of a hierarchy.
    pub cgroup_parent: String,
    /// Below it: parent of the groups of fenced instances, frozen as a whole.
    pub fenced_parent: String,
}

impl Layout {
    /// `data_dir` must be absolute.
    pub fn new(data_dir: &Path, node: &NodeId) -> Self {
        let root = data_dir.join("oci");
        let short = Path::new(SHORT_ROOT).join(short_hash(data_dir.as_os_str().as_encoded_bytes(), 6));
        Self {
            runtime_root: root.join("run"),
            instances: root.join("instances"),
            rootfs: short.join("rootfs"),
            short,
            root,
            cgroup_parent: format!("{CGROUP_ROOT}/{node}"),
            fenced_parent: format!("{CGROUP_ROOT}/{node}/{FENCED}"),
        }
    }

    /// Name of the short directory: of this agent, on this host.
    pub fn short_name(&self) -> String {
        self.short.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Directory of an instance.
    pub fn instance(&self, key: &InstanceKey) -> PathBuf {
        self.instances.join(directory_name(key))
    }

    /// Control group of an instance, from the root of a hierarchy.
    pub fn cgroup(&self, key: &InstanceKey, fenced: bool) -> String {
        let [plain, in_fence] = self.cgroups(&container_id(key));
        if fenced { in_fence } else { plain }
    }

    /// Both groups that a container may have: the plain one and the fenced one.
    pub fn cgroups(&self, container: &str) -> [String; 2] {
        [&self.cgroup_parent, &self.fenced_parent].map(|parent| format!("{parent}/{container}"))
    }
}

/// `<tenant>.<id>.<epoch>`; ids contain no dot.
pub fn directory_name(key: &InstanceKey) -> String {
    format!("{}.{}.{}", key.sandbox.tenant, key.sandbox.id, key.epoch)
}

/// The opposite of [`directory_name`].
pub fn parse_directory_name(name: &str) -> Option<InstanceKey> {
    let (rest, epoch) = name.rsplit_once('.')?;
    let (tenant, id) = rest.split_once('.')?;
    let sandbox = SandboxName::new(TenantId::parse(tenant).ok()?, SandboxId::parse(id).ok()?);
    let key = InstanceKey { sandbox, epoch: Epoch(epoch.parse().ok()?) };
    // `+1` and `01` are numbers too, but not names that this module gives.
    (directory_name(&key) == name).then_some(key)
}

/// The runtime's name for an instance: short (full names overflow what runtimes accept), and known from the key alone, so
/// that an instance can be removed when nothing but its key is left.
pub fn container_id(key: &InstanceKey) -> String {
    short_hash(directory_name(key).as_bytes(), 10)
}

fn short_hash(bytes: &[u8], length: usize) -> String {
    Sha256::digest(bytes).iter().take(length).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_name_says_the_key_and_nothing_else_does() {
        let sandbox = SandboxName::parse("tenants/acme/sandboxes/web-1").expect("valid");
        let key = InstanceKey { sandbox, epoch: Epoch(7) };
        assert_eq!(directory_name(&key), "acme.web-1.7");
        assert_eq!(parse_directory_name("acme.web-1.7"), Some(key));
        for bad in ["", "acme.web-1", "acme.web-1.", "acme.web-1.07", "acme.web-1.+7", "acme.a.b.7", "A.b.1", ".tmp"] {
            assert_eq!(parse_directory_name(bad), None, "{bad}");
        }
    }
}
