//! `warren-fence`: freezes this node's sandboxes when its lease lapses. The agent starts it; see `warren_node_agent::fence`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    warren_node_agent::fence::guard::run(&arguments)
}
