//! Configuration: flag over environment over file over default, validated once, with every problem named at once.
//!
//! Children: `layer` (where values come from), `parse` (what they mean).

mod layer;
mod parse;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use warren_proto::client::{self, ClientTls, TlsFiles};
use warren_proto::ids::NodeId;
use warren_proto::units::{Bytes, MilliCpu};

use crate::driver::oci::NetworkOptions;
use crate::gpu::GpuConfig;

pub use layer::{Args, Command, FleetArgs, Layer};
pub(crate) use parse::size;

/// Everything that the agent is told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub node_id: NodeId,
    pub data_dir: PathBuf,
    pub schedulers: Vec<String>,
    pub listen: SocketAddr,
    /// `None`: the address that is listened on.
    pub advertise: Option<String>,
    pub http_listen: SocketAddr,
    pub drivers: Vec<DriverKind>,
    pub runtime: String,
    /// Program of the fence; `None`: there is none.
    pub fence: Option<PathBuf>,
    /// `None`: the host's, less a reserve.
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
    pub disk: Option<Bytes>,
    pub gpus: GpuConfig,
    pub network: NetworkOptions,
    pub labels: BTreeMap<String, String>,
    /// `host:port` of registries that templates are pulled from without TLS.
    pub insecure_registries: Vec<String>,
    pub tls: TlsFiles,
    pub log_level: String,
    pub log_format: LogFormat,
}

/// A driver that is compiled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    Oci,
    Sim,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Everything that is wrong, one key a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

/// Collects problems; a value that is wrong yields nothing and the rest is still checked.
#[derive(Debug, Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, key: &str, what: impl fmt::Display) {
        self.0.push(format!("{key}: {what}"));
    }

    fn take<T>(&mut self, key: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|what| self.add(key, what)).ok()
    }

    fn required(&mut self, key: &str, value: Option<String>, example: &str) -> Option<String> {
        if value.is_none() {
            let flag = key.replace('_', "-");
            self.add(
                key,
                format!("is required: give --{flag}, WARREN_{} or `{key} = ...`, e.g. {example}", key.to_uppercase()),
            );
        }
        value
    }
}

impl Config {
    /// Reads the file that the flags name and checks everything.
    pub fn load(args: Layer) -> Result<Self, ConfigError> {
        Self::resolve(args.with_file()?)
    }

    /// As `load`, for a command that talks to no scheduler.
    pub fn load_offline(args: Layer) -> Result<Self, ConfigError> {
        let mut raw = args.with_file()?;
        raw.schedulers.get_or_insert_with(|| "127.0.0.1:7070".to_owned());
        Self::resolve(raw)
    }

    /// As `load`, for simulated agents, which have no directory and names of their own.
    pub fn load_fleet(args: Layer) -> Result<Self, ConfigError> {
        let mut raw = args.with_file()?;
        raw.node_id.get_or_insert_with(|| "fleet".to_owned());
        raw.data_dir.get_or_insert_with(|| ".".to_owned());
        Self::resolve(raw)
    }

    /// PURE but for TLS files, which are only named here and read by `tls`.
    pub fn resolve(raw: Layer) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let tls = parse::tls_files(&mut problems, &raw);
        let node_id = problems.required("node_id", raw.node_id, "node-1");
        let node_id = node_id.and_then(|id| problems.take("node_id", NodeId::parse(&id).map_err(|e| e.to_string())));
        let data_dir = problems.required("data_dir", raw.data_dir, "/var/lib/warren-node-agent");
        let schedulers = problems.required("schedulers", raw.schedulers, "127.0.0.1:7070");
        let schedulers = schedulers.map(|text| parse::schedulers(&mut problems, &text, tls.ca.is_some()));
        let listen = parse::listen(&mut problems, "listen", raw.listen.as_deref().unwrap_or("127.0.0.1:7080"), &tls);
        let http_listen = raw.http_listen.as_deref().unwrap_or("127.0.0.1:7081");
        let http_listen = parse::listen(&mut problems, "http_listen", http_listen, &tls);
        if let Some(listen) = listen
            && listen.ip().is_unspecified()
            && raw.advertise.is_none()
        {
            problems.add(
                "advertise",
                format!("is required because listen is {listen}: give the `host:port` that clients reach"),
            );
        }
        let advertise = raw.advertise.inspect(|text| {
            problems.take("advertise", parse::host_port(text));
        });
        let drivers = parse::drivers(&mut problems, raw.drivers.as_deref().unwrap_or("oci"));
        let cpu = raw.cpu_milli.and_then(|text| problems.take("cpu_milli", parse::cpu(&text)));
        let memory = raw.memory.and_then(|text| problems.take("memory", parse::size(&text)));
        let disk = raw.disk.and_then(|text| problems.take("disk", parse::size(&text)));
        let network = parse::network(&mut problems, raw.sandbox_network.as_deref(), raw.dns_upstream.as_deref());
        let gpus = parse::gpus(raw.gpus.as_deref(), raw.cdi_dirs.as_deref());
        let labels = problems.take("labels", parse::labels(raw.labels.as_deref().unwrap_or(""))).unwrap_or_default();
        let insecure = raw.insecure_registries.unwrap_or_default();
        let insecure = insecure.split(',').map(str::trim).filter(|name| !name.is_empty());
        let insecure_registries: Vec<String> = insecure.map(str::to_owned).collect();
        for registry in &insecure_registries {
            problems.take("insecure_registries", parse::host_port(registry));
        }
        let log_format = problems.take("log_format", parse::log_format(raw.log_format.as_deref().unwrap_or("text")));
        let log_level = raw.log_level.unwrap_or_else(|| "info".to_owned());
        problems.take("log_level", parse::log_level(&log_level));
        let fence = match raw.fence.as_deref() {
            Some("none") => None,
            Some(program) => Some(PathBuf::from(program)),
            None => parse::fence_beside_this_program(),
        };
        let runtime = raw.runtime.unwrap_or_else(|| "runc".to_owned());
        match (node_id, data_dir, schedulers, listen, http_listen, log_format) {
            (Some(node_id), Some(data_dir), Some(schedulers), Some(listen), Some(http_listen), Some(log_format))
                if problems.0.is_empty() =>
            {
                let data_dir = PathBuf::from(data_dir);
                Ok(Self {
                    node_id,
                    data_dir,
                    schedulers,
                    listen,
                    advertise,
                    http_listen,
                    drivers,
                    runtime,
                    fence,
                    cpu,
                    memory,
                    disk,
                    gpus,
                    network,
                    labels,
                    insecure_registries,
                    tls,
                    log_level,
                    log_format,
                })
            }
            _ => Err(ConfigError(problems.0)),
        }
    }

    /// Whether the servers speak TLS.
    pub fn serves_tls(&self) -> bool {
        self.tls.certificate.is_some()
    }

    /// How this agent speaks to schedulers and peers.
    pub fn client_tls(&self) -> Result<ClientTls, client::ChannelError> {
        ClientTls::load(&self.tls)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
