//! Where to connect: flags and environment over the context file over defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use warren_proto::client::TlsFiles;

use crate::Global;
use crate::failure::Failure;

const DEFAULT_ENDPOINT: &str = "127.0.0.1:7070";

/// The context file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    pub current: Option<String>,
    pub contexts: BTreeMap<String, Context>,
}

/// A region and how to reach it; what it leaves open has the defaults of the flags.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Context {
    pub endpoints: Vec<String>,
    pub tenant: Option<String>,
    pub tls_ca: Option<PathBuf>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
}

/// What every command needs to know.
#[derive(Debug)]
pub struct Settings {
    pub endpoints: Vec<String>,
    pub tenant: String,
    pub tls: TlsFiles,
}

/// Settles what flags leave open.
pub fn settle(global: &Global) -> Result<Settings, Failure> {
    let context = load(global)?;
    let endpoints = match (global.endpoints.is_empty(), context.endpoints.is_empty()) {
        (false, _) => global.endpoints.clone(),
        (true, false) => context.endpoints,
        (true, true) => vec![DEFAULT_ENDPOINT.to_owned()],
    };
    Ok(Settings {
        endpoints,
        tenant: global.tenant.clone().or(context.tenant).unwrap_or_else(|| "default".to_owned()),
        tls: TlsFiles {
            ca: global.tls_ca.clone().or(context.tls_ca),
            certificate: global.tls_cert.clone().or(context.tls_cert),
            key: global.tls_key.clone().or(context.tls_key),
        },
    })
}

/// The context that counts now.
fn load(global: &Global) -> Result<Context, Failure> {
    let Some((path, file)) = read(global)? else { return Ok(Context::default()) };
    let Some(name) = global.context.clone().or(file.current.clone()) else { return Ok(Context::default()) };
    file.find(&path, &name).cloned()
}

/// The file, and where it is; `None` where nobody has a home. One that nobody named may be missing.
pub fn read(global: &Global) -> Result<Option<(PathBuf, File)>, Failure> {
    let Some(path) = path(global) else { return Ok(None) };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && global.contexts.is_none() => String::new(),
        Err(source) => return Err(Failure::Io { what: format!("read {}", path.display()), source }),
    };
    let file = toml::from_str(&text).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
    Ok(Some((path, file)))
}

fn path(global: &Global) -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config/warren/contexts.toml"));
    global.contexts.clone().or_else(home)
}

impl File {
    pub fn find(&self, path: &Path, name: &str) -> Result<&Context, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let known: Vec<&String> = self.contexts.keys().collect();
            Failure::Usage(format!("{} has no context `{name}`; it has {known:?}", path.display()))
        })
    }

    /// Replaced as a whole: whoever reads it meanwhile, or after a crash, has the file before or this one.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let failed = |source| Failure::Io { what: format!("write {}", path.display()), source };
        let text = toml::to_string(self).map_err(|error| failed(std::io::Error::other(error)))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(failed)?;
        let new = path.with_extension("toml.new");
        std::fs::write(&new, text).map_err(failed)?;
        std::fs::rename(&new, path).map_err(failed)
    }
}
