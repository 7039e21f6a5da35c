//! The simulator: clean seeds stay clean, a seed is always the same, and planted bugs are found.

use warren_chaos::sim::{self, Bug};

#[test]
fn clean_code_breaks_no_rule() {
    std::thread::scope(|scope| {
        for first in 0..THREADS {
            scope.spawn(move || (1..=1_000).skip(first).step_by(THREADS).for_each(is_clean));
        }
    });
}

/// So that a thousand seeds take about a minute in a debug build.
const STEPS: u64 = 1_200;

/// The seeds are independent of each other; the machines that run this have two cores.
const THREADS: usize = 2;

fn is_clean(seed: u64) {
    let report = sim::run(seed, STEPS, None, false);
    assert_eq!(report.violation, None, "again: sim replay --seed {seed} --steps {STEPS} --trace");
}

#[test]
fn a_seed_gives_the_same_trace_always() {
    for seed in [4, 5, 6] {
        let (first, second) = (sim::run(seed, 1_500, None, false), sim::run(seed, 1_500, None, true));
        assert_eq!((first.hash, first.steps, first.commands), (second.hash, second.steps, second.commands), "{seed}");
    }
    assert_ne!(sim::run(1, 500, None, false).hash, sim::run(2, 500, None, false).hash);
}

/// Seeds in which a planted bug is looked for; the rarest needs some seventy.
const SEEDS: u64 = 300;

#[test]
fn planted_bugs_are_found() {
    for bug in Bug::ALL {
        let run = |seed| sim::run(seed, 3_000, Some(bug), false).violation.map(|violation| (seed, violation));
        let found = (1..=SEEDS).find_map(run);
        let (seed, violation) = found.unwrap_or_else(|| panic!("{} is not found in {SEEDS} seeds", bug.name()));
        println!("{}: seed {seed}, rule {}: {}", bug.name(), violation.rule, violation.what);
        assert_eq!(violation.rule, bug.rule(), "{} at seed {seed}: {}", bug.name(), violation.what);
    }
}
