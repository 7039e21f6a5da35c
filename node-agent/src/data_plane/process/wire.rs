//! PURE: processes as the protocol says them.

use std::time::Duration;

use warren_proto::v1::attach_process_response::Message as Down;
use warren_proto::v1::process_output::Stream as WireStream;
use warren_proto::v1::{AttachProcessResponse, ExitStatus, OutputDropped, Process, ProcessOutput, ProcessState};

use crate::driver::{Event, Exit, ProcessStatus, Stream};

pub fn exit(exit: Exit) -> ExitStatus {
    ExitStatus { code: exit.code, signal: exit.signal, oom_killed: exit.oom_killed }
}

pub fn process(status: ProcessStatus) -> Process {
    let state = if status.exit.is_some() { ProcessState::Exited } else { ProcessState::Running };
    Process {
        process_id: status.id,
        command: status.command,
        working_directory: status.working_directory,
        user: status.user,
        terminal: status.terminal,
        kill_on_disconnect: status.kill_on_disconnect,
        timeout: status.timeout.map(duration),
        state: state.into(),
        exit_status: status.exit.map(exit),
        timed_out: status.timed_out,
        start_time: Some(timestamp(status.started_ms)),
        end_time: status.ended_ms.map(timestamp),
        output_start: signed(status.output_start),
        output_end: signed(status.output_end),
        attached: status.attached,
    }
}

pub fn attached(status: ProcessStatus) -> AttachProcessResponse {
    AttachProcessResponse { message: Some(Down::Attached(process(status))) }
}

pub fn event(event: Event) -> AttachProcessResponse {
    let message = match event {
        Event::Output { offset, stream: from, data } => {
            Down::Output(ProcessOutput { offset: signed(offset), stream: stream(from).into(), data })
        }
        Event::Dropped { from, to } => Down::Dropped(dropped(from, to)),
        Event::Exited(status) => Down::Exited(process(*status)),
    };
    AttachProcessResponse { message: Some(message) }
}

pub fn dropped(from: u64, to: u64) -> OutputDropped {
    OutputDropped { from: signed(from), to: signed(to) }
}

pub fn stream(stream: Stream) -> WireStream {
    match stream {
        Stream::Stdout => WireStream::Stdout,
        Stream::Stderr => WireStream::Stderr,
    }
}

pub fn timestamp(unix_ms: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(unix_ms.rem_euclid(1000) * 1_000_000).expect("less than a second");
    prost_types::Timestamp { seconds: unix_ms.div_euclid(1000), nanos }
}

fn duration(duration: Duration) -> prost_types::Duration {
    let nanos = i32::try_from(duration.subsec_nanos()).expect("less than a second");
    prost_types::Duration { seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), nanos }
}

pub fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
