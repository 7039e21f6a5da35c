//! The lines of the code map, held by reading the sources: who may use whom, what pure modules must not touch, what only one
//! module may do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest file that is still read with pleasure; the style guide says 80 to 350 lines.
const MAX_LINES: usize = 720;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Every `.rs` file below a folder of the repository, with its text.
fn sources(folder: &str) -> BTreeMap<String, String> {
    let root = root();
    let mut found = BTreeMap::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
                found.insert(name, fs::read_to_string(&path).expect("text"));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no sources");
    found
}

/// The lines of a file that are code outside its tests.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let inline = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub(crate) mod testing {"];
    let end = inline.iter().filter_map(|begin| text.find(begin)).min().unwrap_or(text.len());
    let lines = text[..end].lines().enumerate();
    lines.map(|(at, line)| (at + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Fails with every place where one of `words` stands in code of `folder`.
fn forbid(folder: &str, words: &[&str], why: &str, except: &[&str]) {
    let mut wrong = Vec::new();
    for (name, text) in sources(folder) {
        if except.iter().any(|allowed| name.contains(allowed)) {
            continue;
        }
        for (at, line) in code(&text) {
            wrong.extend(words.iter().filter(|word| line.contains(**word)).map(|w| format!("{name}:{at}: `{w}`")));
        }
    }
    assert!(wrong.is_empty(), "{why}:\n{}", wrong.join("\n"));
}

#[test]
fn pure_modules_touch_no_io_clock_or_chance() {
    let io = [
        "tokio",
        "tonic",
        "openraft",
        "sled",
        "std::fs",
        "std::net",
        "std::io",
        "SystemTime",
        "Instant",
        "rand::",
        "clock::",
    ];
    for module in ["state", "placement", "plan"] {
        forbid(&format!("scheduler/src/{module}"), &io, "a pure module is given time, chance and data", &[]);
    }
}

#[test]
fn state_knows_no_floats_and_no_hash_order() {
    let words = ["f32", "f64", "HashMap", "HashSet", "is_leader", ".unwrap()"];
    forbid(
        "scheduler/src/state",
        &words,
        "apply must be deterministic and total",
        &["tests.rs", "state/tests/", "testing.rs"],
    );
}

#[test]
fn modules_use_only_what_lies_to_their_right() {
    let up = |modules: &[&str]| modules.iter().map(|module| format!("crate::{module}")).collect::<Vec<_>>();
    let order = ["api", "controller", "raft", "plan", "placement", "state"];
    let forbidden: [(&str, Vec<String>); 5] = [
        ("state", up(&order[..5])),
        ("placement", up(&order[..4])),
        ("plan", up(&order[..3])),
        ("raft", up(&["api", "controller", "plan", "placement"])),
        ("controller", up(&["api"])),
    ];
    for (module, words) in forbidden {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        forbid(&format!("scheduler/src/{module}"), &words, "a module uses what lies to its left", &[]);
    }
}

#[test]
fn only_raft_names_openraft_and_sled() {
    // `main` turns down their logs by name.
    forbid("scheduler/src", &["openraft", "sled"], "the log's libraries have one home", &["src/raft/", "src/main.rs"]);
}

#[test]
fn only_the_clock_reads_time() {
    let words = ["SystemTime::now", " Instant::now", "(Instant::now", "time::Instant::now"];
    forbid("scheduler/src", &words, "time is an input", &["src/clock.rs", "bin/warrenctl"]);
    forbid("node-agent/src", &words, "time is an input", &["src/clock.rs"]);
}

#[test]
fn one_file_makes_statuses() {
    let words = [
        "Status::new(",
        "Status::internal(",
        "Status::invalid_argument(",
        "Status::unavailable(",
        "Status::not_found(",
    ];
    forbid("scheduler/src/api", &words, "errors are made where their reasons stand together", &["api/status.rs"]);
}

#[test]
fn metric_names_stand_in_one_file() {
    forbid("scheduler/src", &["\"warren_"], "metrics are named together", &["src/metrics/names.rs", "bin/warrenctl"]);
    forbid("node-agent/src", &["\"warren_agent_"], "metrics are named together", &["src/metrics.rs"]);
}

#[test]
fn scheduler_and_agent_never_see_each_other() {
    let manifest = |folder: &str| fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("a manifest");
    assert!(!manifest("scheduler").contains("warren-node-agent"));
    assert!(!manifest("node-agent").contains("warren-scheduler"));
    let shared = manifest("proto");
    assert!(!shared.contains("warren-node-agent") && !shared.contains("warren-scheduler"));
}

#[test]
fn unsafe_code_has_one_home() {
    for folder in ["proto/src", "scheduler/src", "chaos-tests/src"] {
        forbid(folder, &["unsafe "], "unsafe code lives in the agent's system calls only", &[]);
    }
    forbid("node-agent/src", &["unsafe "], "unsafe code lives in sys.rs only", &["src/sys.rs"]);
}

#[test]
fn nothing_is_left_for_later_in_silence() {
    let words = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "FIXME", "TODO"];
    for folder in
        ["proto/src", "scheduler/src", "node-agent/src", "chaos-tests/src", "node-agent/tests", "chaos-tests/tests"]
    {
        forbid(folder, &words, "what is missing stands in the README", &[]);
    }
}

#[test]
fn files_stay_readable_and_say_what_they_are_for() {
    for folder in ["proto/src", "scheduler/src", "node-agent/src", "chaos-tests/src"] {
        for (name, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= MAX_LINES, "{name} has {lines} lines, at most {MAX_LINES} are allowed");
            assert!(text.starts_with("//!"), "{name} does not begin by saying what it is for");
        }
    }
}

