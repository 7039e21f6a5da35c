//! Processes that outlive who started them: attached to from an offset, by several, after a restart, and remembered.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use warren_node_agent::driver::{AttachFrom, Driver, DriverError, Event, ExecSpec, Exit, ProcessSpec, ProcessStatus};

use super::exec::read_until;
use super::world::*;

/// Runs until it ends by itself.
fn detached(id: &str, exec: ExecSpec) -> ProcessSpec {
    ProcessSpec { id: id.into(), exec, kill_on_disconnect: false, no_stdin: false, timeout: None }
}

fn from(offset: u64) -> AttachFrom {
    AttachFrom { offset, lossless: true }
}

async fn status(driver: &dyn Driver, key: &warren_node_agent::driver::InstanceKey, id: &str) -> ProcessStatus {
    let all = driver.processes(key).await.expect("lists");
    all.into_iter().find(|status| status.id == id).unwrap_or_else(|| panic!("{id} is not listed"))
}

#[test]
fn a_process_outlives_its_agent_and_is_attached_to_from_an_offset() {
    with_each_runtime("detached processes", |world| async move {
        let key = world.start("a", &[]).await;
        let spec = detached("web", sh("echo one; read line; echo got $line; echo err >&2; cat; exit 5"));
        let started = world.driver.start_process(&key, &spec).await.expect("starts");
        assert_eq!((started.exit, started.attached, started.id.as_str()), (None, false, "web"));
        let mut first = world.driver.attach(&key, "web", from(0)).await.expect("attaches");
        read_until(&mut first, &mut String::new(), "one\n").await;
        drop(first);
        // The same again is the same; another is refused.
        assert_eq!(world.driver.start_process(&key, &spec).await.expect("the same").started_ms, started.started_ms);
        let other = ProcessSpec { no_stdin: true, ..spec.clone() };
        assert!(matches!(world.driver.start_process(&key, &other).await, Err(DriverError::ProcessExists { .. })));

        let driver = world.restarted();
        let found = status(&*driver, &key, "web").await;
        assert_eq!((found.exit, found.output_start, found.output_end), (None, 0, 4));
        // Two are attached to it: both get all of it, each from where it asked.
        let mut whole = driver.attach(&key, "web", from(0)).await.expect("attaches");
        let rest = driver.attach(&key, "web", from(4)).await.expect("attaches");
        assert!(whole.status.attached);
        whole.input.write(b"x\nbinary \x00\xff").await.expect("writes");
        whole.input.close().await.expect("closes");
        let (whole, rest) = tokio::join!(read_all(whole.output), read_all(rest.output));
        assert_eq!(whole.stdout, b"one\ngot x\nbinary \x00\xff");
        assert_eq!((rest.stdout.as_slice(), rest.stderr.as_slice()), (&whole.stdout[4..], &b"err\n"[..]));
        assert_eq!((whole.exit, rest.exit), (code(5), code(5)));

        // It is remembered, by any agent.
        let ended = status(&*world.restarted(), &key, "web").await;
        assert_eq!((ended.exit, ended.timed_out, ended.attached), (Some(code(5)), false, false));
        assert!(ended.ended_ms >= Some(ended.started_ms));
        let again = driver.attach(&key, "web", from(2)).await.expect("attaches");
        let again = read_all(again.output).await;
        assert_eq!((&again.stdout, &again.stderr, again.exit), (&whole.stdout[2..].to_vec(), &whole.stderr, code(5)));
        driver.signal_process(&key, "web", 9).await.expect("no effect");
        let unknown = driver.attach(&key, "nope", from(0)).await.map(drop);
        assert!(matches!(unknown, Err(DriverError::ProcessNotFound { .. })));
    });
}

