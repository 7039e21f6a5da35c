//! PURE: what clients ask of processes, checked.

use std::time::Duration;

use warren_proto::v1::{self, ExecStart, StartProcessRequest};

use crate::data_plane::status::Refusal;
use crate::driver::oci::users::User;
use crate::driver::{ExecSpec, ProcessSpec, TerminalSize};

/// Arguments and variables together, in bytes: well below what Linux takes.
const MAX_ARGUMENTS: usize = 1 << 20;

/// Longest name of a process: that of a host.
const MAX_ID: usize = 63;

/// Longest name of a user: what Linux's tools take.
const MAX_USER: usize = 32;

/// Longest time-out: a year, which is as good as none.
const MAX_TIMEOUT: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Length of an id that is made here: 48 random bits, of at most some hundred in a sandbox.
const NEW_ID: usize = 12;

/// Highest signal number on Linux.
const MAX_SIGNAL: u8 = 64;

/// A process to start that nobody need be attached to.
pub fn process(request: StartProcessRequest) -> Result<ProcessSpec, Refusal> {
    let StartProcessRequest { process_id, start: exec, kill_on_disconnect, no_stdin } = request;
    let id = if process_id.is_empty() { new_id() } else { id("process_id", process_id)? };
    let (exec, timeout) = start(exec.ok_or_else(|| field("start", "must be set"))?)?;
    Ok(ProcessSpec { id, exec, kill_on_disconnect, no_stdin, timeout })
}

/// An id that no other process has.
pub fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..NEW_ID].to_owned()
}

/// An id as clients may choose one.
pub fn id(name: &'static str, id: String) -> Result<String, Refusal> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = id.bytes().next().zip(id.bytes().last()).is_some_and(|(first, last)| plain(first) && plain(last));
    if ends && id.len() <= MAX_ID && id.bytes().all(|byte| plain(byte) || byte == b'-') {
        return Ok(id);
    }
    Err(field(name, "must be 1 to 63 of a-z, 0-9 and `-`, beginning and ending with a letter or digit"))
}

/// A signal number.
pub fn signal(signal: i32) -> Result<u8, Refusal> {
    let known = u8::try_from(signal).ok().filter(|signal| (1..=MAX_SIGNAL).contains(signal));
    known.ok_or_else(|| field("signal", "must be 1 to 64"))
}

/// What to execute, and for how long.
pub fn start(start: ExecStart) -> Result<(ExecSpec, Option<Duration>), Refusal> {
    let texts = || start.command.iter().chain(start.environment.keys()).chain(start.environment.values());
    if start.command.first().is_none_or(String::is_empty) {
        return Err(field("start.command", "must name a program"));
    }
    if texts().any(|text| text.contains('\0')) || texts().map(String::len).sum::<usize>() > MAX_ARGUMENTS {
        return Err(field("start", "command and environment must be free of NUL and at most 1 MiB"));
    }
    if start.environment.keys().any(|key| key.is_empty() || key.contains('=')) {
        return Err(field("start.environment", "a variable's name must be neither empty nor hold `=`"));
    }
    let directory = start.working_directory;
    if !directory.is_empty() && (!directory.starts_with('/') || directory.contains('\0')) {
        return Err(field("start.working_directory", "must be an absolute path"));
    }
    // Sorted: the same request again is the same specification.
    let mut environment: Vec<(String, String)> = start.environment.into_iter().collect();
    environment.sort();
    let exec = ExecSpec {
        command: start.command,
        environment,
        working_directory: (!directory.is_empty()).then_some(directory),
        user: user(start.user)?,
        terminal: start.terminal.map(|size| terminal("start.terminal", size)).transpose()?,
    };
    Ok((exec, start.timeout.map(timeout).transpose()?))
}

fn timeout(wire: prost_types::Duration) -> Result<Duration, Refusal> {
    let duration = Duration::try_from(wire).ok().filter(|d| !d.is_zero() && *d <= MAX_TIMEOUT);
    duration.ok_or_else(|| field("start.timeout", "must be more than 0 and at most 366 days"))
}

