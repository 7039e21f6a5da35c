//! Control groups of instances: found, asked, emptied and removed by hand, so that it works without the runtime's state.
//!
//! The runtime makes the groups and sets their limits. With version 1 an instance has one group in each hierarchy, with
//! version 2 one in all; both can be mounted at once. A group's path is the same in each.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use crate::fence::{Kind, Switch};

/// Deepest nesting below an instance's group that is looked into; instances cannot make groups themselves.
const MAX_DEPTH: u32 = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    unified: bool,
    /// Version 1 only.
    controllers: Vec<String>,
}

/// The hierarchies that this host has mounted.
#[derive(Debug, Clone)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    pub fn discover() -> io::Result<Self> {
        Ok(Self { hierarchies: parse_mounts(&fs::read_to_string("/proc/self/mountinfo")?) })
    }

    /// Whether controllers are in version 2.
    pub fn is_unified(&self) -> bool {
        self.with_controller("memory").is_none()
    }

    /// Whether version 1 has this controller mounted.
    pub fn has_controller(&self, name: &str) -> bool {
        self.with_controller(name).is_some()
    }

    /// File whose line `oom_kill N` counts what was killed for want of memory in a group.
    pub fn oom_file(&self, group: &str) -> PathBuf {
        match self.with_controller("memory") {
            Some(hierarchy) => below(&hierarchy.mount, group).join("memory.oom_control"),
            None => self.unified_group(group).join("memory.events"),
        }
    }

    /// A file of a controller: by its name in version 1 where that has the controller, else by that in version 2.
    pub fn file(&self, controller: &str, group: &str, v1: &str, v2: &str) -> PathBuf {
        match self.with_controller(controller) {
            Some(hierarchy) => below(&hierarchy.mount, group).join(v1),
            None => self.unified_group(group).join(v2),
        }
    }

    /// Whether the group is there, in any hierarchy.
    pub fn exists(&self, group: &str) -> bool {
        self.directories(group).any(|dir| dir.exists())
    }

    /// Makes a group that freezes everything below it, and answers its switch.
    pub fn make_switch(&self, group: &str) -> io::Result<Switch> {
        let (dir, kind, file) = match self.with_controller("freezer") {
            Some(hierarchy) => (below(&hierarchy.mount, group), Kind::Freezer, "freezer.state"),
            None => (self.unified_group(group), Kind::Unified, "cgroup.freeze"),
        };
        fs::create_dir_all(&dir)?;
        Ok(Switch { kind, path: dir.join(file) })
    }

    /// Has everything in the group stop, or go on. It takes effect a moment later.
    pub fn set_frozen(&self, group: &str, frozen: bool) -> io::Result<()> {
        match self.with_controller("freezer") {
            Some(hierarchy) => fs::write(
                below(&hierarchy.mount, group).join("freezer.state"),
                if frozen { "FROZEN" } else { "THAWED" },
            ),
            None => fs::write(self.unified_group(group).join("cgroup.freeze"), if frozen { "1" } else { "0" }),
        }
    }

    /// Whether the group was told to freeze (not whether a parent was).
    pub fn is_told_to_freeze(&self, group: &str) -> bool {
        let file = match self.with_controller("freezer") {
            Some(hierarchy) => below(&hierarchy.mount, group).join("freezer.self_freezing"),
            None => self.unified_group(group).join("cgroup.freeze"),
        };
        fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
    }

    /// Whether nothing in the group runs any more, after it was told to freeze.
    pub fn is_frozen(&self, group: &str) -> bool {
        match self.with_controller("freezer") {
            Some(hierarchy) => fs::read_to_string(below(&hierarchy.mount, group).join("freezer.state"))
                .is_ok_and(|text| text.trim() == "FROZEN"),
            None => fs::read_to_string(self.unified_group(group).join("cgroup.events"))
                .is_ok_and(|text| text.lines().any(|line| line == "frozen 1")),
        }
    }

    /// Sends SIGKILL to every process in the group, and lets it run so that it can die. Answers how many there were.
    pub fn kill(&self, group: &str) -> usize {
        let pids = self.processes(group);
        for pid in pids.iter().filter_map(|raw| Pid::from_raw(*raw)) {
            // It may have ended meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
        // Frozen processes die only once they are thawed. A group without a freezer needs none.
        let _ = self.set_frozen(group, false);
        self.leave_frozen_parent(group, &pids);
        pids.len()
    }

    /// With version 1 what a parent froze cannot die: the killed processes are moved to the root group, where they run just
    /// far enough to see that they were killed. (With version 2 frozen processes can be killed.)
    fn leave_frozen_parent(&self, group: &str, pids: &BTreeSet<i32>) {
        let Some(hierarchy) = self.with_controller("freezer") else { return };
        let parent = below(&hierarchy.mount, group).join("freezer.parent_freezing");
        if !fs::read_to_string(parent).is_ok_and(|text| text.trim() == "1") {
            return;
        }
        for pid in pids {
            let _ = fs::write(hierarchy.mount.join("cgroup.procs"), pid.to_string());
        }
    }

    /// Moves a process to the root of every hierarchy.
    pub fn move_to_root(&self, pid: u32) -> io::Result<()> {
        self.hierarchies.iter().try_for_each(|h| fs::write(h.mount.join("cgroup.procs"), pid.to_string()))
    }

    /// Removes the group everywhere. Fails with `EBUSY` while something is in it; not being there is success.
    pub fn remove(&self, group: &str) -> io::Result<()> {
        self.directories(group).try_for_each(|dir| remove_tree(&dir, MAX_DEPTH))
    }

    /// Names of the groups right below `parent`, in any hierarchy.
    pub fn children(&self, parent: &str) -> BTreeSet<String> {
        self.directories(parent).flat_map(|dir| subdirectories(&dir)).filter_map(name_of).collect()
    }

    /// Removes a group that is only a parent, where it is empty.
    pub fn remove_if_empty(&self, group: &str) {
        for dir in self.directories(group) {
            // Busy: somebody else uses it.
            let _ = fs::remove_dir(dir);
        }
    }

    fn processes(&self, group: &str) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for dir in self.directories(group) {
            collect_processes(&dir, MAX_DEPTH, &mut pids);
        }
        pids
    }

    fn directories(&self, group: &str) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().map(move |hierarchy| below(&hierarchy.mount, group))
    }

    fn with_controller(&self, name: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.controllers.iter().any(|c| c == name))
    }

    fn unified_group(&self, group: &str) -> PathBuf {
        let mount = self.hierarchies.iter().find(|h| h.unified).map(|h| h.mount.as_path());
        below(mount.unwrap_or(Path::new("/sys/fs/cgroup")), group)
    }
}

