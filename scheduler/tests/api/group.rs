//! What any replica of a group answers, whoever leads.

use tonic::Request;
use warren_proto::v1::*;

use super::*;

/// A request that its replica answers by itself.
fn here<T>(key: &'static str, value: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(key, value.parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_answers_what_may_be_stale_and_forwards_all_else() {
    let mut group = Region::start_group(3, |_, _| ()).await;
    let _agent = Agent::start(&group[0]).await;
    create_template(&group[0]).await;
    let made = group[0].sandboxes().create_sandbox(create_request()).await.unwrap();
    let revision = made.metadata().get("warren-revision").unwrap().to_str().unwrap().to_owned();
    let get = GetSandboxRequest { name: made.into_inner().name };
    let template = GetTemplateRequest { name: "templates/base".into() };
    for follower in &group[1..] {
        let (mut sandboxes, mut templates) = (follower.sandboxes(), follower.templates());
        let recent = |message| here("warren-min-revision", &revision, message);
        sandboxes.get_sandbox(recent(get.clone())).await.unwrap();
        templates.get_template(here("warren-min-revision", &revision, template.clone())).await.unwrap();
        let ahead = here("warren-min-revision", "1000000", template.clone());
        refused(templates.get_template(ahead).await, Code::Unavailable, ErrorReason::RevisionNotReached);
        sandboxes.get_sandbox(get.clone()).await.expect("forwarded");
        let other = Agent::open(follower, |hello| hello.node = "nodes/other".into()).await;
        refused(other.map(drop), Code::Unavailable, ErrorReason::NotLeader);
    }
    let last = group.pop().unwrap();
    for region in group {
        region.end().await;
    }
    // Nobody leads: what is not forwarded is answered all the same.
    let (mut sandboxes, mut templates) = (last.sandboxes(), last.templates());
    let stale = |message| here("warren-consistency", "stale", message);
    sandboxes.get_sandbox(stale(get.clone())).await.unwrap();
    templates.get_template(here("warren-consistency", "stale", template.clone())).await.unwrap();
    let all = here("warren-consistency", "stale", ListTemplatesRequest::default());
    assert_eq!(templates.list_templates(all).await.unwrap().into_inner().templates.len(), 1);
    refused(templates.get_template(template).await, Code::Unavailable, ErrorReason::NoLeader);
    last.end().await;
}

/// Creates until the answer is as wanted.
async fn create_until(region: &Region, wanted: impl Fn(&Result<Sandbox, Status>) -> bool) {
    let attempts = async {
        for n in 0.. {
            let result = region.create(&format!("s{n}")).await;
            if wanted(&result) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, attempts).await.expect("as wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_whose_disk_is_full_keeps_the_leader_from_creating_but_not_from_deleting() {
    let disks: BTreeMap<u64, DiskUse> = (1..=3).map(|id| (id, DiskUse::fixed(10, 90))).collect();
    let group = Region::start_group(3, |id, config| config.disk = disks[&id].clone()).await;
    let (leader, follower) = (&group[0], group[1].replica.id());
    let _agent = Agent::start(leader).await;
    create_template(leader).await;
    let first = leader.create("first").await.unwrap().name;
    disks[&follower.0].set(95);
    create_until(leader, Result::is_err).await;
    let full = refused(leader.create("more").await, Code::ResourceExhausted, ErrorReason::DiskFull);
    assert_eq!(warren_proto::error::metadata_of(&full, "replica"), Some(follower.to_string()));
    let delete = DeleteSandboxRequest { name: first, ..DeleteSandboxRequest::default() };
    let deleted = leader.sandboxes().delete_sandbox(delete).await.unwrap().into_inner();
    assert_eq!(deleted.state(), SandboxState::Stopping, "deletes make room");
    disks[&follower.0].set(89);
    create_until(leader, Result::is_ok).await;
    for region in group {
        region.end().await;
    }
}

/// As many waits as one connection has streams, all through one follower: its other calls go on. And one tenant has no more of them.
#[tokio::test(flavor = "multi_thread")]
async fn waits_through_a_follower_hold_up_no_other_call_and_are_bounded() {
    const WAITS_OF_TENANT: usize = 4096;
    let group = Region::start_group(2, |_, _| ()).await;
    let (leader, follower) = (&group[0], &group[1]);
    let agent = Agent::start(leader).await;
    create_template(leader).await;
    let name = leader.create("s").await.unwrap().name;
    let wait = |seconds| WaitSandboxRequest {
        name: name.clone(),
        states: vec![SandboxState::Stopped.into()],
        timeout: Some(prost_types::Duration { seconds, nanos: 1_000_000 }),
    };
    let client = follower.sandboxes();
    let mut waits = tokio::task::JoinSet::new();
    for _ in 0..WAITS_OF_TENANT {
        let (mut client, request) = (client.clone(), wait(600));
        waits.spawn(async move {
            loop {
                match client.wait_sandbox(request.clone()).await {
                    // The test's own look at the leader took the last place, or so many reads at once took too long.
                    Err(status) if status.code() != Code::NotFound => {}
                    answer => return answer,
                }
            }
        });
    }
    let filled = async {
        loop {
            match leader.sandboxes().wait_sandbox(wait(0)).await {
                Ok(_) => {}
                refusal => return refused(refusal, Code::ResourceExhausted, ErrorReason::Overloaded),
            }
        }
    };
    let full = tokio::time::timeout(PATIENCE * 6, filled).await.expect("the share is taken");
    assert_eq!(warren_proto::error::metadata_of(&full, "tenant").as_deref(), Some("t"));
    assert!(retry_after_of(&full).is_some());
    let get = GetSandboxRequest { name: name.clone() };
    let other = tokio::time::timeout(PATIENCE, follower.sandboxes().get_sandbox(get)).await;
    other.expect("it does not stand behind the waits").unwrap();
    let delete = DeleteSandboxRequest { name: name.clone(), ..DeleteSandboxRequest::default() };
    tokio::time::timeout(PATIENCE, follower.sandboxes().delete_sandbox(delete)).await.unwrap().unwrap();
    agent.report(&name, 1, Phase::Removed).await;
    let ended = tokio::time::timeout(PATIENCE * 3, waits.join_all()).await.expect("all are woken");
    for wait in ended {
        refused(wait, Code::NotFound, ErrorReason::SandboxNotFound);
    }
    for region in group {
        region.end().await;
    }
}
