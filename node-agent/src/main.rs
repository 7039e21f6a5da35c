//! The node agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((first, rest)) if first == "shim" => warren_node_agent::shim::run(rest),
        _ => ExitCode::FAILURE,
    }
}
