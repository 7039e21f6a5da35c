//! What is done inside a sandbox, through the node agent that runs it: processes, files, ports, logs, figures.
//!
//! [`link::Link`] finds the agent and tries again what may be tried again; the commands stand on it.

mod link;

mod attach;
mod exec;
mod input;
mod process;
mod run;
mod signal;

pub use attach::{AttachArgs, attach};
pub use exec::{ExecArgs, exec};
pub use process::{KillArgs, PsArgs, kill, ps};
pub use run::{RunArgs, run};