/// A size that a terminal can have.
pub fn terminal(name: &'static str, size: v1::TerminalSize) -> Result<TerminalSize, Refusal> {
    let dimension = |n: u32| u16::try_from(n).ok().filter(|n| *n > 0);
    match (dimension(size.columns), dimension(size.rows)) {
        (Some(columns), Some(rows)) => Ok(TerminalSize { columns, rows }),
        _ => Err(field(name, "columns and rows must be 1 to 65535")),
    }
}

/// Numbers, or what can be a user's name; whether there is such a user only the sandbox knows.
fn user(text: String) -> Result<String, Refusal> {
    let numbers = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b':');
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$".contains(&byte);
    let name = text.len() <= MAX_USER && !text.starts_with('-') && text.bytes().all(letter);
    if User::parse(&text).is_some() || (name && !numbers) {
        return Ok(text);
    }
    Err(field("start.user", "must be `uid` or `uid:gid`, each 0 to 65534, or a name of the sandbox's /etc/passwd"))
}

pub fn field(field: &'static str, what: &str) -> Refusal {
    Refusal::Field { field, what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl FnOnce(&mut ExecStart)) -> Result<(ExecSpec, Option<Duration>), Refusal> {
        let mut wire = ExecStart { command: vec!["sh".into()], ..ExecStart::default() };
        change(&mut wire);
        start(wire)
    }

    fn refused(change: impl FnOnce(&mut ExecStart)) -> &'static str {
        match parse(change) {
            Err(Refusal::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_start_is_checked_field_by_field() {
        let (spec, timeout) = parse(|s| s.user = "1000".into()).expect("valid");
        assert_eq!((spec.user.as_str(), spec.working_directory, spec.terminal, timeout), ("1000", None, None, None));
        for user in ["", "1:2", "www-data", "a.b_c", "0"] {
            assert_eq!(parse(|s| s.user = user.into()).expect("valid").0.user, user);
        }
        for user in ["65535", "1:", "1:web", "-x", "a b", "a/b", &"x".repeat(33)] {
            assert_eq!(refused(|s| s.user = user.into()), "start.user", "{user}");
        }
        let long = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        assert_eq!(parse(|s| s.timeout = long(3)).expect("valid").1, Some(Duration::from_secs(3)));
        for seconds in [0, -1, i64::MAX] {
            assert_eq!(refused(|s| s.timeout = long(seconds)), "start.timeout");
        }
        assert_eq!(refused(|s| s.command.clear()), "start.command");
        assert_eq!(refused(|s| s.command.push("a\0b".into())), "start");
        assert_eq!(refused(|s| drop(s.environment.insert("a=b".into(), String::new()))), "start.environment");
        assert_eq!(refused(|s| s.working_directory = "tmp".into()), "start.working_directory");
        assert_eq!(refused(|s| s.terminal = Some(v1::TerminalSize { columns: 0, rows: 1 })), "start.terminal");
    }

    #[test]
    fn an_id_is_a_plain_name_and_one_is_made_where_none_is_chosen() {
        for good in ["a", "0", "a-b", &"x".repeat(63)] {
            assert!(id("process_id", good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "-", "a-", "A", "a.b", "../a", "a/b", &"x".repeat(64)] {
            assert!(id("process_id", bad.to_owned()).is_err(), "{bad}");
        }
        let request = |id: &str| StartProcessRequest {
            process_id: id.into(),
            start: Some(ExecStart { command: vec!["sh".into()], ..ExecStart::default() }),
            ..StartProcessRequest::default()
        };
        assert_eq!(process(request("web")).expect("valid").id, "web");
        let made = process(request("")).expect("valid").id;
        assert_eq!(id("process_id", made.clone()).expect("valid"), made);
        assert!(process(StartProcessRequest::default()).is_err());
    }
}
