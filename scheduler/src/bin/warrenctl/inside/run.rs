//! `sandbox run`: a sandbox for one command. Created, waited for, used, deleted; exits as the command did.
//!
//! Whatever ends this program in a way that it notices deletes the sandbox. For all other ways the sandbox has a deadline,
//! which is moved on for as long as this program lives.

use std::convert::Infallible;
use std::io::{IsTerminal, stderr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use prost_types::FieldMask;
use warren_proto::v1::{CreateSandboxRequest, DeleteSandboxRequest, ExecStart, Sandbox, UpdateSandboxRequest};

use super::exec::{self, Job, job};
use super::link::Link;
use crate::client::{Client, request_id, sandboxes, within};
use crate::create::{DEFAULT_WAIT, SpecArgs, create_one, with_plights};
use crate::delete::delete_one;
use crate::failure::Failure;
use crate::follow::{Follow, Goal, Outcome, Wait};
use crate::names;
use crate::sandbox::parent;
use crate::terminal::Endings;

/// How long a sandbox stays when this program is gone without a word: longer than a change of leaders and a bad connection
/// last, short enough that nobody pays much for it.
const ABANDONED: Duration = Duration::from_secs(15 * 60);

/// How often its deadline is moved on: two of these may fail.
const RENEWAL: Duration = Duration::from_secs(5 * 60);

/// How often the line that waits is drawn.
const TICK: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox run python -- python3 -c 'print(6 * 7)'      one command, and nothing is left
  warrenctl sandbox run -it python -- bash                       a shell in a sandbox of its own
  warrenctl sandbox run --cpu 2 --memory 1GiB -i python -- python3 - < script.py
  warrenctl sandbox run --keep --id box python -- pip install x  the sandbox stays

Exits as the command did; 125 when Warren itself failed.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// Id of the sandbox [default: a new one]
    #[arg(long)]
    id: Option<String>,
    /// Hand standard input on to the command
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; with -i this one, in raw mode
    #[arg(short, long)]
    tty: bool,
    /// `uid` or `uid:gid` inside, or a name that the sandbox knows [default: 0:0]
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// Keep the sandbox when the command has ended
    #[arg(long, conflicts_with = "rm")]
    keep: bool,
    /// Delete the sandbox when the command has ended
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
          default_missing_value = "true", action = clap::ArgAction::Set)]
    rm: bool,
    /// How long to wait for the sandbox to run
    #[arg(long, value_name = "TIME", default_value = DEFAULT_WAIT, value_parser = names::duration)]
    wait: Duration,
    #[command(flatten)]
    spec: SpecArgs,
    /// Template to start from
    template: String,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The exit code of the command, or 125.
pub async fn run(client: &Client, args: RunArgs) -> Result<ExitCode, Failure> {
    let failed = |failure| Failure::Exec(Box::new(failure));
    let keep = args.keep || !args.rm;
    let mut sandbox = args.spec.sandbox(&args.template, &[]).map_err(failed)?;
    let renews = !keep && sandbox.ttl.is_none() && sandbox.deadline.is_none();
    if renews {
        sandbox.ttl = ABANDONED.try_into().ok();
    }
    // Chosen here: also one that is not known to exist can be deleted.
    let (id, chosen) = args.id.map_or_else(|| (new_id(), false), |id| (id, true));
    let start = ExecStart { user: args.user, ..ExecStart::default() };
    let job = job(args.command, args.interactive, args.tty, start);
    let mut endings = Endings::new().map_err(Failure::io("listen for signals"))?;
    let mut run = Run { link: Link::new(client, &id), id, fate: Fate::None, wait: args.wait };
    let code = run.work(sandbox, job, renews, &mut endings).await;
    // Those that came meanwhile were the command's.
    let mut endings = Endings::new().map_err(Failure::io("listen for signals"))?;
    match run.fate {
        Fate::None => {}
        Fate::Exists if keep => eprintln!("{} stays: `warrenctl sandbox delete {}` deletes it", run.link.name, run.id),
        // Somebody else's may have had that name before.
        Fate::Unknown if chosen => eprintln!("whether {} was created is not known", run.link.name),
        Fate::Exists | Fate::Unknown => run.remove(&mut endings).await,
    }
    code.map(ExitCode::from).map_err(failed)
}

