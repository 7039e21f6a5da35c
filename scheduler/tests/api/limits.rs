//! Bounds, really reached: what is refused then, what still passes, and what a waiting sandbox says.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use warren_proto::error::metadata_of;
use warren_proto::ids::TenantId;
use warren_proto::v1::batch_create_result::Result as ItemResult;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::*;
use warren_scheduler::state::State;
use warren_scheduler::state::outcome::Reply;
use warren_scheduler::state::request::{Answer, MAX_REQUESTS_OF_TENANT, RETENTION_MS, Scope};

use super::*;

/// Changes that one tenant may have under way.
const SHARE: usize = 4096;

/// What the log's queue takes, and what of it clients may fill.
const QUEUE: usize = 16_384;
const OF_CLIENTS: usize = 12_288;

async fn create_many(mut api: SandboxServiceClient<Channel>, tenant: String, count: usize) -> Vec<ItemResult> {
    let requests = vec![CreateSandboxRequest { parent: String::new(), ..create_request() }; count];
    let request = BatchCreateSandboxesRequest { parent: tenant, requests, ..BatchCreateSandboxesRequest::default() };
    let results = api.batch_create_sandboxes(request).await.unwrap().into_inner().results;
    results.into_iter().map(|result| result.result.unwrap()).collect()
}

