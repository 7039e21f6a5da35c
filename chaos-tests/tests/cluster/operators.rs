//! An operator's day: the real `warrenctl` against a real region.

use std::process::{Command, Output};

use anyhow::{Context, ensure};
use warren_chaos::cluster::{Cluster, Options};

use crate::scenario;

/// What must not be in a bundle.
const SECRET: &str = "correct-horse-battery-staple";

fn ctl(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<Output> {
    let endpoints = cluster.endpoints().join(",");
    let output = Command::new(cluster.ctl()).args(["--endpoints", &endpoints]).args(arguments).output();
    output.with_context(|| format!("run warrenctl {}", arguments.join(" ")))
}

/// What it prints; an error where it fails.
fn done(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<String> {
    let output = ctl(cluster, arguments)?;
    let (said, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "warrenctl {}: {said}{printed}", arguments.join(" "));
    Ok(printed.into_owned())
}

#[test]
fn every_operators_command_works_on_a_real_region() {
    let options = Options { secrets: true, ..Options::default() };
    scenario("operators", options, async |cluster| {
        let client = cluster.client()?;
        client.await_status("the second level", |status| status.level == 2).await?;
        look_around(cluster)?;
        sandboxes(cluster)?;
        nodes_and_tenants(cluster).await?;
        pauses(cluster)?;
        bundle_and_backup(cluster)?;
        done(cluster, &["sandbox", "delete", "--all", "--wait"]).map(drop)
    });
}

fn look_around(cluster: &Cluster) -> anyhow::Result<()> {
    ensure!(done(cluster, &["server", "health"])?.starts_with("healthy: 3 of 3"), "not healthy");
    ensure!(done(cluster, &["server", "members"])?.contains("LEADER"), "no leader");
    ensure!(done(cluster, &["raft", "status"])?.lines().count() == 4, "not three replicas");
    done(cluster, &["raft", "hash"])?;
    ensure!(done(cluster, &["check"])?.matches("all rules hold").count() == 3, "not checked on all");
    let found = done(cluster, &["doctor"])?;
    ensure!(!found.contains("FAIL") && found.contains("state hash"), "{found}");
    ensure!(done(cluster, &["region", "level"])? == "2\n", "another level");
    Ok(())
}

fn sandboxes(cluster: &Cluster) -> anyhow::Result<()> {
    let secret = format!("TOKEN={SECRET}");
    let create = [
        "sandbox",
        "create",
        "--id",
        "a",
        "--template",
        "box",
        "--memory",
        "32MiB",
        "--label",
        "team=x",
        "--secret",
        &secret,
        "--annotation",
        "note=hello",
        "--ttl",
        "1h",
        "--priority",
        "5",
        "--restart",
        "on-failure",
        "--on-isolation",
        "freeze",
        "--queue-timeout",
        "5m",
        "--egress",
        "none",
        "--wait",
    ];
    done(cluster, &create)?;
    let seen = done(cluster, &["sandbox", "exec", "a", "--", "sh", "-c", "echo $TOKEN"])?;
    ensure!(seen.trim() == SECRET, "the sandbox has `{seen}`");
    let shown = done(cluster, &["sandbox", "show", "a", "-o", "json"])?;
    ensure!(!shown.contains(SECRET) && shown.contains("\"TOKEN\""), "{shown}");
    done(cluster, &["sandbox", "create", "--id", "b", "--template", "box", "--memory", "32MiB", "--wait"])?;
    done(cluster, &["sandbox", "wait", "b", "--for", "running"])?;
    done(cluster, &["sandbox", "update", "b", "--label", "team=y", "--ttl", "30m", "--priority", "9"])?;
    let listed = done(cluster, &["sandbox", "list", "--label", "team=y", "--state", "running", "-o", "name"])?;
    ensure!(listed == "tenants/default/sandboxes/b\n", "{listed}");
    Ok(())
}

async fn nodes_and_tenants(cluster: &Cluster) -> anyhow::Result<()> {
    let node = cluster.nodes()[0].clone();
    ensure!(done(cluster, &["node", "cordon", &node])?.contains("READY,CORDONED"), "not cordoned");
    ensure!(done(cluster, &["node", "label", &node, "zone=z1"])?.contains("zone=z1"), "no label");
    ensure!(!done(cluster, &["node", "uncordon", &node])?.contains("CORDONED"), "still cordoned");
    let refused = ctl(cluster, &["node", "forget", &node, "--yes"])?;
    ensure!(refused.status.code() == Some(4), "a node that is ready was forgotten");
    let unasked = ctl(cluster, &["node", "forget", &node])?;
    ensure!(unasked.status.code() == Some(2), "not asked: {unasked:?}");
    done(cluster, &["node", "orphans"])?;
    done(cluster, &["top", "nodes"])?;
    done(cluster, &["tenant", "set-quota", "default", "--sandboxes", "2"])?;
    let full = ctl(cluster, &["sandbox", "create", "--template", "box", "--timeout", "2s"])?;
    ensure!(full.status.code() == Some(7), "over the quota: {full:?}");
    ensure!(done(cluster, &["tenant", "list"])?.contains("2 / 2"), "usage beside the limit");
    done(cluster, &["tenant", "set-quota", "default", "--none"])?;
    done(cluster, &["top", "tenants"]).map(drop)
}

fn pauses(cluster: &Cluster) -> anyhow::Result<()> {
    done(cluster, &["region", "pause", "creates"])?;
    let paused = ctl(cluster, &["sandbox", "create", "--template", "box", "--timeout", "1s"])?;
    ensure!(paused.status.code() == Some(5), "created while paused: {paused:?}");
    ensure!(done(cluster, &["region", "status"])?.contains("creates paused"), "not said");
    done(cluster, &["region", "resume", "creates"])?;
    done(cluster, &["region", "release-brake"]).map(drop)
}

fn bundle_and_backup(cluster: &Cluster) -> anyhow::Result<()> {
    let (bundle, backup) = (cluster.scratch("bundle.tar.gz"), cluster.scratch("backup.warren"));
    done(cluster, &["debug", "bundle", &bundle.display().to_string()])?;
    let listed = Command::new("tar").args(["-xzOf"]).arg(&bundle).output()?;
    let text = String::from_utf8_lossy(&listed.stdout);
    ensure!(text.contains("warren_raft_has_leader") && text.contains("heartbeat_ms"), "not all is in the bundle");
    ensure!(!text.contains(SECRET) && !text.contains("hello"), "the bundle tells what it must not");
    let file = backup.display().to_string();
    done(cluster, &["server", "backup", &file])?;
    let again = ctl(cluster, &["server", "backup", &file])?;
    ensure!(again.status.code() == Some(2), "a backup was overwritten");
    ensure!(std::fs::metadata(&backup)?.len() > 1000, "an empty backup");
    Ok(())
}
