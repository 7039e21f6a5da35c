//! The GPUs of this host: what there is, and how an assigned device comes into a sandbox.
//!
//! ```text
//!  NVML, or a list in a file ──▶ inventory ──▶ Hello ──▶ ledger ──▶ assignment: devices by uuid ──▶ cdi ──▶ OCI bundle
//! ```
//!
//! The ledger decides which device a sandbox gets; the agent injects exactly those, and refuses the start where one of them
//! is not there. A device that no specification describes is not reported: it could be assigned and never injected.
//!
//! A whole device, and a MIG instance, belong to one sandbox: the hardware enforces it. A share of a device is advisory:
//! sandboxes that have one see the whole device, and are told their share by [`SHARES_VARIABLE`].

pub mod cdi;
mod list;
mod nvml;

use std::collections::BTreeMap;
use std::path::PathBuf;

use warren_proto::units::Bytes;

use self::cdi::{CdiError, Edits, Registry};

/// Tells a sandbox what it may use: `{uuid}={thousandths}:{bytes of memory}:{enforced|advisory}`, separated by spaces.
pub const SHARES_VARIABLE: &str = "WARREN_GPU_SHARES";

/// A whole device, in thousandths.
pub const WHOLE: u32 = 1000;

/// Most devices of a host that are reported: a host has 8 to 16, and as MIG instances at most 7 times as many.
pub const MAX_DEVICES: usize = 128;

/// Whether a share of a device is more than a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sharing {
    /// It cannot be shared beyond what the hardware separates: a MIG instance.
    Enforced,
    /// Whoever has a share could use all of it.
    Advisory,
}

/// One device that can be assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub uuid: String,
    /// As NVML names it: `NVIDIA A100-SXM4-40GB`.
    pub model: String,
    pub memory: Bytes,
    pub sharing: Sharing,
    /// Qualified CDI names that may describe it, the best first.
    pub cdi: Vec<String>,
}

/// A device, or a share of one, that the ledger gave to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grant {
    pub uuid: String,
    /// Thousandths of it; [`WHOLE`] for all of it.
    pub milli: u32,
    pub memory: Bytes,
}

/// Where the inventory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// No GPU is offered.
    None,
    /// NVIDIA's driver, where it is installed.
    Nvml,
    /// A TOML file that lists devices: for accelerators that NVML does not know.
    File(PathBuf),
}

/// What an agent is told about GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuConfig {
    pub source: Source,
    /// Where CDI specifications lie; of two that describe the same device, that of the later directory wins.
    pub cdi_dirs: Vec<PathBuf>,
}

/// Why devices cannot be listed or injected.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    #[error("NVML: {0}")]
    Nvml(String),
    #[error("{path}: {what}")]
    List { path: PathBuf, what: String },
    #[error("GPU {0} is not on this node")]
    Unknown(String),
    #[error(
        "no CDI specification describes GPU {uuid}; one of {names:?} is needed (for NVIDIA: `nvidia-ctk cdi generate`)"
    )]
    Undescribed { uuid: String, names: Vec<String> },
    #[error(transparent)]
    Cdi(#[from] CdiError),
}

/// The devices that this node offers, and how to inject them.
#[derive(Debug, Clone, Default)]
pub struct Gpus {
    devices: BTreeMap<String, Device>,
    cdi_dirs: Vec<PathBuf>,
}

impl Gpus {
    /// Looks at the host. Blocks. Devices that cannot be injected are left out, and said aloud.
    pub fn discover(config: &GpuConfig) -> Result<Self, GpuError> {
        let found = match &config.source {
            Source::None => Vec::new(),
            Source::Nvml => nvml::devices()?,
            Source::File(path) => list::devices(path)?,
        };
        if found.is_empty() {
            return Ok(Self { cdi_dirs: config.cdi_dirs.clone(), ..Self::default() });
        }
        let registry = Registry::scan(&config.cdi_dirs);
        let mut devices = BTreeMap::new();
        for device in found.into_iter().take(MAX_DEVICES) {
            if registry.first_of(&device.cdi).is_some() {
                devices.insert(device.uuid.clone(), device);
            } else {
                let error = GpuError::Undescribed { uuid: device.uuid, names: device.cdi };
                tracing::warn!(model = device.model, "a GPU is not offered: {error}");
            }
        }
        Ok(Self { devices, cdi_dirs: config.cdi_dirs.clone() })
    }

