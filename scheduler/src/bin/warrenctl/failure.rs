//! What went wrong: for a person on stderr, for a script in the exit code.

use std::io;
use std::process::ExitCode;

use tonic::{Code, Status};
use warren_proto::error::{reason_of, reason_text};
use warren_proto::v1::ErrorReason;

use crate::replicas::NO_LEADER_ADVICE;
use crate::retry::is_broken_connection;

/// Exit code of `sandbox exec` when Warren itself failed: the one that container tools use.
pub const EXEC_FAILED: u8 = 125;

/// Exit code of a command that got no answer, or not in time.
pub const UNAVAILABLE: u8 = 5;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A scheduler or an agent said no.
    #[error("{}", answer(.0))]
    Status(Box<Status>),
    /// It went on failing until time was up; the last of it.
    #[error("gave up on {endpoint}: {}", in_full(.status))]
    GaveUp { endpoint: String, status: Box<Status> },
    #[error("cannot connect to {what}: {}", chain(.error))]
    Unreachable { what: String, error: tonic::transport::Error },
    /// There is no such thing; a server was asked for a list that lacks it.
    #[error("{0}")]
    NotFound(String),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{0}")]
    TimedOut(String),
    /// Some replicas answer, and none leads.
    #[error("no leader: {0}")]
    NoLeader(String),
    /// Not all that should have been looked at was.
    #[error("not reached: {0}")]
    Unreached(String),
    /// Done, and it did not end well.
    #[error("{0}")]
    Failed(String),
    /// Several items failed, each told already; the exit code is the first one's.
    #[error("{what}")]
    Several { what: String, code: u8 },
    /// As another failure, but of `sandbox exec`.
    #[error("{0}")]
    Exec(Box<Failure>),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Failure {
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// What a scheduler or an agent answered, if that is what went wrong.
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Status(status) | Self::GaveUp { status, .. } => Some(status),
            Self::Exec(inner) => inner.status(),
            _ => None,
        }
    }

    pub fn reason(&self) -> Option<ErrorReason> {
        self.status().and_then(reason_of)
    }

    /// 1 failed, 2 usage, 3 not found, 4 conflict or precondition, 5 unavailable or timed out, 6 permission,
    /// 7 resource exhausted, 125 `sandbox exec` failed before or beside the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exec(_) => EXEC_FAILED,
            Self::Usage(_) => 2,
            Self::NotFound(_) => 3,
            Self::TimedOut(_) | Self::Unreachable { .. } | Self::NoLeader(_) | Self::Unreached(_) => UNAVAILABLE,
            Self::Io { .. } | Self::Failed(_) => 1,
            Self::Several { code, .. } => *code,
            Self::Status(status) | Self::GaveUp { status, .. } => of_code(status.code()),
        }
    }

    /// Tells the person.
    pub fn tell(&self) {
        eprintln!("error: {self}");
        let reason = self.reason();
        if let Some(reason) = reason {
            eprintln!("reason: {}", reason_text(reason));
        }
        let hint = match (reason, self) {
            (Some(reason), _) => hint(reason),
            (None, Self::NoLeader(_)) => Some(NO_LEADER_ADVICE),
            (None, Self::Unreached(_)) => Some(
                "what is said above holds for the others alone; start it, or replace it (`warrenctl server leave`)",
            ),
            (None, Self::GaveUp { status, .. }) if status.code() == Code::Unavailable => {
                Some("is a scheduler listening there? --endpoints, WARREN_ENDPOINTS or a context name them")
            }
            _ => None,
        };
        if let Some(hint) = hint {
            eprintln!("hint: {hint}");
        }
    }

    /// Tells the person, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        self.tell();
        ExitCode::from(self.exit_code())
    }
}

fn of_code(code: Code) -> u8 {
    match code {
        Code::InvalidArgument => 2,
        Code::NotFound => 3,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted | Code::OutOfRange => 4,
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled => UNAVAILABLE,
        Code::PermissionDenied | Code::Unauthenticated => 6,
        Code::ResourceExhausted => 7,
        _ => 1,
    }
}

