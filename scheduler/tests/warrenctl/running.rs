//! `sandbox run`: one command in a sandbox of its own, of which nothing stays.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;
use warren_proto::v1::*;

use crate::fake::{Fake, error};
use crate::run::{command, ctl, ctl_with};

fn fate(state: SandboxState) -> Option<Sandbox> {
    let mut fate = Sandbox::default();
    fate.set_state(state);
    Some(fate)
}

#[tokio::test]
async fn it_is_created_used_and_deleted() {
    let fake = Fake::start().await;
    fake.book().fate = fate(SandboxState::Running);
    let args = ["sandbox", "run", "-i", "--memory", "64MiB", "-u", "1000", "python", "--", "echo", "-n"];
    let ran = ctl_with(&fake, &args, b"through").await;
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "through", ""));
    let book = fake.book();
    let create = &book.creates[0];
    let sandbox = create.sandbox.clone().expect("a sandbox");
    assert_eq!(sandbox.template, "templates/python");
    assert!(sandbox.command.is_empty(), "the template's own process keeps it up");
    assert_eq!(sandbox.resources.map(|resources| resources.memory_bytes), Some(64 << 20));
    assert_eq!(sandbox.ttl.map(|ttl| ttl.seconds), Some(900), "nothing stays where nobody deletes it");
    assert!(create.sandbox_id.starts_with("run-"), "{create:?}");
    assert_eq!(book.deletes.len(), 1);
    assert_eq!(book.deletes[0].name, format!("tenants/default/sandboxes/{}", create.sandbox_id));
    assert_eq!((book.execs[0].command.join(" "), book.execs[0].user.as_str()), ("echo -n".into(), "1000"));
}

#[tokio::test]
async fn it_stays_where_that_was_asked_for() {
    for keep in ["--keep", "--rm=false"] {
        let fake = Fake::start().await;
        fake.book().fate = fate(SandboxState::Running);
        let ran = ctl(&fake, &["sandbox", "run", keep, "--id", "box", "python", "--", "say"]).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (0, "say: out\n"));
        assert!(ran.stderr.ends_with("sandboxes/box stays: `warrenctl sandbox delete box` deletes it\n"), "{ran:?}");
        let book = fake.book();
        assert!(book.deletes.is_empty());
        assert_eq!(book.creates[0].sandbox.clone().and_then(|sandbox| sandbox.ttl), None);
    }
}

#[tokio::test]
async fn it_goes_also_when_the_command_could_not_be_executed() {
    let fake = Fake::start().await;
    fake.book().fate = fate(SandboxState::Running);
    fake.fail("exec", [error(Code::InvalidArgument, ErrorReason::CommandNotFound, "no such program")]);
    let ran = ctl(&fake, &["sandbox", "run", "python", "--", "nonsense"]).await;
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("error: no such program\n"), "{ran:?}");
    assert_eq!(fake.book().deletes.len(), 1);
}

#[tokio::test]
async fn one_that_never_runs_is_told_and_deleted() {
    let fake = Fake::start().await;
    let why = StateReason { code: "START_FAILED".into(), message: "no such image".into() };
    fake.book().fate = fate(SandboxState::Failed).map(|fate| Sandbox { reason: Some(why), ..fate });
    let ran = ctl(&fake, &["sandbox", "run", "python", "--", "say"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (125, ""));
    assert!(ran.stderr.contains("is FAILED: START_FAILED: no such image"), "{ran:?}");
    assert_eq!(fake.book().deletes.len(), 1);
}

#[tokio::test]
async fn another_sandbox_of_that_name_is_left_alone() {
    let fake = Fake::start().await;
    fake.fail("create", [error(Code::AlreadyExists, ErrorReason::SandboxAlreadyExists, "box is there")]);
    let ran = ctl(&fake, &["sandbox", "run", "--id", "box", "python", "--", "say"]).await;
    assert_eq!((ran.code, fake.book().deletes.len()), (125, 0), "{ran:?}");
}

#[tokio::test]
async fn a_signal_deletes_it_whether_it_waits_or_runs() {
    for (state, program) in [(SandboxState::Starting, "hang"), (SandboxState::Running, "hang")] {
        let fake = Fake::start().await;
        fake.book().fate = fate(state);
        let mut command = command(&["sandbox", "run", "-i", "python", "--", program]);
        command.env("WARREN_ENDPOINTS", &fake.address).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("warrenctl starts");
        let reached = || {
            let book = fake.book();
            if state == SandboxState::Running { !book.execs.is_empty() } else { !book.watches.is_empty() }
        };
        while !reached() {
            tokio::task::yield_now().await;
        }
        kill(Pid::from_raw(i32::try_from(child.id().expect("it runs")).expect("a pid")), Signal::SIGTERM)
            .expect("a signal");
        let status = child.wait().await.expect("it ends");
        assert_eq!(status.code(), Some(128 + 15), "{state:?}");
        assert_eq!(fake.book().deletes.len(), 1, "{state:?}");
    }
}
