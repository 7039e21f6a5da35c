//! An instance's shim: mounts its root file system, starts the main process, drains its output and writes down how it ended.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;

use super::children::{complaint, kill_children, read_available, read_pid, runtime, wait_for};
use super::{Report, Shim, failed, report};
use crate::clock;
use crate::driver::Stream;
use crate::driver::oci::log::LogWriter;
use crate::driver::oci::record::{ExitRecord, Record};
use crate::driver::oci::rootfs::{self, mount_rootfs};
use crate::driver::oci::{cgroup, ids, layout, lifeline};
use crate::failpoint;
use crate::network::inside::{self, Paths};
use crate::sys;

/// How much of a main process's output is kept: what `Ended` promises.
const OUTPUT_TAIL: usize = 4096;
/// How much is read at a time.
const READ_SIZE: usize = 16 << 10;

pub fn run(mut shim: Shim) -> io::Result<()> {
    failpoint::pass("shim.entered");
    let (output, main) = match start_instance(&shim.record) {
        Ok(started) => started,
        Err(failure) => {
            kill_children();
            report(&mut shim.agent, &failure);
            return Err(io::Error::other("not started"));
        }
    };
    report(&mut shim.agent, &Report::Started);
    failpoint::pass("shim.answered");
    drop(shim.agent);
    sys::drop_stdio()?;
    let tail = drain(output.outputs, &mut LogWriter::new(layout::LOGS.into()))?;
    let seen = wait_for(main)?;
    let exit = shim.record.kind.exit(seen, cgroup::oom_kills(&shim.record.oom_file) > 0);
    ExitRecord::new(exit, tail).write(Path::new("."))?;
    drop(output.alive);
    Ok(())
}

struct Held {
    outputs: [(Stream, io::PipeReader); 2],
    alive: File,
}

fn start_instance(record: &Record) -> Result<(Held, Pid), Report> {
    let step = |what: &'static str| move |e: io::Error| failed(what, &e);
    let alive = lifeline::hold(Path::new(layout::ALIVE)).map_err(step("hold the lifeline"))?;
    if !Path::new(layout::RECORD).exists() {
        return Err(failed("start", &io::ErrorKind::NotFound.into()));
    }
    failpoint::pass("shim.held");
    fs::write(layout::SHIM, std::process::id().to_string()).map_err(step("write down the shim's pid"))?;
    mount_rootfs(record).map_err(|e| failed(e.what, &e.source))?;
    failpoint::pass("shim.mounted");
    let joined = connect(record).map_err(step("connect the sandbox's network"))?;
    failpoint::pass("shim.connected");
    let (stdout, out) = io::pipe().map_err(step("make a pipe"))?;
    let (stderr, err) = io::pipe().map_err(step("make a pipe"))?;
    let mut command = runtime(record, "runtime.log");
    command.args(["run", "--detach", "--bundle", ".", "--pid-file", "main.pid", &record.container_id]);
    // An empty pipe, not /dev/null: crun gives what it finds here to the sandbox's root user, and that one is the host's.
    let (empty, _) = io::pipe().map_err(step("make a pipe"))?;
    command.stdin(empty).stdout(out).stderr(err);
    let status = command.status();
    rootfs::show_tmp(record);
    // It holds the writing ends of the pipes.
    drop(command);
    let failure = |what: String, output: String| Report::Failed { what, output };
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            kill_children();
            let printed = [read_available(stdout), read_available(stderr)].concat();
            return Err(failure(format!("{} run: {status}", record.runtime), complaint("runtime.log", &printed)));
        }
        Err(e) => return Err(failure(format!("run `{}`", record.runtime), e.to_string())),
    }
    failpoint::pass("shim.ran");
    if let Some(paths) = joined {
        paths.unbind().map_err(step("let go of the namespaces"))?;
    }
    let pid = read_pid("main.pid").map_err(step("read the main process's pid"))?;
    fs::write(layout::STARTED, pid.to_string()).map_err(step("write down the main process's pid"))?;
    failpoint::pass("shim.noted");
    Ok((Held { outputs: [(Stream::Stdout, stdout), (Stream::Stderr, stderr)], alive }, pid))
}

/// Makes the namespaces that the runtime is to join, and says where they are; `None`: there is no network.
fn connect(record: &Record) -> io::Result<Option<Paths>> {
    let Some(assigned) = &record.network else { return Ok(None) };
    let paths = Paths::new(record.rootfs.parent().ok_or(io::ErrorKind::InvalidInput)?);
    inside::prepare(assigned, &paths, record.first_id, ids::RANGE)?;
    inside::write_resolver(&record.rootfs, assigned.gateway, record.first_id)?;
    Ok(Some(paths))
}

/// Reads until every writer is gone, writes down what comes, and keeps the end.
fn drain(outputs: [(Stream, io::PipeReader); 2], log: &mut LogWriter) -> io::Result<Vec<u8>> {
    let mut outputs = Vec::from(outputs);
    let mut tail = VecDeque::with_capacity(OUTPUT_TAIL + READ_SIZE);
    let mut buffer = vec![0u8; READ_SIZE];
    while !outputs.is_empty() {
        let ready = ready(&outputs)?;
        let mut ended = Vec::new();
        for index in ready {
            let (stream, output) = &mut outputs[index];
            match output.read(&mut buffer) {
                Ok(0) => ended.push(index),
                Ok(count) => {
                    log.write(*stream, clock::unix_now_ms(), &buffer[..count]);
                    tail.extend(&buffer[..count]);
                    tail.drain(..tail.len().saturating_sub(OUTPUT_TAIL));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        for index in ended.into_iter().rev() {
            outputs.remove(index);
        }
    }
    Ok(tail.into())
}

/// Waits for output; which of them have some, or are at their end.
fn ready(outputs: &[(Stream, io::PipeReader)]) -> io::Result<Vec<usize>> {
    let mut fds: Vec<PollFd<'_>> = outputs.iter().map(|(_, output)| PollFd::new(output, PollFlags::IN)).collect();
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(fds.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty()).map(|(index, _)| index).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::driver::oci::log::LogReader;
    use crate::driver::{LogEvent, LogQuery};

    #[test]
    fn the_last_four_kib_are_kept_and_the_log_has_each_stream() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (stdout, mut out) = io::pipe().expect("a pipe");
        let (stderr, mut err) = io::pipe().expect("a pipe");
        let long: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        out.write_all(&long).expect("writes");
        drop(out);
        let mut log = LogWriter::new(dir.path().to_owned());
        let writing = std::thread::spawn(move || err.write_all(b"oops").expect("writes"));
        let tail = drain([(Stream::Stdout, stdout), (Stream::Stderr, stderr)], &mut log).expect("reads");
        writing.join().expect("wrote");
        assert_eq!(tail.len(), OUTPUT_TAIL);
        let mut reader = LogReader::new(dir.path().to_owned(), &LogQuery::default()).expect("opens");
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = reader.next().expect("reads") {
            let LogEvent::Entry { stream, data, .. } = event else { panic!("{event:?}") };
            if stream == Stream::Stdout { stdout.extend(data) } else { stderr.extend(data) }
        }
        assert_eq!((stdout, stderr.as_slice()), (long, &b"oops"[..]));
    }
}
