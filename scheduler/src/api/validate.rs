//! What requests say, parsed once into the domain's types. Every refusal names the field and says what would be right.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use prost::Message;
use sha2::{Digest as _, Sha256};
use tonic::Status;
use uuid::{Uuid, Version};
use warren_proto::ids::{Digest, IdError, SandboxId, SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_proto::v1;

use super::status::invalid_field;
use crate::clock;
use crate::state::command::{Change, LogTime, RequestKey, TemplateSpec};
use crate::state::pairs::Pairs;
use crate::state::sandbox::SandboxSpec;
use crate::state::settings::{Egress, Expiry, Isolation, MAX_PRIORITY, Restart, Settings};
use crate::state::tenant::Quota;

/// Most bytes of a specification, encoded (section 6 of the design).
const MAX_SPEC_BYTES: usize = 16 * 1024;

const MAX_ARGUMENTS: usize = 256;
const MAX_ENVIRONMENT: usize = 256;
const MAX_LABELS: usize = 64;

/// Longest key of an annotation; its value is bounded by the specification.
const MAX_ANNOTATION_KEY: usize = 253;

/// Most destinations of an egress list.
const MAX_EGRESS: usize = 64;

/// Ten years, in ms.
const MAX_TIME_MS: u64 = 10 * 366 * 24 * 60 * 60 * 1000;

/// The last moment of the year 9999 (google.protobuf.Timestamp).
const MAX_TIMESTAMP_MS: u64 = 253_402_300_799_999;

/// Longest label key or value: as in Kubernetes.
const MAX_LABEL_LENGTH: usize = 63;

const DEFAULT_CPU_MILLI: u64 = 250;
const DEFAULT_MEMORY: u64 = 256 * Bytes::MIB;
const DEFAULT_DISK: u64 = Bytes::GIB;
const DEFAULT_PIDS: u64 = 256;

/// Smallest that a runtime and a shell start with.
const MIN_CPU_MILLI: u64 = 10;
const MIN_MEMORY: u64 = 16 * Bytes::MIB;
const MIN_DISK: u64 = Bytes::MIB;
const MIN_PIDS: u64 = 16;

/// Largest: above any host.
const MAX_CPU_MILLI: u64 = 10_000_000;
const MAX_MEMORY: u64 = 1 << 50;
const MAX_DISK: u64 = 1 << 50;
const MAX_PIDS: u64 = 32_768;
const MAX_GPUS: u64 = 1024;

/// Largest template: an honest root file system is far below, and every node keeps it twice.
const MAX_TEMPLATE_BYTES: i64 = 64 << 30;

pub fn id_error(field: &str) -> impl Fn(IdError) -> Status {
    move |error| invalid_field(field, error.to_string())
}

/// `tenants/{tenant}`, or `None` for `tenants/-`.
pub fn parent(text: &str) -> Result<Option<TenantId>, Status> {
    if text == "tenants/-" {
        return Ok(None);
    }
    TenantId::from_name(text).map(Some).map_err(id_error("parent"))
}

pub fn one_tenant(text: &str) -> Result<TenantId, Status> {
    TenantId::from_name(text).map_err(id_error("parent"))
}

pub fn sandbox_name(text: &str) -> Result<SandboxName, Status> {
    SandboxName::parse(text).map_err(id_error("name"))
}

/// The caller's id for the sandbox, or a new one of 80 random bits.
pub fn sandbox_id(text: &str) -> Result<SandboxId, Status> {
    if text.is_empty() {
        // Time first: what is made together stands together, in state and in lists, and is copied once for many.
        let made = format!("s-{:012x}{:012x}", clock::log_time().0, rand::random::<u64>() >> 16);
        return SandboxId::parse(&made).map_err(id_error("sandbox_id"));
    }
    SandboxId::parse(text).map_err(id_error("sandbox_id"))
}

/// The request's key: its id, with a hash of everything else in it. Empty: none.
pub fn request_key<M: Message>(request_id: &str, without_id: &M) -> Result<Option<RequestKey>, Status> {
    if request_id.is_empty() {
        return Ok(None);
    }
    let wrong = || invalid_field("request_id", "must be a UUIDv7 (RFC 9562), a new one for each new request");
    let id = Uuid::parse_str(request_id).map_err(|_| wrong())?;
    if id.get_version() != Some(Version::SortRand) {
        return Err(wrong());
    }
    let payload = Sha256::digest(without_id.encode_to_vec()).into();
    Ok(Some(RequestKey { id: id.as_u128(), payload }))
}

/// Makes a variable's value unreadable.
type Seal<'a> = dyn Fn(&str, &str) -> Result<Vec<u8>, Status> + 'a;

/// What a client may say of a new sandbox; output-only fields are ignored (google.aip.dev/203). `seal` makes a secret's value
/// unreadable.
pub fn sandbox_spec(sandbox: &v1::Sandbox, seal: &Seal) -> Result<SandboxSpec, Status> {
    let template = TemplateId::from_name(&sandbox.template).map_err(id_error("sandbox.template"))?;
    command("sandbox.command", &sandbox.command)?;
    environment("sandbox.environment", &sandbox.environment)?;
    environment("sandbox.secret_environment", &sandbox.secret_environment)?;
    if let Some(both) = sandbox.secret_environment.keys().find(|key| sandbox.environment.contains_key(*key)) {
        let right = format!("`{both}` stands in `environment` too: name it in one of them");
        return Err(invalid_field("sandbox.secret_environment", right));
    }
    directory("sandbox.working_directory", &sandbox.working_directory)?;
    let (resources, pids) = resources(&sandbox.resources.unwrap_or_default())?;
    bounded(sandbox.encoded_len(), "sandbox")?;
    if sandbox.on_deadline() == v1::OnDeadline::Hibernate {
        return Err(invalid_field("sandbox.on_deadline", "this version cannot hibernate: use DELETE"));
    }
    let sealed = sandbox.secret_environment.iter().map(|(key, value)| Ok((key.clone(), seal(key, value)?)));
    Ok(SandboxSpec {
        template,
        command: sandbox.command.clone(),
        environment: sandbox.environment.clone().into_iter().collect(),
        secrets: sealed.collect::<Result<_, Status>>()?,
        working_directory: sandbox.working_directory.clone(),
        resources,
        pids,
        restart: restart("sandbox.restart_policy", sandbox.restart_policy)?,
        isolation: isolation("sandbox.on_isolation", sandbox.on_isolation)?,
        queue_timeout_ms: sandbox.queue_timeout.map(|wire| millis("sandbox.queue_timeout", wire)).transpose()?,
        settings: Settings {
            labels: labels("sandbox.labels", &sandbox.labels)?,
            annotations: annotations("sandbox.annotations", &sandbox.annotations)?,
            expiry: expiry(sandbox)?,
            egress: egress(sandbox.egress.as_ref())?,
            priority: priority(sandbox.priority)?,
        },
    })
}

/// What an update may change: the fields that its mask names.
pub fn change(sandbox: &v1::Sandbox, mask: Option<prost_types::FieldMask>) -> Result<Change, Status> {
    let mut change = Change::default();
    let paths = mask.unwrap_or_default().paths;
    if paths.is_empty() {
        return Err(invalid_field("update_mask", "must name at least one field"));
    }
    for path in paths {
        match path.as_str() {
            "labels" => change.labels = Some(labels("sandbox.labels", &sandbox.labels)?),
            "annotations" => change.annotations = Some(annotations("sandbox.annotations", &sandbox.annotations)?),
            "deadline" | "ttl" => change.expiry = Some(expiry(sandbox)?),
            "egress" => change.egress = Some(egress(sandbox.egress.as_ref())?),
            "priority" => change.priority = Some(priority(sandbox.priority)?),
            other => {
                let right = "may name `labels`, `annotations`, `deadline`, `ttl`, `egress` and `priority`";
                return Err(invalid_field("update_mask", format!("`{other}` cannot be changed: it {right}")));
            }
        }
    }
    bounded(sandbox.encoded_len(), "sandbox")?;
    Ok(change)
}

/// The revision that an etag stands for; `None` where it is empty.
pub fn etag(text: &str) -> Result<Option<u64>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    // Revisions begin at 1.
    let revision = text.parse().ok().filter(|revision| *revision > 0);
    revision.map(Some).ok_or_else(|| invalid_field("sandbox.etag", "must be one that a reply gave"))
}