    /// By uuid.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.values()
    }

    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// What the bundle of a sandbox with these grants must say. Specifications are read anew: a driver that was upgraded
    /// has other libraries. Blocks.
    pub fn edits(&self, grants: &[Grant]) -> Result<Edits, GpuError> {
        if grants.is_empty() {
            return Ok(Edits::default());
        }
        let registry = Registry::scan(&self.cdi_dirs);
        let mut names = Vec::new();
        let mut shares = Vec::new();
        for grant in grants {
            let device = self.devices.get(&grant.uuid).ok_or_else(|| GpuError::Unknown(grant.uuid.clone()))?;
            let name = registry
                .first_of(&device.cdi)
                .ok_or_else(|| GpuError::Undescribed { uuid: device.uuid.clone(), names: device.cdi.clone() })?;
            names.push(name.to_owned());
            let kind = match device.sharing {
                Sharing::Advisory if grant.milli < WHOLE => "advisory",
                Sharing::Advisory | Sharing::Enforced => "enforced",
            };
            shares.push(format!("{}={}:{}:{kind}", grant.uuid, grant.milli, grant.memory.0));
        }
        let mut edits = registry.edits(&names)?;
        edits.environment.push(format!("{SHARES_VARIABLE}={}", shares.join(" ")));
        Ok(edits)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn host(specs: &str, list: &str) -> (tempfile::TempDir, GpuConfig) {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("cdi")).expect("directory");
        fs::write(dir.path().join("cdi/fake.yaml"), specs).expect("write");
        fs::write(dir.path().join("gpus.toml"), list).expect("write");
        let config =
            GpuConfig { source: Source::File(dir.path().join("gpus.toml")), cdi_dirs: vec![dir.path().join("cdi")] };
        (dir, config)
    }

    const SPECS: &str = r#"
cdiVersion: "0.6.0"
kind: warren.dev/fake
containerEdits:
  env: ["FAKE_DRIVER=1"]
devices:
  - name: "0"
    containerEdits: { env: ["FAKE_DEVICE=0"], deviceNodes: [{ path: /dev/fake0, hostPath: /dev/null }] }
  - name: "1"
    containerEdits: { env: ["FAKE_DEVICE=1"] }
"#;

    const LIST: &str = r#"
[[device]]
uuid = "GPU-0"
model = "Fake 1"
memory = "16GiB"
cdi = "warren.dev/fake=0"
[[device]]
uuid = "GPU-1"
model = "Fake 1"
memory = "16GiB"
cdi = "warren.dev/fake=1"
sharing = "enforced"
[[device]]
uuid = "GPU-2"
model = "Fake 1"
memory = "16GiB"
cdi = "warren.dev/fake=2"
"#;

    fn grant(uuid: &str, milli: u32) -> Grant {
        Grant { uuid: uuid.to_owned(), milli, memory: Bytes(Bytes::GIB) }
    }

    #[test]
    fn only_what_can_be_injected_is_offered() {
        let (_dir, config) = host(SPECS, LIST);
        let gpus = Gpus::discover(&config).expect("listed");
        let uuids: Vec<&str> = gpus.devices().map(|device| device.uuid.as_str()).collect();
        assert_eq!(uuids, ["GPU-0", "GPU-1"]);
    }

    #[test]
    fn a_sandbox_gets_exactly_what_was_assigned_and_is_told_its_shares() {
        let (_dir, config) = host(SPECS, LIST);
        let gpus = Gpus::discover(&config).expect("listed");
        let edits = gpus.edits(&[grant("GPU-1", WHOLE)]).expect("injected");
        let shares = |what: &str| format!("{SHARES_VARIABLE}={what}");
        assert_eq!(
            edits.environment,
            ["FAKE_DRIVER=1", "FAKE_DEVICE=1", &shares("GPU-1=1000:1073741824:enforced")].map(str::to_owned)
        );
        let shared = gpus.edits(&[grant("GPU-0", 250)]).expect("injected");
        assert_eq!(shared.environment.last(), Some(&shares("GPU-0=250:1073741824:advisory")));
        assert_eq!(gpus.edits(&[]).expect("nothing"), Edits::default());
    }

    #[test]
    fn a_device_that_went_is_a_clear_refusal() {
        let (dir, config) = host(SPECS, LIST);
        let gpus = Gpus::discover(&config).expect("listed");
        assert!(matches!(gpus.edits(&[grant("GPU-9", WHOLE)]), Err(GpuError::Unknown(uuid)) if uuid == "GPU-9"));
        fs::remove_file(dir.path().join("cdi/fake.yaml")).expect("remove");
        let error = gpus.edits(&[grant("GPU-0", WHOLE)]).expect_err("undescribed").to_string();
        assert!(error.contains("warren.dev/fake=0") && error.contains("nvidia-ctk"), "{error}");
    }
}
