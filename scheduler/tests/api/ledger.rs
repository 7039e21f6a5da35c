//! What an API tier and operators ask of the ledger: batches, waits, updates, quotas, pauses, nodes, members, and every refusal.

use std::time::Duration;

use prost_types::FieldMask;
use warren_proto::v1::batch_create_result::Result as ItemResult;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::tenant_service_client::TenantServiceClient;
use warren_proto::v1::*;
use warren_scheduler::secrets::Sealer;

use super::*;

fn clusters(region: &Region) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(region.channel())
}

fn nodes(region: &Region) -> NodeServiceClient<Channel> {
    NodeServiceClient::new(region.channel())
}

fn item(id: &str) -> CreateSandboxRequest {
    CreateSandboxRequest { sandbox_id: id.into(), parent: String::new(), ..create_request() }
}

fn batch(requests: Vec<CreateSandboxRequest>, all_or_nothing: bool) -> BatchCreateSandboxesRequest {
    BatchCreateSandboxesRequest { parent: TENANT.into(), requests, all_or_nothing, request_id: String::new() }
}

async fn exists(region: &Region, id: &str) -> bool {
    let name = format!("{TENANT}/sandboxes/{id}");
    region.sandboxes().get_sandbox(GetSandboxRequest { name }).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_answers_each_item_or_does_all_or_nothing() {
    let (region, _agent) = region_with_node().await;
    let mut api = region.sandboxes();
    let mixed = batch(vec![item("a"), item("Not An Id"), item("b")], false);
    let results = api.batch_create_sandboxes(mixed).await.unwrap().into_inner().results;
    let shown: Vec<String> = results
        .into_iter()
        .map(|result| match result.result.unwrap() {
            ItemResult::Sandbox(sandbox) => sandbox.name,
            ItemResult::Error(error) => error.reason,
        })
        .collect();
    assert_eq!(shown, ["tenants/t/sandboxes/a", "INVALID_FIELD", "tenants/t/sandboxes/b"]);

    let mut other = item("a");
    other.sandbox.as_mut().unwrap().command = vec!["other".into()];
    let clash = api.batch_create_sandboxes(batch(vec![item("c"), other], true)).await;
    let clash = refused(clash, Code::Aborted, ErrorReason::BatchRejected);
    assert_eq!(warren_proto::error::metadata_of(&clash, "item_reason").as_deref(), Some("SANDBOX_ALREADY_EXISTS"));
    assert!(!exists(&region, "c").await, "nothing of it");

    let request_id = Uuid::now_v7().to_string();
    let all =
        BatchCreateSandboxesRequest { request_id, ..batch((0..300).map(|n| item(&format!("x{n}"))).collect(), true) };
    for _ in 0..2 {
        let made = api.batch_create_sandboxes(all.clone()).await.unwrap().into_inner();
        assert!(made.results.iter().all(|r| matches!(r.result, Some(ItemResult::Sandbox(_)))));
        assert_eq!(made.results.len(), 300);
    }
    let too_many = batch(vec![item("y"); 1001], false);
    refused(api.batch_create_sandboxes(too_many).await, Code::InvalidArgument, ErrorReason::InvalidField);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_with_the_state_with_the_end_or_with_its_time() {
    let (region, agent) = region_with_node().await;
    let name = region.create("s").await.unwrap().name;
    let wait = |states: Vec<SandboxState>, ms: u64| {
        let timeout = Duration::from_millis(ms).try_into().ok();
        let states = states.into_iter().map(Into::into).collect();
        let request = WaitSandboxRequest { name: name.clone(), states, timeout };
        let mut api = region.sandboxes();
        async move { api.wait_sandbox(request).await.map(tonic::Response::into_inner) }
    };
    assert!(!wait(vec![], 50).await.unwrap().reached, "it only starts");
    let (answer, ()) = tokio::join!(wait(vec![], 20_000), agent.report(&name, 1, Phase::Running));
    assert!(answer.unwrap().reached);
    let (answer, ()) = tokio::join!(wait(vec![SandboxState::Pending], 20_000), agent.report(&name, 1, Phase::Removed));
    let answer = answer.unwrap();
    assert!(!answer.reached && answer.sandbox.unwrap().state() == SandboxState::Lost, "it cannot come any more");
    let missing = WaitSandboxRequest { name: format!("{TENANT}/sandboxes/none"), ..WaitSandboxRequest::default() };
    refused(region.sandboxes().wait_sandbox(missing).await, Code::NotFound, ErrorReason::SandboxNotFound);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_replaces_what_its_mask_names_if_nobody_was_faster() {
    let (region, _agent) = region_with_node().await;
    let made = region.create("s").await.unwrap();
    let update = |sandbox: Sandbox, paths: &[&str]| {
        let update_mask = Some(FieldMask { paths: paths.iter().map(ToString::to_string).collect() });
        let request = UpdateSandboxRequest { sandbox: Some(sandbox), update_mask, request_id: String::new() };
        let mut api = region.sandboxes();
        async move { api.update_sandbox(request).await.map(tonic::Response::into_inner) }
    };
    let wanted = Sandbox {
        name: made.name.clone(),
        etag: made.etag.clone(),
        labels: [("team".to_owned(), "a".to_owned())].into(),
        ttl: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        priority: 7,
        ..Sandbox::default()
    };
    let after = update(wanted.clone(), &["labels", "ttl"]).await.unwrap();
    assert_eq!((after.labels.len(), after.priority), (1, 0), "the mask says what changes");
    assert!(after.deadline.is_some() && after.etag != made.etag);
    refused(update(wanted.clone(), &["priority"]).await, Code::Aborted, ErrorReason::EtagMismatch);
    let latest = Sandbox { etag: String::new(), ..wanted.clone() };
    assert_eq!(update(latest.clone(), &["priority"]).await.unwrap().priority, 7);
    refused(update(latest.clone(), &["command"]).await, Code::InvalidArgument, ErrorReason::InvalidField);
    refused(update(latest, &[]).await, Code::InvalidArgument, ErrorReason::InvalidField);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_sealed_in_the_ledger_and_opened_for_the_agent_alone() {
    let region = Region::start_with(|config| config.sealer = Some(Sealer::new(&[3; 32]))).await;
    let agent = Agent::start(&region).await;
    create_template(&region).await;
    let mut request = CreateSandboxRequest { request_id: Uuid::now_v7().to_string(), ..create_request() };
    request.sandbox.as_mut().unwrap().secret_environment.insert("TOKEN".into(), "hunter2".into());
    let first = region.sandboxes().create_sandbox(request.clone()).await.unwrap().into_inner();
    assert_eq!(region.sandboxes().create_sandbox(request).await.unwrap().into_inner().name, first.name, "a retry");
    assert!(first.secret_environment.is_empty() && first.secret_names == ["TOKEN"]);
    let kept = format!("{:?}", region.replica.state().sandboxes);
    assert!(!kept.contains("hunter2"), "{kept}");
    let given = agent.environment_of(&first.name).await;
    assert_eq!(given.get("TOKEN").map(String::as_str), Some("hunter2"));
    region.end().await;

    let (bare, _agent) = region_with_node().await;
    let mut request = create_request();
    request.sandbox.as_mut().unwrap().secret_environment.insert("A".into(), "b".into());
    let unsealed = bare.sandboxes().create_sandbox(request).await;
    refused(unsealed, Code::FailedPrecondition, ErrorReason::SecretsUnavailable);
    bare.end().await;
}

/// A ledger begins at level 1 and quotas need level 2: the first request after an election finds the members still saying
/// what they support.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_while_a_ledger_just_formed_reaches_the_level_it_needs() {
    let region = Region::start_among(BTreeMap::new(), |_| ()).await;
    let mut leadership = region.replica.leadership();
    leadership.wait_for(|now| matches!(now, Leadership::Leader { .. })).await.unwrap();
    let quota = Some(Quota { sandboxes: Some(1), ..Quota::default() });
    let mut tenants = TenantServiceClient::new(region.channel());
    tenants.set_quota(SetQuotaRequest { name: TENANT.into(), quota }).await.unwrap();
    assert_eq!(region.replica.state().level, Level::SECOND);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_pauses_and_a_full_disk_refuse_creates_and_say_so() {
    let (region, _agent) = region_with_node().await;
    let mut tenants = TenantServiceClient::new(region.channel());
    let missing = tenants.get_tenant(GetTenantRequest { name: TENANT.into() }).await;
    refused(missing, Code::NotFound, ErrorReason::TenantNotFound);
    let quota = |sandboxes, creates_per_minute| SetQuotaRequest {
        name: TENANT.into(),
        quota: Some(Quota { sandboxes, creates_per_minute, ..Quota::default() }),
    };
    tenants.set_quota(quota(Some(1), None)).await.unwrap();
    region.create("one").await.unwrap();
    refused(region.create("two").await, Code::ResourceExhausted, ErrorReason::QuotaExceeded);
    tenants.set_quota(quota(None, Some(1))).await.unwrap();
    region.create("two").await.unwrap();
    let fast = refused(region.create("three").await, Code::ResourceExhausted, ErrorReason::CreateRateExceeded);
    assert!(retry_after_of(&fast).is_some());
    let shown = tenants.get_tenant(GetTenantRequest { name: TENANT.into() }).await.unwrap().into_inner();
    assert_eq!((shown.own_quota, shown.usage.unwrap().sandboxes), (true, 2));
    tenants.set_quota(SetQuotaRequest { name: TENANT.into(), quota: None }).await.unwrap();

    let pause = |creates| SetPauseRequest { creates: Some(creates), placement: None, moves: None };
    clusters(&region).set_pause(pause(true)).await.unwrap();
    refused(region.create("three").await, Code::Unavailable, ErrorReason::Paused);
    clusters(&region).set_pause(pause(false)).await.unwrap();
    region.create("three").await.unwrap();
    region.end().await;

    let directory = tempfile::tempdir().unwrap();
    let disk = DiskUse::watch(directory.path(), 0, CancellationToken::new());
    assert!(!disk.is_full(), "0 stands for never");
    let full = DiskUse::watch(directory.path(), 1, CancellationToken::new());
    let region = Region::start_with(|config| config.disk = full).await;
    refused(region.create("s").await, Code::ResourceExhausted, ErrorReason::DiskFull);
    let gone =
        DeleteSandboxRequest { name: format!("{TENANT}/sandboxes/s"), allow_missing: true, ..Default::default() };
    region.sandboxes().delete_sandbox(gone).await.expect("deletes are accepted");
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_cordoned_labelled_forgotten_and_orphans_stopped() {
    let (region, mut agent) = region_with_node().await;
    let mut api = nodes(&region);
    let name = || "nodes/n".to_owned();
    assert!(api.cordon_node(CordonNodeRequest { name: name() }).await.unwrap().into_inner().cordoned);
    assert_eq!(region.create("s").await.unwrap().state(), SandboxState::Pending);
    assert!(!api.uncordon_node(UncordonNodeRequest { name: name() }).await.unwrap().into_inner().cordoned);
    let labels =
        SetNodeLabelsRequest { name: name(), set: [("zone".to_owned(), "z".to_owned())].into(), remove: vec![] };
    assert_eq!(api.set_node_labels(labels).await.unwrap().into_inner().labels["zone"], "z");
    let ready = api.forget_node(ForgetNodeRequest { name: name() }).await;
    refused(ready, Code::FailedPrecondition, ErrorReason::NodeState);
    let sandbox = format!("{TENANT}/sandboxes/stranger");
    let stop = StopOrphanRequest { name: name(), sandbox: sandbox.clone(), epoch: 4 };
    refused(api.stop_orphan(stop.clone()).await, Code::NotFound, ErrorReason::OrphanNotFound);
    agent.report(&sandbox, 4, Phase::Orphan).await;
    let mut states = region.replica.watch_state();
    states.wait_for(|state| state.nodes.values().any(|node| !node.orphans.is_empty())).await.unwrap();
    api.stop_orphan(stop).await.unwrap();
    loop {
        if agent.assigned().await.contains(&(sandbox.clone(), 4, Desired::Removed)) {
            break;
        }
    }
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_group_the_level_and_the_rules_answer_operators() {
    use Code::{FailedPrecondition, InvalidArgument, NotFound};
    let (region, _agent) = region_with_node().await;
    let mut api = clusters(&region);
    let remove = |replica_id| RemoveReplicaRequest { replica_id };
    refused(api.remove_replica(remove(9)).await, NotFound, ErrorReason::ReplicaNotFound);
    refused(api.remove_replica(remove(1)).await, FailedPrecondition, ErrorReason::Membership);
    let join = JoinReplicaRequest {
        replica_id: 1,
        api_address: "h:1".into(),
        peer_address: "h:2".into(),
        ..Default::default()
    };
    refused(api.join_replica(join.clone()).await, FailedPrecondition, ErrorReason::Membership);
    let nowhere = JoinReplicaRequest { api_address: "nowhere".into(), ..join };
    refused(api.join_replica(nowhere).await, InvalidArgument, ErrorReason::InvalidField);
    let transfer = api.transfer_leadership(TransferLeadershipRequest { replica_id: 9 }).await;
    refused(transfer, FailedPrecondition, ErrorReason::Membership);
    let level = api.set_level(SetLevelRequest { level: 7 }).await;
    refused(level, FailedPrecondition, ErrorReason::LevelTooLow);
    assert!(api.check_state(CheckStateRequest {}).await.unwrap().into_inner().violations.is_empty());
    api.release_brake(ReleaseBrakeRequest {}).await.unwrap();
    let status = api.get_replica_status(GetReplicaStatusRequest {}).await.unwrap().into_inner();
    assert!(status.hash.len() == 32 && status.max_level == 2 && status.hash_index > 0, "{status:?}");
    region.end().await;
}

/// A backup is a whole checkpoint of what was there.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_streamed_while_the_region_serves() {
    let (region, _agent) = region_with_node().await;
    region.create("s").await.unwrap();
    let mut stream = clusters(&region).backup(BackupRequest {}).await.unwrap().into_inner();
    let (mut bytes, mut size) = (Vec::new(), 0);
    while let Some(message) = stream.message().await.unwrap() {
        size = message.size_bytes;
        bytes.extend(message.chunk);
    }
    assert_eq!(i64::try_from(bytes.len()), Ok(size));
    let directory = tempfile::tempdir().unwrap();
    let (file, data) = (directory.path().join("backup"), directory.path().join("data"));
    std::fs::write(&file, &bytes).unwrap();
    let member = warren_scheduler::raft::Member {
        peer_address: "127.0.0.1:1".into(),
        api_address: "127.0.0.1:2".into(),
        standby: false,
    };
    let restore = || warren_scheduler::raft::offline::restore(&file, &data, ReplicaId(9), member.clone());
    let renewed = restore().unwrap();
    assert_eq!((renewed.sandboxes, renewed.nodes), (1, 1));
    assert!(renewed.predecessor == region.replica.state().ledger_id && renewed.predecessor != Some(renewed.ledger_id));
    assert!(restore().unwrap_err().to_string().contains("holds a ledger already"));
    bytes[100] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let elsewhere = directory.path().join("elsewhere");
    let damaged = warren_scheduler::raft::offline::restore(&file, &elsewhere, ReplicaId(9), member).unwrap_err();
    assert!(damaged.to_string().contains("is damaged"), "{damaged}");
    region.end().await;
}