/// Names of states, as a filter has them.
pub fn states(wire: &[i32]) -> Result<BTreeSet<v1::SandboxState>, Status> {
    let state = |value: &i32| match v1::SandboxState::try_from(*value) {
        Ok(v1::SandboxState::Unspecified) | Err(_) => Err(invalid_field("states", "must be states of sandboxes")),
        Ok(state) => Ok(state),
    };
    wire.iter().map(state).collect()
}

pub fn quota(wire: &v1::Quota) -> Result<Quota, Status> {
    let limit = |field: &str, value: Option<i64>| {
        let wrong = |_| invalid_field(&format!("quota.{field}"), "must not be negative; leave it out for no limit");
        value.map(|value| u64::try_from(value).map_err(wrong)).transpose()
    };
    Ok(Quota {
        cpu: limit("cpu_milli", wire.cpu_milli)?.map(MilliCpu),
        memory: limit("memory_bytes", wire.memory_bytes)?.map(Bytes),
        disk: limit("disk_bytes", wire.disk_bytes)?.map(Bytes),
        gpus: limit("gpus", wire.gpus)?.map(Gpus),
        sandboxes: limit("sandboxes", wire.sandboxes)?,
        creates_per_minute: limit("creates_per_minute", wire.creates_per_minute)?,
    })
}

