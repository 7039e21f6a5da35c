//! What Prometheus scrapes: legal, described, and no more series for more tenants and sandboxes.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
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
    check_health(&region, exporter).await;
    region.end().await;
}

/// A replica that cannot go on does not look alive.
async fn check_health(region: &Region, exporter: PrometheusHandle) {
    let listener = bind().await;
    let address = listener.local_addr().unwrap();
    let serving = warren_scheduler::http::serve(region.controller.clone(), exporter, listener, region.stop.clone());
    tokio::spawn(serving);
    let page = get(address, "/healthz").await;
    assert!(page.starts_with("HTTP/1.1 200") && page.ends_with("ok\n"), "{page}");
    region.replica.fail("the disk is full".to_owned());
    let page = get(address, "/healthz").await;
    assert!(page.starts_with("HTTP/1.1 503") && page.ends_with("not ok: the disk is full\n"), "{page}");
}

async fn get(address: SocketAddr, page: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
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
