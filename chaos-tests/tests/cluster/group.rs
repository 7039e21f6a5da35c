//! The group of replicas: joining, leaving, replacing the dead, handing over, and a disk that is gone.

use anyhow::{Context, ensure};
use warren_chaos::cluster::{Cluster, Options, Server};
use warren_proto::v1::{GetClusterStatusResponse, Member, MemberRole};

use crate::{create_many, delete_all, scenario};

fn member(status: &GetClusterStatusResponse, id: u64) -> Option<&Member> {
    status.members.iter().find(|member| member.replica_id == id)
}

fn votes(status: &GetClusterStatusResponse, id: u64) -> bool {
    member(status, id).is_some_and(|m| matches!(m.role(), MemberRole::Follower | MemberRole::Leader))
}

fn id_of(scheduler: usize) -> u64 {
    scheduler as u64 + 1
}

/// A new replica that joins through those that run, with a disk of its own.
async fn join(cluster: &mut Cluster, flags: &[(&str, &str)]) -> anyhow::Result<usize> {
    let addresses = cluster.endpoints().join(",");
    let all: Vec<(&str, &str)> = std::iter::once(("join", addresses.as_str())).chain(flags.iter().copied()).collect();
    let at = cluster.add_scheduler(&all);
    cluster.restart(Server::Scheduler(at)).await.context("start the new replica")?;
    Ok(at)
}

#[test]
fn a_dead_replica_is_replaced_under_a_new_id_and_leadership_is_handed_over() {
    scenario("replica replaced", Options::default(), async |cluster| {
        let dead = cluster.follower().await?;
        cluster.kill(Server::Scheduler(dead))?;
        let names = create_many(&cluster.client()?, 4).await?;
        let new = join(cluster, &[]).await?;
        let client = cluster.client()?;
        client.await_status("the new replica votes", |status| votes(status, id_of(new))).await?;
        client.remove_replica(id_of(dead)).await.context("take the dead one out")?;
        let status = client.await_status("it is out", |status| member(status, id_of(dead)).is_none()).await?;
        ensure!(status.members.len() == 3, "{:?}", status.members);
        client.transfer_leadership(id_of(new)).await.context("hand over")?;
        client.await_status("the new one leads", |status| status.leader_id == id_of(new)).await?;
        ensure!(client.list().await?.len() == names.len(), "sandboxes went missing");
        client.await_running(&names).await?;
        delete_all(&client, &names).await
    });
}

#[test]
fn a_standby_replaces_a_voter_that_is_dead_for_longer_than_its_grace() {
    let options = Options { replica_grace_ms: Some(3000), agents: 1, ..Options::default() };
    scenario("standby", options, async |cluster| {
        let dead = cluster.follower().await?;
        let standby = join(cluster, &[("standby", "true")]).await?;
        let client = cluster.client()?;
        let waits = |status: &GetClusterStatusResponse| {
            member(status, id_of(standby)).is_some_and(|m| m.role() == MemberRole::Standby && m.matched_index > 0)
        };
        client.await_status("the standby waits", waits).await?;
        cluster.kill(Server::Scheduler(dead))?;
        let replaced =
            |status: &GetClusterStatusResponse| votes(status, id_of(standby)) && member(status, id_of(dead)).is_none();
        client.await_status("the standby replaced it", replaced).await?;
        Ok(())
    });
}

#[test]
fn a_replica_that_lost_its_disk_says_so_and_does_not_vote_again() {
    scenario("disk lost", Options { agents: 1, ..Options::default() }, async |cluster| {
        let lost = cluster.follower().await?;
        let client = cluster.client()?;
        client.await_status("the second level", |status| status.level == 2).await?;
        cluster.kill(Server::Scheduler(lost))?;
        cluster.wipe(lost)?;
        let said = cluster.await_refusal(lost).await?;
        ensure!(said.contains("its disk was lost or replaced") && said.contains("--join"), "it says: {said}");
        let names = create_many(&client, 2).await?;
        delete_all(&client, &names).await
    });
}

