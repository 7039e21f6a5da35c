//! Configuration: flags over environment over a TOML file over defaults; validated once.
//!
//! A key has one name everywhere: `--api-listen`, `WARREN_API_LISTEN`, `api_listen`. An error names the key, says what is
//! wrong with its value, and what would be right.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde::Deserialize;
use warren_proto::client::TlsFiles;
use warren_proto::ids::ReplicaId;

use crate::raft::Member;

/// Shortest lease: below, renewals would be all that a fleet does.
const MIN_LEASE_MS: u64 = 500;

/// What is done instead of serving. Nothing may run on the data directory meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Action {
    /// Make a new ledger of one replica out of a backup, in an empty data directory
    Restore {
        /// As `warrenctl server backup` wrote it
        backup: PathBuf,
    },
    /// Make a new ledger of one replica out of this one's disk: for when the quorum is lost for good
    RecoverQuorum,
}

/// A replica of Warren's scheduler.
#[derive(Debug, Clone, Default, Parser, Deserialize)]
#[command(name = "warren-scheduler", version, about)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    #[command(subcommand)]
    #[serde(skip)]
    pub action: Option<Action>,
    /// TOML file with any of these keys, in snake_case
    #[arg(long, env = "WARREN_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Number of this replica, 1 or more; never re-used
    #[arg(long, env = "WARREN_REPLICA_ID", value_name = "N")]
    pub replica_id: Option<u64>,
    /// Directory for log, checkpoints and keys
    #[arg(long, env = "WARREN_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where to serve the API and agents [default: 127.0.0.1:7070]
    #[arg(long, env = "WARREN_API_LISTEN", value_name = "ADDR")]
    pub api_listen: Option<String>,
    /// Where to serve other replicas [default: 127.0.0.1:7071]
    #[arg(long, env = "WARREN_PEER_LISTEN", value_name = "ADDR")]
    pub peer_listen: Option<String>,
    /// Where to serve /metrics, /healthz and /readyz [default: 127.0.0.1:7072]
    #[arg(long, env = "WARREN_HTTP_LISTEN", value_name = "ADDR")]
    pub http_listen: Option<String>,
    /// How clients and agents reach the API [default: api-listen]
    #[arg(long, env = "WARREN_API_ADVERTISE", value_name = "HOST:PORT")]
    pub api_advertise: Option<String>,
    /// How other replicas reach this one [default: peer-listen]
    #[arg(long, env = "WARREN_PEER_ADVERTISE", value_name = "HOST:PORT")]
    pub peer_advertise: Option<String>,
    /// Members of a new ledger, `ID=PEER_ADDR/API_ADDR,...`; used when the data directory is empty
    #[arg(long, env = "WARREN_INITIAL_MEMBERS", value_name = "LIST")]
    pub initial_members: Option<String>,
    /// API addresses of a running group that this replica joins, `HOST:PORT,...`; used when the data directory is empty
    #[arg(long, env = "WARREN_JOIN", value_name = "LIST")]
    pub join: Option<String>,
    /// Join as a standby: a learner that replaces a voter which is dead for longer than replica-grace-ms
    #[arg(long, env = "WARREN_STANDBY", value_name = "BOOL")]
    pub standby: Option<bool>,
    /// How long a voter may be silent before a standby replaces it [default: 600000]
    #[arg(long, env = "WARREN_REPLICA_GRACE_MS", value_name = "MS")]
    pub replica_grace_ms: Option<u64>,
    /// File with 32 random bytes in base64, the same on all replicas: seals secret_environment
    #[arg(long, env = "WARREN_SECRETS_KEY_FILE", value_name = "FILE")]
    pub secrets_key_file: Option<PathBuf>,
    /// Share of the disk from which on creates are refused, in percent [default: 90]
    #[arg(long, env = "WARREN_DISK_FULL_PERCENT", value_name = "N")]
    pub disk_full_percent: Option<u64>,
    /// How long a node may run without hearing from the leader [default: 10000]
    #[arg(long, env = "WARREN_LEASE_MS", value_name = "MS")]
    pub lease_ms: Option<u64>,
    /// Between two heartbeats of the leader [default: 100]
    #[arg(long, env = "WARREN_HEARTBEAT_MS", value_name = "MS")]
    pub heartbeat_ms: Option<u64>,
    /// Others stand for election when the leader was silent for 2⅓ to 2⅔ times this [default: 300]
    #[arg(long, env = "WARREN_ELECTION_TIMEOUT_MS", value_name = "MS")]
    pub election_timeout_ms: Option<u64>,
    /// Log entries between two checkpoints [default: 10000]
    #[arg(long, env = "WARREN_CHECKPOINT_EVERY", value_name = "N")]
    pub checkpoint_every: Option<u64>,
    /// PEM file of this server's certificate
    #[arg(long, env = "WARREN_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its key
    #[arg(long, env = "WARREN_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// PEM file of the authorities that clients, agents and peers must be certified by
    #[arg(long, env = "WARREN_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Log filter, such as `info` or `warren_scheduler=debug` [default: info]
    #[arg(long, env = "WARREN_LOG_LEVEL", value_name = "FILTER")]
    pub log_level: Option<String>,
    /// `text` or `json` [default: text]
    #[arg(long, env = "WARREN_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config: read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("config: {path}: {source}")]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("{key} is not set: give {right}")]
    Missing { key: &'static str, right: &'static str },
    #[error("{key}: `{value}` is wrong: {right}")]
    Invalid { key: &'static str, value: String, right: String },
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// A configuration that holds.
#[derive(Debug, Clone)]
pub struct Config {
    /// Serve, where it is `None`.
    pub action: Option<Action>,
    pub replica_id: ReplicaId,
    pub data_dir: PathBuf,
    pub api_listen: SocketAddr,
    pub peer_listen: SocketAddr,
    pub http_listen: SocketAddr,
    pub api_advertise: String,
    pub peer_advertise: String,
    pub initial_members: BTreeMap<ReplicaId, Member>,
    /// Another group's API addresses; empty: none is joined.
    pub join: Vec<String>,
    pub standby: bool,
    pub replica_grace: Duration,
    pub secrets_key_file: Option<PathBuf>,
    pub disk_full_percent: u64,
    pub lease: Duration,
    pub heartbeat: Duration,
    pub election_timeout: Duration,
    pub checkpoint_every: u64,
    /// Empty: plain text, on loopback.
    pub tls: TlsFiles,
    pub log_level: String,
    pub log_format: LogFormat,
}

macro_rules! over {
    ($flags:ident, $file:ident, $($key:ident),*) => {
        Settings { action: $flags.action, config: $flags.config, $($key: $flags.$key.or($file.$key)),* }
    };
}

impl Settings {
    /// Reads the file, if one is named, and lays flags and environment over it.
    pub fn load(self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            None => Self::default(),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
                toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.clone(), source })?
            }
        };
        self.over(file).validate()
    }

    fn over(self, file: Self) -> Self {
        over!(
            self,
            file,
            replica_id,
            data_dir,
            api_listen,
            peer_listen,
            http_listen,
            api_advertise,
            peer_advertise,
            initial_members,
            join,
            standby,
            replica_grace_ms,
            secrets_key_file,
            disk_full_percent,
            lease_ms,
            heartbeat_ms,
            election_timeout_ms,
            checkpoint_every,
            tls_cert,
            tls_key,
            tls_ca,
            log_level,
            log_format
        )
    }

    fn validate(self) -> Result<Config, ConfigError> {
        let replica_id = match self.replica_id {
            None => return Err(ConfigError::Missing { key: "replica_id", right: "a number from 1 on" }),
            Some(0) => return Err(invalid("replica_id", "0", "must be 1 or more")),
            Some(id) => ReplicaId(id),
        };
        let data_dir = self.data_dir.ok_or(ConfigError::Missing { key: "data_dir", right: "a directory" })?;
        let tls = TlsFiles { ca: self.tls_ca, certificate: self.tls_cert, key: self.tls_key };
        check_tls(&tls)?;
        let api_listen = listen("api_listen", self.api_listen, "127.0.0.1:7070", &tls)?;
        let peer_listen = listen("peer_listen", self.peer_listen, "127.0.0.1:7071", &tls)?;
        let http_listen = listen("http_listen", self.http_listen, "127.0.0.1:7072", &tls)?;
        let heartbeat = self.heartbeat_ms.unwrap_or(100);
        let election = self.election_timeout_ms.unwrap_or(300);
        if heartbeat == 0 || election < heartbeat.saturating_mul(2) {
            let right = format!("must be at least twice heartbeat_ms ({heartbeat}), which must not be 0");
            return Err(invalid("election_timeout_ms", election, right));
        }
        let lease = at_least("lease_ms", self.lease_ms.unwrap_or(10_000), MIN_LEASE_MS)?;
        let join = addresses("join", self.join.as_deref().unwrap_or(""))?;
        let initial_members = members(self.initial_members.as_deref().unwrap_or(""), replica_id)?;
        if !join.is_empty() && !initial_members.is_empty() {
            let right = "give initial_members to form a new group, or join to enter one that runs";
            return Err(invalid("join", join.join(","), right));
        }
        let full = self.disk_full_percent.unwrap_or(90);
        if !(1..=100).contains(&full) {
            return Err(invalid("disk_full_percent", full, "must be from 1 to 100"));
        }
        let grace = at_least("replica_grace_ms", self.replica_grace_ms.unwrap_or(600_000), election.saturating_mul(2))?;
        Ok(Config {
            action: self.action,
            replica_id,
            data_dir,
            api_advertise: advertise("api_advertise", self.api_advertise, api_listen)?,
            peer_advertise: advertise("peer_advertise", self.peer_advertise, peer_listen)?,
            api_listen,
            peer_listen,
            http_listen,
            initial_members,
            join,
            standby: self.standby.unwrap_or(false),
            replica_grace: Duration::from_millis(grace),
            secrets_key_file: self.secrets_key_file,
            disk_full_percent: full,
            lease: Duration::from_millis(lease),
            heartbeat: Duration::from_millis(heartbeat),
            election_timeout: Duration::from_millis(election),
            checkpoint_every: at_least("checkpoint_every", self.checkpoint_every.unwrap_or(10_000), 10)?,
            tls,
            log_level: self.log_level.unwrap_or_else(|| "info".to_owned()),
            log_format: log_format(self.log_format.as_deref())?,
        })
    }
}