/// A positive time, in ms.
pub fn millis(field: &str, wire: prost_types::Duration) -> Result<u64, Status> {
    let wrong = || invalid_field(field, "must be more than 0 and at most 10 years");
    let ms = std::time::Duration::try_from(wire).map_err(|_| wrong())?.as_millis();
    u64::try_from(ms).ok().filter(|ms| (1..=MAX_TIME_MS).contains(ms)).ok_or_else(wrong)
}

fn expiry(sandbox: &v1::Sandbox) -> Result<Expiry, Status> {
    match (sandbox.deadline, sandbox.ttl) {
        (None, None) => Ok(Expiry::Never),
        (None, Some(ttl)) => Ok(Expiry::After(millis("sandbox.ttl", ttl)?)),
        (Some(at), None) => {
            let ms = i128::from(at.seconds) * 1000 + i128::from(at.nanos) / 1_000_000;
            let at = u64::try_from(ms).ok().filter(|ms| *ms <= MAX_TIMESTAMP_MS);
            at.map(|at| Expiry::At(LogTime(at)))
                .ok_or_else(|| invalid_field("sandbox.deadline", "must lie between 1970 and the year 9999"))
        }
        (Some(_), Some(_)) => Err(invalid_field("sandbox.ttl", "give `ttl` or `deadline`, not both")),
    }
}

fn priority(wire: i32) -> Result<u8, Status> {
    let priority = u8::try_from(wire).ok().filter(|priority| *priority <= MAX_PRIORITY);
    priority.ok_or_else(|| invalid_field("sandbox.priority", format!("must be from 0 to {MAX_PRIORITY}")))
}

fn restart(field: &str, wire: i32) -> Result<Restart, Status> {
    match v1::RestartPolicy::try_from(wire) {
        Ok(v1::RestartPolicy::Unspecified | v1::RestartPolicy::Never) => Ok(Restart::Never),
        Ok(v1::RestartPolicy::OnFailure) => Ok(Restart::OnFailure),
        Ok(v1::RestartPolicy::Always) => Ok(Restart::Always),
        Err(_) => Err(invalid_field(field, "must be NEVER, ON_FAILURE or ALWAYS")),
    }
}

fn isolation(field: &str, wire: i32) -> Result<Isolation, Status> {
    match v1::OnIsolation::try_from(wire) {
        Ok(v1::OnIsolation::Unspecified | v1::OnIsolation::Keep) => Ok(Isolation::Keep),
        Ok(v1::OnIsolation::Freeze) => Ok(Isolation::Freeze),
        Err(_) => Err(invalid_field(field, "must be KEEP or FREEZE")),
    }
}