#[test]
fn a_replica_that_joined_and_lost_its_disk_says_so_too() {
    scenario("joined disk lost", Options { agents: 1, ..Options::default() }, async |cluster| {
        let joined = join(cluster, &[]).await?;
        let client = cluster.client()?;
        client.await_status("it votes", |status| votes(status, id_of(joined))).await?;
        cluster.kill(Server::Scheduler(joined))?;
        cluster.wipe(joined)?;
        let said = cluster.await_refusal(joined).await?;
        ensure!(said.contains("its disk was lost or replaced") && said.contains("--join"), "it says: {said}");
        client.remove_replica(id_of(joined)).await.context("take it out")?;
        cluster.wipe(joined)?;
        cluster.set_flag(Server::Scheduler(joined), "replica-id", Some("9"));
        cluster.restart(Server::Scheduler(joined)).await.context("start it as a new one")?;
        client.await_status("it votes under its new id", |status| votes(status, 9)).await?;
        Ok(())
    });
}

#[test]
fn a_replica_without_its_disk_that_starts_before_its_peers_is_found_out_by_them() {
    scenario("disk lost, peers down", Options { agents: 1, ..Options::default() }, async |cluster| {
        let lost = cluster.follower().await?;
        let client = cluster.client()?;
        client.await_status("the second level", |status| status.level == 2).await?;
        for scheduler in 0..3 {
            cluster.kill(Server::Scheduler(scheduler))?;
        }
        cluster.wipe(lost)?;
        let already = cluster.log(Server::Scheduler(lost))?.matches("serving").count();
        cluster.start_only(lost)?;
        cluster.await_log(lost, "serving", already + 1).await?;
        for scheduler in (0..3).filter(|at| *at != lost) {
            cluster.start_only(scheduler)?;
        }
        let said = cluster.await_end(lost).await?;
        ensure!(said.contains("its disk was lost or replaced") && said.contains("--join"), "it says: {said}");
        let names = create_many(&client, 2).await?;
        delete_all(&client, &names).await
    });
}

#[test]
fn a_live_follower_leaves_and_the_leader_hands_over_and_leaves() {
    scenario("leave", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        client.await_status("all are heard of", |s| s.members.iter().all(|member| member.reachable)).await?;
        let (leader, follower) = (cluster.leader().await?, cluster.follower().await?);
        client.remove_replica(id_of(follower)).await.context("the follower leaves")?;
        client.await_status("it is out", |status| member(status, id_of(follower)).is_none()).await?;
        client.remove_replica(id_of(leader)).await.context("the leader leaves")?;
        let last = (0..3).find(|at| *at != leader && *at != follower).context("three schedulers")?;
        let alone = |status: &GetClusterStatusResponse| status.members.len() == 1 && status.leader_id == id_of(last);
        cluster.client_of(last)?.await_status("the last one leads alone", alone).await?;
        let names = create_many(&cluster.client_of(last)?, 2).await?;
        delete_all(&cluster.client_of(last)?, &names).await
    });
}

/// A replica whose Raft has stopped must not look alive.
#[test]
fn a_replica_that_cannot_write_its_checkpoint_ends_and_comes_back() {
    let options = Options { agents: 1, checkpoint_every: Some(200), ..Options::default() };
    scenario("checkpoint fails", options, async |cluster| {
        let client = cluster.client()?;
        let broken = cluster.follower().await?;
        let (place, aside) = (cluster.checkpoints(broken), cluster.scratch("checkpoints"));
        std::fs::rename(&place, &aside).context("take its checkpoints away")?;
        let mut rounds = 0;
        while cluster.runs(broken)? {
            rounds += 1;
            ensure!(rounds < 100, "it runs on without its checkpoints");
            let names = create_many(&client, 4).await?;
            delete_all(&client, &names).await?;
        }
        let log = cluster.log(Server::Scheduler(broken))?;
        ensure!(log.contains("this replica cannot go on") && log.contains("raft has stopped"), "it says: {log}");
        std::fs::rename(&aside, &place).context("give them back")?;
        cluster.restart(Server::Scheduler(broken)).await
    });
}
