//! `sandbox logs`: what the main process wrote, from an offset on; followed over breaks, and shown after its end.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use clap::Args;
use prost_types::Timestamp;
use warren_proto::v1::process_output::Stream;
use warren_proto::v1::read_logs_response::Message;
use warren_proto::v1::sandbox_log_service_client::SandboxLogServiceClient;
use warren_proto::v1::{ErrorReason, LogEntry, ReadLogsRequest};

use super::exec::{READER_GONE, put};
use super::link::{Again, HELD, Link};
use crate::client::Client;
use crate::failure::Failure;
use crate::names;
use crate::output::{Format, Output};
use crate::retry::{Backoff, is_transient};
use crate::sandbox::{get, state_word};

const TYPE: &str = "warren.v1.LogEntry";

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox logs box                       all that is held
  warrenctl sandbox logs -f --tail 20 box          the last lines, and what comes
  warrenctl sandbox logs --since 5m -t box         of the last five minutes, with times
  warrenctl sandbox logs --since 2026-11-25T01:00:00Z -o jsonl box";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LogsArgs {
    /// Go on with what is written, until the main process ends
    #[arg(short, long)]
    follow: bool,
    /// Only what was written since then: 5m ago, or at a time (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Only so many lines from the end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    tail: Option<i32>,
    /// Show when each line was written
    #[arg(short, long)]
    timestamps: bool,
    /// Id or full name of the sandbox
    name: String,
}

/// A duration ago, or a time.
fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = names::duration(text) {
        return Ok(SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH).into());
    }
    text.parse().map_err(|_| format!("`{text}` is no time: expected 5m, or 2026-11-25T01:00:00Z"))
}

pub async fn logs(client: &Client, output: &Output, args: LogsArgs) -> Result<ExitCode, Failure> {
    let link = Link::new(client, &args.name);
    let request =
        ReadLogsRequest { offset: 0, since_time: args.since, tail_lines: args.tail.unwrap_or(0), follow: args.follow };
    let printer = Printer { output, timestamps: args.timestamps, lines: [true; 2] };
    let mut reading = Reading { link: &link, request, printer, shown: false };
    match reading.all().await {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(failure) if reading.shown => Err(failure),
        // Its node has nothing any more; the ledger has the end.
        Err(failure) => last_words(&link, failure).await,
    }
}

struct Reading<'a> {
    link: &'a Link<'a>,
    request: ReadLogsRequest,
    printer: Printer<'a>,
    shown: bool,
}

impl Reading<'_> {
    /// Reads to the end, taking a broken stream up where it broke.
    async fn all(&mut self) -> Result<u8, Failure> {
        let mut patience = Backoff::new(1, self.link.client.deadline());
        loop {
            let (begun, offset) = (Instant::now(), self.request.offset);
            let broken = match self.once().await {
                Err(Failure::Status(status)) if is_transient(&status) => status,
                ended => return ended,
            };
            self.link.forget();
            if self.request.offset > offset || begun.elapsed() > HELD {
                patience = Backoff::new(1, self.link.client.deadline());
            }
            let Some(pause) = patience.pause(&broken) else { return Err(Failure::Status(broken)) };
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(&mut self) -> Result<u8, Failure> {
        let request = self.request;
        let stream = self.link.call(Again::Always, |agent| {
            let request = agent.bearing(request);
            async move { Ok(SandboxLogServiceClient::new(agent.channel).read_logs(request?).await?) }
        });
        let mut stream = stream.await?.into_inner();
        while let Some(response) = stream.message().await? {
            match response.message {
                Some(Message::Entry(entry)) => {
                    match self.printer.show(&entry) {
                        Err(Failure::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => {
                            return Ok(READER_GONE);
                        }
                        shown => shown?,
                    }
                    self.passed(entry.offset + i64::try_from(entry.data.len()).unwrap_or(0));
                }
                Some(Message::Dropped(dropped)) => {
                    // What was never asked for is not missed.
                    if self.shown {
                        eprintln!("bytes {} to {} of the log are not held any more", dropped.from, dropped.to);
                    }
                    self.passed(dropped.to);
                }
                None => {}
            }
        }
        Ok(0)
    }

    /// Goes on from here after a break; what was asked of the beginning is done.
    fn passed(&mut self, offset: i64) {
        self.shown = true;
        self.request = ReadLogsRequest { offset, follow: self.request.follow, ..ReadLogsRequest::default() };
    }
}

struct Printer<'a> {
    output: &'a Output,
    timestamps: bool,
    /// Whether the next byte of stdout and of stderr begins a line.
    lines: [bool; 2],
}

impl Printer<'_> {
    fn show(&mut self, entry: &LogEntry) -> Result<(), Failure> {
        if self.output.format != Format::Table {
            return self.output.line(TYPE, entry);
        }
        let error = entry.stream() == Stream::Stderr;
        let stamped;
        let bytes = if self.timestamps {
            let time = entry.time.as_ref().map(ToString::to_string).unwrap_or_default();
            stamped = stamp(&entry.data, &time, &mut self.lines[usize::from(error)]);
            &stamped
        } else {
            &entry.data
        };
        let written =
            if error { write(std::io::stderr().lock(), bytes) } else { write(std::io::stdout().lock(), bytes) };
        written.map_err(Failure::io("write output"))
    }
}

fn write(mut stream: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    put(&mut stream, bytes)
}

/// Puts the time before each line that begins in `data`.
fn stamp(data: &[u8], time: &str, begins: &mut bool) -> Vec<u8> {
    let mut stamped = Vec::with_capacity(data.len() + time.len() + 1);
    for piece in data.split_inclusive(|&byte| byte == b'\n') {
        if *begins {
            stamped.extend_from_slice(time.as_bytes());
            stamped.push(b' ');
        }
        stamped.extend_from_slice(piece);
        *begins = piece.ends_with(b"\n");
    }
    stamped
}

/// The end of the output out of the ledger's record of a sandbox that has ended; else the failure.
async fn last_words(link: &Link<'_>, failure: Failure) -> Result<ExitCode, Failure> {
    let gone = matches!(failure.reason(), Some(ErrorReason::SandboxState | ErrorReason::SandboxMoved));
    if !gone {
        return Err(failure);
    }
    let sandbox = get(link.client, &link.name).await?;
    if sandbox.end_time.is_none() {
        return Err(failure);
    }
    eprintln!(
        "{} is {}, and its node holds no log of it: this is the end of what it wrote",
        link.name,
        state_word(&sandbox)
    );
    put(&mut std::io::stdout().lock(), &sandbox.output_tail).map_err(Failure::io("write output"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_the_time_of_its_beginning() {
        let mut begins = true;
        assert_eq!(stamp(b"a\nb", "T1", &mut begins), b"T1 a\nT1 b");
        assert_eq!(stamp(b"c\n", "T2", &mut begins), b"c\n");
        assert_eq!(stamp(b"d\n", "T3", &mut begins), b"T3 d\n");
    }

    #[test]
    fn since_is_a_time_or_ago() {
        assert_eq!(since("1970-01-01T00:01:00Z").map(|time| time.seconds), Ok(60));
        let now = Timestamp::from(SystemTime::now()).seconds;
        assert!(since("5m").is_ok_and(|time| (now - 301..=now - 300).contains(&time.seconds)));
        assert!(since("yesterday").is_err());
    }
}
