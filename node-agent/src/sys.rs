//! The few system calls that have no safe wrapper: the only module of this crate with `unsafe`.
//!
//! Each function is a thin, total wrapper: it owns what it opens, and it leaves nothing behind when it fails.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the detached mount `tree` show files of user `n` as owned by what `user_namespace` maps `n` to.
pub fn set_id_map(tree: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd() as u64,
    };
    // SAFETY: the path is a NUL-terminated constant, `attr` lives through the call and its true size is passed; the kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result)
}

/// Makes a user namespace that maps ids `0..count` inside to `first..first + count` outside. Call it from a process with one
/// thread.
pub fn user_namespace(first: u32, count: u32) -> io::Result<OwnedFd> {
    let [users] = born_with(libc::CLONE_NEWUSER, first, count, ["user"])?;
    Ok(users)
}

/// As [`user_namespace`], with a network namespace that belongs to it.
pub fn user_and_network_namespaces(first: u32, count: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let [users, network] = born_with(libc::CLONE_NEWUSER | libc::CLONE_NEWNET, first, count, ["user", "net"])?;
    Ok((users, network))
}

/// A namespace needs a process to be born with: a child that does nothing but wait until its namespaces are open here.
fn born_with<const N: usize>(flags: libc::c_int, first: u32, count: u32, names: [&str; N]) -> io::Result<[OwnedFd; N]> {
    let (hold, release) = io::pipe()?;
    // SAFETY: `clone` without a new stack or shared memory acts like `fork`. The child calls only `close`, `read` and
    // `_exit`, which are async-signal-safe, with descriptors and a buffer of its own copy of this memory.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        let mut byte = 0u8;
        // SAFETY: as above; `byte` is one writable byte.
        unsafe {
            libc::close(release.as_raw_fd());
            libc::read(hold.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    check(child)?;
    let opened = map_and_open(child, first, count, names);
    drop(release);
    // SAFETY: the child is ours and not waited for elsewhere; a null status pointer is allowed.
    unsafe { libc::waitpid(child as libc::pid_t, std::ptr::null_mut(), 0) };
    opened
}

fn map_and_open<const N: usize>(child: i64, first: u32, count: u32, names: [&str; N]) -> io::Result<[OwnedFd; N]> {
    let map = format!("0 {first} {count}\n");
    fs::write(format!("/proc/{child}/uid_map"), &map)?;
    fs::write(format!("/proc/{child}/gid_map"), &map)?;
    let opened: io::Result<Vec<OwnedFd>> =
        names.iter().map(|name| Ok(File::open(format!("/proc/{child}/ns/{name}"))?.into())).collect();
    Ok(opened?.try_into().expect("one for each name"))
}

/// Lets the process that `command` starts inherit `fd`, under the same number, which is returned. `fd` stays
/// close-on-exec in this process, so nothing else that is started at the same time gets it.
pub fn inherit(command: &mut Command, fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    // SAFETY: the closure runs in the child between fork and exec and calls only `fcntl`, which is async-signal-safe. It
    // owns `fd`, so the number stays valid.
    unsafe {
        command.pre_exec(move || check(libc::c_long::from(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0))));
    }
    number
}

/// Has the kernel kill the process that `command` starts when the thread that starts it ends.
pub fn die_with_starter(command: &mut Command) {
    // SAFETY: the closure runs in the child between fork and exec; `prctl` is a plain system call.
    unsafe {
        command.pre_exec(|| check(libc::c_long::from(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))));
    }
}

/// Takes ownership of descriptor `number`, which a parent process passed with [`inherit`].
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` accepts any number and fails on one that is not open.
    check(libc::c_long::from(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }))?;
    // SAFETY: it is open, and the caller is the start of a process, before anything else could own it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Points stdin, stdout and stderr of this process at `/dev/null`.
pub fn drop_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for number in 0..=2 {
        // SAFETY: both are plain descriptor numbers; the standard ones are never owned by a Rust value.
        check(libc::c_long::from(unsafe { libc::dup2(null.as_raw_fd(), number) }))?;
    }
    Ok(())
}

/// Has the kernel run this process before every ordinary one (SCHED_FIFO at `priority`, 1 to 99).
pub fn schedule_realtime(priority: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: `parameters` lives through the call and the kernel only reads it; 0 is this process.
    check(libc::c_long::from(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) }))
}

/// Sends any signal, real-time ones too, to the process behind `pidfd`. No effect once it was waited for.
pub fn signal_process(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null `siginfo` is allowed: the kernel fills it in as `kill` would.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    match check(result) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// Has the terminal whose controlling end is given send `signal` to its foreground processes, as its key would: SIGINT,
/// SIGQUIT or SIGTSTP.
pub fn signal_foreground(terminal: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: `TIOCSIG` takes a number, no pointer.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), TIOCSIG, signal) }))
}

/// From asm-generic/ioctls.h: `_IOW('T', 0x36, int)`.
const TIOCSIG: libc::Ioctl = 0x4004_5436u32 as libc::Ioctl;

/// Receives one descriptor over a Unix socket.
pub fn receive_descriptor(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// A runtime sends a short name beside the descriptor.
    const NAME_LENGTH: usize = 4096;
    let mut name = [0u8; NAME_LENGTH];
    let mut buffers = [io::IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel just installed these descriptors for this call; nobody else owns them.
            let mut owned = numbers.into_iter().map(|n| unsafe { OwnedFd::from_raw_fd(n) });
            if let Some(first) = owned.next() {
                owned.for_each(drop);
                return Ok(first);
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptor came over the socket"))
}

/// Number of a loop device that is free now. Another may take it first.
pub fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    // linux/loop.h
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
    // SAFETY: this request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    check(libc::c_long::from(number))?;
    Ok(number.unsigned_abs())
}

/// `struct loop_config` of linux/loop.h, 304 bytes, with the words that are used here.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    /// Of `struct loop_info64`, up to its flags.
    before_flags: [u64; 6],
    key_size: u32,
    flags: u32,
    after_flags: [u64; 22],
    reserved: [u64; 8],
}

/// Puts `image` behind a free loop device, which lets go of it when its last opener and mount are gone. Fails with `EBUSY` when
/// it is not free any more.
pub fn configure_loop(device: BorrowedFd<'_>, image: BorrowedFd<'_>) -> io::Result<()> {
    // linux/loop.h
    const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    // The image's pages are not cached a second time, outside of the memory limit of who wrote them.
    const LO_FLAGS_DIRECT_IO: u32 = 16;
    const { assert!(size_of::<LoopConfig>() == 304) };
    let config = LoopConfig {
        fd: image.as_raw_fd().unsigned_abs(),
        block_size: 0,
        before_flags: [0; 6],
        key_size: 0,
        flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
        after_flags: [0; 22],
        reserved: [0; 8],
    };
    // SAFETY: `config` has the layout and size that the request reads, and lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    check(libc::c_long::from(result))
}

/// Receives one packet and the descriptors beside it. No bytes: the other end is gone.
pub fn receive_message(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    /// More than anyone here sends.
    const DESCRIPTORS: usize = 4;
    let mut buffers = [io::IoSliceMut::new(bytes)];
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel just installed these descriptors for this call; nobody else owns them.
            fds.extend(numbers.into_iter().map(|n| unsafe { OwnedFd::from_raw_fd(n) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet is longer than any that is sent"));
    }
    Ok((message.bytes, fds))
}

/// Has the async runtime watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and names the same file, for as long as it is owned; the result owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
