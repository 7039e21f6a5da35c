//! What sandboxes must not leave on the host: processes, mounts, control groups, runtime state.
//!
//! A network namespace goes with its last process and an overlay with its mount namespace, so those two need no look of their
//! own. The looks are read-only, and about one cluster's directory and nodes: other clusters may run at the same time.

use std::fs;
use std::path::{Path, PathBuf};

/// Whose traces are looked for.
#[derive(Debug, Clone)]
pub struct Traces {
    /// All data directories lie below it.
    pub directory: PathBuf,
    /// Names of the nodes, each with its data directory.
    pub nodes: Vec<(String, PathBuf)>,
}

impl Traces {
    /// What is left of sandboxes while their agents run. Empty: nothing.
    pub fn of_sandboxes(&self) -> Vec<String> {
        let mut found = self.mounts();
        for (node, data_dir) in &self.nodes {
            for group in groups_of(node) {
                // The group of those that freeze with the lease stays as long as its agent; sandboxes' own lie in it.
                let fenced = group.join("fenced");
                let groups = entries(&group).chain(entries(&fenced)).filter(|path| path.is_dir() && *path != fenced);
                found.extend(groups.map(|path| named("control group", &path)));
            }
            for state in ["oci/instances", "oci/run"] {
                found.extend(entries(&data_dir.join(state)).map(|path| named("runtime state", &path)));
            }
        }
        found.extend(processes().filter(|process| self.is_sandbox(process)).map(|process| process.describe()));
        found
    }

    /// What is left once the agents were stopped and cleaned. Empty: nothing.
    pub fn of_agents(&self) -> Vec<String> {
        let mut found = self.of_sandboxes();
        for (node, data_dir) in &self.nodes {
            found.extend(groups_of(node).map(|path| named("control group", &path)));
            let driver = data_dir.join("oci");
            found.extend(driver.exists().then(|| named("files", &driver)));
        }
        let directory = self.directory.to_string_lossy();
        found.extend(
            processes().filter(|process| process.command.contains(&*directory)).map(|process| process.describe()),
        );
        found
    }

    /// The processes of all sandboxes, and their shims.
    pub(crate) fn sandbox_processes(&self) -> Vec<SandboxProcess> {
        let of = |process: Process| SandboxProcess {
            path: Path::new("/proc").join(&process.pid),
            is_inside: self.nodes.iter().any(|(node, _)| process.groups.contains(&format!("/warren/{node}/"))),
        };
        processes().filter(|process| self.is_sandbox(process)).map(of).collect()
    }

    fn mounts(&self) -> Vec<String> {
        let directory = self.directory.to_string_lossy();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        table.lines().filter(|line| line.contains(&*directory)).map(|line| format!("mount {line}")).collect()
    }

    /// In a control group of a node, or standing in an instance's directory as its shim does.
    fn is_sandbox(&self, process: &Process) -> bool {
        let in_group = |node: &str| process.groups.contains(&format!("/warren/{node}/"));
        self.nodes
            .iter()
            .any(|(node, data_dir)| in_group(node) || process.directory.starts_with(data_dir.join("oci/instances")))
    }
}

/// A process of a sandbox, or beside one.
pub(crate) struct SandboxProcess {
    /// Below `/proc`.
    pub path: PathBuf,
    /// In the sandbox's control group; otherwise a shim.
    pub is_inside: bool,
}

struct Process {
    pid: String,
    command: String,
    groups: String,
    directory: PathBuf,
}

impl Process {
    fn describe(&self) -> String {
        format!("process {}: {}", self.pid, self.command)
    }
}

/// Those that can be looked at; one that ends meanwhile is none.
fn processes() -> impl Iterator<Item = Process> {
    entries(Path::new("/proc")).filter_map(|path| {
        let pid = path.file_name()?.to_str()?.to_owned();
        pid.parse::<u32>().ok()?;
        // One that is ending has given up its memory, and its command line with it.
        let command = fs::read(path.join("cmdline")).ok().filter(|command| !command.is_empty())?;
        Some(Process {
            pid,
            command: String::from_utf8_lossy(&command).replace('\0', " "),
            groups: fs::read_to_string(path.join("cgroup")).ok()?,
            directory: fs::read_link(path.join("cwd")).unwrap_or_default(),
        })
    })
}

/// The node's group in every hierarchy that has one: one mount for all controllers, or one mount each.
pub(crate) fn groups_of(node: &str) -> impl Iterator<Item = PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let own = Path::new("warren").join(node);
    let roots = std::iter::once(root.to_owned()).chain(entries(root));
    roots.map(move |root| root.join(&own)).filter(|path| path.is_dir())
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn named(kind: &str, path: &Path) -> String {
    format!("{kind} {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_and_a_process_are_found_and_a_stranger_is_not() {
        let directory = tempfile::tempdir().expect("directory");
        let data_dir = directory.path().join("node");
        let traces = Traces {
            directory: directory.path().to_owned(),
            nodes: vec![("no-such-node".to_owned(), data_dir.clone())],
        };
        assert_eq!(traces.of_agents(), Vec::<String>::new());
        let instance = data_dir.join("oci/instances/acme.a.1");
        fs::create_dir_all(&instance).expect("instance");
        let mut shim = std::process::Command::new("sleep").arg("60").current_dir(&instance).spawn().expect("process");
        let found = traces.of_sandboxes();
        let process = format!("process {}:", shim.id());
        shim.kill().expect("kill");
        shim.wait().expect("wait");
        assert!(found.iter().any(|line| line.starts_with("runtime state")), "{found:?}");
        assert!(found.iter().any(|line| line.starts_with(&process)), "{found:?}");
    }
}
