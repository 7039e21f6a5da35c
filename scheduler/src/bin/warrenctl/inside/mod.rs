//! What is done inside a sandbox, through the node agent that runs it: processes, files, ports, logs, figures.
//!
//! [`link::Link`] finds the agent and tries again what may be tried again; the commands stand on it.

#![allow(clippy::needless_update, reason = "requests of node agents may get fields that these commands leave empty")]

mod link;

mod attach;
mod copy;
mod exec;
mod files;
mod forward;
mod input;
mod logs;
mod place;
mod process;
mod run;
mod signal;
mod stats;
mod tree;

pub use attach::{AttachArgs, attach};
pub use copy::{CpArgs, cp};
pub use exec::{ExecArgs, exec};
pub use files::{CatArgs, LsArgs, MkdirArgs, MvArgs, RmArgs, cat, ls, mkdir, mv, rm};
pub use forward::{ForwardArgs, forward};
pub use logs::{LogsArgs, logs};
pub use process::{KillArgs, PsArgs, kill, ps};
pub use run::{RunArgs, run};
pub use stats::{StatsArgs, stats};
