//! `sandbox exec`: a process in a sandbox, with this program's streams; exits as it did.
//!
//! Connect, start, carry the streams both ways. Input is read only once the process has started, so whatever fails before
//! that can be tried again without loss. After it nothing is tried again: the process may have had effects. With `--detach`
//! the process is left to itself, and its id printed.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::{CloseStdin, ExecRequest, ExecResponse, ExecStart};

use super::input::{Input, OUTBOUND, Say};
use super::link::{Again, Agent, Link};
use super::process;
use crate::client::Client;
use crate::failure::Failure;
use crate::names;
use crate::output::Output;
use crate::terminal::{Endings, HANGUP, RawMode, size};

/// Exit code of a program whose reader is gone, as a shell shows it: 128 + SIGPIPE.
pub const READER_GONE: u8 = 141;

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox exec box -- ls -l /srv                    a command
  warrenctl sandbox exec -it box -- bash                      a shell
  warrenctl sandbox exec -i box -- python3 - < script.py      input from here
  warrenctl sandbox exec --detach box -- python3 -m http.server
                                                              prints an id for `sandbox attach`, `ps` and `kill`

A signal to this program is handed to the process; a second one ends the program, and the process with it.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ExecArgs {
    /// Hand standard input on to the process
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal; with -i this one, in raw mode
    #[arg(short, long)]
    tty: bool,
    /// Environment, added to the sandbox's
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = names::pair)]
    env: Vec<(String, String)>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    /// `uid` or `uid:gid` inside, or a name that the sandbox knows [default: 0:0]
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// Kill the process when it runs longer than this, such as 5m
    #[arg(long, value_name = "TIME", value_parser = names::duration)]
    time_limit: Option<Duration>,
    /// Leave the process to itself and print its id; with -i its input stays open for `sandbox attach`
    #[arg(short, long)]
    detach: bool,
    /// Id of the process, with --detach [default: a new one]
    #[arg(long, value_name = "ID", requires = "detach")]
    process_id: Option<String>,
    /// Id or full name of the sandbox
    name: String,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// What is to be executed, and how.
#[derive(Debug)]
pub struct Job {
    pub start: ExecStart,
    pub interactive: bool,
    pub tty: bool,
}

/// With the kind of this terminal, where there is to be one.
pub fn job(command: Vec<String>, interactive: bool, tty: bool, start: ExecStart) -> Job {
    let mut start = ExecStart { command, terminal: tty.then(size), ..start };
    if let (true, Ok(term)) = (tty, std::env::var("TERM")) {
        start.environment.entry("TERM".to_owned()).or_insert(term);
    }
    Job { start, interactive, tty }
}

/// The exit code of the process, or 125.
pub async fn exec(client: &Client, output: &Output, args: ExecArgs) -> Result<ExitCode, Failure> {
    let failed = |failure| Failure::Exec(Box::new(failure));
    let link = Link::new(client, &args.name);
    let start = ExecStart {
        environment: args.env.into_iter().collect(),
        working_directory: args.workdir,
        user: args.user,
        timeout: args.time_limit.and_then(|limit| limit.try_into().ok()),
        ..ExecStart::default()
    };
    let job = job(args.command, args.interactive, args.tty, start);
    if args.detach {
        let started = process::start(&link, job, args.process_id).await.map_err(failed)?;
        return process::show_started(output, &started).map(|()| ExitCode::SUCCESS);
    }
    let mut endings = Endings::new().map_err(Failure::io("listen for signals"))?;
    run(&link, job, &mut endings).await.map(ExitCode::from).map_err(failed)
}

/// Executes it with this program's streams; the process's exit code, or 128 and the signal that ended this program.
pub async fn run(link: &Link<'_>, job: Job, endings: &mut Endings) -> Result<u8, Failure> {
    let starting = link.call(Again::Unstarted, |agent| open(agent, job.start.clone()));
    let Process { input, mut output } = tokio::select! {
        process = starting => process?,
        signal = endings.next() => return Ok(128 + signal),
    };
    let raw = if job.tty && job.interactive { RawMode::enter() } else { Ok(None) };
    let _raw = raw.map_err(Failure::io("put the terminal into raw mode"))?;
    let mut stdin = Input::new(job.interactive, job.tty)?;
    let signals = input.clone();
    let feeding = tokio::spawn(async move { stdin.feed(&input).await });
    // One that has a terminal gets its signals from the keys; here they are the end.
    let mut forwards = !job.tty;
    let code = {
        let printing = print(&mut output);
        tokio::pin!(printing);
        loop {
            tokio::select! {
                code = &mut printing => break code,
                signal = endings.next() => {
                    let forwarded = std::mem::take(&mut forwards) && signal != HANGUP;
                    if !(forwarded && signals.try_send(Say::Signal(i32::from(signal))).is_ok()) {
                        break Ok(128 + signal);
                    }
                }
            }
        }
    };
    feeding.abort();
    code
}

/// A process that has started.
struct Process {
    input: mpsc::Sender<Say>,
    output: Streaming<ExecResponse>,
}

async fn open(agent: Agent, start: ExecStart) -> Result<Process, Failure> {
    let (input, said) = mpsc::channel(OUTBOUND);
    let first = ExecRequest { message: Some(Up::Start(start)) };
    let requests = tokio_stream::once(first).chain(ReceiverStream::new(said).map(wire));
    let request = agent.bearing(requests)?;
    let mut output = SandboxDataServiceClient::new(agent.channel).exec(request).await?.into_inner();
    match output.message().await?.and_then(|response| response.message) {
        Some(Down::Started(_)) => Ok(Process { input, output }),
        _ => Err(Failure::Failed("the node agent did not say that the process started".to_owned())),
    }
}

fn wire(say: Say) -> ExecRequest {
    let message = match say {
        Say::Stdin(bytes) => Up::Stdin(bytes),
        Say::CloseStdin => Up::CloseStdin(CloseStdin {}),
        Say::Resize(size) => Up::Resize(size),
        Say::Signal(number) => Up::Signal(number),
    };
    ExecRequest { message: Some(message) }
}

/// Prints until the process ended; its exit code.
async fn print(output: &mut Streaming<ExecResponse>) -> Result<u8, Failure> {
    while let Some(response) = output.message().await? {
        let written = match response.message {
            Some(Down::Stdout(bytes)) => put(&mut std::io::stdout().lock(), &bytes),
            Some(Down::Stderr(bytes)) => put(&mut std::io::stderr().lock(), &bytes),
            Some(Down::Exit(exit)) => return Ok(exit_code(exit.code)),
            Some(Down::Started(_)) | None => Ok(()),
        };
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(READER_GONE),
            written => written.map_err(Failure::io("write output"))?,
        }
    }
    Err(Failure::Failed("the stream ended before the process did: how it ended is not known".to_owned()))
}

/// As a shell has it.
pub fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(u8::MAX)
}

pub fn put(stream: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).and_then(|()| stream.flush())
}
