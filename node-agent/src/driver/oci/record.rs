//! What the driver and the shim write down about an instance, as JSON with a version.
//!
//! A file appears under its name only when it is whole: temporary file, rename. How a main process ended is on disk by then too;
//! a record need not be, since what it speaks of does not outlive the host's memory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use warren_proto::units::{Bytes, MilliCpu};

use super::kind::Kind;
use super::layout;
use crate::driver::stats::Limits;
use crate::driver::{Ended, Exit, InstanceSpec};
use crate::network::egress::Egress;
use crate::network::inside::Assigned;

/// Version of every file that this module writes. A higher one was written by a newer build.
const VERSION: u32 = 1;

/// What was asked for, and what was decided for it: all that the shim, a later agent and `exec` need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    pub sandbox: String,
    pub epoch: u64,
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub pids: u64,
    pub base: PathBuf,
    pub command: Vec<String>,
    pub environment: Vec<(String, String)>,
    pub working_directory: String,
    /// Id on the host of the instance's root user; the instance has [`super::ids::RANGE`] ids from there.
    pub first_id: u32,
    pub runtime: String,
    #[serde(default)]
    pub kind: Kind,
    pub runtime_root: PathBuf,
    pub container_id: String,
    /// Where the shim mounts the instance's root file system, in its own mount namespace.
    pub rootfs: PathBuf,
    /// File whose line `oom_kill N` counts processes killed for want of memory.
    pub oom_file: PathBuf,
    /// `None`: loopback only.
    #[serde(default)]
    pub network: Option<Assigned>,
    /// What it may reach at the start.
    #[serde(default)]
    pub egress: Egress,
}

/// What a [`Record`] says beside the specification.
#[derive(Debug, Clone)]
pub struct Decided {
    pub first_id: u32,
    pub runtime: String,
    pub kind: Kind,
    pub runtime_root: PathBuf,
    pub rootfs: PathBuf,
    pub oom_file: PathBuf,
    pub network: Option<Assigned>,
}

impl Record {
    pub fn new(spec: &InstanceSpec, decided: Decided) -> Self {
        Self {
            version: VERSION,
            sandbox: spec.key.sandbox.to_string(),
            epoch: spec.key.epoch.0,
            cpu_milli: spec.resources.cpu.0,
            memory_bytes: spec.resources.memory.0,
            disk_bytes: spec.resources.disk.0,
            pids: spec.pids,
            base: spec.base.clone(),
            command: spec.command.clone(),
            environment: spec.environment.clone(),
            working_directory: spec.working_directory.clone(),
            first_id: decided.first_id,
            runtime: decided.runtime,
            kind: decided.kind,
            runtime_root: decided.runtime_root,
            container_id: layout::container_id(&spec.key),
            rootfs: decided.rootfs,
            oom_file: decided.oom_file,
            network: decided.network,
            egress: spec.egress.clone(),
        }
    }

    pub fn limits(&self) -> Limits {
        Limits { cpu: MilliCpu(self.cpu_milli), memory: Bytes(self.memory_bytes), pids: self.pids }
    }

    /// The same with other limits.
    pub fn resized(self, limits: &Limits) -> Self {
        Self { cpu_milli: limits.cpu.0, memory_bytes: limits.memory.0, pids: limits.pids, ..self }
    }

    pub fn read(directory: &Path) -> io::Result<Self> {
        let record: Self = read(&directory.join(layout::RECORD))?;
        supported(record.version)?;
        Ok(record)
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        write(&directory.join(layout::RECORD), self, false)
    }
}

/// What an instance may reach, once that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRecord {
    version: u32,
    egress: Egress,
}

impl EgressRecord {
    pub fn new(egress: Egress) -> Self {
        Self { version: VERSION, egress }
    }

    /// `None`: it was never changed.
    pub fn read(directory: &Path) -> io::Result<Option<Egress>> {
        match read::<Self>(&directory.join(layout::EGRESS)) {
            Ok(record) => supported(record.version).map(|()| Some(record.egress)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        write(&directory.join(layout::EGRESS), self, false)
    }
}

/// How a main process ended, as its shim writes it down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    version: u32,
    pub code: i32,
    pub signal: i32,
    pub oom_killed: bool,
    /// Not text: whatever the process wrote.
    pub output_tail: Vec<u8>,
}

impl ExitRecord {
    pub fn new(exit: Exit, output_tail: Vec<u8>) -> Self {
        let Exit { code, signal, oom_killed } = exit;
        Self { version: VERSION, code, signal, oom_killed, output_tail }
    }

    /// `None`: not written yet.
    pub fn read(directory: &Path) -> io::Result<Option<Self>> {
        match read::<Self>(&directory.join(layout::EXIT)) {
            Ok(record) => supported(record.version).map(|()| Some(record)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        write(&directory.join(layout::EXIT), self, true)
    }
}

impl From<ExitRecord> for Ended {
    fn from(record: ExitRecord) -> Self {
        let ExitRecord { code, signal, oom_killed, output_tail, .. } = record;
        Self { exit: Exit { code, signal, oom_killed }, output_tail }
    }
}

fn supported(version: u32) -> io::Result<()> {
    if version == VERSION {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("written in format {version}, this build reads format {VERSION}"),
    ))
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn write<T: Serialize>(path: &Path, value: &T, durably: bool) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    if durably {
        file.sync_data()?;
    }
    fs::rename(&temporary, path)?;
    if !durably {
        return Ok(());
    }
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this build wrote to disk when the format was fixed. If this test fails, a new build can no longer read an old
    /// build's instances: add a version instead.
    #[test]
    fn the_formats_on_disk_stay_readable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let record = r#"{"version":1,"sandbox":"tenants/a/sandboxes/b","epoch":3,"cpu_milli":250,"memory_bytes":67108864,
            "disk_bytes":1,"pids":64,"base":"/t","command":["a","b"],"environment":[["K","V"]],"working_directory":"/",
            "first_id":100000,"runtime":"runc","runtime_root":"/r","container_id":"c","rootfs":"/run/x","oom_file":"/o"}"#;
        fs::write(dir.path().join(layout::RECORD), record).expect("write");
        let read = Record::read(dir.path()).expect("readable");
        assert_eq!((read.epoch, read.pids, read.first_id), (3, 64, 100_000));
        assert_eq!(read.environment, [("K".to_owned(), "V".to_owned())]);

        let exit = r#"{"version":1,"code":137,"signal":9,"oom_killed":true,"output_tail":[255,0]}"#;
        fs::write(dir.path().join(layout::EXIT), exit).expect("write");
        let ended: Ended = ExitRecord::read(dir.path()).expect("readable").expect("there").into();
        assert_eq!(ended.exit, Exit { code: 137, signal: 9, oom_killed: true });
        assert_eq!(ended.output_tail, [255, 0]);
    }

    #[test]
    fn an_exit_round_trips_and_another_version_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(ExitRecord::read(dir.path()).expect("readable"), None);
        let record = ExitRecord::new(Exit { code: 3, ..Exit::default() }, b"bye".to_vec());
        record.write(dir.path()).expect("write");
        assert_eq!(ExitRecord::read(dir.path()).expect("readable"), Some(record.clone()));
        ExitRecord { version: 2, ..record }.write(dir.path()).expect("write");
        assert!(ExitRecord::read(dir.path()).is_err());
    }
}
