//! A sandbox's own end of the network, made by its shim before the runtime starts.
//!
//! ```text
//!  sandbox's namespace                    host
//!  lo 127.0.0.1                           lo: gateway (10.224.0.1)
//!  eth0 10.224.0.7/32 ◀──── veth ────▶ wrn3fa9c20b0007, route to 10.224.0.7
//!       default via the gateway
//! ```
//! The namespace belongs to the sandbox's user namespace, so its root may do with it what containers' roots may. Both are
//! bound to fixed paths, which exist only in the shim's mount namespace: a runtime joins them by name, and once they are
//! unbound the namespaces live as long as the sandbox's processes.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde::{Deserialize, Serialize};

use super::netlink::Netlink;
use crate::sys;

/// The sandbox's link, as programs expect it.
const INSIDE: &str = "eth0";
/// The resolver's file: no search domains, and a second try before a program gives up.
const RESOLV_CONF: &str = "options timeout:3 attempts:2\n";

/// What one instance has of the node's network. Part of its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// Of the instance in the node's slice.
    pub number: u16,
    /// Name of the host's end.
    pub link: String,
    pub address: Ipv4Addr,
    /// The host, as the sandbox sees it; names are answered there.
    pub gateway: Ipv4Addr,
}

/// Where the namespaces are bound.
#[derive(Debug, Clone)]
pub struct Paths {
    pub users: PathBuf,
    pub network: PathBuf,
}

impl Paths {
    /// In a driver's directory of short paths.
    pub fn new(short: &Path) -> Self {
        Self { users: short.join("userns"), network: short.join("netns") }
    }

    /// Makes the files to which the namespaces are bound.
    pub fn make(&self) -> io::Result<()> {
        fs::write(&self.users, "")?;
        fs::write(&self.network, "")
    }

    /// Lets go of the namespaces, which live on in the sandbox's processes.
    pub fn unbind(&self) -> io::Result<()> {
        unmount(&self.users, UnmountFlags::DETACH)?;
        Ok(unmount(&self.network, UnmountFlags::DETACH)?)
    }
}

/// Makes a user namespace with `count` ids from `first_id` on and in it a network namespace, connects that with the host, and
/// binds both. Call it in a private mount namespace, from a process with one thread.
pub fn prepare(assigned: &Assigned, paths: &Paths, first_id: u32, count: u32) -> io::Result<()> {
    let (users, network) = sys::user_and_network_namespaces(first_id, count)?;
    connect(assigned, network.as_fd())?;
    for (namespace, path) in [(&users, &paths.users), (&network, &paths.network)] {
        mount_bind(format!("/proc/self/fd/{}", namespace.as_raw_fd()), path)?;
    }
    Ok(())
}

/// Connects the network namespace `inside` with this thread's.
pub fn connect(assigned: &Assigned, inside: BorrowedFd<'_>) -> io::Result<()> {
    let outer = Netlink::open()?;
    let inner = within(inside, || {
        // Before there is a link that could get an address by itself; loopback keeps its own.
        set("net/ipv6/conf/default/disable_ipv6", "1")?;
        Netlink::open()
    })?;
    inner.set_up(inner.index("lo")?)?;
    outer.add_pair(&assigned.link, INSIDE, inside)?;
    let index = outer.index(&assigned.link)?;
    set(&format!("net/ipv6/conf/{}/disable_ipv6", assigned.link), "1")?;
    outer.set_up(index)?;
    outer.add_route_to(index, assigned.address, assigned.gateway)?;
    let eth0 = inner.index(INSIDE)?;
    inner.add_address(eth0, assigned.address, libc::RT_SCOPE_UNIVERSE)?;
    inner.set_up(eth0)?;
    inner.add_route_to(eth0, assigned.gateway, assigned.address)?;
    inner.add_default_route(eth0, assigned.gateway)
}

/// Does something in another network namespace and comes back.
fn within<T>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = fs::File::open("/proc/thread-self/ns/net")?;
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let done = work();
    setns(&own, CloneFlags::CLONE_NEWNET)?;
    done
}

/// Sets a kernel setting; one that this kernel does not have needs no setting.
fn set(name: &str, value: &str) -> io::Result<()> {
    match fs::write(Path::new("/proc/sys").join(name), value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes `/etc/resolv.conf` of a root file system, as its root user's file. Whatever links the template has there lead
/// nowhere outside. A template without `/etc`, or with a directory of that name, has no use for it.
pub fn write_resolver(root: &Path, gateway: Ipv4Addr, first_id: u32) -> io::Result<()> {
    let directory = |flags| -> io::Result<OwnedFd> {
        let root = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(root, "etc", flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    };
    let etc = match directory(OFlags::RDONLY | OFlags::DIRECTORY) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => return Ok(()),
        other => other?,
    };
    let name = c"resolv.conf";
    match unlinkat(&etc, name, rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(rustix::io::Errno::ISDIR) => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::File::from(rustix::fs::openat(&etc, name, flags, Mode::from_raw_mode(0o644))?);
    std::os::unix::fs::fchown(&file, Some(first_id), Some(first_id))?;
    io::Write::write_all(&mut &file, format!("nameserver {gateway}\n{RESOLV_CONF}").as_bytes())
}