/// What is known of the sandbox.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// It was not created.
    None,
    /// It was asked for, and not answered.
    Unknown,
    Exists,
}

struct Run<'a> {
    link: Link<'a>,
    id: String,
    fate: Fate,
    wait: Duration,
}

impl Run<'_> {
    /// The command's exit code, or that of this program where a signal ended the wait.
    async fn work(&mut self, sandbox: Sandbox, job: Job, renews: bool, endings: &mut Endings) -> Result<u8, Failure> {
        tokio::select! {
            ready = self.start(sandbox) => ready?,
            signal = endings.next() => return Ok(128 + signal),
        }
        // From here on signals are the command's.
        tokio::select! {
            code = exec::run(&self.link, job, endings) => code,
            never = renew(&self.link), if renews => match never {},
        }
    }

    /// Creates it and waits until it runs.
    async fn start(&mut self, sandbox: Sandbox) -> Result<(), Failure> {
        let client = self.link.client;
        let follow = Follow::from_now(client, parent(client, false), self.wait).await?;
        let request = CreateSandboxRequest {
            parent: parent(client, false),
            sandbox_id: self.id.clone(),
            sandbox: Some(sandbox),
            request_id: request_id(),
        };
        let line = Waiting::new(&self.id);
        self.fate = Fate::Unknown;
        let created = create_one(client, request).await.inspect_err(|failure| {
            if let Failure::Status(_) = failure {
                self.fate = Fate::None;
            }
        })?;
        self.fate = Fate::Exists;
        let mut wait = Wait::new(Goal::Running);
        let mut outcome = wait.add(created.name.clone(), created);
        let waited = wait.all(client, follow, |_, ended| {
            outcome = Some(ended);
            Ok(())
        });
        let waited = waited.await;
        drop(line);
        waited.map_err(|failure| with_plights(failure, &wait))?;
        match outcome {
            Some(Outcome::Never(why)) => Err(Failure::Failed(format!("{} {why}", self.link.name))),
            _ => Ok(()),
        }
    }

    /// Deletes it, whatever it is doing; a second signal leaves that to its deadline.
    async fn remove(&self, endings: &mut Endings) {
        let name = self.link.name.clone();
        let request = DeleteSandboxRequest { name, allow_missing: true, request_id: request_id() };
        let left = tokio::select! {
            deleted = delete_one(self.link.client, request) => deleted.err().map(|failure| failure.to_string()),
            _signal = endings.next() => Some("interrupted".to_owned()),
        };
        if let Some(why) = left {
            eprintln!("{} was not deleted ({why}): `warrenctl sandbox delete {}` deletes it", self.link.name, self.id);
        }
    }
}

/// Moves its deadline on for as long as this is awaited.
async fn renew(link: &Link<'_>) -> Infallible {
    loop {
        tokio::time::sleep(RENEWAL).await;
        let sandbox = Sandbox { name: link.name.clone(), ttl: ABANDONED.try_into().ok(), ..Sandbox::default() };
        let update_mask = Some(FieldMask { paths: vec!["deadline".to_owned()] });
        let request = UpdateSandboxRequest { sandbox: Some(sandbox), update_mask, request_id: request_id() };
        let update = |c| {
            let request = within(request.clone());
            async move { sandboxes(c).update_sandbox(request).await }
        };
        // The next one may do; that it never does shows as the sandbox's end.
        let _untold = link.client.call(update).await;
    }
}

/// A line on a terminal that says what is waited for; nothing elsewhere.
struct Waiting(ProgressBar);

impl Waiting {
    fn new(id: &str) -> Self {
        if !stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new_spinner().with_message(format!("{id} starts"));
        let style = ProgressStyle::with_template("{spinner} {msg}, {elapsed}");
        let bar = style.map_or_else(|_| ProgressBar::hidden(), |style| bar.with_style(style));
        bar.enable_steady_tick(TICK);
        Self(bar)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Says what it is for in lists.
fn new_id() -> String {
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("run-{}", &unique[..12])
}
