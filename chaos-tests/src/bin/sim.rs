//! Runs the simulator: seeds in a row, one seed again, or every planted bug.

use std::ops::Range;
use std::process::ExitCode;

use warren_chaos::sim::{self, Bug, Report};

const USAGE: &str = "\
sim run --seeds A..B [--steps N] [--bug NAME]      runs seeds A to B-1, to the first violation
sim replay --seed S [--steps N] [--bug NAME] [--trace]   runs one seed, and prints what happened
sim bugs [--seeds A..B] [--steps N]                runs every planted bug until it is found";

/// Steps of one seed: enough for some leaders, leases and restarts.
const STEPS: u64 = 3_000;

/// Seeds in which a planted bug is looked for.
const BUG_SEEDS: Range<u64> = 1..1_001;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let found = match args.first().map(String::as_str) {
        Some("run") => Options::parse(&args[1..]).map(|options| run(&options)),
        Some("replay") => Options::parse(&args[1..]).map(|options| replay(&options)),
        Some("bugs") => Options::parse(&args[1..]).map(|options| bugs(&options)),
        _ => Err(USAGE.to_owned()),
    };
    match found {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(wrong) => {
            eprintln!("{wrong}");
            ExitCode::from(2)
        }
    }
}

#[derive(Default)]
struct Options {
    seeds: Option<Range<u64>>,
    seed: Option<u64>,
    steps: Option<u64>,
    bug: Option<Bug>,
    trace: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"));
            match name.as_str() {
                "--seeds" => options.seeds = Some(range(value()?)?),
                "--seed" => options.seed = Some(number(value()?)?),
                "--steps" => options.steps = Some(number(value()?)?),
                "--bug" => options.bug = Some(bug(value()?)?),
                "--trace" => options.trace = true,
                _ => return Err(format!("{name} is not known\n{USAGE}")),
            }
        }
        Ok(options)
    }

    fn steps(&self) -> u64 {
        self.steps.unwrap_or(STEPS)
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("`{text}` is not a number"))
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (first, end) = text.split_once("..").ok_or_else(|| format!("`{text}` is not a range such as 1..100"))?;
    Ok(number(first)?..number(end)?)
}

fn bug(name: &str) -> Result<Bug, String> {
    let names = || Bug::ALL.map(Bug::name).join(", ");
    Bug::parse(name).ok_or_else(|| format!("`{name}` is no planted bug; there are {}", names()))
}

/// Whether all seeds are clean.
fn run(options: &Options) -> bool {
    let seeds = options.seeds.clone().unwrap_or(1..101);
    let (mut commands, mut steps, mut elapsed, mut hash) = (0, 0, 0, 0u64);
    for seed in seeds.clone() {
        let report = sim::run(seed, options.steps(), options.bug, false);
        if report.violation.is_some() {
            say(&report, options);
            return false;
        }
        commands += report.commands;
        steps += report.steps;
        elapsed += report.elapsed / 1_000_000;
        hash = hash.rotate_left(1) ^ report.hash;
    }
    println!(
        "{} seeds clean: {steps} steps, {commands} commands, {elapsed} s of virtual time; traces {hash:016x}",
        seeds.count()
    );
    true
}

fn replay(options: &Options) -> bool {
    let report = sim::run(options.seed.unwrap_or(1), options.steps(), options.bug, options.trace);
    for line in &report.lines {
        println!("{line}");
    }
    say(&report, options);
    report.violation.is_none()
}

/// Whether every planted bug is found.
fn bugs(options: &Options) -> bool {
    let seeds = options.seeds.clone().unwrap_or(BUG_SEEDS);
    let mut all = true;
    for bug in Bug::ALL {
        let found = seeds.clone().map(|seed| sim::run(seed, options.steps(), Some(bug), false));
        match found.into_iter().find(|report| report.violation.is_some()) {
            Some(Report { seed, violation: Some(v), .. }) => {
                println!("{:28} seed {seed}, step {}: rule {}: {}", bug.name(), v.step, v.rule, v.what);
            }
            _ => {
                all = false;
                println!("{:28} NOT FOUND in seeds {seeds:?}", bug.name());
            }
        }
    }
    all
}

fn say(report: &Report, options: &Options) {
    let Report { seed, hash, steps, commands, violation, .. } = report;
    match violation {
        None => println!("seed {seed}: clean after {steps} steps, {commands} commands; trace {hash:016x}"),
        Some(v) => {
            let bug = options.bug.map(|bug| format!(" --bug {}", bug.name())).unwrap_or_default();
            println!("seed {seed}, step {}, index {}: rule {} is broken", v.step, v.index, v.rule);
            println!("  {}", v.what);
            println!("  trace {hash:016x}; again: sim replay --seed {seed} --steps {}{bug} --trace", options.steps());
        }
    }
}
