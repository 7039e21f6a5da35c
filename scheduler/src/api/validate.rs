//! What requests say, parsed once into the domain's types. Every refusal names the field and says what would be right.

use std::collections::BTreeMap;

use prost::Message;
use sha2::{Digest as _, Sha256};
use tonic::Status;
use uuid::{Uuid, Version};
use warren_proto::ids::{Digest, IdError, SandboxId, SandboxName, TemplateId, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};
use warren_proto::v1;

use super::status::invalid_field;
use crate::state::command::{RequestKey, TemplateSpec};
use crate::state::sandbox::SandboxSpec;

/// Most bytes of a specification, encoded (section 6 of the design).
const MAX_SPEC_BYTES: usize = 16 * 1024;

const MAX_ARGUMENTS: usize = 256;
const MAX_ENVIRONMENT: usize = 256;
const MAX_LABELS: usize = 64;

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
        let made = format!("s-{:020x}", rand::random::<u128>() >> 48);
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

/// What a client may say of a new sandbox; output-only fields are ignored (google.aip.dev/203).
pub fn sandbox_spec(sandbox: &v1::Sandbox) -> Result<SandboxSpec, Status> {
    let template = TemplateId::from_name(&sandbox.template).map_err(id_error("sandbox.template"))?;
    command("sandbox.command", &sandbox.command)?;
    environment("sandbox.environment", &sandbox.environment)?;
    directory("sandbox.working_directory", &sandbox.working_directory)?;
    labels("sandbox.labels", &sandbox.labels)?;
    let (resources, pids) = resources(&sandbox.resources.unwrap_or_default())?;
    bounded(sandbox.encoded_len(), "sandbox")?;
    Ok(SandboxSpec {
        template,
        command: sandbox.command.clone(),
        environment: sandbox.environment.clone(),
        working_directory: sandbox.working_directory.clone(),
        labels: sandbox.labels.clone(),
        resources,
        pids,
    })
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

fn labels(field: &str, labels: &BTreeMap<String, String>) -> Result<(), Status> {
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
    Ok(())
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

    fn violated(sandbox: &v1::Sandbox) -> String {
        use tonic_types::StatusExt;
        let status = sandbox_spec(sandbox).unwrap_err();
        status.get_details_bad_request().unwrap().field_violations[0].field.clone()
    }

    #[test]
    fn what_is_not_said_takes_the_default() {
        let spec = sandbox_spec(&sandbox()).unwrap();
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
        let resources = |r: v1::Resources| violated(&v1::Sandbox { resources: Some(r), ..sandbox() });
        let none = v1::Resources::default();
        assert_eq!(resources(v1::Resources { cpu_milli: -1, ..none }), "sandbox.resources.cpu_milli");
        assert_eq!(resources(v1::Resources { memory_bytes: 1, ..none }), "sandbox.resources.memory_bytes");
        assert_eq!(resources(v1::Resources { pids: i64::MAX, ..none }), "sandbox.resources.pids");
        assert_eq!(wrong(|s| drop(s.environment.insert("A".into(), "x".repeat(20_000)))), "sandbox");
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
            assert_eq!(sandbox_id("").unwrap().as_str().len(), 22);
        }
    }
}
