//! What Prometheus scrapes: legal, described, and no more series for more tenants and sandboxes.

use std::process::{Command, Stdio};

use warren_scheduler::metrics;

use super::*;

/// Without promtool (Debian's `prometheus`) only the rest is checked, and that is said.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_clean_and_its_series_do_not_grow_with_what_runs() {
    let exporter = metrics::install().unwrap();
    let (region, _agent) = region_with_node().await;
    let page = || {
        metrics::observe(&region.controller);
        exporter.render()
    };
    // Other tests of this process call other methods meanwhile, each with its series.
    let own = |line: &&str| {
        !line.is_empty()
            && !line.starts_with('#')
            && !line.starts_with("warren_grpc_")
            && !line.starts_with("warren_lease_")
    };
    let series = |page: &str| page.lines().filter(own).count();
    region.create("first").await.unwrap();
    let few = series(&page());
    for tenant in 0..20 {
        for n in 0..5 {
            let parent = format!("tenants/t{tenant}");
            let request = CreateSandboxRequest { parent, sandbox_id: format!("s{n}"), ..create_request() };
            region.sandboxes().create_sandbox(request).await.unwrap();
        }
    }
    let text = page();
    assert!(few > 40 && series(&text) == few, "{few} series became {}:\n{text}", series(&text));
    for name in ["warren_raft_has_leader", "warren_raft_log_sync_duration_seconds_count", "warren_sandboxes"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "no {name}");
    }
    check_with_promtool(&text);
    region.end().await;
}

fn check_with_promtool(text: &str) {
    use std::io::Write;
    let check =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut check) = check else {
        eprintln!("SKIPPED promtool check metrics: no promtool (Debian's prometheus)");
        return;
    };
    check.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = check.wait_with_output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
}
