//! `sandbox ps`, `attach`, `kill` and `exec --detach`: processes that outlive their streams.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::{Code, Status};
use warren_proto::v1::process_output::Stream;
use warren_proto::v1::*;

use crate::agent_processes::{exited, output};
use crate::fake::{Fake, error};
use crate::run::{command, ctl, ctl_with, two_days_ago};

fn process(id: &str, command: &[&str]) -> Process {
    let mut process = Process {
        process_id: id.into(),
        command: command.iter().map(|&word| word.into()).collect(),
        start_time: Some(two_days_ago()),
        ..Process::default()
    };
    process.set_state(ProcessState::Running);
    process
}

fn broken() -> Status {
    Status::unavailable("the agent went away")
}

#[tokio::test]
async fn ps_shows_what_runs_and_how_the_rest_ended() {
    let fake = Fake::start().await;
    let mut ended = process("p-2", &["sh", "-c", "printf '\x1b[2J'"]);
    ended.set_state(ProcessState::Exited);
    ended.exit_status = Some(ExitStatus { code: 137, signal: 9, ..ExitStatus::default() });
    let server = Process { attached: true, user: "1000".into(), ..process("p-1", &["python3", "-i"]) };
    fake.book().processes = vec![Process { terminal: true, ..server }, ended];
    let expected = "\
PROCESS   STATE      USER   TTY   AGE    COMMAND
p-1       attached   1000   yes   2d3h   python3 -i
p-2       SIGKILL    -      -     2d3h   sh -c printf '\\u{1b}[2J'
";
    assert_eq!(ctl(&fake, &["sandbox", "ps", "x"]).await.ok(), expected);
    assert_eq!(ctl(&fake, &["sandbox", "ps", "x", "-o", "name"]).await.ok(), "p-1\np-2\n");
    let json = ctl(&fake, &["sandbox", "ps", "x", "-o", "json"]).await.ok();
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json[1]["exitStatus"]["signal"], 9);
}

#[tokio::test]
async fn a_list_is_asked_for_again_and_a_signal_is_not() {
    let fake = Fake::start().await;
    fake.fail("processes", [broken()]);
    ctl(&fake, &["sandbox", "ps", "x"]).await.ok();
    assert_eq!(fake.book().connects, 2, "it may be elsewhere by then");
    fake.fail("signal", [broken()]);
    assert_eq!(ctl(&fake, &["sandbox", "kill", "x", "p-1"]).await.code, 5);
    ctl(&fake, &["sandbox", "kill", "x", "p-1", "p-2", "--signal", "kill"]).await.ok();
    let kills: Vec<_> = fake.book().kills.iter().map(|kill| (kill.process_id.clone(), kill.signal)).collect();
    assert_eq!(kills, [("p-1".into(), 15), ("p-1".into(), 9), ("p-2".into(), 9)]);
    assert_eq!(ctl(&fake, &["sandbox", "kill", "x", "p-1", "-s", "LOUD"]).await.code, 2);
}

#[tokio::test]
async fn a_detached_process_has_one_id_however_often_its_start_is_tried() {
    let fake = Fake::start().await;
    fake.fail("start", [broken(), broken()]);
    let options = ["--detach", "-e", "A=1", "--time-limit", "5m", "-u", "www-data"];
    let args = [&["sandbox", "exec"][..], &options[..], &["x", "--", "serve", "--all"]].concat();
    let id = ctl(&fake, &args).await.ok();
    let starts = fake.book().starts.clone();
    assert_eq!((starts.len(), format!("{}\n", starts[2].process_id)), (3, id));
    assert_eq!((&starts[0], &starts[1]), (&starts[2], &starts[2]));
    let start = starts[0].start.clone().expect("a start");
    assert_eq!((start.command, start.user.as_str()), (vec!["serve".into(), "--all".into()], "www-data"));
    assert_eq!(start.timeout.map(|timeout| timeout.seconds), Some(300));
    assert!(starts[0].no_stdin && !starts[0].kill_on_disconnect);
    let chosen = ["sandbox", "exec", "-i", "-d", "--process-id", "web", "x", "--", "serve"];
    assert_eq!(ctl(&fake, &chosen).await.ok(), "web\n");
    assert!(!fake.book().starts[3].no_stdin);
}