impl Config {
    /// Key and value, for operators to see.
    pub fn shown(&self) -> BTreeMap<String, String> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let ms = |duration: Duration| duration.as_millis().to_string();
        let members: Vec<String> = self.initial_members.keys().map(ToString::to_string).collect();
        [
            ("replica_id", self.replica_id.to_string()),
            ("data_dir", self.data_dir.display().to_string()),
            ("api_listen", self.api_listen.to_string()),
            ("peer_listen", self.peer_listen.to_string()),
            ("http_listen", self.http_listen.to_string()),
            ("api_advertise", self.api_advertise.clone()),
            ("peer_advertise", self.peer_advertise.clone()),
            ("initial_members", members.join(",")),
            ("join", self.join.join(",")),
            ("standby", self.standby.to_string()),
            ("replica_grace_ms", ms(self.replica_grace)),
            ("secrets_key_file", path(&self.secrets_key_file)),
            ("disk_full_percent", self.disk_full_percent.to_string()),
            ("lease_ms", ms(self.lease)),
            ("heartbeat_ms", ms(self.heartbeat)),
            ("election_timeout_ms", ms(self.election_timeout)),
            ("checkpoint_every", self.checkpoint_every.to_string()),
            ("tls_cert", path(&self.tls.certificate)),
            ("tls_ca", path(&self.tls.ca)),
            ("log_level", self.log_level.clone()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }
}

fn invalid(key: &'static str, value: impl ToString, right: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key, value: value.to_string(), right: right.into() }
}

fn at_least(key: &'static str, value: u64, least: u64) -> Result<u64, ConfigError> {
    if value >= least { Ok(value) } else { Err(invalid(key, value, format!("must be {least} or more"))) }
}

fn check_tls(tls: &TlsFiles) -> Result<(), ConfigError> {
    match (&tls.certificate, &tls.key, &tls.ca) {
        (None, None, None) | (Some(_), Some(_), Some(_)) => Ok(()),
        _ => {
            let given = [("tls_cert", &tls.certificate), ("tls_key", &tls.key), ("tls_ca", &tls.ca)];
            let (key, path) = given
                .iter()
                .find_map(|(key, path)| path.as_ref().map(|path| (*key, path)))
                .unwrap_or(("tls_cert", NO_PATH));
            Err(invalid(key, path.display(), "tls_cert, tls_key and tls_ca go together: give all three"))
        }
    }
}

static NO_PATH: &PathBuf = &PathBuf::new();

fn listen(key: &'static str, value: Option<String>, default: &str, tls: &TlsFiles) -> Result<SocketAddr, ConfigError> {
    let text = value.unwrap_or_else(|| default.to_owned());
    let address: SocketAddr =
        text.parse().map_err(|_| invalid(key, &text, "must be an IP address and a port, such as 127.0.0.1:7070"))?;
    if !address.ip().is_loopback() && tls.certificate.is_none() {
        let right = "plain text is served on loopback only: give tls_cert, tls_key and tls_ca, or listen on 127.0.0.1";
        return Err(invalid(key, &text, right));
    }
    Ok(address)
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

fn advertise(key: &'static str, value: Option<String>, listen: SocketAddr) -> Result<String, ConfigError> {
    match value {
        Some(text) if is_host_and_port(&text) => Ok(text),
        Some(text) => Err(invalid(key, text, "must be `host:port`")),
        None if listen.ip().is_unspecified() => {
            Err(ConfigError::Missing { key, right: "the `host:port` that others reach: it listens on every address" })
        }
        None => Ok(listen.to_string()),
    }
}

fn addresses(key: &'static str, text: &str) -> Result<Vec<String>, ConfigError> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| match is_host_and_port(part) {
            true => Ok(part.to_owned()),
            false => Err(invalid(key, part, "must be `host:port`, separated by commas")),
        })
        .collect()
}

