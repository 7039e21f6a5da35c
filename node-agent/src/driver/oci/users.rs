//! Who a process runs as: numbers as they are, names by the instance's own /etc/passwd and /etc/group.
//!
//! The files are the sandbox's, so anything may stand in them or in their place: they are opened below the root that the main
//! process has, whatever links lead out of it, only when they are plain files, and no more than a bound of them is read.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use super::layout;
use super::record::Record;
use crate::driver::DriverError;

/// Most that is read of /etc/passwd and /etc/group: some ten thousand users.
const MAX_FILE: u64 = 1 << 20;

/// Highest id that an instance has.
const MAX_ID: u32 = 65_534;

/// Most groups that a user is put into beside its own: what Linux took before 2.6.4, and many times what images have.
const MAX_GROUPS: usize = 32;

/// A user inside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Beside `gid`.
    pub groups: Vec<u32>,
    /// Of one that was named.
    pub home: Option<String>,
}

impl User {
    pub fn number(uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..Self::default() }
    }

    /// `uid` or `uid:gid`; a lone uid is its group too; empty: root. `None`: it is a name.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |part: &str| part.parse::<u32>().ok().filter(|n| *n <= MAX_ID);
        match text.split_once(':') {
            _ if text.is_empty() => Some(Self::default()),
            Some((uid, gid)) => Some(Self::number(number(uid)?, number(gid)?)),
            None => number(text).map(|uid| Self::number(uid, uid)),
        }
    }

    /// Looks `text` up in a running instance. Blocks.
    pub fn resolve(text: &str, directory: &Path, record: &Record) -> Result<Self, DriverError> {
        if let Some(user) = Self::parse(text) {
            return Ok(user);
        }
        let failed = |source| DriverError::Io { what: format!("look up user `{text}`"), source };
        let root = root(directory, record).map_err(failed)?;
        let passwd = read(&root, "etc/passwd").map_err(failed)?;
        let group = read(&root, "etc/group").map_err(failed)?;
        Self::named(text, &passwd, &group).ok_or_else(|| DriverError::UserNotFound { user: text.to_owned() })
    }

    fn named(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let fields: Vec<&str> = line.split(':').collect();
        let id = |text: &str| text.parse::<u32>().ok().filter(|n| *n <= MAX_ID);
        let (uid, gid) = (id(fields.get(2)?)?, id(fields.get(3)?)?);
        let member = |line: &str| {
            let fields: Vec<&str> = line.split(':').collect();
            let is = fields.get(3)?.split(',').any(|one| one == name);
            id(fields[2]).filter(|other| is && *other != gid)
        };
        let groups = group.lines().filter_map(member).take(MAX_GROUPS).collect();
        let plain = |home: &&&str| home.starts_with('/') && !home.contains('\0');
        let home = fields.get(5).filter(plain).map(|home| (*home).to_owned());
        Some(Self { uid, gid, groups, home })
    }
}

/// The root directory that the instance's main process has.
fn root(directory: &Path, record: &Record) -> io::Result<OwnedFd> {
    let main = std::fs::read_to_string(directory.join(layout::STARTED))?;
    let process = Path::new("/proc").join(main.trim());
    let root = if record.kind.hides_processes() {
        // The process on the host is the sandbox's kernel; its parent, the shim, has the root file system mounted.
        let stat = std::fs::read_to_string(process.join("stat"))?;
        let shim = parent(&stat).ok_or(ErrorKind::InvalidData)?;
        let inside = record.rootfs.strip_prefix("/").unwrap_or(&record.rootfs);
        Path::new("/proc").join(shim).join("root").join(inside)
    } else {
        process.join("root")
    };
    let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // It may have ended, and the number be another's by now.
    let groups = std::fs::read_to_string(process.join("cgroup"))?;
    if groups.contains(&record.container_id) { Ok(root) } else { Err(ErrorKind::NotFound.into()) }
}

/// The parent's pid out of `/proc/<pid>/stat`, whose second field, in parentheses, may hold anything.
fn parent(stat: &str) -> Option<&str> {
    stat.get(stat.rfind(')')? + 1..)?.split_whitespace().nth(1)
}

/// A file's text; empty where there is none.
fn read(root: &OwnedFd, path: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(root, path, flags, Mode::empty(), inside) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        Err(e) => return Err(e.into()),
    };
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("/{path} is not a plain file")));
    }
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_need_no_file_and_names_do() {
        assert_eq!(User::parse(""), Some(User::default()));
        assert_eq!(User::parse("1000"), Some(User::number(1000, 1000)));
        assert_eq!(User::parse("1:2"), Some(User::number(1, 2)));
        for name in ["web", "65535", "1:web", ":", "-1"] {
            assert_eq!(User::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_name_brings_its_groups_and_its_home() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbad:x:y:0::/:\nweb:x:33:34:w,w:/srv:/bin/sh\nbig:x:70000:1::/:\n";
        let group = "root:x:0:\nweb:x:34:web\ndocker:x:99:a,web,b\nbad\naudio:x:29:webb\nx:x:77:web";
        let web = User { uid: 33, gid: 34, groups: vec![99, 77], home: Some("/srv".into()) };
        assert_eq!(User::named("web", passwd, group), Some(web));
        for unknown in ["we", "bad", "big", "nobody"] {
            assert_eq!(User::named(unknown, passwd, group), None, "{unknown}");
        }
    }

    #[test]
    fn links_lead_nowhere_outside_and_only_plain_files_are_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root: OwnedFd = File::open(dir.path()).expect("opens").into();
        std::fs::create_dir(dir.path().join("etc")).expect("makes");
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/passwd")).expect("links");
        assert_eq!(read(&root, "etc/passwd").expect("the root's own, which is not there"), "");
        std::fs::write(dir.path().join("etc/hostname"), "inside").expect("writes");
        assert_eq!(read(&root, "etc/passwd").expect("reads"), "inside");
        super::super::lifeline::create(&dir.path().join("etc/group")).expect("a FIFO");
        assert!(read(&root, "etc/group").is_err());
    }
}
