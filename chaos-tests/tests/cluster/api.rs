//! What the API promises while the cluster changes underneath.

use anyhow::{Context, ensure};
use tonic::{Code, Status};
use warren_chaos::client::{Client, TENANT, small_sandbox};
use warren_chaos::cluster::{Options, Server};
use warren_proto::error::reason_of;
use warren_proto::v1::{CreateSandboxRequest, DeleteSandboxRequest, ErrorReason, Sandbox};

use crate::{create_many, delete_all, scenario};

fn create_request(sandbox: Sandbox) -> CreateSandboxRequest {
    CreateSandboxRequest {
        parent: TENANT.to_owned(),
        sandbox: Some(sandbox),
        request_id: Client::request_id(),
        ..CreateSandboxRequest::default()
    }
}

fn ensure_refused(outcome: Result<Sandbox, Status>, code: Code, reason: ErrorReason) -> anyhow::Result<()> {
    let status = outcome.err().context("it was accepted")?;
    ensure!(status.code() == code && reason_of(&status) == Some(reason), "{status:?}");
    Ok(())
}

#[test]
fn the_same_request_twice_has_one_effect_also_after_the_leader_was_killed() {
    scenario("request ids", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let request = create_request(small_sandbox());
        // At once, at two replicas.
        let (one, two) = (cluster.client_of(0)?, cluster.client_of(1)?);
        let (first, again) = tokio::try_join!(one.create_as(request.clone()), two.create_as(request.clone()))?;
        ensure!(first.name == again.name, "{} and {}", first.name, again.name);

        let other = CreateSandboxRequest {
            sandbox: Some(Sandbox { labels: [("k".to_owned(), "v".to_owned())].into(), ..small_sandbox() }),
            ..request.clone()
        };
        ensure_refused(client.create_as(other.clone()).await, Code::InvalidArgument, ErrorReason::RequestIdReused)?;

        let victim = Server::Scheduler(cluster.leader().await?);
        cluster.kill(victim)?;
        ensure!(client.create_as(request).await?.name == first.name, "a new leader created it again");
        ensure_refused(client.create_as(other).await, Code::InvalidArgument, ErrorReason::RequestIdReused)?;
        ensure!(client.list().await?.len() == 1, "there is more than one");
        cluster.restart(victim).await?;

        client.await_running(std::slice::from_ref(&first.name)).await?;
        let delete =
            DeleteSandboxRequest { name: first.name.clone(), request_id: Client::request_id(), allow_missing: false };
        client.delete_as(delete.clone()).await?;
        client.await_gone(std::slice::from_ref(&first.name)).await?;
        client.delete_as(delete).await.context("the same delete again, after it was done")?;
        ensure_refused(client.delete(&first.name).await, Code::NotFound, ErrorReason::SandboxNotFound)
    });
}

#[test]
fn a_chosen_id_makes_one_sandbox() {
    scenario("chosen ids", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let chosen = |sandbox| CreateSandboxRequest { sandbox_id: "mine".to_owned(), ..create_request(sandbox) };
        let first = client.create_as(chosen(small_sandbox())).await?;
        ensure!(first.name == format!("{TENANT}/sandboxes/mine"), "{}", first.name);
        ensure!(client.create_as(chosen(small_sandbox())).await?.name == first.name, "not idempotent");
        let other = Sandbox { command: vec!["true".to_owned()], ..small_sandbox() };
        ensure_refused(client.create_as(chosen(other)).await, Code::AlreadyExists, ErrorReason::SandboxAlreadyExists)?;
        delete_all(&client, &[first.name]).await
    });
}

#[test]
fn a_follower_serves_everything() {
    scenario("follower", Options { agents: 1, ..Options::default() }, async |cluster| {
        let follower = cluster.follower().await?;
        let client = cluster.client_of(follower)?;
        let own = client.replica_status().await?;
        ensure!(own.replica_id == follower as u64 + 1 && own.leader_id != own.replica_id, "{own:?}");

        let names = create_many(&client, 3).await?;
        // It reads what it has just written, though another replica wrote it.
        ensure!(client.list().await?.len() == 3, "a list misses what was acknowledged before it");
        client.await_running(&names).await?;
        ensure!(client.sh(&names[0], "echo here").await? == "here", "exec");
        ensure!(client.get(&names[1]).await?.name == names[1], "get");
        ensure!(client.nodes().await?.len() == 1, "nodes");
        ensure!(client.templates().await?.len() == 1, "templates");
        let status = client.cluster_status().await?;
        ensure!(status.leader_id == own.leader_id && status.members.len() == 3, "{status:?}");
        delete_all(&client, &names).await
    });
}
