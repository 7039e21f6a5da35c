//! Exit codes, what is said on stderr, and what is tried again.

use std::time::Duration;

use futures::future::join_all;
use tonic::{Code, Status};
use uuid::Uuid;
use warren_proto::error::ErrorBuilder;
use warren_proto::v1::*;

use crate::fake::{Fake, broken_endpoint, error, silent_endpoint};
use crate::run::{Ran, command, ctl, run};

async fn show_failing(failure: Status) -> Ran {
    let fake = Fake::start().await;
    fake.fail("get", std::iter::repeat_n(failure, 1000));
    // For those that are tried again; long enough to be answered once on a busy host.
    ctl(&fake, &["--timeout", "3s", "sandbox", "show", "x"]).await
}

#[tokio::test]
async fn each_class_of_error_has_its_exit_code() {
    use ErrorReason as R;
    let classes = [
        (Code::InvalidArgument, R::InvalidField, 2),
        (Code::NotFound, R::SandboxNotFound, 3),
        (Code::AlreadyExists, R::SandboxAlreadyExists, 4),
        (Code::FailedPrecondition, R::SandboxState, 4),
        (Code::Aborted, R::Conflict, 4),
        (Code::OutOfRange, R::Compacted, 4),
        (Code::Unavailable, R::NoLeader, 5),
        (Code::Unknown, R::OutcomeUnknown, 5),
        (Code::PermissionDenied, R::PermissionDenied, 6),
        (Code::Unauthenticated, R::TokenInvalid, 6),
        (Code::ResourceExhausted, R::Overloaded, 7),
        (Code::Internal, R::Internal, 1),
        (Code::DataLoss, R::DigestMismatch, 1),
        (Code::Unimplemented, R::DriverUnsupported, 1),
    ];
    let runs = classes.map(|(code, reason, _)| show_failing(error(code, reason, "it went wrong")));
    for ((_, reason, exit), ran) in classes.into_iter().zip(join_all(runs).await) {
        assert_eq!(ran.code, exit, "{reason:?}: {ran:?}");
        assert!(ran.stderr.contains("it went wrong\n"), "{ran:?}");
        let text = warren_proto::error::reason_text(reason);
        assert!(ran.stderr.contains(&format!("\nreason: {text}\n")), "{ran:?}");
        assert_eq!(ran.stdout, "", "data only on stdout");
    }
}

#[tokio::test]
async fn an_error_says_what_to_do() {
    let ran = show_failing(error(Code::NotFound, ErrorReason::SandboxNotFound, "there is no x")).await;
    let expected = "\
error: there is no x
reason: SANDBOX_NOT_FOUND
hint: `warrenctl sandbox list` shows the sandboxes of a tenant; --tenant says which tenant
";
    assert_eq!(ran.stderr, expected);
}

#[tokio::test]
async fn a_wrong_command_line_is_exit_code_2() {
    for wrong in [
        &["sandbox", "create"][..],
        &["sandbox", "create", "--template", "t", "--memory", "lots"],
        &["sandbox", "create", "--template", "t", "--cpu", "0.0001"],
        &["sandbox", "create", "--template", "t", "--env", "novalue"],
        &["sandbox", "create", "--template", "t", "--count", "0"],
        &["sandbox", "exec", "x"],
        &["sandbox", "delete"],
        &["sandbox", "delete", "--all", "x"],
        &["sandbox", "list", "-o", "xml"],
        &["no-such-command"],
        &["--endpoints", "nowhere", "status"],
        &["--endpoints", "10.0.0.1:7070", "status"],
        &["--contexts", "/nonexistent/contexts.toml", "--timeout", "x", "status"],
    ] {
        let ran = run(command(wrong), b"").await;
        assert_eq!(ran.code, 2, "{wrong:?}: {ran:?}");
        assert!(ran.stdout.is_empty() && ran.stderr.contains("error: "), "{wrong:?}: {ran:?}");
    }
}

#[tokio::test]
async fn a_create_that_is_made_again_carries_the_same_request_id() {
    let fake = Fake::start().await;
    fake.fail(
        "create",
        [
            Status::unavailable("the connection broke"),
            error(Code::Unavailable, ErrorReason::NoLeader, "no leader"),
            error(Code::Unknown, ErrorReason::OutcomeUnknown, "leadership was lost"),
            error(Code::Aborted, ErrorReason::Conflict, "the state changed"),
        ],
    );
    ctl(&fake, &["sandbox", "create", "--id", "x", "--template", "python"]).await.ok();
    let creates = fake.book().creates.clone();
    assert_eq!(creates.len(), 5);
    assert!(creates.iter().all(|create| *create == creates[0]), "{creates:?}");
    assert_eq!(Uuid::parse_str(&creates[0].request_id).expect("a UUID").get_version_num(), 7);
}

#[tokio::test]
async fn a_delete_that_is_made_again_carries_the_same_request_id() {
    let fake = Fake::start().await;
    ctl(&fake, &["sandbox", "create", "--id", "x", "--template", "python"]).await.ok();
    fake.fail("delete", [error(Code::Unknown, ErrorReason::OutcomeUnknown, "leadership was lost")]);
    ctl(&fake, &["sandbox", "delete", "x"]).await.ok();
    let deletes = fake.book().deletes.clone();
    assert_eq!((deletes.len(), &deletes[0]), (2, &deletes[1]));
    assert_eq!(Uuid::parse_str(&deletes[0].request_id).expect("a UUID").get_version_num(), 7);
}