#[tokio::test]
async fn attach_goes_on_where_it_broke() {
    let fake = Fake::start().await;
    fake.book().processes = vec![Process { output_start: 10, output_end: 40, ..process("p-1", &["count"]) }];
    fake.book().attachments = [
        vec![Ok(output(10, Stream::Stdout, b"ten ")), Ok(output(14, Stream::Stderr, b"err")), Err(broken())],
        vec![Err(broken())],
        vec![
            Ok(attach_process_response::Message::Dropped(OutputDropped { from: 17, to: 20 })),
            Ok(output(20, Stream::Stdout, b"twenty")),
            Ok(exited(3)),
        ],
    ]
    .into();
    let ran = ctl(&fake, &["sandbox", "attach", "--no-stdin", "x", "p-1"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (3, "ten twenty"), "{ran:?}");
    assert!(ran.stderr.starts_with("err"), "{ran:?}");
    assert!(ran.stderr.contains("bytes 17 to 20 of its output are not held any more"), "{ran:?}");
    let offsets: Vec<_> = fake.book().attaches.iter().map(|attach| attach.offset).collect();
    assert_eq!(offsets, [10, 17, 17]);
    assert!(fake.book().attaches.iter().all(|attach| attach.lossless));
}

#[tokio::test]
async fn attach_begins_where_it_is_told_and_hands_input_on() {
    let fake = Fake::start().await;
    fake.book().processes = vec![Process { output_start: 10, output_end: 40, ..process("p-1", &["cat"]) }];
    for (offset, expected) in [("end", 40), ("12", 12)] {
        let args = ["sandbox", "attach", "--offset", offset, "x", "p-1"];
        let ran = ctl_with(&fake, &args, b"words").await;
        assert_eq!((ran.code, ran.stdout.as_str()), (7, "words"), "{ran:?}");
        assert_eq!(fake.book().attaches.last().map(|attach| attach.offset), Some(expected));
    }
    assert_eq!(ctl(&fake, &["sandbox", "attach", "--offset", "-1", "x", "p-1"]).await.code, 2);
}

#[tokio::test]
async fn attach_to_what_is_not_there_says_where_to_look() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["sandbox", "attach", "x", "p-1"]).await;
    assert_eq!(ran.code, 3);
    assert!(ran.stderr.contains("has no process `p-1`: `warrenctl sandbox ps` shows those it has"), "{ran:?}");
    fake.book().processes = vec![process("p-1", &["cat"])];
    let gone = error(Code::FailedPrecondition, ErrorReason::SandboxState, "x is STOPPED");
    fake.fail("attach", [gone]);
    assert_eq!(ctl(&fake, &["sandbox", "attach", "x", "p-1"]).await.code, 4);
}

#[tokio::test]
async fn a_signal_goes_to_the_process_and_a_second_one_ends_the_program() {
    for (program, signals, code) in [("hang", 1, 128 + 2), ("deaf", 2, 128 + 2)] {
        let fake = Fake::start().await;
        let mut command = command(&["sandbox", "exec", "-i", "x", "--", program]);
        command.env("WARREN_ENDPOINTS", &fake.address).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("warrenctl starts");
        let pid = Pid::from_raw(i32::try_from(child.id().expect("it runs")).expect("a pid"));
        // It listens once it has started to read what it hands on.
        let mut stdin = child.stdin.take().expect("a pipe");
        tokio::io::AsyncWriteExt::write_all(&mut stdin, &vec![b'x'; 1 << 20]).await.expect("input is taken");
        for sent in 1..=signals {
            kill(pid, Signal::SIGINT).expect("a signal");
            while sent == 1 && fake.book().signals.is_empty() {
                tokio::task::yield_now().await;
            }
        }
        let status = child.wait().await.expect("it ends");
        assert_eq!(status.code(), Some(code), "{program}");
        assert_eq!(fake.book().signals, [2], "{program}");
    }
}
