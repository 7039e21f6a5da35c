//! What kind of world a seed makes: how large, how fast, and which faults come how often.

use std::time::Duration;

use super::clock::{MS, SECOND};
use super::rng::Rng;

/// Drawn once, at the beginning.
#[derive(Debug, Clone)]
pub struct Plan {
    pub replicas: usize,
    pub agents: usize,
    pub clients: usize,
    pub lease: Duration,
    /// Longest pause of a client between two requests, in µs.
    pub think: u64,
    /// Longest pause between two faults, in µs; each kind's weight.
    pub fault_pause: u64,
    pub weights: Weights,
    /// In thousandths.
    pub lost_calls: u64,
    pub failing_starts: u64,
    pub wild_decisions: u64,
    pub slow_messages: u64,
    /// In ms.
    pub watch_pause: u64,
    pub most_sandboxes: usize,
    pub checkpoint_every: u64,
    /// Longest that a proposal waits for others, in µs.
    pub longest_flush: u64,
    /// Entries that take long to reach a majority, in thousandths.
    pub slow_commits: u64,
    /// Longest pause between two things that operators do, in µs.
    pub operator_pause: u64,
    /// Share of sandboxes that freeze on isolation, in thousandths.
    pub freezing: u64,
}

/// How often each kind of fault comes, relative to the others.
#[derive(Debug, Clone)]
pub struct Weights {
    pub replica_crash: u64,
    pub cut: u64,
    pub transfer: u64,
    pub agent_crash: u64,
    pub stall: u64,
    pub reboot: u64,
    pub session_break: u64,
    pub clock_jump: u64,
    pub shrink: u64,
}

impl Plan {
    pub fn draw(rng: &mut Rng) -> Self {
        // Long leases make time pass quickly: hours of log time in as many steps as seconds otherwise.
        let lease = match rng.below(10) {
            0..5 => Duration::from_millis(rng.between(1_000, 3_000)),
            5..8 => Duration::from_secs(10),
            _ => Duration::from_secs(rng.between(60, 300)),
        };
        let lease_us = u64::try_from(lease.as_micros()).unwrap_or(10 * SECOND);
        let mut often = |most: u64| if rng.per_mille(300) { 0 } else { rng.between(1, most) };
        let weights = Weights {
            replica_crash: often(4),
            cut: often(6),
            transfer: often(3),
            agent_crash: often(4),
            stall: often(6),
            reboot: often(2),
            session_break: often(6),
            clock_jump: often(3),
            shrink: often(1),
        };
        let most_agents = if rng.per_mille(300) { 12 } else { 5 };
        let agents = usize::try_from(rng.between(3, most_agents)).unwrap_or(3);
        Self {
            replicas: if rng.per_mille(700) { 3 } else { 5 },
            agents,
            clients: usize::try_from(rng.between(2, 5)).unwrap_or(2),
            lease,
            think: rng.between(20 * MS, lease_us / 2),
            fault_pause: rng.between(lease_us / 10, lease_us * 2),
            weights,
            lost_calls: rng.between(0, 60),
            failing_starts: rng.between(0, 250),
            wild_decisions: rng.between(0, 80),
            slow_messages: rng.between(0, 30),
            watch_pause: rng.between(20, lease_us / MS),
            most_sandboxes: usize::try_from(rng.between(8, 40)).unwrap_or(8),
            checkpoint_every: rng.between(8, 80),
            longest_flush: rng.between(100, 20 * MS),
            slow_commits: rng.between(0, 300),
            operator_pause: lease_us * rng.between(2, 20),
            freezing: rng.between(200, 1_000),
        }
    }
}
