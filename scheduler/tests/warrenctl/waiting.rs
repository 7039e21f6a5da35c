//! Creating, deleting and watching: what is waited for, and what is said of it.

use tonic::{Code, Status};
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::*;

use crate::fake::{Fake, error};
use crate::run::ctl;

fn becoming(state: SandboxState) -> Option<Sandbox> {
    Some(Sandbox { state: state.into(), node: "nodes/n1".into(), epoch: 1, ..Default::default() })
}

const CREATE: [&str; 6] = ["sandbox", "create", "--id", "x", "--template", "python"];

#[tokio::test]
async fn everything_that_is_said_reaches_the_scheduler() {
    let fake = Fake::start().await;
    let options = ["--cpu", "0.5", "--memory", "64MiB", "--disk", "2GiB", "--pids", "9", "-e", "A=1=2", "-l", "team=x"];
    let rest = ["--workdir", "/srv", "--", "python3", "-c", "print(1)"];
    ctl(&fake, &[&CREATE[..], &options[..], &rest[..]].concat()).await.ok();
    let create = fake.book().creates[0].clone();
    let sandbox = create.sandbox.expect("a sandbox");
    assert_eq!((create.parent.as_str(), create.sandbox_id.as_str()), ("tenants/default", "x"));
    assert_eq!(sandbox.template, "templates/python");
    assert_eq!(sandbox.command, ["python3", "-c", "print(1)"]);
    assert_eq!((sandbox.environment["A"].as_str(), sandbox.labels["team"].as_str()), ("1=2", "x"));
    assert_eq!(sandbox.working_directory, "/srv");
    let resources = Resources { cpu_milli: 500, memory_bytes: 64 << 20, disk_bytes: 2 << 30, pids: 9, gpus: 0 };
    assert_eq!(sandbox.resources, Some(resources));
}

#[tokio::test]
async fn a_wait_ends_when_it_runs() {
    let fake = Fake::start().await;
    fake.book().fate = becoming(SandboxState::Running);
    let shown = ctl(&fake, &[&CREATE[..], &["--wait", "-o", "json"]].concat()).await.ok();
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("json");
    assert_eq!((&shown["state"], &shown["node"]), (&"SANDBOX_STATE_RUNNING".into(), &"nodes/n1".into()));
    let book = fake.book();
    assert_eq!((book.watches.len(), book.lists), (1, 1), "one token, one watch, no polling");
    assert_eq!(book.watches[0].watch_token, "0", "from before the create");
}

#[tokio::test]
async fn many_are_created_at_once_and_shown_in_order() {
    let fake = Fake::start().await;
    fake.book().fate = becoming(SandboxState::Running);
    let ran = ctl(&fake, &[&CREATE[..], &["--count", "12", "--wait=10s"]].concat()).await.ok();
    let ids: Vec<&str> = ran.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let expected: Vec<String> = (1..=12).map(|n| format!("x-{n}")).collect();
    assert_eq!(ids, expected);
    let ids: std::collections::BTreeSet<String> =
        fake.book().creates.iter().map(|create| create.request_id.clone()).collect();
    assert_eq!(ids.len(), 12, "a request id each");
}

#[tokio::test]
async fn what_was_acknowledged_is_said_even_when_others_fail() {
    let fake = Fake::start().await;
    let full = || error(Code::ResourceExhausted, ErrorReason::Overloaded, "the table is full");
    fake.fail("create", [full(), full()]);
    let ran = ctl(&fake, &[&CREATE[..], &["--count", "5", "-o", "name"]].concat()).await;
    assert_eq!(ran.code, 7, "{ran:?}");
    assert_eq!(ran.stdout.lines().count(), 3, "{ran:?}");
    assert_eq!(ran.stderr.matches("error: the table is full").count(), 2, "{ran:?}");
}

#[tokio::test]
async fn a_wait_that_takes_too_long_says_why() {
    let fake = Fake::start().await;
    let reason = Some(StateReason { code: "SHORT_OF_CPU".into(), message: "no node has 0.25 vCPU free".into() });
    fake.book().fate = becoming(SandboxState::Pending).map(|sandbox| Sandbox { reason, ..sandbox });
    let ran = ctl(&fake, &[&CREATE[..], &["--wait=3s", "-o", "name"]].concat()).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (5, "tenants/default/sandboxes/x\n"), "{ran:?}");
    let expected =
        "error: timed out: tenants/default/sandboxes/x is PENDING: SHORT_OF_CPU: no node has 0.25 vCPU free\n";
    assert_eq!(ran.stderr, expected);
}

#[tokio::test]
async fn a_sandbox_that_fails_ends_the_wait() {
    let fake = Fake::start().await;
    let reason = Some(StateReason { code: "START_FAILED".into(), message: "no such program".into() });
    fake.book().fate = becoming(SandboxState::Failed).map(|sandbox| Sandbox { reason, ..sandbox });
    let ran = ctl(&fake, &[&CREATE[..], &["--wait"]].concat()).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ran.stderr, "error: tenants/default/sandboxes/x is FAILED: START_FAILED: no such program\n");
    assert!(ran.stdout.contains("FAILED"), "{ran:?}");
}

