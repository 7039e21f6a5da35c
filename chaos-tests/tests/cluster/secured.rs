//! TLS between all parts of a region, with certificates on both sides.

use std::process::Command;

use anyhow::{Context, ensure};
use warren_chaos::client::small_sandbox;
use warren_chaos::cluster::{Options, Server};
use warren_proto::client::{ClientTls, TlsFiles, channel};
use warren_proto::v1::GetClusterStatusRequest;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;

use crate::operators::eventually;
use crate::{create_many, delete_all, scenario};

/// Replicas vote, followers forward, agents hold sessions, fetch templates and serve execs: all by TLS, also after a leader is
/// gone. Who speaks plain text or has no certificate is not served.
#[test]
fn a_region_speaks_tls_between_all_of_its_parts_and_to_nobody_without_a_certificate() {
    scenario("tls", Options { agents: 2, tls: true, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let mut names = create_many(&client, 4).await?;
        client.await_running(&names).await?;
        ensure!(client.sh(&names[0], "echo by TLS").await? == "by TLS", "exec");

        let files = cluster.tls_files();
        for scheduler in 0..3 {
            let address = &cluster.endpoints()[scheduler];
            let without = TlsFiles { ca: files.ca.clone(), ..TlsFiles::default() };
            for stranger in [ClientTls::default(), ClientTls::load(&without)?] {
                let mut service = ClusterServiceClient::new(channel(address, &stranger)?);
                let answer = service.get_cluster_status(GetClusterStatusRequest {}).await;
                ensure!(answer.is_err(), "{address} served a stranger");
            }
        }

        let leader = cluster.leader().await?;
        let follower = cluster.follower().await?;
        names.push(cluster.client_of(follower)?.create(small_sandbox()).await.context("by a follower")?.name);
        cluster.kill(Server::Scheduler(leader))?;
        names.push(client.create(small_sandbox()).await.context("after the leader's end")?.name);
        cluster.restart(Server::Scheduler(leader)).await?;
        client.await_running(&names).await?;

        let (endpoints, ctl) = (cluster.endpoints().join(","), cluster.ctl().to_owned());
        let health = || {
            let mut command = Command::new(&ctl);
            command.args(["--endpoints", &endpoints, "server", "health"]);
            for (file, flag) in [(&files.ca, "--tls-ca"), (&files.certificate, "--tls-cert"), (&files.key, "--tls-key")]
            {
                command.args(file.iter().flat_map(|file| [flag.to_owned(), file.display().to_string()]));
            }
            command.output().context("run warrenctl")
        };
        eventually("healthy", health, |said| said.starts_with("healthy: 3 of 3")).await?;
        delete_all(&client, &names).await
    });
}
