//! What lies in a process's directory, `exec/<id>/` of its instance.
//!
//! ```text
//! about.json    what was asked for; written by the agent before it starts the shim
//! socket        where the shim answers; nobody answers there once the process ended and all attached had their output
//! process.json, pid, tty    while it is being started
//! inner.pid, log            where the runtime must be asked to signal it
//! end           how it ended, and the output that was held then; appears whole
//! ```
//! The directory appears with `about.json` and `socket` in it, so its name is a claim. Nothing here is synced: it is worth
//! nothing after the host went down, when the process did too.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::driver::process::{ProcessSpec, ProcessStatus, Stream, TerminalSize};

pub const ABOUT: &str = "about.json";
pub const SOCKET: &str = "socket";
pub const PROCESS: &str = "process.json";
pub const PID: &str = "pid";
/// Of a process that the host does not see; needed until it ends.
pub const INNER_PID: &str = "inner.pid";
pub const LOG: &str = "log";
pub const TTY: &str = "tty";
pub const END: &str = "end";

/// Version of the files here. A higher one was written by a newer build.
const VERSION: u32 = 1;

/// Longest first line of `end`: a command of 1 MiB, and as many pieces of output as a ring holds.
const MAX_HEADER: u64 = 8 << 20;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    version: u32,
    pub id: String,
    /// Of the whole specification: the same again is answered, another is refused.
    pub fingerprint: String,
    pub command: Vec<String>,
    pub working_directory: String,
    pub user: String,
    pub terminal: Option<TerminalSize>,
    pub kill_on_disconnect: bool,
    pub no_stdin: bool,
    pub timeout: Option<Duration>,
}

impl About {
    pub fn new(spec: &ProcessSpec, working_directory: String) -> Self {
        Self {
            version: VERSION,
            id: spec.id.clone(),
            fingerprint: fingerprint(spec),
            command: spec.exec.command.clone(),
            working_directory,
            user: spec.exec.user.clone(),
            terminal: spec.exec.terminal,
            kill_on_disconnect: spec.kill_on_disconnect,
            no_stdin: spec.no_stdin,
            timeout: spec.timeout,
        }
    }

    pub fn read(directory: &Path) -> io::Result<Self> {
        let about: Self = serde_json::from_slice(&fs::read(directory.join(ABOUT))?)?;
        supported(about.version)?;
        Ok(about)
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        create(&directory.join(ABOUT))?.write_all(&serde_json::to_vec(self)?)
    }
}

/// Says whether two specifications are the same.
pub fn fingerprint(spec: &ProcessSpec) -> String {
    let bytes = serde_json::to_vec(spec).expect("plain data becomes JSON");
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    status: ProcessStatus,
    /// Lengths of the pieces of output that follow.
    pieces: Vec<(Stream, u64)>,
}

/// A process that ended.
#[derive(Debug)]
pub struct End {
    pub status: ProcessStatus,
    /// The pieces that are not read yet.
    pub pieces: Vec<(Stream, u64)>,
    pub output: BufReader<File>,
}

impl End {
    /// `None`: it has not ended.
    pub fn open(directory: &Path) -> io::Result<Option<Self>> {
        let mut output = match File::open(directory.join(END)) {
            Ok(file) => BufReader::new(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut line = Vec::new();
        (&mut output).take(MAX_HEADER).read_until(b'\n', &mut line)?;
        let Header { version, status, pieces } = serde_json::from_slice(&line)?;
        supported(version)?;
        Ok(Some(Self { status, pieces, output }))
    }

    /// Writes down the end. `output` lies in two parts.
    pub fn write(
        directory: &Path,
        status: &ProcessStatus,
        pieces: Vec<(Stream, u64)>,
        (first, second): (&[u8], &[u8]),
    ) -> io::Result<()> {
        let temporary = directory.join("end.tmp");
        let mut file = create(&temporary)?;
        let mut line = serde_json::to_vec(&Header { version: VERSION, status: status.clone(), pieces })?;
        line.push(b'\n');
        file.write_all(&line)?;
        file.write_all(first)?;
        file.write_all(second)?;
        fs::rename(temporary, directory.join(END))
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().create(true).write(true).truncate(true).mode(0o600).open(path)
}

fn supported(version: u32) -> io::Result<()> {
    if version == VERSION {
        return Ok(());
    }
    let what = format!("written in format {version}, this build reads format {VERSION}");
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this build wrote to disk when the format was fixed. If this test fails, a new build can no longer read what an
    /// old build's shims leave: add a version instead.
    #[test]
    fn the_formats_on_disk_stay_readable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let about = r#"{"version":1,"id":"p","fingerprint":"f","command":["sh"],"working_directory":"/","user":"",
            "terminal":{"columns":80,"rows":24},"kill_on_disconnect":true,"no_stdin":false,"timeout":{"secs":3,"nanos":0}}"#;
        fs::write(dir.path().join(ABOUT), about).expect("writes");
        let about = About::read(dir.path()).expect("readable");
        assert_eq!((about.id.as_str(), about.timeout), ("p", Some(Duration::from_secs(3))));
        let end = concat!(
            r#"{"version":1,"status":{"id":"p","command":["sh"],"working_directory":"/","user":"","terminal":false,"#,
            r#""kill_on_disconnect":false,"timeout":null,"started_ms":1,"ended_ms":2,"#,
            r#""exit":{"code":137,"signal":9,"oom_killed":true},"timed_out":false,"output_start":4,"output_end":6,"#,
            r#""attached":false},"pieces":[["Stdout",1],["Stderr",1]]}"#,
            "\nab"
        );
        fs::write(dir.path().join(END), end).expect("writes");
        let mut end = End::open(dir.path()).expect("readable").expect("ended");
        assert_eq!(end.status.exit.map(|exit| (exit.code, exit.signal, exit.oom_killed)), Some((137, 9, true)));
        assert_eq!(end.pieces, [(Stream::Stdout, 1), (Stream::Stderr, 1)]);
        let mut output = String::new();
        end.output.read_to_string(&mut output).expect("reads");
        assert_eq!(output, "ab");
    }

    #[test]
    fn a_torn_end_is_an_error_and_none_is_none() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert!(End::open(dir.path()).expect("nothing").is_none());
        fs::write(dir.path().join(END), "{\"version\":1,").expect("writes");
        assert!(End::open(dir.path()).is_err());
    }
}
