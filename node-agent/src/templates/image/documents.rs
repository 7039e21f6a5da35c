//! OCI's JSON documents, as far as they are needed (github.com/opencontainers/image-spec, v1.1), and Docker's of the same shape.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Defaults, ImageError};

/// Names the tag of an image in a layout's index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What templates are for.
const PLATFORM: (&str, &str) = ("linux", "amd64");

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

impl Descriptor {
    pub fn tag(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }

    fn platform(&self) -> Option<(&str, &str)> {
        self.platform.as_ref().map(|platform| (platform.os.as_str(), platform.architecture.as_str()))
    }
}

#[derive(Debug, Deserialize)]
pub struct Index {
    pub manifests: Vec<Descriptor>,
}

impl Index {
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        parse("image index", bytes)
    }

    /// The image for linux/amd64; the only one, where it names no platform.
    pub fn for_this_platform(&self) -> Result<&Descriptor, ImageError> {
        let only = || match self.manifests.as_slice() {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        };
        let here = self.manifests.iter().find(|manifest| manifest.platform() == Some(PLATFORM));
        here.or_else(only).ok_or_else(|| {
            let offered = self.manifests.iter().filter_map(Descriptor::platform);
            let offered: Vec<_> = offered.map(|(os, architecture)| format!("{os}/{architecture}")).collect();
            ImageError::invalid(format!("the image is not for linux/amd64 but for {}", offered.join(", ")))
        })
    }
}

#[derive(Debug, Deserialize)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

impl Manifest {
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        parse("image manifest", bytes)
    }
}

/// Whether a document is an index rather than a manifest; its media type may stand nowhere, so its shape says.
pub fn is_index(bytes: &[u8]) -> Result<bool, ImageError> {
    #[derive(Deserialize)]
    struct Shape {
        #[serde(default)]
        manifests: Option<serde::de::IgnoredAny>,
    }
    Ok(parse::<Shape>("image manifest", bytes)?.manifests.is_some())
}

#[derive(Debug, Deserialize)]
pub struct ConfigDocument {
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<RunConfig>,
    #[serde(default)]
    rootfs: Option<RootFs>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl ConfigDocument {
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let config: Self = parse("image configuration", bytes)?;
        if config.os.is_empty() || config.os == PLATFORM.0 {
            Ok(config)
        } else {
            Err(ImageError::invalid(format!("the image is not for linux but for {}", config.os)))
        }
    }

    pub fn diff_ids(&self) -> Vec<String> {
        self.rootfs.as_ref().map(|rootfs| rootfs.diff_ids.clone()).unwrap_or_default()
    }

    /// Entrypoint and Cmd are one command, as container runtimes put them together.
    pub fn defaults(self, image_digest: String) -> Defaults {
        let run = self.config.unwrap_or_default();
        let environment = run.env.unwrap_or_default().into_iter();
        let pair = |text: String| match text.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (text, String::new()),
        };
        Defaults {
            command: [run.entrypoint.unwrap_or_default(), run.cmd.unwrap_or_default()].concat(),
            environment: environment.map(pair).filter(|(key, _)| !key.is_empty()).collect(),
            working_directory: run.working_dir.unwrap_or_default(),
            user: run.user.unwrap_or_default(),
            image_digest,
        }
    }
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::invalid(format!("{what}: {error}")))
}
