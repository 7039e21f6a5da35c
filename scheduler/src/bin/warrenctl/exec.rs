//! `sandbox exec`: a process in a sandbox, with this program's streams; exits as it did.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};
use warren_proto::client;
use warren_proto::error::reason_of;
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::{
    CloseStdin, ConnectSandboxRequest, ConnectSandboxResponse, ErrorReason, ExecRequest, ExecResponse, ExecStart,
};

use crate::client::{Client, sandboxes, within};
use crate::failure::Failure;
use crate::names;
use crate::terminal::{RawMode, size};

/// Bytes of input in one message.
const INPUT_BYTES: usize = 32 * 1024;

/// Messages under way to the process.
const OUTBOUND: usize = 8;

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Hand on standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = names::pair)]
    env: Vec<(String, String)>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    /// Numeric `uid` or `uid:gid` inside
    #[arg(short, long, value_name = "USER", default_value = "")]
    user: String,
    name: String,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub async fn exec(client: &Client, args: ExecArgs) -> Result<ExitCode, Failure> {
    let (interactive, tty) = (args.interactive, args.tty);
    let name = names::sandbox(&client.tenant, &args.name);
    let start = ExecStart {
        command: args.command,
        environment: args.env.into_iter().collect(),
        working_directory: args.workdir,
        terminal: tty.then(size),
        user: args.user,
    };
    match run(client, &name, start, interactive, tty).await {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(failure) => Err(Failure::Exec(Box::new(failure))),
    }
}

async fn run(client: &Client, name: &str, start: ExecStart, interactive: bool, tty: bool) -> Result<u8, Failure> {
    let (input, mut output) = begin(client, name, &start).await?;
    let _raw = if tty && interactive { RawMode::enter().map_err(Failure::io("set up the terminal"))? } else { None };
    let feeding = tokio::spawn(feed(input, interactive, tty));
    let code = print(&mut output).await;
    feeding.abort();
    code
}

type Input = mpsc::Sender<ExecRequest>;

/// Connects and starts the process. Until it has started, another try is safe: the sandbox may have moved, or be about to run.
async fn begin(client: &Client, name: &str, start: &ExecStart) -> Result<(Input, Streaming<ExecResponse>), Failure> {
    let deadline = Instant::now() + client.timeout;
    loop {
        let place = connect(client, name, deadline).await?;
        match open(client, &place, start).await {
            Ok(opened) => return Ok(opened),
            Err(status) if reason_of(&status) == Some(ErrorReason::SandboxMoved) && Instant::now() < deadline => {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            Err(status) => return Err(status.into()),
        }
    }
}

async fn connect(client: &Client, name: &str, deadline: Instant) -> Result<ConnectSandboxResponse, Failure> {
    let request = ConnectSandboxRequest { name: name.to_owned(), token_ttl: None };
    client
        .call_until(deadline, |c| {
            let request = within(request.clone());
            async move { sandboxes(c).connect_sandbox(request).await }
        })
        .await
}

async fn open(
    client: &Client,
    place: &ConnectSandboxResponse,
    start: &ExecStart,
) -> Result<(Input, Streaming<ExecResponse>), Status> {
    let channel =
        client::channel(&place.address, &client.tls).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let (input, requests) = mpsc::channel(OUTBOUND);
    let first = ExecRequest { message: Some(Up::Start(start.clone())) };
    input.try_send(first).map_err(|_| Status::internal("the first message does not fit"))?;
    let mut request = Request::new(ReceiverStream::new(requests));
    let bearer = format!("Bearer {}", place.token).parse();
    request.metadata_mut().insert("authorization", bearer.map_err(|_| Status::internal("an unusable token"))?);
    let output = SandboxDataServiceClient::new(channel).exec(request).await?.into_inner();
    Ok((input, output))
}

/// Hands on standard input, and the terminal's changes of size, until the process is gone.
async fn feed(input: Input, interactive: bool, tty: bool) {
    let send = |message| input.send(ExecRequest { message: Some(message) });
    if !interactive && send(Up::CloseStdin(CloseStdin {})).await.is_err() {
        return;
    }
    let Ok(mut resized) = signal(SignalKind::window_change()) else { return };
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0u8; INPUT_BYTES];
    let mut open = interactive;
    loop {
        let message = tokio::select! {
            read = stdin.read(&mut buffer), if open => match read {
                Ok(0) | Err(_) => {
                    open = false;
                    Up::CloseStdin(CloseStdin {})
                }
                Ok(count) => Up::Stdin(buffer[..count].to_vec()),
            },
            _ = resized.recv(), if tty => Up::Resize(size()),
            () = input.closed() => return,
        };
        if send(message).await.is_err() {
            return;
        }
    }
}

/// Prints until the process ended; its exit code.
async fn print(output: &mut Streaming<ExecResponse>) -> Result<u8, Failure> {
    while let Some(response) = output.message().await? {
        let written = match response.message {
            Some(Down::Stdout(bytes)) => std::io::stdout().write_all(&bytes).and_then(|()| std::io::stdout().flush()),
            Some(Down::Stderr(bytes)) => std::io::stderr().write_all(&bytes),
            Some(Down::Exit(exit)) => return Ok(u8::try_from(exit.code & 0xff).unwrap_or(u8::MAX)),
            Some(Down::Started(_)) | None => Ok(()),
        };
        written.map_err(Failure::io("write output"))?;
    }
    Err(Failure::Failed("the stream ended before the process did".to_owned()))
}
