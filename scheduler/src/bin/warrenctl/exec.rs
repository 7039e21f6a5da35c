//! `sandbox exec`: a process in a sandbox, with this program's streams; exits as it did.
//!
//! Connect, start, carry the streams both ways. Input is read only once the process has started, so whatever fails before
//! that can be tried again without loss. After it nothing is tried again: the process may have had effects.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::{
    ConnectSandboxRequest, ConnectSandboxResponse, ErrorReason, ExecRequest, ExecResponse, ExecStart,
};

use crate::client::{Client, bearing, sandboxes, within};
use crate::failure::Failure;
use crate::input;
use crate::names;
use crate::retry::Backoff;
use crate::terminal::{Endings, RawMode, size};

/// Messages under way to the process; then input waits.
const OUTBOUND: usize = 8;

/// Exit code of a program whose reader is gone, as a shell shows it: 128 + SIGPIPE.
const READER_GONE: u8 = 141;

#[derive(Debug, Args)]
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
    /// Numeric `uid` or `uid:gid` inside [default: 0:0]
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// Id or full name of the sandbox
    name: String,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl ExecArgs {
    fn start(&self) -> ExecStart {
        let mut environment: std::collections::BTreeMap<_, _> = self.env.iter().cloned().collect();
        if let (true, Ok(term)) = (self.tty, std::env::var("TERM")) {
            environment.entry("TERM".to_owned()).or_insert(term);
        }
        ExecStart {
            command: self.command.clone(),
            environment,
            working_directory: self.workdir.clone(),
            terminal: self.tty.then(size),
            user: self.user.clone(),
            timeout: None,
        }
    }
}

/// The exit code of the process, or 125.
pub async fn exec(client: &Client, args: ExecArgs) -> Result<ExitCode, Failure> {
    let failed = |failure| Failure::Exec(Box::new(failure));
    run(client, &args).await.map(ExitCode::from).map_err(failed)
}

async fn run(client: &Client, args: &ExecArgs) -> Result<u8, Failure> {
    let name = names::sandbox(&client.tenant, &args.name);
    let Process { input, mut output } = begin(client, &name, &args.start()).await?;
    // Before raw mode: from here on each of these signals ends this function, which gives the terminal back.
    let mut endings = Endings::new().map_err(Failure::io("listen for signals"))?;
    let raw = if args.tty && args.interactive { RawMode::enter() } else { Ok(None) };
    let _raw = raw.map_err(Failure::io("put the terminal into raw mode"))?;
    let feeding = tokio::spawn(input::feed(input, args.interactive, args.tty));
    let code = tokio::select! {
        code = print(&mut output) => code,
        signal = endings.next() => Ok(128 + signal),
    };
    feeding.abort();
    code
}

/// A process that has started.
struct Process {
    input: mpsc::Sender<ExecRequest>,
    output: Streaming<ExecResponse>,
}

/// Connects and starts the process; tries again while it is certain that it did not start and may yet.
async fn begin(client: &Client, name: &str, start: &ExecStart) -> Result<Process, Failure> {
    let deadline = client.deadline();
    let mut backoff = Backoff::new(1, deadline);
    loop {
        let place = locate(client, name, deadline).await?;
        let failure = match open(client, &place, start).await {
            Ok(process) => return Ok(process),
            Err(failure) => failure,
        };
        let Some(status) = may_yet_start(&failure) else { return Err(failure) };
        let Some(pause) = backoff.pause(&status) else { return Err(failure) };
        tokio::time::sleep(pause).await;
    }
}

/// Whether the failure says that nothing was started and that asking the schedulers anew may help: the sandbox moved, its
/// agent restarts or is full for the moment, or has not heard yet of the key that signed the token.
fn may_yet_start(failure: &Failure) -> Option<Status> {
    use ErrorReason::{NodeUnreachable, Overloaded, SandboxMoved, TokenInvalid};
    match (failure, failure.reason()) {
        (Failure::Unreachable { .. }, _) => Some(Status::unavailable("not reachable")),
        (_, Some(SandboxMoved | NodeUnreachable | Overloaded | TokenInvalid)) => failure.status().cloned(),
        _ => None,
    }
}

/// Where the sandbox runs. One that is about to run is waited for.
async fn locate(client: &Client, name: &str, deadline: Instant) -> Result<ConnectSandboxResponse, Failure> {
    let request = ConnectSandboxRequest { name: name.to_owned(), token_ttl: None };
    let connect = |c| {
        let request = within(request.clone());
        async move { sandboxes(c).connect_sandbox(request).await }
    };
    client.call_until(deadline, connect).await
}

async fn open(client: &Client, place: &ConnectSandboxResponse, start: &ExecStart) -> Result<Process, Failure> {
    let channel = client.connect_agent(&place.address, place.tls).await?;
    let (input, requests) = mpsc::channel(OUTBOUND);
    let first = ExecRequest { message: Some(Up::Start(start.clone())) };
    input.try_send(first).map_err(|_| Failure::Failed("the first message does not fit".to_owned()))?;
    let request = bearing(ReceiverStream::new(requests), &place.token)?;
    let mut output = SandboxDataServiceClient::new(channel).exec(request).await?.into_inner();
    match output.message().await?.and_then(|response| response.message) {
        Some(Down::Started(_)) => Ok(Process { input, output }),
        _ => Err(Failure::Failed("the node agent did not say that the process started".to_owned())),
    }
}

/// Prints until the process ended; its exit code.
async fn print(output: &mut Streaming<ExecResponse>) -> Result<u8, Failure> {
    while let Some(response) = output.message().await? {
        let written = match response.message {
            Some(Down::Stdout(bytes)) => put(&mut std::io::stdout().lock(), &bytes),
            Some(Down::Stderr(bytes)) => put(&mut std::io::stderr().lock(), &bytes),
            Some(Down::Exit(exit)) => return Ok(u8::try_from(exit.code & 0xff).unwrap_or(u8::MAX)),
            Some(Down::Started(_)) | None => Ok(()),
        };
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(READER_GONE),
            written => written.map_err(Failure::io("write output"))?,
        }
    }
    Err(Failure::Failed("the stream ended before the process did: how it ended is not known".to_owned()))
}

fn put(stream: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).and_then(|()| stream.flush())
}