fn egress(wire: Option<&v1::Egress>) -> Result<Egress, Status> {
    let Some(wire) = wire else { return Ok(Egress::None) };
    let mode = wire.mode();
    if mode != v1::EgressMode::List && !wire.allow.is_empty() {
        return Err(invalid_field("sandbox.egress.allow", "goes with mode LIST only"));
    }
    match mode {
        v1::EgressMode::Unspecified | v1::EgressMode::None => Ok(Egress::None),
        v1::EgressMode::Public => Ok(Egress::Public),
        v1::EgressMode::List if wire.allow.is_empty() || wire.allow.len() > MAX_EGRESS => {
            Err(invalid_field("sandbox.egress.allow", format!("must name 1 to {MAX_EGRESS} destinations")))
        }
        v1::EgressMode::List => {
            wire.allow.iter().try_for_each(|entry| destination(entry))?;
            Ok(Egress::List(wire.allow.clone()))
        }
    }
}

/// `host`, `host:port`, `address/bits` or `address/bits:port`; IPv6 addresses stand in brackets before a port.
fn destination(text: &str) -> Result<(), Status> {
    let wrong = || {
        let right = "must be `host`, `host:port`, `address/bits` or `address/bits:port`";
        invalid_field("sandbox.egress.allow", format!("`{text}` {right}"))
    };
    let (place, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inside, rest)) => (inside, rest.strip_prefix(':')),
        None if text.matches(':').count() == 1 => text.split_once(':').map_or((text, None), |(h, p)| (h, Some(p))),
        None => (text, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
        return Err(wrong());
    }
    let legal = match place.split_once('/') {
        Some((address, bits)) => match (address.parse::<IpAddr>(), bits.parse::<u8>()) {
            (Ok(IpAddr::V4(_)), Ok(bits)) => bits <= 32,
            (Ok(IpAddr::V6(_)), Ok(bits)) => bits <= 128,
            _ => false,
        },
        None => place.parse::<IpAddr>().is_ok() || is_host_name(place),
    };
    if legal { Ok(()) } else { Err(wrong()) }
}

/// RFC 1123: labels of letters, digits and `-`.
fn is_host_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn annotations(field: &str, annotations: &BTreeMap<String, String>) -> Result<Pairs, Status> {
    if annotations.len() > MAX_LABELS {
        return Err(invalid_field(field, format!("at most {MAX_LABELS} annotations")));
    }
    if annotations.keys().any(|key| key.is_empty() || key.len() > MAX_ANNOTATION_KEY) {
        return Err(invalid_field(field, format!("a key is 1 to {MAX_ANNOTATION_KEY} bytes")));
    }
    Ok(annotations.clone().into_iter().collect())
}

pub fn template_spec(template: &v1::Template) -> Result<TemplateSpec, Status> {
    command("template.default_command", &template.default_command)?;
    environment("template.environment", &template.environment)?;
    directory("template.working_directory", &template.working_directory)?;
    bounded(template.encoded_len(), "template")?;
    let directory = template.working_directory.as_str();
    Ok(TemplateSpec {
        digest: digest("template.digest", &template.digest)?,
        size_bytes: template_size("template.size_bytes", template.size_bytes)?,
        default_command: template.default_command.clone(),
        environment: template.environment.clone(),
        working_directory: if directory.is_empty() { "/".to_owned() } else { directory.to_owned() },
    })
}

pub fn digest(field: &str, text: &str) -> Result<Digest, Status> {
    Digest::parse(text).map_err(id_error(field))
}

pub fn template_size(field: &str, bytes: i64) -> Result<u64, Status> {
    match u64::try_from(bytes) {
        Ok(size) if (1..=MAX_TEMPLATE_BYTES).contains(&bytes) => Ok(size),
        _ => Err(invalid_field(field, format!("must be from 1 to {MAX_TEMPLATE_BYTES}"))),
    }
}

fn bounded(bytes: usize, field: &str) -> Result<(), Status> {
    if bytes <= MAX_SPEC_BYTES {
        return Ok(());
    }
    Err(invalid_field(field, format!("has {bytes} bytes encoded, at most {MAX_SPEC_BYTES} are allowed")))
}

fn no_nul(field: &str, text: &str) -> Result<(), Status> {
    if text.contains('\0') { Err(invalid_field(field, "must not contain a NUL character")) } else { Ok(()) }
}

