//! Reads: filtered lists and watches, revisions, and what a caller may ask of consistency.

use std::collections::BTreeMap;

use tonic::Request;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::*;
use warren_scheduler::state::event::MAX_EVENTS;

use super::*;

fn labelled(id: &str, label: &str) -> CreateSandboxRequest {
    let mut request = CreateSandboxRequest { sandbox_id: id.into(), ..create_request() };
    request.sandbox.as_mut().unwrap().labels.insert("kind".into(), label.into());
    request
}

async fn names(region: &Region, request: ListSandboxesRequest) -> Vec<String> {
    let mut api = region.sandboxes();
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListSandboxesRequest { page_token, ..request.clone() };
        let page = api.list_sandboxes(request).await.unwrap().into_inner();
        seen.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.name.rsplit('/').next().unwrap().to_owned()));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return seen;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_filter_by_state_label_and_node_in_order_and_in_pages() {
    let (region, agent) = region_with_node().await;
    for (id, label) in [("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"), ("e", "x")] {
        region.sandboxes().create_sandbox(labelled(id, label)).await.unwrap();
    }
    for id in ["a", "c"] {
        agent.report(&format!("{TENANT}/sandboxes/{id}"), 1, Phase::Running).await;
    }
    region.replica.watch_state().wait_for(|state| state.indexes.count("RUNNING") == 2).await.unwrap();
    let all = ListSandboxesRequest { parent: TENANT.into(), page_size: 2, ..Default::default() };
    let label = |value: &str| [("kind".to_owned(), value.to_owned())].into();
    let x = ListSandboxesRequest { labels: label("x"), ..all.clone() };
    assert_eq!(names(&region, x.clone()).await, ["a", "c", "e"]);
    let states = |states: &[SandboxState]| states.iter().map(|state| (*state).into()).collect();
    let is_running = ListSandboxesRequest { states: states(&[SandboxState::Running]), ..all.clone() };
    assert_eq!(names(&region, is_running).await, ["a", "c"]);
    // Four fit on the node, the fifth waits.
    let others = states(&[SandboxState::Starting, SandboxState::Pending]);
    assert_eq!(names(&region, ListSandboxesRequest { states: others, ..all.clone() }).await, ["b", "d", "e"]);
    let both = ListSandboxesRequest { states: states(&[SandboxState::Pending]), ..x.clone() };
    assert_eq!(names(&region, both).await, ["e"]);
    let there = ListSandboxesRequest { node: "nodes/n".into(), ..x };
    assert_eq!(names(&region, there).await, ["a", "c"]);
    let none = ListSandboxesRequest { labels: label("z"), ..all.clone() };
    assert_eq!(names(&region, none).await, Vec::<String>::new());
    let other = ListSandboxesRequest { parent: "tenants/other".into(), labels: label("x"), ..all };
    assert_eq!(names(&region, other).await, Vec::<String>::new());
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filtered_watch_sees_what_comes_to_match_and_what_no_longer_does() {
    let (region, agent) = region_with_node().await;
    let states = vec![SandboxState::Running.into()];
    let request = WatchSandboxesRequest { parent: TENANT.into(), states, ..Default::default() };
    let mut watch = region.sandboxes().watch_sandboxes(request).await.unwrap().into_inner();
    let mut next = async || {
        let event = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
        (event.kind(), event.sandbox.map(|sandbox| sandbox.state()))
    };
    assert_eq!(next().await, (Kind::Synced, None));
    let name = region.create("s").await.unwrap().name;
    agent.report(&name, 1, Phase::Running).await;
    assert_eq!(next().await, (Kind::Created, Some(SandboxState::Running)));
    let delete = DeleteSandboxRequest { name, ..DeleteSandboxRequest::default() };
    region.sandboxes().delete_sandbox(delete).await.unwrap();
    assert_eq!(next().await, (Kind::Deleted, Some(SandboxState::Stopping)));
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_exactly_where_a_list_was_read() {
    let (region, _agent) = region_with_node().await;
    region.create("before").await.unwrap();
    let list = ListSandboxesRequest { parent: TENANT.into(), ..Default::default() };
    let token = region.sandboxes().list_sandboxes(list).await.unwrap().into_inner().watch_token;
    region.create("one").await.unwrap();
    region.create("two").await.unwrap();
    let request = WatchSandboxesRequest { parent: TENANT.into(), watch_token: token, ..Default::default() };
    let mut watch = region.sandboxes().watch_sandboxes(request.clone()).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!((first.kind(), first.sandbox.unwrap().name), (Kind::Created, format!("{TENANT}/sandboxes/one")));
    let again = WatchSandboxesRequest { watch_token: first.watch_token, ..request };
    let mut watch = region.sandboxes().watch_sandboxes(again).await.unwrap().into_inner();
    let second = watch.message().await.unwrap().unwrap();
    assert_eq!((second.kind(), second.sandbox.unwrap().name), (Kind::Created, format!("{TENANT}/sandboxes/two")));
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reply_carries_its_revision_and_reads_may_ask_for_one() {
    let (region, _agent) = region_with_node().await;
    let made = region.sandboxes().create_sandbox(create_request()).await.unwrap();
    let revision: u64 = made.metadata().get("warren-revision").unwrap().to_str().unwrap().parse().unwrap();
    let name = made.into_inner().name;
    let get = |key: &'static str, value: String| {
        let mut request = Request::new(GetSandboxRequest { name: name.clone() });
        request.metadata_mut().insert(key, value.parse().unwrap());
        let mut api = region.sandboxes();
        async move { api.get_sandbox(request).await }
    };
    assert!(get("warren-min-revision", revision.to_string()).await.unwrap().into_inner().revision <= revision);
    assert!(get("warren-consistency", "stale".into()).await.is_ok());
    let ahead = get("warren-min-revision", (revision + 1_000_000).to_string()).await;
    refused(ahead, Code::Unavailable, ErrorReason::RevisionNotReached);
    refused(get("warren-consistency", "strong".into()).await, Code::InvalidArgument, ErrorReason::InvalidField);
    refused(get("warren-min-revision", "x".into()).await, Code::InvalidArgument, ErrorReason::InvalidField);
    region.end().await;
}

/// One that does not read while more happens than is kept: what it had been sent, then that it must list again; never a gap.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_read_too_slowly_ends_with_compacted() {
    /// The most that one batch, and one entry of the log, holds.
    const BATCH: usize = 1000;
    let (region, _agent) = region_with_node().await;
    // They wait, and nobody looks at them.
    let pause = SetPauseRequest { placement: Some(true), ..Default::default() };
    cluster_service_client::ClusterServiceClient::new(region.channel()).set_pause(pause).await.unwrap();
    let request = WatchSandboxesRequest { parent: "tenants/-".into(), ..Default::default() };
    let mut watch = region.sandboxes().watch_sandboxes(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().kind(), Kind::Synced);
    let requests: Vec<_> =
        (0..BATCH).map(|_| CreateSandboxRequest { parent: String::new(), ..create_request() }).collect();
    // Half as many again as are kept: buffers on the way to the client take some megabytes.
    for _ in 0..MAX_EVENTS * 3 / 2 / BATCH {
        let batch = BatchCreateSandboxesRequest {
            parent: TENANT.into(),
            requests: requests.clone(),
            all_or_nothing: true,
            request_id: String::new(),
        };
        region.sandboxes().batch_create_sandboxes(batch).await.unwrap();
    }
    let mut seen = BTreeMap::<u64, usize>::new();
    let end = loop {
        match watch.message().await {
            Ok(Some(event)) => *seen.entry(event.sandbox.unwrap().revision).or_default() += 1,
            Ok(None) => panic!("it ends without a word"),
            Err(status) => break status,
        }
    };
    let counts: Vec<usize> = seen.into_values().collect();
    let (_cut_short, whole) = counts.split_last().unwrap();
    assert!(whole.iter().all(|count| *count == BATCH), "a gap: {whole:?}");
    assert!(counts.len() <= MAX_EVENTS / BATCH, "it was read fast enough after all");
    refused(Err::<(), _>(end), Code::OutOfRange, ErrorReason::Compacted);
    region.end().await;
}