#[test]
fn the_last_who_lets_go_kills_only_what_was_to_be_killed() {
    with_each_runtime("kill on disconnect", |world| async move {
        let key = world.start("a", &[]).await;
        let kept = detached("kept", command(&["sleep", "1000"]));
        let bound = ProcessSpec { kill_on_disconnect: true, ..detached("bound", command(&["sleep", "1000"])) };
        for spec in [&kept, &bound] {
            world.driver.start_process(&key, spec).await.expect("starts");
        }
        let one = world.driver.attach(&key, "bound", from(0)).await.expect("attaches");
        let two = world.driver.attach(&key, "bound", from(0)).await.expect("attaches");
        drop(world.driver.attach(&key, "kept", from(0)).await.expect("attaches"));
        drop(one);
        assert_eq!(status(&*world.driver, &key, "bound").await.exit, None);
        drop(two);
        world.driver.process_ended(&key, "bound").await;
        assert_eq!(status(&*world.driver, &key, "bound").await.exit, Some(killed_by(9)));
        assert_eq!(status(&*world.driver, &key, "kept").await.exit, None);
        world.driver.signal_process(&key, "kept", 15).await.expect("signals");
        world.driver.process_ended(&key, "kept").await;
        assert_eq!(status(&*world.driver, &key, "kept").await.exit, Some(killed_by(15)));
    });
}

#[test]
fn what_nobody_took_in_time_is_dropped_aloud_and_what_was_held_for_someone_is_not() {
    with_each_runtime("dropped output", |world| async move {
        let key = world.start("a", &[]).await;
        let million = "head -c 4000000 /dev/zero | tr '\\0' x";
        world.driver.start_process(&key, &detached("lost", sh(million))).await.expect("starts");
        world.driver.process_ended(&key, "lost").await;
        let held = status(&*world.driver, &key, "lost").await;
        assert_eq!((held.output_start, held.output_end), (4_000_000 - (1 << 20), 4_000_000));
        let mut attached = world.driver.attach(&key, "lost", from(5)).await.expect("attaches");
        let dropped = attached.output.next().await.expect("reads");
        assert_eq!(dropped, Event::Dropped { from: 5, to: held.output_start });
        assert_eq!(read_all(attached.output).await.stdout.len(), 1 << 20);

        // One that takes its time, and one that keeps the process waiting for it.
        world.driver.start_process(&key, &detached("kept", sh(&format!("read x; {million}")))).await.expect("starts");
        let mut slow = world.driver.attach(&key, "kept", from(0)).await.expect("attaches");
        slow.input.write(b"\n").await.expect("writes");
        let fast = AttachFrom { offset: 0, lossless: false };
        let mut fast = world.driver.attach(&key, "kept", fast).await.expect("attaches");
        let mut seen = 0;
        while seen < 1 << 20 {
            match fast.output.next().await.expect("reads") {
                Event::Output { offset, data, .. } => {
                    assert_eq!(offset, seen);
                    seen += data.len() as u64;
                }
                other => panic!("{other:?}"),
            }
        }
        drop(fast);
        assert_eq!(status(&*world.driver, &key, "kept").await.exit, None, "it waits for the slow one");
        assert_eq!(read_all(slow.output).await.stdout.len(), 4_000_000);
    });
}

#[test]
fn a_time_out_ends_a_process_with_all_that_it_started() {
    with_each_runtime("time-outs", |world| async move {
        let key = world.start("a", &[]).await;
        let timeout = Some(Duration::from_millis(300));
        let spec = ProcessSpec { timeout, ..detached("slow", sh("trap '' TERM; (sleep 1004; :) & sleep 1004")) };
        world.driver.start_process(&key, &spec).await.expect("starts");
        world.driver.process_ended(&key, "slow").await;
        let ended = status(&*world.driver, &key, "slow").await;
        assert_eq!((ended.exit, ended.timed_out), (Some(killed_by(9)), true));
        // With a kernel of its own nobody outside knows whose child is whose.
        if !world.has_own_kernel() {
            assert_eq!(world.sh(&key, "ps -o args | grep '[s]leep 1004'").await.exit, code(1));
        }
        let spec = ProcessSpec { timeout: Some(Duration::from_secs(1000)), ..detached("quick", sh("exit 1")) };
        world.driver.start_process(&key, &spec).await.expect("starts");
        world.driver.process_ended(&key, "quick").await;
        assert!(!status(&*world.driver, &key, "quick").await.timed_out);
    });
}

