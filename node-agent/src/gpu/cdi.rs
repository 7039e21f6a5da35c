//! Container Device Interface: what a vendor says must be changed in a container for a device to be there (specification 0.8,
//! github.com/cncf-tags/container-device-interface).
//!
//! Read and applied here rather than by the crate `container-device-interface`: that one brings a JSON schema validator with an
//! HTTP client and a C build of a TLS library for what is a few lists of edits.
//!
//! A device node becomes a bind mount of the host's node and a rule of the devices control group: in a user namespace nobody
//! may make nodes, and runtimes bind a node's path inside as if it were one of the host.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

/// Largest specification that is read: NVIDIA's for eight devices takes about 30 KiB.
const MAX_SPEC: u64 = 4 << 20;

/// The hooks of the OCI runtime specification.
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Why a device cannot be injected.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    #[error("no CDI specification describes `{0}`")]
    Unknown(String),
    #[error("{path}: {what}")]
    Spec { path: PathBuf, what: String },
    #[error("device node {path}: {source}")]
    Node { path: PathBuf, source: io::Error },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    kind: String,
    #[serde(default)]
    container_edits: WireEdits,
    #[serde(default)]
    devices: Vec<WireDevice>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDevice {
    name: String,
    #[serde(default)]
    container_edits: WireEdits,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireEdits {
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    device_nodes: Vec<Node>,
    #[serde(default)]
    mounts: Vec<Mount>,
    #[serde(default)]
    hooks: Vec<Hook>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: PathBuf,
    host_path: Option<PathBuf>,
    permissions: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: String,
    path: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<i64>,
}

/// What there is to inject, by qualified name: `vendor.com/class=name`.
#[derive(Debug, Default)]
pub struct Registry {
    devices: BTreeMap<String, Described>,
}

#[derive(Debug)]
struct Described {
    spec: PathBuf,
    /// What every device of the specification needs; applied once a specification.
    common: WireEdits,
    own: WireEdits,
}

impl Registry {
    /// Reads the specifications in these directories; a device of a later directory hides one of an earlier. One that cannot
    /// be read is said aloud and left out, as is a directory that is not there.
    pub fn scan(directories: &[PathBuf]) -> Self {
        let mut registry = Self::default();
        for directory in directories {
            for path in specs_in(directory) {
                match read(&path) {
                    Ok(spec) => registry.add(&path, spec),
                    Err(error) => tracing::warn!("a CDI specification is not used: {error}"),
                }
            }
        }
        registry
    }

    fn add(&mut self, path: &Path, spec: Spec) {
        for device in spec.devices {
            let name = format!("{}={}", spec.kind, device.name);
            let described =
                Described { spec: path.to_owned(), common: spec.container_edits.clone(), own: device.container_edits };
            if let Some(hidden) = self.devices.insert(name.clone(), described)
                && hidden.spec.parent() == path.parent()
            {
                tracing::warn!(device = name, used = %path.display(), hidden = %hidden.spec.display(), "two CDI specifications describe it");
            }
        }
    }

    /// The first of these names that is described.
    pub fn first_of<'a>(&self, names: &'a [String]) -> Option<&'a str> {
        names.iter().find(|name| self.devices.contains_key(*name)).map(String::as_str)
    }

    /// What must be changed for these devices.
    pub fn edits(&self, names: &[String]) -> Result<Edits, CdiError> {
        let mut edits = Edits::default();
        let mut used: Vec<&Path> = Vec::new();
        for name in names {
            let device = self.devices.get(name).ok_or_else(|| CdiError::Unknown(name.clone()))?;
            if !used.contains(&device.spec.as_path()) {
                used.push(&device.spec);
                edits.add(&device.common)?;
            }
            edits.add(&device.own)?;
        }
        Ok(edits)
    }
}

/// In order of their names, so that the same files give the same result.
fn specs_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_spec = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "json" || kind == "yaml");
    let mut paths: Vec<PathBuf> = entries.filter(is_spec).collect();
    paths.sort();
    paths
}

fn read(path: &Path) -> Result<Spec, CdiError> {
    let failed = |what: String| CdiError::Spec { path: path.to_owned(), what };
    let size = fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
    if size > MAX_SPEC {
        return Err(failed(format!("{size} bytes are more than {MAX_SPEC}")));
    }
    let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    // YAML holds JSON.
    let spec: Spec = serde_yaml_ng::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let edits = spec.devices.iter().map(|device| &device.container_edits).chain([&spec.container_edits]);
    for hook in edits.flat_map(|edits| &edits.hooks) {
        if !HOOKS.contains(&hook.hook_name.as_str()) {
            return Err(failed(format!("hookName `{}` is none of {HOOKS:?}", hook.hook_name)));
        }
    }
    Ok(spec)
}

/// What must be changed in a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Edits {
    /// `KEY=value`, also for processes that are executed later.
    pub environment: Vec<String>,
    nodes: Vec<HostNode>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
}

/// A device node of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HostNode {
    path: PathBuf,
    source: PathBuf,
    kind: &'static str,
    major: u32,
    minor: u32,
    access: String,
}

impl Edits {
    fn add(&mut self, edits: &WireEdits) -> Result<(), CdiError> {
        self.environment.extend(edits.env.iter().cloned());
        for node in &edits.device_nodes {
            self.nodes.push(HostNode::find(node)?);
        }
        self.mounts.extend(edits.mounts.iter().cloned());
        self.hooks.extend(edits.hooks.iter().cloned());
        Ok(())
    }

