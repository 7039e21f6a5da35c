//! `sandbox exec`: streams through, exit code out.

use std::time::Duration;

use tonic::{Code, Status};
use warren_proto::error::ErrorBuilder;
use warren_proto::v1::*;

use crate::fake::{Fake, error, silent_endpoint};
use crate::run::{ctl, ctl_with};

#[tokio::test]
async fn input_goes_in_output_comes_out_and_the_exit_code_is_the_process_own() {
    let fake = Fake::start().await;
    // More than all buffers on the way hold.
    let input: Vec<u8> = (0..300_000u32).flat_map(|n| format!("{n}\n").into_bytes()).collect();
    let ran = ctl_with(&fake, &["sandbox", "exec", "-i", "x", "--", "echo"], &input).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (7, ""));
    assert!(ran.stdout.as_bytes() == input, "{} bytes in, {} out", input.len(), ran.stdout.len());
}

#[tokio::test]
async fn each_output_has_its_stream() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["sandbox", "exec", "x", "--", "say"]).await;
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "say: out\n", "say: err\n"));
}

#[tokio::test]
async fn without_i_the_process_has_no_input() {
    let fake = Fake::start().await;
    let ran = ctl_with(&fake, &["sandbox", "exec", "x", "--", "echo"], b"not for you").await;
    assert_eq!((ran.code, ran.stdout.as_str()), (7, ""));
}

#[tokio::test]
async fn everything_that_is_said_reaches_the_agent() {
    let fake = Fake::start().await;
    let options = ["-e", "A=1", "--env", "B=2", "-w", "/srv", "-u", "1000:1000"];
    let args = [&["sandbox", "exec"][..], &options[..], &["x", "--", "say", "-e", "--", "-o"]].concat();
    ctl(&fake, &args).await.ok();
    let start = fake.book().execs[0].clone();
    assert_eq!(start.command, ["say", "-e", "--", "-o"]);
    assert_eq!((start.environment["A"].as_str(), start.environment["B"].as_str()), ("1", "2"));
    assert_eq!((start.working_directory.as_str(), start.user.as_str()), ("/srv", "1000:1000"));
    assert_eq!(start.terminal, None);
}

#[tokio::test]
async fn a_sandbox_that_moved_is_looked_for_again() {
    let fake = Fake::start().await;
    let moved = || error(Code::FailedPrecondition, ErrorReason::SandboxMoved, "not here");
    fake.fail("exec", [moved(), moved()]);
    let ran = ctl_with(&fake, &["sandbox", "exec", "-i", "x", "--", "echo"], b"still here").await;
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "still here"), "{ran:?}");
    let book = fake.book();
    assert_eq!((book.connects, book.execs.len()), (3, 1));
}

#[tokio::test]
async fn a_sandbox_that_is_about_to_run_is_waited_for() {
    let fake = Fake::start().await;
    let starting = ErrorBuilder::new(Code::FailedPrecondition, ErrorReason::SandboxState, "x is STARTING");
    fake.fail("connect", [starting.retry_after(Duration::from_millis(20)).build()]);
    ctl(&fake, &["sandbox", "exec", "x", "--", "say"]).await.ok();
    assert_eq!(fake.book().connects, 2);
}

#[tokio::test]
async fn when_warren_fails_the_exit_code_is_125() {
    let fake = Fake::start().await;
    let exec = ["--timeout", "10s", "sandbox", "exec", "x", "--", "say"];
    for (method, failure) in [
        ("connect", error(Code::NotFound, ErrorReason::SandboxNotFound, "there is no x")),
        ("connect", error(Code::FailedPrecondition, ErrorReason::SandboxState, "x is STOPPED")),
        ("exec", error(Code::InvalidArgument, ErrorReason::CommandNotFound, "no such program")),
        ("exec", error(Code::Internal, ErrorReason::DriverFailed, "the runtime failed")),
    ] {
        fake.fail(method, [failure.clone()]);
        let ran = ctl(&fake, &exec).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (125, ""), "{ran:?}");
        assert!(ran.stderr.starts_with(&format!("error: {}\nreason: ", failure.message())), "{ran:?}");
    }
    assert!(fake.book().execs.is_empty());
}

#[tokio::test]
async fn what_has_started_is_not_started_again() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["sandbox", "exec", "x", "--", "break"]).await;
    assert_eq!((ran.code, fake.book().execs.len()), (125, 1), "{ran:?}");
    fake.fail("exec", [Status::unavailable("the connection broke")]);
    let ran = ctl(&fake, &["sandbox", "exec", "x", "--", "say"]).await;
    assert_eq!((ran.code, fake.book().execs.len()), (125, 1), "it may have started: {ran:?}");
}

#[tokio::test]
async fn an_agent_that_cannot_be_reached_is_exit_code_125() {
    let fake = Fake::start().await;
    fake.book().agent = Some(silent_endpoint().await);
    let ran = ctl(&fake, &["--timeout", "2s", "sandbox", "exec", "x", "--", "say"]).await;
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.stderr.contains("cannot connect to the node agent at 127.0.0.1:"), "{ran:?}");
}
