//! `sandbox attach`: output of a process from an offset on, and input to it. A stream that breaks is taken up where it broke.

use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use warren_proto::v1::attach_process_request::Message as Up;
use warren_proto::v1::attach_process_response::Message as Down;
use warren_proto::v1::process_output::Stream;
use warren_proto::v1::sandbox_process_service_client::SandboxProcessServiceClient;
use warren_proto::v1::{AttachProcessRequest, AttachProcessResponse, AttachStart, CloseStdin, Process};

use super::exec::{READER_GONE, exit_code, put};
use super::input::{Input, OUTBOUND, Say};
use super::link::{Again, Agent, HELD, Link};
use super::process;
use crate::client::Client;
use crate::failure::Failure;
use crate::retry::{Backoff, is_transient};
use crate::terminal::{Endings, RawMode, size};

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox attach box p-3f2a91c0               its output from the beginning, and input to it
  warrenctl sandbox attach --offset end box p-3f2a91c0  only what comes from now on
  warrenctl sandbox attach --no-stdin box p-3f2a91c0    only watch it

Ctrl-P Ctrl-Q leaves a process that has a terminal; Ctrl-C leaves one that has none. It runs on. Exits as the process did.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct AttachArgs {
    /// From which byte of its output on, or `end` [default: the oldest that is still held]
    #[arg(long, value_name = "N", value_parser = offset)]
    offset: Option<Offset>,
    /// Send nothing to it
    #[arg(long)]
    no_stdin: bool,
    /// Id or full name of the sandbox
    name: String,
    /// Id of the process, as `sandbox ps` shows it
    process: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offset {
    At(i64),
    End,
}

fn offset(text: &str) -> Result<Offset, String> {
    match (text, text.parse()) {
        ("end", _) => Ok(Offset::End),
        (_, Ok(at @ 0..)) => Ok(Offset::At(at)),
        _ => Err(format!("`{text}` is no offset: expected a number of bytes, or `end`")),
    }
}

/// How the attachment ended.
enum End {
    Exited(Box<Process>),
    Detached,
    /// This program's own end: its exit code.
    Code(u8),
}

pub async fn attach(client: &Client, args: AttachArgs) -> Result<ExitCode, Failure> {
    let link = Link::new(client, &args.name);
    let known = process::list(&link).await?.into_iter().find(|known| known.process_id == args.process);
    let Some(known) = known else {
        let what =
            format!("{} has no process `{}`: `warrenctl sandbox ps` shows those it has", link.name, args.process);
        return Err(Failure::NotFound(what));
    };
    let from = match args.offset {
        None => known.output_start,
        Some(Offset::At(at)) => at,
        Some(Offset::End) => known.output_end,
    };
    let mut attached = Attachment { link: &link, process: args.process, offset: from };
    let end = attached.run(known.terminal, !args.no_stdin).await?;
    Ok(ExitCode::from(match end {
        End::Exited(process) => {
            if process.timed_out {
                eprintln!("it ran longer than its time limit and was killed");
            }
            exit_code(process.exit_status.unwrap_or_default().code)
        }
        End::Detached => {
            eprintln!(
                "\ndetached: it runs on; `warrenctl sandbox attach {} {}` comes back",
                args.name, attached.process
            );
            0
        }
        End::Code(code) => code,
    }))
}

struct Attachment<'a> {
    link: &'a Link<'a>,
    process: String,
    /// Of the next byte that is wanted.
    offset: i64,
}