fn command(field: &str, arguments: &[String]) -> Result<(), Status> {
    if arguments.len() > MAX_ARGUMENTS {
        return Err(invalid_field(field, format!("at most {MAX_ARGUMENTS} arguments")));
    }
    if arguments.first().is_some_and(String::is_empty) {
        return Err(invalid_field(field, "the program must not be empty"));
    }
    arguments.iter().try_for_each(|argument| no_nul(field, argument))
}

fn environment(field: &str, variables: &BTreeMap<String, String>) -> Result<(), Status> {
    if variables.len() > MAX_ENVIRONMENT {
        return Err(invalid_field(field, format!("at most {MAX_ENVIRONMENT} variables")));
    }
    for (key, value) in variables {
        if key.is_empty() || key.contains('=') {
            return Err(invalid_field(field, format!("`{key}`: a name must not be empty or contain `=`")));
        }
        no_nul(field, key)?;
        no_nul(field, value)?;
    }
    Ok(())
}

fn directory(field: &str, path: &str) -> Result<(), Status> {
    if !path.is_empty() && !path.starts_with('/') {
        return Err(invalid_field(field, "must be an absolute path"));
    }
    no_nul(field, path)
}

pub fn labels<M: FromIterator<(String, String)>>(field: &str, labels: &BTreeMap<String, String>) -> Result<M, Status> {
    if labels.len() > MAX_LABELS {
        return Err(invalid_field(field, format!("at most {MAX_LABELS} labels")));
    }
    let legal = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    for (key, value) in labels {
        if key.is_empty() || key.len() > MAX_LABEL_LENGTH || !legal(key) {
            let right = format!("`{key}`: a key is 1 to {MAX_LABEL_LENGTH} letters, digits, `-`, `_`, `.` and `/`");
            return Err(invalid_field(field, right));
        }
        if value.len() > MAX_LABEL_LENGTH || !legal(value) {
            let right = format!("`{key}`: a value is up to {MAX_LABEL_LENGTH} letters, digits, `-`, `_`, `.` and `/`");
            return Err(invalid_field(field, right));
        }
    }
    Ok(labels.clone().into_iter().collect())
}

fn resources(wire: &v1::Resources) -> Result<(Resources, u64), Status> {
    let cpu = amount("sandbox.resources.cpu_milli", wire.cpu_milli, DEFAULT_CPU_MILLI, MIN_CPU_MILLI, MAX_CPU_MILLI)?;
    let memory = amount("sandbox.resources.memory_bytes", wire.memory_bytes, DEFAULT_MEMORY, MIN_MEMORY, MAX_MEMORY)?;
    let disk = amount("sandbox.resources.disk_bytes", wire.disk_bytes, DEFAULT_DISK, MIN_DISK, MAX_DISK)?;
    let gpus = amount("sandbox.resources.gpus", wire.gpus, 0, 1, MAX_GPUS)?;
    let pids = amount("sandbox.resources.pids", wire.pids, DEFAULT_PIDS, MIN_PIDS, MAX_PIDS)?;
    Ok((Resources { cpu: MilliCpu(cpu), memory: Bytes(memory), disk: Bytes(disk), gpus: Gpus(gpus) }, pids))
}

