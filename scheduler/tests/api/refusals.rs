//! Refusals that need something to be wrong with nodes, with the group, or with the size of things.

use warren_proto::v1::node_service_client::NodeServiceClient;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_session_supersedes_the_older_and_strangers_are_sent_away() {
    let (region, first) = region_with_node().await;
    let _second = Agent::start(&region).await;
    refused(Err::<(), _>(first.end().await), Code::Aborted, ErrorReason::SessionSuperseded);
    let stranger = Agent::open(&region, |hello| hello.ledger_id = Uuid::now_v7().to_string()).await;
    refused(stranger.map(drop), Code::FailedPrecondition, ErrorReason::LedgerMismatch);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_on_a_silent_node_is_unreachable() {
    let region = Region::start_with(|config| config.lease = Duration::from_secs(3)).await;
    let agent = Agent::start(&region).await;
    let renewing = agent.renew();
    create_template(&region).await;
    let name = region.create("s").await.unwrap().name;
    agent.report(&name, 1, Phase::Running).await;
    let mut states = region.replica.watch_state();
    states.wait_for(|state| state.indexes.count("RUNNING") == 1).await.unwrap();
    drop(renewing);
    states.wait_for(|state| state.nodes.values().all(|node| !node.is_ready())).await.unwrap();
    let connect = ConnectSandboxRequest { name, ..ConnectSandboxRequest::default() };
    let silent = region.sandboxes().connect_sandbox(connect).await;
    let silent = refused(silent, Code::Unavailable, ErrorReason::NodeUnreachable);
    assert!(retry_after_of(&silent).is_some(), "it may come back");
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_table_says_which_and_how_much_it_takes() {
    let (region, _agent) = region_with_node().await;
    let mut api = NodeServiceClient::new(region.channel());
    let labels = |range: std::ops::Range<u32>| SetNodeLabelsRequest {
        name: "nodes/n".into(),
        set: range.map(|n| (format!("label-{n}"), String::new())).collect(),
        remove: vec![],
    };
    api.set_node_labels(labels(0..64)).await.unwrap();
    let full = refused(api.set_node_labels(labels(64..65)).await, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert_eq!(warren_proto::error::metadata_of(&full, "limit").as_deref(), Some("64"));
    region.end().await;
}

/// Makes the region's own replica lead, and opens a session with it. Elections may cross this.
async fn lead(region: &Region, second: &Replica) -> Agent {
    let mut leadership = region.replica.leadership();
    let attempts = async {
        loop {
            let now = leadership.wait_for(|now| *now != Leadership::Follower { leader: None }).await.unwrap().clone();
            if now.leader_id() == Some(ReplicaId(2)) {
                let _elections_may_be_faster = second.transfer_leadership(Some(ReplicaId(1))).await;
            }
            if let Ok(agent) = Agent::open(region, |_| ()).await {
                return agent;
            }
        }
    };
    tokio::time::timeout(PATIENCE, attempts).await.expect("a leader")
}

/// Two replicas: with one gone nothing is committed, and what was under way may still be.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_the_outcome_is_open_and_nobody_leads() {
    let (peers, directory) = (bind().await, tempfile::tempdir().unwrap());
    let other = Member {
        peer_address: peers.local_addr().unwrap().to_string(),
        api_address: "127.0.0.1:1".into(),
        standby: false,
    };
    let others = BTreeMap::from([(ReplicaId(2), other.clone())]);
    let region = Region::start_among(others, |_| ()).await;
    refused(region.create("s").await, Code::Unavailable, ErrorReason::NoLeader);

    let members = BTreeMap::from([(ReplicaId(1), region.member.clone()), (ReplicaId(2), other)]);
    let second = start_replica(2, directory.path(), members, peers, CALM_ELECTION).await;
    let agent = lead(&region, &second).await;
    create_template(&region).await;
    // The second has no controller here: it does not say what it supports.
    let quota = SetQuotaRequest { name: TENANT.into(), quota: Some(Quota::default()) };
    let early = tenant_service_client::TenantServiceClient::new(region.channel()).set_quota(quota).await;
    refused(early, Code::FailedPrecondition, ErrorReason::LevelTooLow);
    second.shutdown().await;
    refused(region.create("s").await, Code::Unknown, ErrorReason::OutcomeUnknown);
    let renewal = Up::RenewLease(RenewLease { sequence: 1 });
    agent.up.send(OpenSessionRequest { message: Some(renewal) }).await.unwrap();
    let end = agent.end().await;
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    region.end().await;
}