impl Attachment<'_> {
    async fn run(&mut self, tty: bool, stdin: bool) -> Result<End, Failure> {
        let mut endings = Endings::new().map_err(Failure::io("listen for signals"))?;
        let raw = if tty && stdin { RawMode::enter() } else { Ok(None) };
        let raw = raw.map_err(Failure::io("put the terminal into raw mode"))?;
        let mut input = Input::new(stdin, tty)?;
        // Its end would end the process's, for all who attach later.
        input = if !stdin { input.silent() } else { input };
        input = if tty && std::io::stdin().is_terminal() { input.detachable() } else { input };
        let mut patience = Backoff::new(1, self.link.client.deadline());
        loop {
            let (begun, offset) = (Instant::now(), self.offset);
            let broken = tokio::select! {
                end = self.once(tty, &mut input) => match end? {
                    Ok(end) => return Ok(end),
                    Err(broken) => broken,
                },
                // A terminal's keys are the process's: what comes here is the end of this program.
                signal = endings.next() => return Ok(if tty { End::Code(128 + signal) } else { End::Detached }),
            };
            if self.offset > offset || begun.elapsed() > HELD {
                patience = Backoff::new(1, self.link.client.deadline());
            }
            // In raw mode a new line does not return by itself.
            let line = if raw.is_some() { "\r\n" } else { "\n" };
            eprint!("the connection broke ({}): attaching again{line}", broken.message());
            let Some(pause) = patience.pause(&broken) else { return Err(broken.into()) };
            tokio::time::sleep(pause).await;
        }
    }

    /// Attaches once, and carries the streams until that ends or breaks.
    async fn once(&mut self, tty: bool, input: &mut Input) -> Result<Result<End, Status>, Failure> {
        let start = AttachStart { process_id: self.process.clone(), offset: self.offset, lossless: true };
        let Attached { said, mut output } =
            self.link.call(Again::Always, |agent| open(agent, start.clone(), tty)).await?;
        let ended = tokio::select! {
            ended = self.print(&mut output) => ended,
            () = input.feed(&said) => Ok(End::Detached),
        };
        match ended {
            Ok(end) => Ok(Ok(end)),
            Err(Failure::Status(status)) if is_transient(&status) => {
                self.link.forget();
                Ok(Err(*status))
            }
            Err(failure) => Err(failure),
        }
    }

    async fn print(&mut self, output: &mut Streaming<AttachProcessResponse>) -> Result<End, Failure> {
        while let Some(response) = output.message().await? {
            match response.message {
                Some(Down::Output(piece)) => {
                    let written = match piece.stream() {
                        Stream::Stderr => put(&mut std::io::stderr().lock(), &piece.data),
                        _ => put(&mut std::io::stdout().lock(), &piece.data),
                    };
                    match written {
                        Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(End::Code(READER_GONE)),
                        written => written.map_err(Failure::io("write output"))?,
                    }
                    self.offset = piece.offset + i64::try_from(piece.data.len()).unwrap_or(0);
                }
                Some(Down::Dropped(dropped)) => {
                    eprintln!("bytes {} to {} of its output are not held any more", dropped.from, dropped.to);
                    self.offset = dropped.to;
                }
                Some(Down::Exited(process)) => return Ok(End::Exited(Box::new(process))),
                Some(Down::Attached(_)) | None => {}
            }
        }
        Err(Status::unavailable("the stream ended").into())
    }
}

/// An open stream.
struct Attached {
    said: mpsc::Sender<Say>,
    output: Streaming<AttachProcessResponse>,
}

async fn open(agent: Agent, start: AttachStart, tty: bool) -> Result<Attached, Failure> {
    let (said, saying) = mpsc::channel(OUTBOUND);
    let first = AttachProcessRequest { message: Some(Up::Attach(start)) };
    // The terminal that it was started with need not be of this one's size.
    let resize = tty.then(|| wire(Say::Resize(size())));
    let before = futures::stream::iter([Some(first), resize].into_iter().flatten());
    let request = agent.bearing(before.chain(ReceiverStream::new(saying).map(wire)))?;
    let output = SandboxProcessServiceClient::new(agent.channel).attach_process(request).await?.into_inner();
    Ok(Attached { said, output })
}

fn wire(say: Say) -> AttachProcessRequest {
    let message = match say {
        Say::Stdin(bytes) => Up::Stdin(bytes),
        Say::CloseStdin => Up::CloseStdin(CloseStdin {}),
        Say::Resize(size) => Up::Resize(size),
        Say::Signal(number) => Up::Signal(number),
    };
    AttachProcessRequest { message: Some(message) }
}