/// What it says. One that says nothing is made by a library: it does not know the call.
fn answer(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Unimplemented, "") => "the server does not know this call: it is older than this program".to_owned(),
        (code, "") => code.description().to_owned(),
        _ if is_broken_connection(status) => format!("the connection broke: {}", in_full(status)),
        _ => in_full(status),
    }
}

/// A status with what is behind it: a broken transport says little itself.
pub fn in_full(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => chain(source),
        None => status.message().to_owned(),
    }
}

/// An error and its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}

/// What to do about it.
fn hint(reason: ErrorReason) -> Option<&'static str> {
    use ErrorReason as R;
    Some(match reason {
        R::SandboxNotFound => "`warrenctl sandbox list` shows the sandboxes of a tenant; --tenant says which tenant",
        R::TemplateNotFound => "`warrenctl template list` shows what there is, `warrenctl template import` adds one",
        R::NodeNotFound => "`warrenctl node list` shows the nodes",
        R::SandboxAlreadyExists => "choose another --id, or leave it out",
        R::TemplateAlreadyExists => "templates do not change: import it under another name",
        R::TemplateInUse => "delete the sandboxes that use it first",
        R::SandboxState => "`warrenctl sandbox show` says what state it is in, and why",
        R::NoLeader | R::OutcomeUnknown => "`warrenctl status` shows which replicas answer; a majority of them must",
        R::NoNodeAvailable | R::NodeUnreachable => "`warrenctl node list` shows which nodes answer",
        R::RequestIdReused | R::RequestIdExpired => "leave --request-id out, or take a new UUIDv7",
        R::RequestTableFull | R::Overloaded => "try again later, or send less at once",
        R::Compacted => "the token is too old: watch without --token, which begins with what there is now",
        R::ImageNotFound => "is the name right? private images need --username and --password",
        R::RegistryUnavailable => {
            "the node, not this machine, must reach the registry; without TLS only with its --insecure-registries"
        }
        R::DigestMismatch => "the file changed meanwhile, or was damaged on its way: import it again",
        R::CommandNotFound => "programs are looked up in the sandbox's PATH; an absolute path avoids that",
        R::FileNotFound => "`warrenctl sandbox ls SANDBOX:/path` shows what is there",
        R::SandboxDiskFull => "remove something (`warrenctl sandbox rm`), or create sandboxes with a larger --disk",
        R::PortClosed => "does the program listen already, and at that port? `warrenctl sandbox exec` looks inside",
        R::TokenInvalid => "the clocks of schedulers and nodes may differ by more than a token's life",
        R::PermissionDenied => "this caller may not do that; --tenant and --tls-cert say who asks, and for whom",
        R::TenantNotFound => "`warrenctl tenant list` shows the tenants; one comes with its first sandbox or its quota",
        R::QuotaExceeded => {
            "`warrenctl tenant show` says what is used; delete something, or raise it: `tenant set-quota`"
        }
        R::CreateRateExceeded => "create more slowly, or raise it: `warrenctl tenant set-quota --creates-per-minute`",
        R::Paused => "`warrenctl region status` shows what is paused, `warrenctl region resume` ends it",
        R::DiskFull => {
            "delete what is not needed, or make room on the schedulers' disks: `warrenctl doctor` shows them"
        }
        R::EtagMismatch => {
            "it changed meanwhile: look at it again with `warrenctl sandbox show`, then repeat the change"
        }
        R::ReplicaNotFound => "`warrenctl server members` shows the replicas and their ids",
        R::Membership => "`warrenctl server members` shows the group; one change at a time, and never below a majority",
        R::NodeState => {
            "`warrenctl node show` says what state it is in; only a node that is not READY can be forgotten"
        }
        R::OrphanNotFound => "`warrenctl node orphans` shows what there is, as {sandbox}@{epoch}",
        R::BatchRejected => "none was created; without --all-or-nothing the others would be",
        R::RevisionNotReached => "that replica is behind: leave --min-revision out, or ask another with --endpoints",
        R::LevelTooLow => "`warrenctl raft status` shows what each build supports; finish the upgrade first",
        R::SecretsUnavailable => "start the schedulers with a key for secrets: `warren-scheduler --help`",
        R::Internal | R::DriverFailed => "the logs of the scheduler or node agent say more",
        _ => return None,
    })
}
