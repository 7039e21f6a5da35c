//! What of a sandbox may change while it lives, and the choices that its creator has.

use super::command::LogTime;
use super::pairs::Pairs;
use super::sandbox::Exit;

/// Highest priority.
pub const MAX_PRIORITY: u8 = 100;

/// When a sandbox ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Expiry {
    #[default]
    Never,
    At(LogTime),
    /// This many ms after its creation.
    After(u64),
}

/// What a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Egress {
    #[default]
    None,
    /// The internet, never the host, private ranges or metadata services.
    Public,
    /// These alone: `host`, `host:port`, `address/bits`, `address/bits:port`.
    List(Vec<String>),
}

/// What happens when the main process ends, or the node is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Restart {
    #[default]
    Never,
    OnFailure,
    Always,
}

impl Restart {
    /// Whether a main process that ended like this is started again.
    pub fn after(self, exit: &Exit) -> bool {
        match self {
            Self::Never => false,
            Self::OnFailure => exit.code != 0,
            Self::Always => true,
        }
    }
}

/// What happens on a node that is not heard of for longer than its lease (rule 2 of the design).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Isolation {
    /// It runs on, and is placed nowhere else until the node returns or is forgotten.
    #[default]
    Keep,
    /// It is frozen, so it may be placed elsewhere.
    Freeze,
}

/// What an update may change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    pub labels: Pairs,
    pub annotations: Pairs,
    pub expiry: Expiry,
    pub egress: Egress,
    /// 0 to [`MAX_PRIORITY`]: the higher is placed first.
    pub priority: u8,
}
