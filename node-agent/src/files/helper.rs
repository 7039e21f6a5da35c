//! The process that does what needs a sandbox's rights: `warren-node-agent files SOCKET ROOT USERS`, three descriptors.
//!
//! It becomes the sandbox's root user, keeps of its capabilities those about files, and answers until its socket ends, which
//! it does when the agent goes. It stays in the host's mount namespace and knows the sandbox by one descriptor of its root,
//! so nothing inside can see, stop or trace it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use rustix::fs::{Gid, Mode, Uid};
use rustix::process::umask;
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, move_into_link_name_space, set_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::message::{Reply, Request, receive, send};
use super::{Fault, make, remove, resolve};
use crate::sys;

/// Runs a helper; `args` are those after `files` on the command line.
pub fn run(args: &[String]) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(args: &[String]) -> io::Result<()> {
    let [socket, root, users] = args else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: files SOCKET ROOT USERS"));
    };
    let [socket, root, users] = [take(socket)?, take(root)?, take(users)?];
    become_root_of(users)?;
    while let Some((request, fds)) = receive::<Request>(socket.as_fd())? {
        let (reply, fds): (Reply, Vec<OwnedFd>) = match answer(root.as_fd(), request, &fds) {
            Ok(fds) => (Ok(()), fds),
            Err(fault) => (Err(fault), Vec::new()),
        };
        send(socket.as_fd(), &reply, &fds)?;
    }
    Ok(())
}

fn take(number: &str) -> io::Result<OwnedFd> {
    sys::take_inherited(number.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not a number"))?)
}

fn become_root_of(users: OwnedFd) -> io::Result<()> {
    umask(Mode::empty());
    set_thread_groups(&[])?;
    move_into_link_name_space(users.as_fd(), Some(LinkNameSpaceType::User))?;
    let (user, group) = (Uid::ROOT, Gid::ROOT);
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    set_no_new_privs(true)?;
    let files = CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::FSETID;
    let sets = CapabilitySets { effective: files, permitted: files, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}

fn answer(root: BorrowedFd<'_>, request: Request, fds: &[OwnedFd]) -> Result<Vec<OwnedFd>, Fault> {
    match request {
        Request::Open { path, how } => return Ok(vec![resolve::open(root, &path, how)?]),
        Request::Begin { path, make_parents, exclusive, ownership } => {
            return Ok(make::begin(root, &path, make_parents, exclusive, ownership)?.into());
        }
        Request::Commit { path, exclusive } => {
            let [directory, file] = fds else { return Err(Fault::Os(libc::EBADF)) };
            make::commit(directory.as_fd(), file.as_fd(), &path, exclusive)?;
        }
        Request::MakeDirectory { path, make_parents, ownership } => {
            make::make_directory(root, &path, make_parents, ownership)?;
        }
        Request::MakeSymlink { path, target } => make::make_symlink(root, &path, &target)?,
        Request::Move { from, to, replace } => make::rename(root, &from, &to, replace)?,
        Request::Remove { path, recursive, allow_missing } => {
            remove::remove(root, &path, recursive, allow_missing)?;
        }
    }
    Ok(Vec::new())
}