fn amount(field: &str, value: i64, default: u64, least: u64, most: u64) -> Result<u64, Status> {
    match u64::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(invalid_field(field, format!("must be from {least} to {most}, or 0 for {default}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> v1::Sandbox {
        v1::Sandbox { template: "templates/python".into(), ..v1::Sandbox::default() }
    }

    fn no_secrets(_: &str, value: &str) -> Result<Vec<u8>, Status> {
        Ok(value.as_bytes().to_vec())
    }

    fn violated(sandbox: &v1::Sandbox) -> String {
        use tonic_types::StatusExt;
        let status = sandbox_spec(sandbox, &no_secrets).unwrap_err();
        status.get_details_bad_request().unwrap().field_violations[0].field.clone()
    }

    #[test]
    fn an_etag_is_a_revision_and_no_revision_is_0() {
        assert_eq!(etag("").unwrap(), None);
        assert_eq!(etag("12").unwrap(), Some(12));
        for wrong in ["0", "-1", "x", "1.5"] {
            assert!(etag(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_said_takes_the_default() {
        let spec = sandbox_spec(&sandbox(), &no_secrets).unwrap();
        assert_eq!(spec.resources.cpu, MilliCpu(DEFAULT_CPU_MILLI));
        assert_eq!(spec.pids, DEFAULT_PIDS);
    }

    #[test]
    fn every_refusal_names_the_field() {
        let wrong = |change: fn(&mut v1::Sandbox)| {
            let mut wrong = sandbox();
            change(&mut wrong);
            violated(&wrong)
        };
        assert_eq!(wrong(|s| s.template = "python".into()), "sandbox.template");
        assert_eq!(wrong(|s| s.command = vec![String::new()]), "sandbox.command");
        assert_eq!(wrong(|s| s.command = vec!["a\0b".into()]), "sandbox.command");
        assert_eq!(wrong(|s| s.command = vec!["x".into(); 257]), "sandbox.command");
        assert_eq!(wrong(|s| drop(s.environment.insert("A=B".into(), "".into()))), "sandbox.environment");
        assert_eq!(wrong(|s| s.working_directory = "tmp".into()), "sandbox.working_directory");
        assert_eq!(wrong(|s| drop(s.labels.insert("ä".into(), "".into()))), "sandbox.labels");
        let ms = |n: i32| prost_types::Duration { seconds: 0, nanos: n * 1_000_000 };
        assert_eq!(wrong(|s| s.priority = 101), "sandbox.priority");
        assert_eq!(wrong(|s| s.queue_timeout = Some(prost_types::Duration::default())), "sandbox.queue_timeout");
        assert_eq!(wrong(|s| s.restart_policy = 99), "sandbox.restart_policy");
        assert_eq!(wrong(|s| s.on_isolation = 99), "sandbox.on_isolation");
        assert_eq!(wrong(|s| s.on_deadline = v1::OnDeadline::Hibernate.into()), "sandbox.on_deadline");
        let both = v1::Sandbox { ttl: Some(ms(5)), deadline: Some(prost_types::Timestamp::default()), ..sandbox() };
        assert_eq!(violated(&both), "sandbox.ttl");
        let twice = BTreeMap::from([("A".to_owned(), String::new())]);
        let both = v1::Sandbox { environment: twice.clone(), secret_environment: twice, ..sandbox() };
        assert_eq!(violated(&both), "sandbox.secret_environment");
        let resources = |r: v1::Resources| violated(&v1::Sandbox { resources: Some(r), ..sandbox() });
        let none = v1::Resources::default();
        assert_eq!(resources(v1::Resources { cpu_milli: -1, ..none }), "sandbox.resources.cpu_milli");
        assert_eq!(resources(v1::Resources { memory_bytes: 1, ..none }), "sandbox.resources.memory_bytes");
        assert_eq!(resources(v1::Resources { pids: i64::MAX, ..none }), "sandbox.resources.pids");
        assert_eq!(wrong(|s| drop(s.environment.insert("A".into(), "x".repeat(20_000)))), "sandbox");
    }

    #[test]
    fn destinations_of_egress_are_hosts_and_networks() {
        for right in
            ["example.com", "example.com:443", "10.0.0.0/8", "10.0.0.0/8:80", "::1", "[2001:db8::]:443", "1.2.3.4:1"]
        {
            assert!(destination(right).is_ok(), "{right}");
        }
        for wrong in ["", "a b", "-x", "1.2.3.4/33", "x/8", "example.com:0", "example.com:99999", "a/b/c"] {
            assert!(destination(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_request_id_is_a_uuid_of_version_7() {
        let request = v1::DeleteSandboxRequest::default();
        assert!(request_key(&Uuid::now_v7().to_string(), &request).unwrap().is_some());
        assert!(request_key("", &request).unwrap().is_none());
        assert!(request_key(&Uuid::new_v4().to_string(), &request).is_err());
        assert!(request_key("rubbish", &request).is_err());
    }

    #[test]
    fn made_ids_are_valid() {
        for _ in 0..100 {
            assert_eq!(sandbox_id("").unwrap().as_str().len(), 26);
        }
    }
}
