//! Ways into a running instance that start no process in it: its root directory, and its ports.
//!
//! Both go through the main process in `/proc`. A number may be another process's by now, so it is believed only for a
//! process of the instance's control group that still lives once everything is open.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::kind::Kind;
use super::record::Record;
use super::{OciDriver, io_error, layout};
use crate::driver::{DriverError, InsideRoot, InstanceKey};

/// Within a sandbox's own network nothing is far: a listener whose queue is full is the only one that takes longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// An address of nobody (RFC 5737): asking the kernel for the way there tells the instance's own address and sends nothing.
const FAR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

/// Refuses runtimes whose main process is a kernel of their own: its root and its network are not those of what runs on it.
pub(super) fn check(kind: Kind, what: &'static str) -> Result<(), DriverError> {
    match kind {
        Kind::Crun | Kind::Runc => Ok(()),
        Kind::Runsc | Kind::Kata => Err(DriverError::Unsupported { driver: super::NAME, what }),
    }
}

pub(super) fn root(driver: &OciDriver, key: &InstanceKey, record: &Record) -> Result<InsideRoot, DriverError> {
    let main = Main::open(driver, key)?;
    let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(main.file("root"));
    let users = File::open(main.file("ns/user"));
    main.alive()?;
    Ok(InsideRoot {
        directory: directory.map_err(io_error("open the sandbox's root directory"))?.into(),
        users: users.map_err(io_error("open the sandbox's user namespace"))?.into(),
        first_id: record.first_id,
        program: driver.shim_exe().to_owned(),
    })
}

pub(super) async fn connect(driver: &OciDriver, key: &InstanceKey, port: u16) -> Result<TcpStream, DriverError> {
    let main = Main::open(driver, key)?;
    let network = File::open(main.file("ns/net"));
    main.alive()?;
    let network = network.map_err(io_error("open the sandbox's network namespace"))?;
    let (answer, connected) = oneshot::channel();
    // A thread of its own, which ends with it: it never comes back from that network. Whoever asked may be gone.
    let enter = move || drop(answer.send(connect_within(network.into(), port)));
    std::thread::Builder::new().spawn(enter).map_err(io_error("start a thread"))?;
    let connected = connected.await.map_err(|_| io_error("connect")(io::ErrorKind::Interrupted.into()))?;
    let connected = connected.and_then(|stream| {
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    });
    match connected {
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut) => {
            Err(DriverError::PortClosed(port))
        }
        other => other.map_err(io_error("connect to the sandbox")),
    }
}

fn connect_within(network: OwnedFd, port: u16) -> io::Result<StdTcpStream> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    let mut addresses = vec![IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    addresses.extend(own_address());
    for address in addresses {
        match StdTcpStream::connect_timeout(&(address, port).into(), CONNECT_TIMEOUT) {
            // Nobody there, or no such address: the next.
            Err(e) if e.kind() != io::ErrorKind::TimedOut => {}
            other => {
                let stream = other?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
        }
    }
    Err(io::ErrorKind::ConnectionRefused.into())
}

fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(FAR).ok()?;
    socket.local_addr().ok().map(|own| own.ip())
}

/// The main process of an instance.
struct Main {
    pid: Pid,
    process: OwnedFd,
    key: InstanceKey,
}

impl Main {
    fn open(driver: &OciDriver, key: &InstanceKey) -> Result<Self, DriverError> {
        let not_running = || DriverError::NotRunning { key: key.clone() };
        let file = driver.layout().instance(key).join(layout::STARTED);
        let text = fs::read_to_string(file).map_err(io_error("read the main process's pid"))?;
        let pid = text.trim().parse().ok().and_then(Pid::from_raw).ok_or_else(not_running)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| not_running())?;
        let main = Self { pid, process, key: key.clone() };
        let groups = fs::read_to_string(main.file("cgroup")).map_err(|_| not_running())?;
        if is_in(&groups, &driver.cgroup(key)) { Ok(main) } else { Err(not_running()) }
    }

    fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// Whether all that was opened by its number was its.
    fn alive(&self) -> Result<(), DriverError> {
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut ended, Some(&at_once)) {
            Ok(0) => Ok(()),
            _ => Err(DriverError::NotRunning { key: self.key.clone() }),
        }
    }
}

/// Whether `/proc/<pid>/cgroup` names the group, or one below it.
fn is_in(groups: &str, group: &str) -> bool {
    let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.into_iter().any(|path| match path.find(group) {
        Some(at) => path[at + group.len()..].is_empty() || path[at + group.len()..].starts_with('/'),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_the_instance_s_by_its_group_only() {
        let group = "/warren/n1/abc";
        assert!(is_in("5:memory:/\n4:pids:/warren/n1/abc\n", group));
        assert!(is_in("0::/machine/warren/n1/abc/init\n", group));
        assert!(!is_in("0::/warren/n1/abcd\n", group));
        assert!(!is_in("0::/warren/n1\n5:cpu:/\n", group));
    }
}