#[tokio::test]
async fn one_that_ran_and_ended_well_did_run() {
    let fake = Fake::start().await;
    for (code, exit) in [(0, 0), (3, 1)] {
        let exit_status = Some(ExitStatus { code, ..Default::default() });
        fake.book().fate = becoming(SandboxState::Stopped).map(|sandbox| Sandbox { exit_status, ..sandbox });
        assert_eq!(ctl(&fake, &[&CREATE[..], &["--wait"]].concat()).await.code, exit);
    }
}

#[tokio::test]
async fn a_wait_outlives_breaks_of_its_watch() {
    let fake = Fake::start().await;
    fake.book().fate = becoming(SandboxState::Running);
    fake.book().break_watch_after = Some(3);
    fake.fail("watch", [Status::unavailable("not now")]);
    ctl(&fake, &[&CREATE[..], &["--count", "4", "--wait"]].concat()).await.ok();
    let tokens: Vec<String> = fake.book().watches.iter().map(|watch| watch.watch_token.clone()).collect();
    assert_eq!(tokens, ["0", "0", "3"], "it continues where it broke");
}

#[tokio::test]
async fn a_wait_whose_token_is_too_old_begins_with_what_there_is() {
    let fake = Fake::start().await;
    fake.book().fate = becoming(SandboxState::Running);
    fake.fail("watch", [error(Code::OutOfRange, ErrorReason::Compacted, "too old")]);
    ctl(&fake, &[&CREATE[..], &["--wait"]].concat()).await.ok();
    assert_eq!(fake.book().watches[1].watch_token, "");
}

#[tokio::test]
async fn a_delete_may_wait_until_nothing_is_left() {
    let fake = Fake::start().await;
    ctl(&fake, &[&CREATE[..], &["--count", "3"]].concat()).await.ok();
    let ran = ctl(&fake, &["sandbox", "delete", "--wait", "x-1", "tenants/default/sandboxes/x-2", "-o", "name"]).await;
    assert_eq!((ran.code, ran.lines()), (0, vec!["tenants/default/sandboxes/x-1", "tenants/default/sandboxes/x-2"]));
    assert_eq!(fake.book().watches.len(), 1);
    assert_eq!(ctl(&fake, &["sandbox", "delete", "--all"]).await.ok(), "SANDBOX   STATE\nx-3       deleting\n");
    assert!(fake.book().sandboxes.is_empty());
}

#[tokio::test]
async fn a_delete_that_was_compacted_away_is_seen_in_what_is_left() {
    let fake = Fake::start().await;
    ctl(&fake, &CREATE).await.ok();
    fake.fail("watch", [error(Code::OutOfRange, ErrorReason::Compacted, "too old")]);
    assert_eq!(ctl(&fake, &["sandbox", "delete", "x", "--wait"]).await.ok(), "SANDBOX   STATE\nx         deleted\n");
}

#[tokio::test]
async fn a_delete_of_nothing_is_exit_code_3_unless_that_is_fine() {
    let fake = Fake::start().await;
    assert_eq!(ctl(&fake, &["sandbox", "delete", "x"]).await.code, 3);
    let fine = ctl(&fake, &["sandbox", "delete", "x", "--allow-missing", "--wait", "-o", "name"]).await;
    assert_eq!(fine.ok(), "");
}

#[tokio::test]
async fn a_watch_is_a_line_an_event_and_goes_on_where_it_broke() {
    let fake = Fake::start().await;
    fake.book().fate = becoming(SandboxState::Running);
    ctl(&fake, &CREATE).await.ok();
    ctl(&fake, &["sandbox", "create", "--id", "other", "--template", "python"]).await.ok();
    // It would go on for ever: this is what ends it, once all was told.
    let end = || error(Code::OutOfRange, ErrorReason::Compacted, "too old");

    fake.book().break_watch_after = Some(1);
    fake.fail("watch end", [end()]);
    let ran = ctl(&fake, &["sandbox", "watch", "--token", "0", "-o", "jsonl"]).await;
    assert_eq!(ran.code, 4, "{ran:?}");
    let events: Vec<serde_json::Value> =
        ran.stdout.lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    let said: Vec<_> = events.iter().map(|e| (e["kind"].as_str(), e["watchToken"].as_str())).collect();
    let kind = |kind: Kind| Some(kind.as_str_name());
    let expected = [(kind(Kind::Created), Some("1")), (kind(Kind::Updated), Some("2"))];
    assert_eq!(said[..2], expected);
    assert_eq!(said.len(), 4, "none twice, none left out: {said:?}");

    fake.fail("watch end", [end()]);
    let ran = ctl(&fake, &["sandbox", "watch", "x"]).await;
    let rows: Vec<Vec<&str>> = ran.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows, [vec!["EVENT", "SANDBOX", "STATE", "NODE", "REASON"], vec!["CURRENT", "x", "RUNNING", "n1"]]);
}