#[cfg(test)]
impl Cgroups {
    /// As if version 2 were mounted there.
    pub fn unified(mount: &Path) -> Self {
        Self { hierarchies: vec![Hierarchy { mount: mount.into(), unified: true, controllers: Vec::new() }] }
    }

    /// As if version 1 were mounted there, a directory for each controller.
    pub fn separate(parent: &Path, controllers: &[&str]) -> Self {
        let hierarchy =
            |name: &&str| Hierarchy { mount: parent.join(name), unified: false, controllers: vec![(*name).to_owned()] };
        Self { hierarchies: controllers.iter().map(hierarchy).collect() }
    }
}

/// Reads the line `oom_kill N` of an [`Cgroups::oom_file`]; 0 where there is none.
pub fn oom_kills(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

fn below(mount: &Path, group: &str) -> PathBuf {
    mount.join(group.trim_start_matches('/'))
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn name_of(path: PathBuf) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

fn collect_processes(dir: &Path, depth: u32, into: &mut BTreeSet<i32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    into.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth > 0 {
        for child in subdirectories(dir) {
            collect_processes(&child, depth - 1, into);
        }
    }
}

fn remove_tree(dir: &Path, depth: u32) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) if depth == 0 => return Err(e),
        Err(_) => {}
    }
    for child in subdirectories(dir) {
        remove_tree(&child, depth - 1)?;
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Reads `/proc/self/mountinfo` (proc_pid_mountinfo(5)): mount point is the fifth field; after ` - ` come type, source and
/// the file system's options, which name version 1 controllers.
fn parse_mounts(text: &str) -> Vec<Hierarchy> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mount = PathBuf::from(left.split(' ').nth(4)?);
        let mut right = right.split(' ');
        let unified = match right.next()? {
            "cgroup2" => true,
            "cgroup" => false,
            _ => return None,
        };
        let options = right.nth(1)?;
        let controllers = if unified { Vec::new() } else { options.split(',').map(str::to_owned).collect() };
        Some(Hierarchy { mount, unified, controllers })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 8:1 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const UNIFIED: &str = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn both_versions_are_understood() {
        let hybrid = Cgroups { hierarchies: parse_mounts(HYBRID) };
        assert_eq!(hybrid.hierarchies.len(), 3);
        assert!(!hybrid.is_unified() && hybrid.has_controller("freezer") && !hybrid.has_controller("hugetlb"));
        assert_eq!(hybrid.oom_file("/w/n/i"), Path::new("/sys/fs/cgroup/memory/w/n/i/memory.oom_control"));
        let unified = Cgroups { hierarchies: parse_mounts(UNIFIED) };
        assert!(unified.is_unified());
        assert_eq!(unified.oom_file("/w/n/i"), Path::new("/sys/fs/cgroup/w/n/i/memory.events"));
    }

    #[test]
    fn oom_kills_are_read_from_either_version_s_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        assert_eq!(oom_kills(&file), 0);
        fs::write(&file, "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n").expect("write");
        assert_eq!(oom_kills(&file), 3);
        fs::write(&file, "low 0\noom 5\noom_kill 2\noom_group_kill 0\n").expect("write");
        assert_eq!(oom_kills(&file), 2);
    }

    #[test]
    fn a_frozen_group_and_its_processes_are_read_from_files() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cgroups =
            Cgroups { hierarchies: vec![Hierarchy { mount: dir.path().into(), unified: true, controllers: vec![] }] };
        assert!(!cgroups.is_told_to_freeze("/a"));
        let group = dir.path().join("a");
        fs::create_dir_all(group.join("nested")).expect("directories");
        fs::write(group.join("cgroup.freeze"), "1\n").expect("write");
        fs::write(group.join("cgroup.events"), "populated 1\nfrozen 1\n").expect("write");
        fs::write(group.join("cgroup.procs"), "0\n").expect("write");
        fs::write(group.join("nested/cgroup.procs"), "2147483600\n").expect("write");
        assert!(cgroups.is_told_to_freeze("/a") && cgroups.is_frozen("/a"));
        assert_eq!(cgroups.processes("/a"), BTreeSet::from([2_147_483_600]));
        assert_eq!(cgroups.children("/"), BTreeSet::from(["a".to_owned()]));
    }
}
