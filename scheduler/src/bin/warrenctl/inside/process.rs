//! Processes that outlive the stream that started them: `sandbox ps`, `sandbox kill`, and the start behind `exec --detach`.

use clap::Args;
use warren_proto::v1::sandbox_process_service_client::SandboxProcessServiceClient;
use warren_proto::v1::{ListProcessesRequest, Process, ProcessState, SignalProcessRequest, StartProcessRequest};

use super::exec::Job;
use super::link::{Again, Link};
use super::signal;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, Output, Row, write};
use crate::table::{age, or_dash};

const PS_EXAMPLES: &str = "\
Examples:
  warrenctl sandbox ps box                 what `exec` started, and what of it ended lately
  warrenctl sandbox ps box -o json         with offsets of its output, exit codes and times";

#[derive(Debug, Args)]
#[command(after_help = PS_EXAMPLES)]
pub struct PsArgs {
    /// Id or full name of the sandbox
    name: String,
}

const KILL_EXAMPLES: &str = "\
Examples:
  warrenctl sandbox kill box p-3f2a91c0                asks it to end
  warrenctl sandbox kill box p-3f2a91c0 --signal KILL  ends it";

#[derive(Debug, Args)]
#[command(after_help = KILL_EXAMPLES)]
pub struct KillArgs {
    /// Id or full name of the sandbox
    name: String,
    /// Ids of the processes, as `sandbox ps` shows them
    #[arg(required = true)]
    processes: Vec<String>,
    /// Name or number
    #[arg(short, long, default_value = "TERM", value_parser = signal::parse)]
    signal: i32,
}

/// Those that run, and those that ended and are remembered.
pub async fn ps(client: &Client, output: &Output, args: PsArgs) -> Result<(), Failure> {
    output.list(&list(&Link::new(client, &args.name)).await?)
}

pub async fn kill(client: &Client, args: KillArgs) -> Result<(), Failure> {
    let link = Link::new(client, &args.name);
    for process_id in args.processes {
        let request = SignalProcessRequest { process_id, signal: args.signal };
        // A signal twice is not always a signal once.
        link.call(Again::Unstarted, |agent| {
            let request = agent.asking(request.clone());
            async move { Ok(SandboxProcessServiceClient::new(agent.channel).signal_process(request?).await?) }
        })
        .await?;
    }
    Ok(())
}

pub async fn list(link: &Link<'_>) -> Result<Vec<Process>, Failure> {
    let answer = link.call(Again::Always, |agent| {
        let request = agent.asking(ListProcessesRequest {});
        async move { Ok(SandboxProcessServiceClient::new(agent.channel).list_processes(request?).await?) }
    });
    Ok(answer.await?.into_inner().processes)
}

/// Starts a process that is left to itself. Its id is chosen here, so that a start whose outcome is unknown may be repeated.
pub async fn start(link: &Link<'_>, job: Job, id: Option<String>) -> Result<Process, Failure> {
    let request = StartProcessRequest {
        process_id: id.unwrap_or_else(new_id),
        start: Some(job.start),
        kill_on_disconnect: false,
        no_stdin: !job.interactive,
    };
    let answer = link.call(Again::Always, |agent| {
        let request = agent.asking(request.clone());
        async move { Ok(SandboxProcessServiceClient::new(agent.channel).start_process(request?).await?) }
    });
    Ok(answer.await?.into_inner())
}

/// Its id alone, for the next command; or all of it for a program.
pub fn show_started(output: &Output, process: &Process) -> Result<(), Failure> {
    match output.format {
        Format::Table => write(&format!("{}\n", process.process_id)),
        _ => output.one(process, String::new),
    }
}

/// Short enough to type, and not one of the 1,024 that a sandbox may remember.
fn new_id() -> String {
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("p-{}", &unique[..8])
}

impl Row for Process {
    const TYPE: &'static str = "warren.v1.Process";
    const HEADERS: &'static [&'static str] = &["PROCESS", "STATE", "USER", "TTY", "AGE", "COMMAND"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.process_id.clone(),
            state(self),
            or_dash(self.user.clone()),
            if self.terminal { "yes" } else { "-" }.to_owned(),
            age(self.start_time.as_ref()),
            printable(&self.command.join(" ")),
        ]
    }

    fn resource_name(&self) -> String {
        self.process_id.clone()
    }
}

/// `running`, `attached`, `exit 3`, `SIGKILL`, with what ended it.
fn state(process: &Process) -> String {
    let exit = process.exit_status.unwrap_or_default();
    match process.state() {
        ProcessState::Running if process.attached => "attached".to_owned(),
        ProcessState::Running => "running".to_owned(),
        _ if process.timed_out => "time limit".to_owned(),
        _ if exit.oom_killed => "out of memory".to_owned(),
        _ if exit.signal != 0 => signal::name(exit.signal),
        _ => format!("exit {}", exit.code),
    }
}

/// Whatever a sandbox calls things, the caller's terminal only shows it.
pub fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use warren_proto::v1::ExitStatus;

    use super::*;

    #[test]
    fn the_state_says_how_it_ended() {
        let mut process = Process::default();
        process.set_state(ProcessState::Running);
        assert_eq!(state(&process), "running");
        process.set_state(ProcessState::Exited);
        assert_eq!(state(&process), "exit 0");
        process.exit_status = Some(ExitStatus { code: 137, signal: 9, ..ExitStatus::default() });
        assert_eq!(state(&process), "SIGKILL");
        process.timed_out = true;
        assert_eq!(state(&process), "time limit");
    }

    #[test]
    fn names_cannot_drive_a_terminal() {
        assert_eq!(printable("a\x1b[2J\nb\u{9b}é"), "a\\u{1b}[2J\\nb\\u{9b}é");
    }
}
