//! A watch is one sequence, whatever happens to the replica that serves it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{bail, ensure};
use tokio::time::Instant;
use warren_chaos::client::{Client, Watcher};
use warren_chaos::cluster::{Options, Server};
use warren_proto::v1::WatchSandboxesResponse;
use warren_proto::v1::watch_sandboxes_response::Kind;

use crate::{create_many, delete_all, scenario, without_room};

/// A client that hears nothing for so long may take a connection for broken: it pings after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Creates between two looks at the log, and looks before giving up: hundreds of creates are enough on an idle machine.
const BATCH: usize = 25;
const MAX_BATCHES: usize = 200;

#[test]
fn a_watch_goes_on_over_a_leader_change_without_a_gap() {
    scenario("watch", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let start = client.watch_token().await?;
        // Its client begins where the leader is, so that the break is the watch's.
        let leader = cluster.leader().await?;
        let mut endpoints = cluster.endpoints().to_vec();
        endpoints.rotate_left(leader);
        let mut watcher = warren_chaos::client::Client::new(&endpoints)?.watch(start.clone());
        let mut seen = Vec::new();

        let mut names = create_many(&client, 5).await?;
        read_until(&mut watcher, &mut seen, Kind::Created, 5).await?;
        cluster.kill(Server::Scheduler(leader))?;
        names.extend(create_many(&client, 5).await?);
        read_until(&mut watcher, &mut seen, Kind::Created, 10).await?;
        cluster.restart(Server::Scheduler(leader)).await?;
        client.await_running(&names).await?;
        delete_all(&client, &names).await?;
        read_until(&mut watcher, &mut seen, Kind::Deleted, 10).await?;
        ensure!(watcher.opened >= 2, "the watch was never broken");

        // The killed replica replayed its log: it tells the same story, event by event, from the same token, and by itself.
        let mut replay = Vec::new();
        let mut again = cluster.client_of(leader)?.watch(start).stale();
        read_until(&mut again, &mut replay, Kind::Deleted, 10).await?;
        ensure!(seen.len() == replay.len(), "{} events, then {}", seen.len(), replay.len());
        for (at, (one, two)) in seen.iter().zip(&replay).enumerate() {
            ensure!(one == two, "event {at} was {one:?}, and is {two:?}");
        }
        for name in &names {
            let of = |kind| {
                let about = |event: &&WatchSandboxesResponse| {
                    event.kind() == kind && event.sandbox.as_ref().is_some_and(|sandbox| sandbox.name == *name)
                };
                seen.iter().filter(about).count()
            };
            ensure!(of(Kind::Created) == 1 && of(Kind::Deleted) == 1, "{name} was created or deleted more than once");
        }
        Ok(())
    });
}

/// A follower sleeps while the others write past what their logs keep: it is sent a checkpoint, and its watch tells all that
/// happened meanwhile, from the tail of events that the checkpoint carries.
#[test]
fn a_watch_goes_on_over_the_installation_of_a_checkpoint_without_a_gap() {
    let options = Options { agents: 1, checkpoint_every: Some(50), ..Options::default() };
    scenario("watch over a checkpoint", options, async |cluster| {
        let start = cluster.client()?.watch_token().await?;
        let (leader, follower) = (cluster.leader().await?, cluster.follower().await?);
        let client = cluster.client_of(leader)?;
        let mut watcher = cluster.client_of(follower)?.watch(start.clone()).stale();
        let mut seen = Vec::new();
        let mut names = vec![client.create(without_room()).await?.name];
        read_until(&mut watcher, &mut seen, Kind::Created, 1).await?;

        cluster.pause(Server::Scheduler(follower))?;
        let stopped = Instant::now();
        create_past_the_log(&client, &mut names).await?;
        // Meanwhile entries that it lacks were on their way to it, and lie before its door: no more than there are by now.
        create_past_the_log(&client, &mut names).await?;
        cluster.unpause(Server::Scheduler(follower))?;
        let stopped = stopped.elapsed();
        read_until(&mut watcher, &mut seen, Kind::Created, names.len()).await?;
        let opened = watcher.opened;
        ensure!(opened == 1 || stopped >= KEEP_ALIVE, "opened {opened} times, though it was stopped for {stopped:?}");
        ensure!(cluster.log(Server::Scheduler(follower))?.contains("checkpoint installed"), "no checkpoint was sent");

        let (mut story, mut at_leader) = (Vec::new(), client.watch(start));
        read_until(&mut at_leader, &mut story, Kind::Created, names.len()).await?;
        ensure!(seen == story, "the follower tells {} events, the leader {}", seen.len(), story.len());
        let created = seen.iter().filter(|event| event.kind() == Kind::Created);
        let created: BTreeSet<_> = created.filter_map(|event| Some(&event.sandbox.as_ref()?.name)).collect();
        ensure!(created.len() == names.len(), "{} of {} creates were told", created.len(), names.len());
        delete_all(&client, &names).await
    });
}

/// Creates sandboxes until the leader's log no longer holds what is the newest in it now. A purge waits for entries that are
/// under way to a replica which does not answer, so how many that takes is not known beforehand.
async fn create_past_the_log(leader: &Client, names: &mut Vec<String>) -> anyhow::Result<()> {
    let newest = leader.replica_status().await?.last_log_index;
    for _ in 0..MAX_BATCHES {
        if leader.replica_status().await?.purged_index > newest {
            return Ok(());
        }
        for _ in 0..BATCH {
            names.push(leader.create(without_room()).await?.name);
        }
    }
    bail!("{} creates after entry {newest} it is still in the log", MAX_BATCHES * BATCH)
}

/// Reads until `count` events of `kind` were seen in all.
async fn read_until(
    watcher: &mut Watcher,
    seen: &mut Vec<WatchSandboxesResponse>,
    kind: Kind,
    count: usize,
) -> anyhow::Result<()> {
    while seen.iter().filter(|event| event.kind() == kind).count() < count {
        seen.push(watcher.next().await?);
    }
    Ok(())
}