/// Every reason of `errors.proto` with the gRPC code that its comment begins with.
fn reasons() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("proto/warren/v1/errors.proto")).expect("the reasons");
    let (mut found, mut code) = (Vec::new(), None);
    for line in text.lines().map(str::trim) {
        match (line.strip_prefix("// "), line.strip_prefix("ERROR_REASON_")) {
            (Some(comment), _) => {
                let first = comment.split([':', ',', '.']).next().unwrap_or_default();
                code = code.or_else(|| Some(first.to_owned()));
            }
            (_, Some(reason)) if !reason.starts_with("UNSPECIFIED") => {
                let reason = reason.split(" =").next().unwrap_or_default().to_owned();
                found.push((reason, code.take().expect("a comment that begins with a code")));
            }
            _ => code = None,
        }
    }
    found
}

/// Reasons that no client can provoke on purpose, and why; tests of the file that makes them make them.
const MADE_BY_ITS_OWN_TEST: [(&str, &str); 4] = [
    ("CONFLICT", "a client's decision that conflicts commits as PENDING; the leader's own commands meet it"),
    ("CLOCK_STEP", "the leader stamps every command, so its clock must jump between two"),
    ("DRIVER_UNSUPPORTED", "the drivers that tests run on can do everything"),
    ("DRIVER_FAILED", "the runtime or the host must break"),
];

/// Whether a test says that it is answered this reason: a refusal that a fake makes is no test of it.
fn expects(tests: &str, camel: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric());
    let names = |statement: &str, prefix: &str| {
        statement.match_indices(&format!("{prefix}::{camel}")).any(|(at, found)| ends(&statement[at + found.len()..]))
    };
    tests.split(';').filter(|statement| !statement.contains("ErrorBuilder")).any(|statement| {
        let answered = ["refused(", "Some(", "vec!["].iter().any(|word| statement.contains(word));
        answered && (names(statement, "ErrorReason") || names(statement, "R"))
    })
}

#[test]
fn every_reason_stands_in_the_table_and_a_test_provokes_it() {
    let table = fs::read_to_string(root().join("proto/ERRORS.md")).expect("the table");
    let rows: BTreeMap<&str, &str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | `"))
        .filter_map(|(reason, rest)| Some((reason, rest.split_once("` |")?.0)))
        .collect();
    let (mut real, mut inline) = (String::new(), String::new());
    for folder in ["scheduler/tests/api", "node-agent/tests", "chaos-tests/tests"] {
        sources(folder).into_values().for_each(|text| real.push_str(&text));
    }
    for folder in ["scheduler/src", "node-agent/src"] {
        let tests =
            sources(folder).into_values().filter_map(|text| Some(text.split_once("#[cfg(test)]")?.1.to_owned()));
        tests.for_each(|text| inline.push_str(&text));
    }
    let reasons = reasons();
    for (reason, code) in &reasons {
        assert_eq!(rows.get(reason.as_str()), Some(&code.as_str()), "the row of {reason} in proto/ERRORS.md");
        let camel: String =
            reason.split('_').map(|word| format!("{}{}", &word[..1], word[1..].to_lowercase())).collect();
        let made_here = MADE_BY_ITS_OWN_TEST.iter().any(|(name, _why)| name == reason);
        if made_here {
            assert!(expects(&inline, &camel), "no test makes {reason}");
        }
        assert_ne!(expects(&real, &camel), made_here, "whether a test that calls a server provokes {reason}");
    }
    assert_eq!(rows.len(), reasons.len(), "the table has rows for reasons that do not exist");
}