#[test]
fn a_child_that_keeps_the_output_open_does_not_delay_the_exit() {
    with_each_runtime("children left behind", |world| async move {
        let key = world.start("a", &[]).await;
        assert_eq!(world.sh(&key, "echo out; sleep 1005 & exit 3").await.exit, code(3));
        let flood = world.sh(&key, "(while :; do echo y; done) & exit 4").await;
        assert_eq!(flood.exit, code(4));
    });
}

#[test]
fn a_user_is_a_number_or_a_name_of_the_sandbox() {
    with_each_runtime("users", |world| async move {
        let key = world.start("a", &[]).await;
        world.sh(&key, "echo 'web:x:33:34::/srv:/bin/sh' >> /etc/passwd; echo 'more:x:77:a,web' >> /etc/group").await;
        let id = |user: &str| ExecSpec { user: user.into(), ..sh("id -u; id -g; id -G; echo $HOME") };
        let named = run(&*world.driver, &key, &id("web"), &[]).await;
        assert_eq!(named.text(), "33\n34\n34 77\n/srv");
        let numbers = run(&*world.driver, &key, &id("5:6"), &[]).await;
        assert!(numbers.text().starts_with("5\n6\n6"), "{}", numbers.text());
        let unknown = exec(&*world.driver, &key, &id("nobody-here")).await.map(drop);
        assert!(matches!(unknown, Err(DriverError::UserNotFound { user }) if user == "nobody-here"));
        // Wherever the sandbox points it.
        world.sh(&key, "rm /etc/passwd; ln -s ../../../../etc/shadow /etc/passwd").await;
        assert!(exec(&*world.driver, &key, &id("root")).await.is_err());
        world.sh(&key, "rm /etc/passwd; mkfifo /etc/passwd").await;
        assert!(exec(&*world.driver, &key, &id("web")).await.is_err());
    });
}

#[test]
fn many_short_ones_in_a_row_are_exact_and_the_newest_are_remembered() {
    with_each_runtime("short executions", |world| async move {
        let key = world.start("a", &[]).await;
        for n in 0..200 {
            let output = world.sh(&key, &format!("echo {n}; echo e{n} >&2; exit {}", n % 7)).await;
            let text = String::from_utf8(output.stderr.clone()).expect("text");
            assert_eq!((output.text(), text, output.exit), (&*n.to_string(), format!("e{n}\n"), code(n % 7)));
        }
        assert_eq!(world.driver.processes(&key).await.expect("lists").len(), 200);
    });
}

#[test]
fn sixty_four_mebibytes_pass_unchanged() {
    with_each_runtime("much output", |world| async move {
        let key = world.start("a", &[]).await;
        let script = "f() { cat /var/data /var/data; }; dd if=/dev/urandom of=/var/data bs=1M count=32 2>/dev/null; f | sha256sum >&2; f";
        let output = world.sh(&key, script).await;
        let told = String::from_utf8(output.stderr).expect("text");
        let digest: String = Sha256::digest(&output.stdout).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((output.stdout.len(), &told[..64]), (64 << 20, &*digest));
    });
}

#[test]
fn a_start_that_fails_leaves_no_process_and_removal_ends_those_that_run() {
    with_each_runtime("failed starts", |world| async move {
        let key = world.start("a", &[]).await;
        let nope = detached("p", command(&["nope"]));
        for _ in 0..2 {
            let failed = world.driver.start_process(&key, &nope).await;
            assert!(matches!(failed, Err(DriverError::CommandNotFound { .. })), "{failed:?}");
        }
        assert!(world.driver.processes(&key).await.expect("lists").is_empty());
        world.driver.start_process(&key, &detached("p", command(&["cat"]))).await.expect("the id is free");
        let attached = world.driver.attach(&key, "p", from(0)).await.expect("attaches");
        let reading = tokio::spawn(read_all(attached.output));
        let driver = Arc::clone(&world.driver);
        driver.remove(&key).await.expect("removes");
        assert_eq!(reading.await.expect("task").exit, Exit { code: 137, signal: 9, oom_killed: false });
        assert!(matches!(driver.start_process(&key, &nope).await, Err(DriverError::NotFound(_))));
    });
}