    /// Changes an OCI `config.json`. The environment is not touched: it is the instance's, not its first process's.
    pub fn apply(&self, bundle: &mut Value) {
        for node in &self.nodes {
            let options = ["bind", "nosuid", "noexec"];
            append(
                &mut bundle["mounts"],
                json!({ "destination": node.path, "source": node.source, "type": "bind", "options": options }),
            );
            append(
                &mut bundle["linux"]["resources"]["devices"],
                json!({ "allow": true, "type": node.kind, "major": node.major, "minor": node.minor, "access": node.access }),
            );
        }
        for Mount { host_path, container_path, options, kind } in &self.mounts {
            let kind = kind.as_deref().unwrap_or("bind");
            append(
                &mut bundle["mounts"],
                json!({ "destination": container_path, "source": host_path, "type": kind, "options": options }),
            );
        }
        for Hook { hook_name, path, args, env, timeout } in &self.hooks {
            let mut hook = json!({ "path": path, "args": args, "env": env });
            if let Some(seconds) = timeout {
                hook["timeout"] = json!(seconds);
            }
            append(&mut bundle["hooks"][hook_name], hook);
        }
    }
}

/// Makes the list where there is none.
fn append(list: &mut Value, entry: Value) {
    match list {
        Value::Array(entries) => entries.push(entry),
        other => *other = Value::Array(vec![entry]),
    }
}

impl HostNode {
    fn find(node: &Node) -> Result<Self, CdiError> {
        let source = node.host_path.clone().unwrap_or_else(|| node.path.clone());
        let failed = |error: io::Error| CdiError::Node { path: source.clone(), source: error };
        let meta = fs::metadata(&source).map_err(failed)?;
        let kind = match meta.file_type() {
            kind if kind.is_char_device() => "c",
            kind if kind.is_block_device() => "b",
            _ => return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "is not a device"))),
        };
        Ok(Self {
            path: node.path.clone(),
            kind,
            major: libc::major(meta.rdev()),
            minor: libc::minor(meta.rdev()),
            access: node.permissions.clone().filter(|access| !access.is_empty()).unwrap_or_else(|| "rw".to_owned()),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(files: &[(&str, &str)]) -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().expect("temporary directory");
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, text).expect("write");
        }
        let registry = Registry::scan(&[dir.path().join("etc"), dir.path().join("run"), dir.path().join("absent")]);
        (dir, registry)
    }

    fn name(name: &str) -> String {
        name.to_owned()
    }

    /// As NVIDIA's tool writes them, in small.
    const SPEC: &str = r#"{"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "deviceNodes": [{"path": "/dev/nvidiactl", "hostPath": "/dev/null"}],
            "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk", "args": ["nvidia-ctk", "hook"]}],
            "mounts": [{"hostPath": "/lib/libcuda.so", "containerPath": "/lib/libcuda.so", "options": ["ro", "bind"]}]},
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/zero", "permissions": "r"}]}},
            {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1", "hostPath": "/dev/full"}]}}]}"#;

    #[test]
    fn exactly_the_named_devices_come_in_and_what_all_need_once() {
        let (_dir, registry) = registry(&[("etc/nvidia.json", SPEC)]);
        let edits = registry.edits(&[name("nvidia.com/gpu=0"), name("nvidia.com/gpu=1")]).expect("edits");
        let mut bundle = json!({ "mounts": [], "linux": { "resources": { "devices": [{ "allow": false }] } } });
        edits.apply(&mut bundle);
        let destinations: Vec<_> =
            bundle["mounts"].as_array().expect("mounts").iter().map(|mount| mount["destination"].clone()).collect();
        assert_eq!(destinations, ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1", "/lib/libcuda.so"]);
        let allowed = bundle["linux"]["resources"]["devices"].as_array().expect("rules");
        assert_eq!(allowed.len(), 4);
        assert_eq!(allowed[2], json!({ "allow": true, "type": "c", "major": 1, "minor": 5, "access": "r" }));
        assert_eq!(bundle["hooks"]["createContainer"].as_array().expect("hooks").len(), 1);
        assert_eq!(edits.environment, ["NVIDIA_VISIBLE_DEVICES=void"]);
        let one = registry.edits(&[name("nvidia.com/gpu=1")]).expect("edits");
        assert!(one.nodes.iter().all(|node| node.path != Path::new("/dev/nvidia0")));
    }

    #[test]
    fn a_later_directory_hides_an_earlier_one() {
        let other = SPEC.replace("/dev/zero", "/dev/full");
        let (_dir, registry) = registry(&[("etc/a.json", SPEC), ("run/a.json", &other)]);
        let edits = registry.edits(&[name("nvidia.com/gpu=0")]).expect("edits");
        assert_eq!(edits.nodes[1].source, Path::new("/dev/full"));
    }

    #[test]
    fn rubbish_hides_nothing_and_is_no_device() {
        let hook = SPEC.replace("createContainer", "sometimes");
        let (_dir, registry) = registry(&[
            ("etc/a.json", SPEC),
            ("run/b.json", "{"),
            ("run/c.yaml", "kind: 7"),
            ("run/d.json", &hook),
            ("run/notes.txt", "no spec"),
        ]);
        assert!(registry.first_of(&[name("nvidia.com/gpu=9"), name("nvidia.com/gpu=0")]).is_some());
        assert!(matches!(registry.edits(&[name("nvidia.com/gpu=9")]), Err(CdiError::Unknown(_))));
    }

    #[test]
    fn what_is_no_device_is_not_let_in() {
        let file = SPEC.replace("/dev/full", "/etc/passwd");
        let (_dir, registry) = registry(&[("etc/a.json", &file)]);
        let error = registry.edits(&[name("nvidia.com/gpu=1")]).expect_err("a file").to_string();
        assert!(error.contains("/etc/passwd") && error.contains("not a device"), "{error}");
    }
}