#[tokio::test]
async fn a_chosen_request_id_is_kept() {
    let fake = Fake::start().await;
    let id = Uuid::now_v7().to_string();
    ctl(&fake, &["sandbox", "create", "--template", "t", "--request-id", &id]).await.ok();
    assert_eq!(fake.book().creates[0].request_id, id);
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    let fake = Fake::start().await;
    fake.fail("create", [error(Code::AlreadyExists, ErrorReason::SandboxAlreadyExists, "taken")]);
    let ran = ctl(&fake, &["sandbox", "create", "--id", "x", "--template", "python"]).await;
    assert_eq!((ran.code, fake.book().creates.len()), (4, 1), "{ran:?}");
}

#[tokio::test]
async fn what_a_server_says_will_pass_is_waited_for() {
    let fake = Fake::start().await;
    let full = ErrorBuilder::new(Code::ResourceExhausted, ErrorReason::Overloaded, "full");
    fake.fail("create", [full.retry_after(Duration::from_millis(20)).build()]);
    ctl(&fake, &["sandbox", "create", "--template", "python"]).await.ok();
    assert_eq!(fake.book().creates.len(), 2);
}

#[tokio::test]
async fn endpoints_that_are_dead_or_break_are_passed_over() {
    let fake = Fake::start().await;
    let dead = silent_endpoint().await;
    let (broken, _stop) = broken_endpoint().await;
    let endpoints = format!("{dead},{broken},{}", fake.address);
    let args = ["--endpoints", &endpoints, "sandbox", "create", "--template", "python", "--id", "x", "-o", "name"];
    let ran = run(command(&args), b"").await;
    assert_eq!(ran.ok(), "tenants/default/sandboxes/x\n");
}

#[tokio::test]
async fn nobody_there_is_exit_code_5_within_the_timeout() {
    let dead = silent_endpoint().await;
    let ran = run(command(&["--endpoints", &dead, "--timeout", "1s", "node", "list"]), b"").await;
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.stderr.starts_with(&format!("error: gave up on {dead}: ")), "{ran:?}");
    assert!(ran.stderr.contains("hint: is a scheduler listening there?"), "{ran:?}");
}

#[tokio::test]
async fn status_without_a_leader_says_what_each_replica_says() {
    let fake = Fake::start().await;
    let dead = silent_endpoint().await;
    fake.fail("status", std::iter::repeat_n(error(Code::Unavailable, ErrorReason::NoLeader, "no leader"), 1000));
    let endpoints = format!("{},{dead}", fake.address);
    let status = ["--endpoints", &endpoints, "--timeout", "1s", "status"];
    let ran = run(command(&status), b"").await;
    assert_eq!(ran.code, 5, "{ran:?}");
    let rows: Vec<Vec<&str>> = ran.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ENDPOINT", "REPLICA", "LEADER", "TERM", "APPLIED", "VERSION", "PROBLEM"]);
    assert_eq!(rows[1], [fake.address.as_str(), "3", "none", "9", "41", "0.1.0"]);
    assert_eq!(rows[2][..6], [dead.as_str(), "-", "-", "-", "-", "-"]);
    let json = run(command(&[&status[..], &["-o", "json"]].concat()), b"").await;
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("json");
    assert_eq!(json["replicas"][0]["status"]["appliedIndex"], 41);
    assert!(json["replicas"][1]["error"].is_string(), "{json}");
}

#[tokio::test]
async fn a_context_file_says_where_and_who() {
    let fake = Fake::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("contexts.toml");
    let text = format!(
        "current = \"home\"\n[contexts.home]\nendpoints = [\"{}\"]\ntenant = \"acme\"\n[contexts.away]\nendpoints = [\"127.0.0.1:1\"]\n",
        fake.address
    );
    std::fs::write(&file, text).expect("a file");
    let file = file.to_str().expect("a path");
    let create = ["--contexts", file, "sandbox", "create", "--template", "t", "--id", "x", "-o", "name"];
    assert_eq!(run(command(&create), b"").await.ok(), "tenants/acme/sandboxes/x\n");
    let flag = [&create[..], &["--tenant", "other"]].concat();
    assert_eq!(run(command(&flag), b"").await.ok(), "tenants/other/sandboxes/x\n");
    let unknown = run(command(&["--contexts", file, "--context", "moon", "status"]), b"").await;
    assert_eq!(unknown.code, 2, "{unknown:?}");
    assert!(unknown.stderr.contains("away") && unknown.stderr.contains("home"), "{unknown:?}");
}

#[tokio::test]
async fn all_or_nothing_is_one_call_and_its_retries_share_a_request_id() {
    let fake = Fake::start().await;
    fake.fail("batch", [error(Code::Unknown, ErrorReason::OutcomeUnknown, "who knows")]);
    let create =
        ["sandbox", "create", "--template", "t", "--id", "a", "--count", "3", "--all-or-nothing", "-o", "name"];
    let ran = ctl(&fake, &create).await;
    let names: Vec<String> = (1..=3).map(|n| format!("tenants/default/sandboxes/a-{n}")).collect();
    assert_eq!(ran.lines(), names);
    let batches = fake.book().batches.clone();
    assert_eq!(batches.len(), 2, "tried again");
    assert!(batches[0] == batches[1] && batches[0].all_or_nothing && batches[0].requests.len() == 3);
    assert_eq!(Uuid::parse_str(&batches[0].request_id).unwrap().get_version_num(), 7);
    let refused = ctl(&fake, &["sandbox", "create", "--template", "t", "--all-or-nothing"]).await;
    assert_eq!(refused.code, 2, "without --count: {refused:?}");
}
