//! PURE: the first request of an Exec, checked.

use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::{self, ExecRequest};

use crate::data_plane::status::Refusal;
use crate::driver::{ExecSpec, TerminalSize};

/// Arguments and variables together, in bytes: well below what Linux takes.
const MAX_ARGUMENTS: usize = 1 << 20;

/// What `start` asks for.
pub fn start(first: Option<ExecRequest>) -> Result<ExecSpec, Refusal> {
    let Some(ExecRequest { message: Some(Up::Start(start)) }) = first else {
        return Err(field("start", "must be the first message"));
    };
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
    Ok(ExecSpec {
        command: start.command,
        environment: start.environment.into_iter().collect(),
        working_directory: (!directory.is_empty()).then_some(directory),
        user: user(&start.user)?,
        terminal: start.terminal.map(|size| terminal("start.terminal", size)).transpose()?,
    })
}

/// A size that a terminal can have.
pub fn terminal(name: &'static str, size: v1::TerminalSize) -> Result<TerminalSize, Refusal> {
    let dimension = |n: u32| u16::try_from(n).ok().filter(|n| *n > 0);
    match (dimension(size.columns), dimension(size.rows)) {
        (Some(columns), Some(rows)) => Ok(TerminalSize { columns, rows }),
        _ => Err(field(name, "columns and rows must be 1 to 65535")),
    }
}

/// `uid` or `uid:gid`; a lone uid is its group too.
fn user(text: &str) -> Result<(u32, u32), Refusal> {
    if text.is_empty() {
        return Ok((0, 0));
    }
    let number = |part: &str| part.parse::<u32>().ok().filter(|n| *n <= 65_534);
    let parsed = match text.split_once(':') {
        Some((uid, gid)) => number(uid).zip(number(gid)),
        None => number(text).map(|uid| (uid, uid)),
    };
    parsed.ok_or_else(|| field("start.user", "must be `uid` or `uid:gid`, each 0 to 65534"))
}

pub fn field(field: &'static str, what: &str) -> Refusal {
    Refusal::Field { field, what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_proto::v1::ExecStart;

    fn parse(change: impl FnOnce(&mut ExecStart)) -> Result<ExecSpec, Refusal> {
        let mut wire = ExecStart { command: vec!["sh".into()], ..ExecStart::default() };
        change(&mut wire);
        start(Some(ExecRequest { message: Some(Up::Start(wire)) }))
    }

    fn refused(change: impl FnOnce(&mut ExecStart)) -> &'static str {
        match parse(change) {
            Err(Refusal::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_start_is_checked_field_by_field() {
        let spec = parse(|s| s.user = "1000".into()).expect("valid");
        assert_eq!((spec.user, spec.working_directory, spec.terminal), ((1000, 1000), None, None));
        assert_eq!(parse(|s| s.user = "1:2".into()).expect("valid").user, (1, 2));
        assert_eq!(refused(|s| s.command.clear()), "start.command");
        assert_eq!(refused(|s| s.command.push("a\0b".into())), "start");
        assert_eq!(refused(|s| drop(s.environment.insert("a=b".into(), String::new()))), "start.environment");
        assert_eq!(refused(|s| s.working_directory = "tmp".into()), "start.working_directory");
        assert_eq!(refused(|s| s.user = "root".into()), "start.user");
        assert_eq!(refused(|s| s.terminal = Some(v1::TerminalSize { columns: 0, rows: 1 })), "start.terminal");
        assert!(matches!(start(None), Err(Refusal::Field { field: "start", .. })));
    }
}
