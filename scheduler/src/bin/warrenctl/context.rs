//! Where to connect: flags and environment over the context file over defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use warren_proto::client::TlsFiles;

use crate::Global;
use crate::failure::Failure;

const DEFAULT_ENDPOINT: &str = "127.0.0.1:7070";

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    current: Option<String>,
    contexts: BTreeMap<String, Context>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Context {
    endpoints: Vec<String>,
    tenant: Option<String>,
    tls_ca: Option<PathBuf>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
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

fn load(global: &Global) -> Result<Context, Failure> {
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config/warren/contexts.toml"));
    let Some(path) = global.contexts.clone().or(home) else { return Ok(Context::default()) };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && global.contexts.is_none() => String::new(),
        Err(source) => return Err(Failure::Io { what: format!("read {}", path.display()), source }),
    };
    let file: File = toml::from_str(&text).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
    let Some(name) = global.context.clone().or(file.current) else { return Ok(Context::default()) };
    file.contexts.get(&name).cloned().ok_or_else(|| {
        let known: Vec<&String> = file.contexts.keys().collect();
        Failure::Usage(format!("{} has no context `{name}`; it has {known:?}", path.display()))
    })
}
