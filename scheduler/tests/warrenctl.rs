//! `warrenctl` as an operator meets it: the real binary against a region in this process that fails when it is told to.
//!
//! What is checked is what scripts rely on: what stands on stdout in every format, exit codes, that a change which is made
//! again carries the same request id, and that nothing acknowledged goes unsaid.

#![allow(clippy::disallowed_methods, reason = "tests bound how long they wait")]

#[path = "warrenctl/agent.rs"]
mod agent;
#[path = "warrenctl/agent_files.rs"]
mod agent_files;
#[path = "warrenctl/agent_logs.rs"]
mod agent_logs;
#[path = "warrenctl/agent_processes.rs"]
mod agent_processes;
#[path = "warrenctl/broken.rs"]
mod broken;
#[path = "warrenctl/copying.rs"]
mod copying;
#[path = "warrenctl/executing.rs"]
mod executing;
#[path = "warrenctl/failing.rs"]
mod failing;
#[path = "warrenctl/fake.rs"]
mod fake;
#[path = "warrenctl/importing.rs"]
mod importing;
#[path = "warrenctl/looking.rs"]
mod looking;
#[path = "warrenctl/processes.rs"]
mod processes;
#[path = "warrenctl/run.rs"]
mod run;
#[path = "warrenctl/running.rs"]
mod running;
#[path = "warrenctl/scheduler.rs"]
mod scheduler;
#[path = "warrenctl/showing.rs"]
mod showing;
#[path = "warrenctl/terminal.rs"]
mod terminal;
#[path = "warrenctl/waiting.rs"]
mod waiting;
