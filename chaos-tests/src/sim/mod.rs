//! The deterministic simulator: a whole region in one thread, from one seed.
//!
//! The real pure modules (`state`, `placement`, `plan`, `liveness`; the agent's `reconcile` and `assignment`) run on a model
//! of everything impure: the replicated log, clocks, sessions, hosts, clients. Nothing in it reads a clock, starts a thread
//! or iterates in an order that is not its own, so a seed gives the same trace always. An oracle looks at every committed
//! command and every change of a host; bugs that are planted on purpose show that it would find them.
//!
//! In reading order: `world` (the loop), `plan` (what a seed makes of it), `queue`, `clock`, `rng`, `trace`; `log`, `replica`,
//! `leader`, `faulty` (schedulers); `session`; `agent`, `supervise`, `host` (nodes); `client`, `watcher`; `fault`; `oracle`.

mod agent;
mod bug;
mod client;
mod clock;
mod decide;
mod fault;
mod faulty;
mod gate;
mod host;
mod leader;
mod log;
mod operator;
mod oracle;
mod plan;
mod queue;
mod replica;
mod rng;
mod session;
mod supervise;
mod trace;
mod watcher;
mod world;

pub use bug::Bug;
pub use oracle::Violation;
use world::World;

/// What a run of one seed came to.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    /// Hash of the trace.
    pub hash: u64,
    pub steps: u64,
    /// Commands that were committed.
    pub commands: u64,
    /// Virtual time that went by, in µs.
    pub elapsed: u64,
    pub violation: Option<Violation>,
    /// The trace, if it was asked for.
    pub lines: Vec<String>,
}

/// Runs one seed for so many steps, or to the first violation.
pub fn run(seed: u64, steps: u64, bug: Option<Bug>, trace: bool) -> Report {
    let mut world = World::new(seed, bug, trace);
    while world.oracle.violation.is_none() && world.steps < steps && world.step() {}
    // It takes as long as the rest: every fourth seed shows that things come to rest.
    if seed.is_multiple_of(4) {
        world.settle_down();
    }
    Report {
        seed,
        hash: world.trace.hash(),
        steps: world.steps,
        commands: world.oracle.commands,
        elapsed: world.now,
        violation: world.oracle.violation.clone(),
        lines: world.trace.into_lines(),
    }
}
