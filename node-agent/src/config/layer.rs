//! Where values come from. All are text here; `Config::resolve` says what they mean.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use serde::{Deserialize, Deserializer};

use super::ConfigError;

/// Warren's node agent: runs the sandboxes of this host.
#[derive(Debug, Parser)]
#[command(name = "warren-node-agent", version, about)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub layer: Layer,
}

#[derive(Debug, Clone, PartialEq, Default, Subcommand)]
pub enum Command {
    /// Serve (the default)
    #[default]
    Run,
    /// Remove everything that this data directory's agent left on the host: sandboxes, templates, journal
    Clean,
    /// Run many simulated agents in this process, to see what schedulers bear; prints a line of JSON at intervals
    Fleet(FleetArgs),
}

/// Which simulated agents.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct FleetArgs {
    /// How many
    #[arg(long, default_value_t = 100)]
    pub count: usize,
    /// Node n is named `PREFIXn`
    #[arg(long, default_value = "sim-", value_name = "PREFIX")]
    pub node_prefix: String,
    /// Templates that every node says it holds, a,b; any other it pretends to fetch
    #[arg(long, value_delimiter = ',', value_name = "DIGEST")]
    pub templates: Vec<String>,
    /// Seconds over which the agents start
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS")]
    pub ramp: f64,
    /// Milliseconds that a simulated start takes
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub start_delay: u64,
    /// Seconds between two lines
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    pub report: f64,
}

/// One source of values: the command line with the environment, or the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layer {
    /// TOML file with these keys in snake_case
    #[arg(long, env = "WARREN_CONFIG", global = true, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Name of this node, unique in the region
    #[arg(long, env = "WARREN_NODE_ID", global = true)]
    #[serde(deserialize_with = "text")]
    pub node_id: Option<String>,
    /// Directory for all that the agent keeps
    #[arg(long, env = "WARREN_DATA_DIR", global = true, value_name = "DIR")]
    #[serde(deserialize_with = "text")]
    pub data_dir: Option<String>,
    /// API addresses of schedulers, a:p,b:p,c:p
    #[arg(long, env = "WARREN_SCHEDULERS", global = true)]
    #[serde(deserialize_with = "text")]
    pub schedulers: Option<String>,
    /// Data plane (gRPC) [default: 127.0.0.1:7080]
    #[arg(long, env = "WARREN_LISTEN", global = true, value_name = "ADDR")]
    #[serde(deserialize_with = "text")]
    pub listen: Option<String>,
    /// Data plane as clients reach it, host:port [default: the listen address]
    #[arg(long, env = "WARREN_ADVERTISE", global = true, value_name = "ADDR")]
    #[serde(deserialize_with = "text")]
    pub advertise: Option<String>,
    /// /metrics, /healthz, /readyz [default: 127.0.0.1:7081]
    #[arg(long, env = "WARREN_HTTP_LISTEN", global = true, value_name = "ADDR")]
    #[serde(deserialize_with = "text")]
    pub http_listen: Option<String>,
    /// Drivers to offer, the default first: oci, sim [default: oci]
    #[arg(long, env = "WARREN_DRIVERS", global = true)]
    #[serde(deserialize_with = "text")]
    pub drivers: Option<String>,
    /// OCI runtimes of driver oci, the default first: crun, runc, runsc (gVisor), kata-runtime, or paths [default: runc]
    #[arg(long, env = "WARREN_RUNTIME", global = true)]
    #[serde(deserialize_with = "text")]
    pub runtime: Option<String>,
    /// Addresses that the agents of this host share out among their sandboxes, address/bits [default: 10.224.0.0/14]
    #[arg(long, env = "WARREN_SANDBOX_NETWORK", global = true, value_name = "NETWORK")]
    #[serde(deserialize_with = "text")]
    pub sandbox_network: Option<String>,
    /// Resolvers that are asked for names by sandboxes, ip or ip:port, a,b [default: the host's]
    #[arg(long, env = "WARREN_DNS_UPSTREAM", global = true, value_name = "ADDRS")]
    #[serde(deserialize_with = "text")]
    pub dns_upstream: Option<String>,
    /// Program that freezes sandboxes when the lease lapses, or `none` [default: warren-fence beside this program]
    #[arg(long, env = "WARREN_FENCE", global = true, value_name = "FILE")]
    #[serde(deserialize_with = "text")]
    pub fence: Option<String>,
    /// Thousandths of a vCPU for sandboxes [default: the host's less a reserve]
    #[arg(long, env = "WARREN_CPU_MILLI", global = true, value_name = "N")]
    #[serde(deserialize_with = "text")]
    pub cpu_milli: Option<String>,
    /// Memory for sandboxes, e.g. 8GiB [default: the host's less a reserve]
    #[arg(long, env = "WARREN_MEMORY", global = true, value_name = "SIZE")]
    #[serde(deserialize_with = "text")]
    pub memory: Option<String>,
    /// Disk for sandboxes, e.g. 20GiB [default: what is free less a reserve]
    #[arg(long, env = "WARREN_DISK", global = true, value_name = "SIZE")]
    #[serde(deserialize_with = "text")]
    pub disk: Option<String>,
    /// GPUs to offer: nvml (NVIDIA's driver, where there is one), none, or a TOML file that lists them [default: nvml]
    #[arg(long, env = "WARREN_GPUS", global = true)]
    #[serde(deserialize_with = "text")]
    pub gpus: Option<String>,
    /// Directories of CDI specifications, a,b [default: /etc/cdi,/var/run/cdi]
    #[arg(long, env = "WARREN_CDI_DIRS", global = true)]
    #[serde(deserialize_with = "text")]
    pub cdi_dirs: Option<String>,
    /// Labels of this node, k=v,k=v
    #[arg(long, env = "WARREN_LABELS", global = true)]
    #[serde(deserialize_with = "text")]
    pub labels: Option<String>,
    /// Registries that templates may be pulled from without TLS, a:p,b:p; those of this host always may
    #[arg(long, env = "WARREN_INSECURE_REGISTRIES", global = true)]
    #[serde(deserialize_with = "text")]
    pub insecure_registries: Option<String>,
    /// PEM certificate of this node, for its servers and as a client
    #[arg(long, env = "WARREN_TLS_CERT", global = true, value_name = "FILE")]
    #[serde(deserialize_with = "text")]
    pub tls_cert: Option<String>,
    /// PEM key of that certificate
    #[arg(long, env = "WARREN_TLS_KEY", global = true, value_name = "FILE")]
    #[serde(deserialize_with = "text")]
    pub tls_key: Option<String>,
    /// PEM authorities that schedulers and peers are checked against
    #[arg(long, env = "WARREN_TLS_CA", global = true, value_name = "FILE")]
    #[serde(deserialize_with = "text")]
    pub tls_ca: Option<String>,
    /// error, warn, info, debug, trace, or a filter such as warren_node_agent=debug [default: info]
    #[arg(long, env = "WARREN_LOG_LEVEL", global = true)]
    #[serde(deserialize_with = "text")]
    pub log_level: Option<String>,
    /// text or json [default: text]
    #[arg(long, env = "WARREN_LOG_FORMAT", global = true)]
    #[serde(deserialize_with = "text")]
    pub log_format: Option<String>,
}

