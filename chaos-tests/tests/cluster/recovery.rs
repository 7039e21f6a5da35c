//! Disasters: two of three disks gone, and a backup restored while sandboxes of a later history run on.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use warren_chaos::client::small_sandbox;
use warren_chaos::cluster::{Cluster, Options, Server};
use warren_proto::v1::{Sandbox, SandboxState, SetPauseRequest};

use crate::faults::main_processes;
use crate::{create_many, delete_all, scenario};

/// Everything resumes what a restored ledger begins with paused.
const RESUME: SetPauseRequest = SetPauseRequest { creates: None, placement: Some(false), moves: Some(false) };

#[test]
fn two_of_three_disks_are_lost_and_nothing_runs_or_counts_twice() {
    scenario("quorum lost", Options::default(), async |cluster| {
        let client = cluster.client()?;
        let mut names = create_many(&client, 8).await?;
        // It needs the second level, which the log raises after its members are known: both must be replayed.
        let important = Sandbox { priority: 7, ..small_sandbox() };
        names.push(client.create(important).await?.name);
        client.await_running(&names).await?;
        let before = main_processes(&client, &names).await?;
        let ledger = client.cluster_status().await?.ledger_id;
        let survivor = cluster.follower().await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
        }
        for lost in (0..3).filter(|at| *at != survivor) {
            cluster.wipe(lost)?;
        }
        let said = cluster.run_offline(survivor, &["recover-quorum"]).context("recover")?;
        ensure!(said.contains("9 sandboxes, 3 nodes"), "it says: {said}");
        cluster.set_flag(Server::Scheduler(survivor), "initial-members", None);
        cluster.restart(Server::Scheduler(survivor)).await?;

        let client = cluster.client_of(survivor)?;
        let status = client.await_status("every node is back", |s| s.ready_node_count == 3).await?;
        ensure!(status.ledger_id != ledger, "the ledger has its old id");
        ensure!(status.level == 2, "the ledger fell back to level {}", status.level);
        let kept = client.list().await?.iter().filter(|sandbox| sandbox.priority == 7).count();
        ensure!(kept == 1, "what the second level brought is lost");
        client.await_running(&names).await?;
        ensure!(main_processes(&client, &names).await? == before, "main processes changed");
        ensure!(client.nodes().await?.iter().all(|node| node.orphans.is_empty()), "there are orphans");
        ensure!(client.check_state().await?.violations.is_empty(), "the rules are broken");

        let waiting = client.create(small_sandbox()).await?;
        ensure!(waiting.state() == SandboxState::Pending, "placed before anybody looked: {waiting:?}");
        client.set_pause(RESUME).await?;
        client.await_running(std::slice::from_ref(&waiting.name)).await?;
        join_two(cluster, survivor).await?;
        let all: Vec<String> = names.into_iter().chain([waiting.name]).collect();
        delete_all(&client, &all).await
    });
}

#[test]
fn the_two_that_were_given_up_come_back_and_the_recovered_ledger_is_as_it_was() {
    scenario("lost pair comes back", Options { agents: 1, ..Options::default() }, async |cluster| {
        let before = cluster.client()?.cluster_status().await?.ledger_id;
        let survivor = cluster.follower().await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
        }
        cluster.run_offline(survivor, &["recover-quorum"]).context("recover")?;
        cluster.set_flag(Server::Scheduler(survivor), "initial-members", None);
        cluster.restart(Server::Scheduler(survivor)).await?;
        let client = cluster.client_of(survivor)?;
        let recovered = client.await_status("it leads alone", |status| status.members.len() == 1).await?;
        ensure!(recovered.ledger_id != before, "the ledger has its old id");

        let pair: Vec<usize> = (0..3).filter(|at| *at != survivor).collect();
        for scheduler in &pair {
            cluster.start_only(*scheduler)?;
        }
        let old = cluster.client_of(pair[0])?;
        old.await_status("they lead themselves", |s| s.ledger_id == before && s.leader_id > 0).await?;
        cluster.await_log(survivor, "a replica is refused", 1).await?;
        let status = client.cluster_status().await?;
        ensure!(status.ledger_id == recovered.ledger_id && status.members.len() == 1, "{status:?}");
        ensure!(status.leader_id == recovered.leader_id && status.term == recovered.term, "{status:?}");
        for scheduler in pair {
            cluster.kill(Server::Scheduler(scheduler))?;
        }
        Ok(())
    });
}

/// Two new replicas with new ids, so that there is a quorum to lose again.
async fn join_two(cluster: &mut Cluster, first: usize) -> anyhow::Result<()> {
    let address = cluster.endpoints()[first].clone();
    for _ in 0..2 {
        let at = cluster.add_scheduler(&[("join", &address)]);
        cluster.restart(Server::Scheduler(at)).await?;
    }
    let client = cluster.client_of(first)?;
    client.await_status("three vote", |s| s.members.iter().filter(|m| m.role != 3).count() == 3).await?;
    Ok(())
}

#[test]
fn a_backup_is_restored_and_what_it_does_not_know_is_frozen_until_somebody_decides() {
    scenario("backup restored", Options::default(), async |cluster| {
        let client = cluster.client()?;
        let known = create_many(&client, 3).await?;
        client.await_running(&known).await?;
        let backup = cluster.scratch("backup.warren");
        std::fs::write(&backup, client.backup().await?)?;
        let unknown = create_many(&client, 2).await?;
        client.await_running(&unknown).await?;
        let before = main_processes(&client, &known).await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
            cluster.wipe(scheduler)?;
        }
        let path = backup.display().to_string();
        cluster.run_offline(0, &["restore", &path]).context("restore")?;
        cluster.set_flag(Server::Scheduler(0), "initial-members", None);
        cluster.restart(Server::Scheduler(0)).await?;

        let client = cluster.client_of(0)?;
        client.await_running(&known).await?;
        ensure!(main_processes(&client, &known).await? == before, "main processes changed");
        let orphans = |nodes: &[warren_proto::v1::Node]| -> BTreeSet<String> {
            nodes.iter().flat_map(|node| node.orphans.clone()).collect()
        };
        let wanted: BTreeSet<String> = unknown.iter().map(|name| format!("{name}@1")).collect();
        let nodes = client.await_nodes("the later ones are orphans", |nodes| orphans(nodes) == wanted).await?;
        ensure!(client.list().await?.len() == known.len(), "the ledger knows what it cannot know");
        for node in &nodes {
            for name in node.orphans.iter().filter_map(|orphan| orphan.strip_suffix("@1")) {
                client.stop_orphan(&node.name, name, 1).await?;
            }
        }
        client
            .await_nodes("they are gone", |nodes| {
                nodes.iter().all(|node| node.orphans.is_empty() && node.leftovers.is_empty())
            })
            .await?;
        client.set_pause(RESUME).await?;
        delete_all(&client, &known).await
    });
}