/// The log takes nothing, as behind a disk that hangs; clients go on calling.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_and_all_clients_are_bounded_and_nodes_still_pass() {
    let (region, agent) = region_with_node().await;
    let name = region.create("before").await.unwrap().name;
    let held_back = region.replica.hold_back().await;
    let mut under_way = tokio::task::JoinSet::new();
    for tenant in ["a", "b", "t"] {
        for count in [1000, 1000, 1000, 1000, 96] {
            under_way.spawn(create_many(region.sandboxes(), format!("tenants/{tenant}"), count));
        }
    }
    // One is taken out of the queue before anything is held.
    let filled = async {
        while region.replica.pending_proposals() < OF_CLIENTS - 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE * 3, filled).await.expect("the clients' part is full");

    let update_mask = Some(prost_types::FieldMask { paths: vec!["priority".into()] });
    let sandbox = Some(Sandbox { name: name.clone(), priority: 1, ..Sandbox::default() });
    let update = UpdateSandboxRequest { sandbox, update_mask, request_id: String::new() };
    let update = region.sandboxes().update_sandbox(update).await;
    let delete = DeleteSandboxRequest { name: name.clone(), ..DeleteSandboxRequest::default() };
    let delete = region.sandboxes().delete_sandbox(delete).await;
    for result in [region.create("more").await, update.map(|r| r.into_inner()), delete.map(|r| r.into_inner())] {
        let refusal = refused(result, Code::ResourceExhausted, ErrorReason::Overloaded);
        assert_eq!(metadata_of(&refusal, "tenant").as_deref(), Some("t"), "its share of {SHARE}");
        assert!(retry_after_of(&refusal).is_some());
    }
    let others = create_many(region.sandboxes(), "tenants/c".into(), 10);
    let mut nodes = NodeServiceClient::new(region.channel());
    let cordon = async {
        loop {
            match tokio::time::timeout(
                Duration::from_millis(100),
                nodes.cordon_node(CordonNodeRequest { name: "nodes/n".into() }),
            )
            .await
            {
                Ok(answer) => return answer,
                // It took the place that the one before it left; the next is refused.
                Err(_waits) => {}
            }
        }
    };
    under_way.spawn(others);
    let refusal = refused(cordon.await, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert_eq!(metadata_of(&refusal, "table").as_deref(), Some("proposals"));

    // What the node saw, and a node that comes, are taken.
    let before = region.replica.pending_proposals();
    agent.report(&name, 1, Phase::Running).await;
    let hello = async {
        while region.replica.pending_proposals() == before {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, hello).await.expect("it waits with the others");
    assert!(region.replica.pending_proposals() < QUEUE);
    drop(held_back);
    region.replica.watch_state().wait_for(|state| state.indexes.count("RUNNING") == 1).await.unwrap();
    let created: Vec<ItemResult> = under_way.join_all().await.into_iter().flatten().collect();
    let (made, refused): (Vec<_>, Vec<_>) = created.iter().partition(|r| matches!(r, ItemResult::Sandbox(_)));
    assert!(made.len() >= 3 * SHARE && !refused.is_empty(), "{} made, {} refused", made.len(), refused.len());
    for result in refused {
        let ItemResult::Error(error) = result else { unreachable!() };
        assert_eq!(error.reason, "OVERLOADED");
    }
    region.end().await;
}

/// A region begun from a backup whose table of answers is full for one tenant.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_table_of_answers_refuses_and_a_create_by_name_needs_none() {
    let (region, _agent) = region_with_node().await;
    let mut state = State::clone(&region.replica.state());
    let expires = state.log_time.plus_ms(RETENTION_MS);
    let scope = Scope { tenant: Some(TenantId::parse("t").unwrap()) };
    for id in 0..MAX_REQUESTS_OF_TENANT {
        let answer = Answer { payload: [0; 32], expires, reply: Reply::Done };
        state.requests.insert(scope.clone(), u128::from(id), answer);
    }
    let backup = region.replica.back_up(&Arc::new(state)).await.unwrap();
    let mut bytes = vec![0; usize::try_from(backup.size_bytes).unwrap()];
    backup.file.read_exact_at(&mut bytes, 0).unwrap();
    let place = Place::new().await;
    let file = place.directory.path().join("backup");
    std::fs::write(&file, &bytes).unwrap();
    region.end().await;

    let (id, member) = (ReplicaId(9), place.member.clone());
    warren_scheduler::raft::offline::restore(&file, place.directory.path(), id, member).unwrap();
    let region = Region::start_at(place, 9, BTreeMap::new(), ELECTION, |_| ()).await;
    region.replica.leadership().wait_for(|now| matches!(now, Leadership::Leader { .. })).await.unwrap();
    let request = CreateSandboxRequest { request_id: Uuid::now_v7().to_string(), ..create_request() };
    let full = region.sandboxes().create_sandbox(request.clone()).await;
    let full = refused(full, Code::ResourceExhausted, ErrorReason::RequestTableFull);
    assert!(retry_after_of(&full).is_some());
    region.create("by-name").await.expect("it needs no answer");
    let other = CreateSandboxRequest { parent: "tenants/other".into(), ..request };
    region.sandboxes().create_sandbox(other).await.expect("another tenant's table is its own");
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_disk_is_internal() {
    let region = Region::start().await;
    std::fs::remove_dir_all(region.directory.path().join("checkpoints")).unwrap();
    let backup = ClusterServiceClient::new(region.channel()).backup(BackupRequest {}).await;
    refused(backup.map(drop), Code::Internal, ErrorReason::Internal);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_sandbox_says_what_is_short_its_place_and_when_it_is_looked_at() {
    let (region, _agent) = region_with_node().await;
    // Two fit.
    for id in ["a", "b", "c", "d", "e", "f", "g"] {
        region.create(id).await.unwrap();
    }
    let list = ListSandboxesRequest {
        parent: TENANT.into(),
        states: vec![SandboxState::Pending.into()],
        ..ListSandboxesRequest::default()
    };
    let waiting = region.sandboxes().list_sandboxes(list).await.unwrap().into_inner().sandboxes;
    assert!(waiting.len() > 1 && waiting.iter().all(|sandbox| sandbox.queue_position == 0), "lists do not count");
    for (place, listed) in (1..).zip(&waiting) {
        let get = GetSandboxRequest { name: listed.name.clone() };
        let shown = region.sandboxes().get_sandbox(get).await.unwrap().into_inner();
        assert_eq!(shown.queue_position, place, "by age");
        assert!(shown.reason.unwrap().code.starts_with("SHORT_OF_"));
        assert!(shown.retry_time.unwrap().seconds > shown.create_time.unwrap().seconds);
    }
    let last = waiting.last().unwrap().name.clone();
    let timeout = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
    let wait = WaitSandboxRequest { name: last, timeout, ..WaitSandboxRequest::default() };
    let waited = region.sandboxes().wait_sandbox(wait).await.unwrap().into_inner().sandbox.unwrap();
    assert_eq!(usize::try_from(waited.queue_position), Ok(waiting.len()));
    let first = region.sandboxes().get_sandbox(GetSandboxRequest { name: format!("{TENANT}/sandboxes/a") }).await;
    let first = first.unwrap().into_inner();
    assert_eq!((first.queue_position, first.retry_time), (0, None), "it does not wait");
    region.end().await;
}
