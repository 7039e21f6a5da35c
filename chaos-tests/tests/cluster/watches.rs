//! A watch is one sequence, whatever happens to the replica that serves it.

use anyhow::ensure;
use warren_chaos::client::Watcher;
use warren_chaos::cluster::{Options, Server};
use warren_proto::v1::WatchSandboxesResponse;
use warren_proto::v1::watch_sandboxes_response::Kind;

use crate::{create_many, delete_all, scenario};

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

        // The killed replica replayed its log: it tells the same story, event by event, from the same token.
        let mut replay = Vec::new();
        let mut again = cluster.client_of(leader)?.watch(start);
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