fn members(text: &str, own: ReplicaId) -> Result<BTreeMap<ReplicaId, Member>, ConfigError> {
    const KEY: &str = "initial_members";
    let wrong = |part: &str| invalid(KEY, part, "must be `ID=PEER_HOST:PORT/API_HOST:PORT`, separated by commas");
    let mut members = BTreeMap::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (id, addresses) = part.split_once('=').ok_or_else(|| wrong(part))?;
        let (peer, api) = addresses.split_once('/').ok_or_else(|| wrong(part))?;
        let id: u64 = id.parse().map_err(|_| wrong(part))?;
        if id == 0 || !is_host_and_port(peer) || !is_host_and_port(api) {
            return Err(wrong(part));
        }
        let member = Member { peer_address: peer.to_owned(), api_address: api.to_owned(), standby: false };
        if members.insert(ReplicaId(id), member).is_some() {
            return Err(invalid(KEY, part, format!("names replica {id} twice")));
        }
    }
    if !members.is_empty() && !members.contains_key(&own) {
        return Err(invalid(KEY, text, format!("must name this replica too (replica_id is {own})")));
    }
    Ok(members)
}

fn log_format(text: Option<&str>) -> Result<LogFormat, ConfigError> {
    match text {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(invalid("log_format", other, "must be `text` or `json`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings { replica_id: Some(1), data_dir: Some("/tmp/x".into()), ..Settings::default() }
    }

    fn refusal(change: impl FnOnce(&mut Settings)) -> String {
        let mut wrong = settings();
        change(&mut wrong);
        wrong.validate().unwrap_err().to_string()
    }

    #[test]
    fn defaults_hold() {
        let config = settings().validate().unwrap();
        assert_eq!(config.api_advertise, "127.0.0.1:7070");
        assert_eq!(config.lease, Duration::from_secs(10));
    }

    #[test]
    fn an_error_names_the_key_and_what_would_be_right() {
        assert!(refusal(|s| s.replica_id = None).starts_with("replica_id is not set"));
        assert!(refusal(|s| s.replica_id = Some(0)).starts_with("replica_id: `0` is wrong"));
        assert!(refusal(|s| s.api_listen = Some("0.0.0.0:1".into())).contains("tls_cert"));
        assert!(refusal(|s| s.http_listen = Some("here".into())).starts_with("http_listen: `here`"));
        assert!(refusal(|s| s.tls_key = Some("k".into())).contains("give all three"));
        assert!(refusal(|s| s.election_timeout_ms = Some(150)).contains("heartbeat_ms"));
        assert!(refusal(|s| s.initial_members = Some("1=a".into())).contains("PEER_HOST"));
        assert!(refusal(|s| s.initial_members = Some("2=a:1/a:2".into())).contains("this replica too"));
        assert!(refusal(|s| s.join = Some("here".into())).starts_with("join: `here`"));
        assert!(refusal(|s| s.disk_full_percent = Some(101)).starts_with("disk_full_percent"));
        assert!(refusal(|s| s.replica_grace_ms = Some(1)).starts_with("replica_grace_ms"));
        assert!(refusal(|s| s.log_format = Some("xml".into())).contains("`text` or `json`"));
        assert!(refusal(|s| s.lease_ms = Some(1)).starts_with("lease_ms"));
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_keys_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("warren.toml");
        std::fs::write(&path, "replica_id = 7\nlease_ms = 900\ndata_dir = \"/d\"\n").unwrap();
        let flags = Settings { config: Some(path.clone()), replica_id: Some(2), ..Settings::default() };
        let config = flags.load().unwrap();
        assert_eq!((config.replica_id, config.lease), (ReplicaId(2), Duration::from_millis(900)));
        std::fs::write(&path, "replica = 7\n").unwrap();
        let flags = Settings { config: Some(path), ..Settings::default() };
        assert!(flags.load().unwrap_err().to_string().contains("replica"));
    }
}
