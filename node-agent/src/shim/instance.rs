//! An instance's shim: mounts its root file system, starts the main process, drains its output and writes down how it ended.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use rustix::process::Pid;

use super::children::{complaint, kill_children, read_available, read_pid, runtime, wait_for};
use super::{Report, Shim, failed, report};
use crate::driver::oci::record::{ExitRecord, Record};
use crate::driver::oci::rootfs::{self, mount_rootfs};
use crate::driver::oci::{cgroup, layout, lifeline};
use crate::failpoint;
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
    let tail = drain(output.main)?;
    let seen = wait_for(main)?;
    let exit = shim.record.kind.exit(seen, cgroup::oom_kills(&shim.record.oom_file) > 0);
    ExitRecord::new(exit, tail).write(Path::new("."))?;
    drop(output.alive);
    Ok(())
}

struct Held {
    main: io::PipeReader,
    alive: File,
}

fn start_instance(record: &Record) -> Result<(Held, Pid), Report> {
    let step = |what: &'static str| move |e: io::Error| failed(what, &e);
    let alive = lifeline::hold(Path::new(layout::ALIVE)).map_err(step("hold the lifeline"))?;
    if !Path::new(layout::RECORD).exists() {
        return Err(failed("start", &io::ErrorKind::NotFound.into()));
    }
    failpoint::pass("shim.held");
    mount_rootfs(record).map_err(|e| failed(e.what, &e.source))?;
    failpoint::pass("shim.mounted");
    let (main, writer) = io::pipe().map_err(step("make a pipe"))?;
    let mut command = runtime(record, "runtime.log");
    command.args(["run", "--detach", "--bundle", ".", "--pid-file", "main.pid", &record.container_id]);
    // An empty pipe, not /dev/null: crun gives what it finds here to the sandbox's root user, and that one is the host's.
    let (empty, _) = io::pipe().map_err(step("make a pipe"))?;
    command.stdin(empty).stderr(writer.try_clone().map_err(step("copy a pipe"))?).stdout(writer);
    let status = command.status();
    rootfs::show_tmp(record);
    // It holds the writing end of the pipe.
    drop(command);
    let failure = |what: String, output: String| Report::Failed { what, output };
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            kill_children();
            let printed = read_available(main);
            return Err(failure(format!("{} run: {status}", record.runtime), complaint("runtime.log", &printed)));
        }
        Err(e) => return Err(failure(format!("run `{}`", record.runtime), e.to_string())),
    }
    failpoint::pass("shim.ran");
    let pid = read_pid("main.pid").map_err(step("read the main process's pid"))?;
    fs::write(layout::STARTED, pid.to_string()).map_err(step("write down the main process's pid"))?;
    failpoint::pass("shim.noted");
    Ok((Held { main, alive }, pid))
}

/// Reads until every writer is gone and keeps the end.
fn drain(mut output: impl Read) -> io::Result<Vec<u8>> {
    let mut tail = VecDeque::with_capacity(OUTPUT_TAIL + READ_SIZE);
    let mut buffer = vec![0u8; READ_SIZE];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return Ok(tail.into()),
            Ok(count) => {
                tail.extend(&buffer[..count]);
                tail.drain(..tail.len().saturating_sub(OUTPUT_TAIL));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_four_kib_of_output_are_kept() {
        let long: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        assert_eq!(drain(long.as_slice()).expect("reads"), long[long.len() - OUTPUT_TAIL..]);
        assert_eq!(drain(&b"short"[..]).expect("reads"), b"short");
    }
}
