//! An operator's day: the real `warrenctl` against a real region.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use warren_chaos::cluster::{Cluster, Options, Server};

use crate::scenario;

/// What must not be in a bundle.
const SECRET: &str = "correct-horse-battery-staple";

/// Between two looks, and looks before giving up: half a minute.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
const LOOKS: u32 = 150;

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

/// Runs it again and again until it prints what is wanted: what a leader hears of others may be late by a heartbeat.
pub async fn eventually(
    what: &str,
    mut look: impl FnMut() -> anyhow::Result<Output>,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let mut last = None;
    for _ in 0..LOOKS {
        let output = look()?;
        if output.status.success() && wanted(&String::from_utf8_lossy(&output.stdout)) {
            return Ok(());
        }
        last = Some(output);
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    bail!("{what}: never; last {last:?}")
}

#[test]
fn every_operators_command_works_on_a_real_region() {
    let options = Options { secrets: true, ..Options::default() };
    scenario("operators", options, async |cluster| {
        let client = cluster.client()?;
        client.await_status("the second level", |status| status.level == 2).await?;
        look_around(cluster).await?;
        sandboxes(cluster)?;
        nodes_and_tenants(cluster).await?;
        pauses(cluster)?;
        bundle_and_backup(cluster)?;
        done(cluster, &["sandbox", "delete", "--all", "--wait"])?;
        without_a_leader(cluster).await
    });
}

/// Two of three schedulers are gone: what is left can be looked at, and it is said what is missing.
async fn without_a_leader(cluster: &mut Cluster) -> anyhow::Result<()> {
    let left = cluster.follower().await?;
    for gone in (0..3).filter(|at| *at != left) {
        cluster.kill(Server::Scheduler(gone))?;
    }
    let bundle = cluster.scratch("leaderless.tar.gz").display().to_string();
    for arguments in [
        &["status"][..],
        &["raft", "status"],
        &["raft", "hash"],
        &["check"],
        &["doctor"],
        &["debug", "bundle", &bundle],
    ] {
        // Only the one that is left is named: it knows the others.
        let only = ["--endpoints", &cluster.endpoints()[left]];
        let output = Command::new(cluster.ctl()).args(only).args(arguments).output()?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.code() == Some(5), "{arguments:?}: {output:?}");
        ensure!(said.contains("1 of 3 voters answer and 2 must"), "{arguments:?}: {said}");
    }
    let listed = Command::new("tar").args(["-xzOf", &bundle]).output()?;
    let text = String::from_utf8_lossy(&listed.stdout);
    ensure!(
        text.contains("warren_raft_has_leader") && text.contains("nodes/chaos-"),
        "not what is left is in the bundle"
    );
    cluster.restart_all().await
}

async fn look_around(cluster: &Cluster) -> anyhow::Result<()> {
    let all_heard = |said: &str| said.starts_with("healthy: 3 of 3");
    eventually("healthy", || ctl(cluster, &["server", "health"]), all_heard).await?;
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
    check_backup(cluster, &backup)
}

/// The rules over a backup: no region is asked, and what is damaged is not called well.
fn check_backup(cluster: &Cluster, backup: &Path) -> anyhow::Result<()> {
    let file = backup.display().to_string();
    ensure!(
        done(cluster, &["check", &file])?.starts_with(&format!("{file}: all rules hold at revision ")),
        "not checked"
    );
    let whole = std::fs::read(backup)?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for damaged in [&flipped[..], &whole[..whole.len() - 1]] {
        std::fs::write(backup, damaged)?;
        let said = ctl(cluster, &["check", &file])?;
        let damage = String::from_utf8_lossy(&said.stderr).contains("is damaged");
        ensure!(said.status.code() == Some(1) && said.stdout.is_empty() && damage, "{said:?}");
    }
    Ok(())
}
