//! PURE: from text to values; each error says what would be right.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use tracing_subscriber::EnvFilter;
use warren_proto::client::{TlsFiles, is_loopback};
use warren_proto::units::{Bytes, MilliCpu};

use crate::driver::oci::NetworkOptions;
use crate::gpu::{GpuConfig, Source};
use crate::network::range::Range;

use super::{DriverKind, Layer, LogFormat, Problems};

/// Of a resolver that is given without one.
const DNS_PORT: u16 = 53;

/// Labels of a node: more than anyone selects by.
const MAX_LABELS: usize = 64;

/// `8GiB`, `512 MiB`, `20G` (binary, as people mean it), or bytes.
pub fn size(text: &str) -> Result<Bytes, String> {
    let wrong = || format!("`{text}` is not a size: write e.g. 512MiB, 8GiB or a number of bytes");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => Bytes::KIB,
        "m" | "mi" | "mib" => Bytes::MIB,
        "g" | "gi" | "gib" => Bytes::GIB,
        "t" | "ti" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    // The wire holds an i64.
    let bytes = number.checked_mul(unit).filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok());
    bytes.map(Bytes).ok_or_else(wrong)
}

/// Where GPUs are listed and described.
pub(super) fn network(problems: &mut Problems, range: Option<&str>, upstreams: Option<&str>) -> NetworkOptions {
    let mut options = NetworkOptions::default();
    if let Some(range) = range.and_then(|text| problems.take("sandbox_network", text.parse::<Range>())) {
        options.range = range;
    }
    for text in upstreams.unwrap_or_default().split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let with_port = text.parse::<SocketAddr>().ok();
        let upstream = with_port.or_else(|| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DNS_PORT)));
        let wrong = || format!("`{text}` is not a resolver: write ip or ip:port, e.g. 10.0.0.53");
        options.upstreams.extend(problems.take("dns_upstream", upstream.ok_or_else(wrong)));
    }
    options
}

pub fn gpus(source: Option<&str>, cdi_dirs: Option<&str>) -> GpuConfig {
    let source = match source.map(str::trim) {
        None | Some("nvml") => Source::Nvml,
        Some("none" | "") => Source::None,
        Some(path) => Source::File(PathBuf::from(path)),
    };
    let directories = cdi_dirs.unwrap_or("/etc/cdi,/var/run/cdi").split(',').map(str::trim);
    GpuConfig { source, cdi_dirs: directories.filter(|dir| !dir.is_empty()).map(PathBuf::from).collect() }
}

pub fn cpu(text: &str) -> Result<MilliCpu, String> {
    let wrong = || format!("`{text}` is not a number of thousandths of a vCPU: write e.g. 4000 for 4 vCPU");
    let milli: u64 = text.trim().parse().map_err(|_| wrong())?;
    if (1..=1_000_000_000).contains(&milli) { Ok(MilliCpu(milli)) } else { Err(wrong()) }
}

pub fn host_port(text: &str) -> Result<(), String> {
    let wrong = || format!("`{text}` is not an address: write host:port");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    match port.parse::<u16>() {
        Ok(_) if !host.is_empty() => Ok(()),
        _ => Err(wrong()),
    }
}

pub fn labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut labels = BTreeMap::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (key, value) = item.split_once('=').ok_or_else(|| format!("`{item}` is not a label: write key=value"))?;
        if key.is_empty() || labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(format!("`{item}`: a label needs a key, and each key only once"));
        }
    }
    if labels.len() > MAX_LABELS {
        return Err(format!("{} labels: at most {MAX_LABELS}", labels.len()));
    }
    Ok(labels)
}

/// Where an installation keeps it; `None` where it is not there.
pub fn fence_beside_this_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.with_file_name("warren-fence");
    program.exists().then_some(program)
}

pub fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("`{text}` is not a log format: write text or json")),
    }
}

pub fn log_level(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text)
        .map_err(|error| format!("`{text}` is not a log level: write error, warn, info, debug or trace ({error})"))
}

pub(super) fn drivers(problems: &mut Problems, text: &str) -> Vec<DriverKind> {
    let mut drivers = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let kind = match name {
            "oci" => DriverKind::Oci,
            "sim" => DriverKind::Sim,
            _ => {
                problems.add("drivers", format!("`{name}` is not a driver: write oci or sim"));
                continue;
            }
        };
        if !drivers.contains(&kind) {
            drivers.push(kind);
        }
    }
    if drivers.is_empty() {
        problems.add("drivers", "at least one is needed: oci, sim or both");
    }
    drivers
}

pub(super) fn schedulers(problems: &mut Problems, text: &str, tls: bool) -> Vec<String> {
    let all: Vec<String> = text.split(',').map(str::trim).filter(|a| !a.is_empty()).map(str::to_owned).collect();
    if all.is_empty() {
        problems.add("schedulers", "at least one address is needed, e.g. 127.0.0.1:7070");
    }
    for address in &all {
        if problems.take("schedulers", host_port(address)).is_some()
            && !tls
            && !address.rsplit_once(':').is_some_and(|(host, _)| is_loopback(host))
        {
            problems.add(
                "schedulers",
                format!("`{address}` is not loopback, and plain text is for loopback only: give --tls-ca"),
            );
        }
    }
    all
}

pub(super) fn listen(problems: &mut Problems, key: &str, text: &str, tls: &TlsFiles) -> Option<SocketAddr> {
    let parsed = text.parse::<SocketAddr>();
    let wrong = |_| format!("`{text}` is not a listen address: write ip:port, e.g. 127.0.0.1:7080");
    let address = problems.take(key, parsed.map_err(wrong))?;
    if !address.ip().is_loopback() && tls.certificate.is_none() {
        problems.add(
            key,
            format!("`{address}` is not loopback, and plain text is for loopback only: give --tls-cert and --tls-key"),
        );
        return None;
    }
    Some(address)
}

pub(super) fn tls_files(problems: &mut Problems, raw: &Layer) -> TlsFiles {
    match (&raw.tls_cert, &raw.tls_key) {
        (Some(_), None) => problems.add("tls_key", "is required with tls_cert: the PEM key of the certificate"),
        (None, Some(_)) => problems.add("tls_cert", "is required with tls_key: the PEM certificate of the key"),
        _ => {}
    }
    let path = |text: &Option<String>| text.as_ref().map(PathBuf::from);
    TlsFiles { ca: path(&raw.tls_ca), certificate: path(&raw.tls_cert), key: path(&raw.tls_key) }
}
