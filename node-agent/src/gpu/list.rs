//! Devices out of a file, for accelerators that NVML does not know.
//!
//! ```toml
//! [[device]]
//! uuid = "GPU-0"
//! model = "Example 1"
//! memory = "16GiB"
//! cdi = "example.com/gpu=0"
//! sharing = "advisory"      # or enforced; advisory when missing
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::{Device, GpuError, Sharing};
use crate::config::size;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    device: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    uuid: String,
    model: String,
    memory: String,
    cdi: String,
    #[serde(default)]
    sharing: Kind,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Enforced,
    #[default]
    Advisory,
}

/// Reads a list; names each device's problem.
pub fn devices(path: &Path) -> Result<Vec<Device>, GpuError> {
    let failed = |what: String| GpuError::List { path: path.to_owned(), what };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let list: List = toml::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let mut seen = BTreeSet::new();
    let mut devices = Vec::new();
    for entry in list.device {
        if entry.uuid.is_empty() || !seen.insert(entry.uuid.clone()) {
            return Err(failed(format!("uuid `{}` is empty or named twice", entry.uuid)));
        }
        let memory = size(&entry.memory).map_err(|error| failed(format!("{}: memory: {error}", entry.uuid)))?;
        let sharing = match entry.sharing {
            Kind::Enforced => Sharing::Enforced,
            Kind::Advisory => Sharing::Advisory,
        };
        devices.push(Device { uuid: entry.uuid, model: entry.model, memory, sharing, cdi: vec![entry.cdi] });
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use warren_proto::units::Bytes;

    use super::*;

    fn parse(text: &str) -> Result<Vec<Device>, String> {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), text).expect("write");
        devices(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn rubbish_is_refused_with_its_place() {
        let device = "[[device]]\nuuid = \"A\"\nmodel = \"m\"\ncdi = \"a.b/c=0\"\n";
        assert_eq!(parse("").expect("empty"), []);
        assert_eq!(parse(&format!("{device}memory = \"1GiB\"")).expect("one")[0].memory, Bytes(1 << 30));
        assert!(parse(&format!("{device}memory = \"much\"")).expect_err("size").contains("A: memory"));
        let twice = format!("{device}memory = \"1GiB\"\n{device}memory = \"1GiB\"");
        assert!(parse(&twice).expect_err("twice").contains("named twice"));
        assert!(parse("[[device]]\nuuid = 1").is_err());
        assert!(devices(Path::new("/nowhere")).is_err());
    }
}