impl Layer {
    /// Reads a TOML file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text =
            std::fs::read_to_string(path).map_err(|error| format!("config: read {}: {error}", path.display()))?;
        toml::from_str(&text).map_err(|error| format!("config: {}: {error}", path.display()))
    }

    /// These values over those of the file that they name.
    pub(super) fn with_file(self) -> Result<Self, ConfigError> {
        let file = match &self.config {
            Some(path) => Self::read(path).map_err(|what| ConfigError(vec![what]))?,
            None => Self::default(),
        };
        Ok(self.over(file))
    }

    /// These values, and where there is none the `other`'s.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        Self {
            config: self.config,
            node_id: self.node_id.or(other.node_id),
            data_dir: self.data_dir.or(other.data_dir),
            schedulers: self.schedulers.or(other.schedulers),
            listen: self.listen.or(other.listen),
            advertise: self.advertise.or(other.advertise),
            http_listen: self.http_listen.or(other.http_listen),
            drivers: self.drivers.or(other.drivers),
            runtime: self.runtime.or(other.runtime),
            fence: self.fence.or(other.fence),
            cpu_milli: self.cpu_milli.or(other.cpu_milli),
            memory: self.memory.or(other.memory),
            disk: self.disk.or(other.disk),
            gpus: self.gpus.or(other.gpus),
            sandbox_network: self.sandbox_network.or(other.sandbox_network),
            dns_upstream: self.dns_upstream.or(other.dns_upstream),
            cdi_dirs: self.cdi_dirs.or(other.cdi_dirs),
            labels: self.labels.or(other.labels),
            insecure_registries: self.insecure_registries.or(other.insecure_registries),
            tls_cert: self.tls_cert.or(other.tls_cert),
            tls_key: self.tls_key.or(other.tls_key),
            tls_ca: self.tls_ca.or(other.tls_ca),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
        }
    }
}

/// A file may say a number, a list or a table of strings where the command line has text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Number(i64),
    List(Vec<String>),
    Table(std::collections::BTreeMap<String, String>),
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Some(match Value::deserialize(deserializer)? {
        Value::Text(text) => text,
        Value::Number(number) => number.to_string(),
        Value::List(items) => items.join(","),
        Value::Table(table) => table.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","),
    }))
}
