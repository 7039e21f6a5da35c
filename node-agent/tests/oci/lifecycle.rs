//! From start to end: frozen, thawed, ended, and how that is known.

use std::fs;
use std::process::Command;

use warren_node_agent::driver::{Driver, DriverError, Exit, Presence};

use super::world::*;

#[test]
fn an_instance_is_started_seen_frozen_thawed_and_removed() {
    with_each_runtime("lifecycle", |world| async move {
        let (driver, key) = (&world.driver, key("a"));
        assert!(matches!(driver.wait(&key).await, Err(DriverError::NotFound(_))));
        assert!(matches!(exec(&**driver, &key, &sh("true")).await, Err(DriverError::NotFound(_))));
        driver.remove(&key).await.expect("nothing to remove");
        world.start("a", &[]).await;
        assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Running)]);
        assert!(driver.start(&world.spec("a", &[])).await.is_err(), "it is there already");
        assert_eq!(world.sh(&key, "echo $GREETING; hostname").await.text(), "hello\na");
        for _ in 0..2 {
            driver.freeze(&key).await.expect("freezes");
            assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Frozen)]);
        }
        assert!(matches!(exec(&**driver, &key, &sh("true")).await, Err(DriverError::NotRunning { .. })));
        for _ in 0..2 {
            driver.thaw(&key).await.expect("thaws");
            assert_eq!(driver.list().await.expect("lists"), [(key.clone(), Presence::Running)]);
        }
        assert_eq!(world.sh(&key, "echo still here").await.text(), "still here");
        driver.freeze(&key).await.expect("freezes");
        for _ in 0..2 {
            driver.remove(&key).await.expect("removes, frozen or gone");
        }
        assert!(driver.list().await.expect("lists").is_empty());
    });
}

#[test]
fn what_runs_while_frozen_does_not_progress() {
    with_each_runtime("freeze", |world| async move {
        let counting = ["/bin/sh", "-c", "while :; do echo >> /var/n; sleep 0.01; done"];
        let key = world.start("a", &counting).await;
        let other = world.start("b", &counting).await;
        let roots = [world.root(&key), world.root(&other)];
        let counted = |name: &str| {
            let root = &roots[usize::from(name == "b")];
            fs::metadata(root.join("var/n")).map_or(0, |metadata| metadata.len())
        };
        while counted("a") == 0 {
            crate::world::look_again().await;
        }
        world.driver.freeze(&key).await.expect("freezes");
        let (seen, others) = (counted("a"), counted("b"));
        while counted("b") < others + 20 {
            crate::world::look_again().await;
        }
        assert_eq!(counted("a"), seen);
    });
}

#[test]
fn how_the_main_process_ended_is_known() {
    with_each_runtime("main process", |world| async move {
        let cases: [(&str, &str, Exit); 4] = [
            ("zero", "echo out; echo err >&2", code(0)),
            ("three", "exit 3", code(3)),
            ("high", "exit 137", code(137)),
            ("notfound", "exit 127", code(127)),
        ];
        for (name, script, exit) in cases {
            let key = world.start(name, &["/bin/sh", "-c", script]).await;
            let ended = world.driver.wait(&key).await.expect("ends");
            // gVisor says the same of a code above 128 and of a signal.
            let exit = if world.has_own_kernel() && exit.code > 128 { killed_by(exit.code - 128) } else { exit };
            assert_eq!(ended.exit, exit, "{name}");
            if name == "zero" {
                assert_eq!(ended.output_tail, b"out\nerr\n");
            }
            assert!(world.driver.list().await.expect("lists").contains(&(key.clone(), Presence::Ended(ended))));
            assert!(matches!(exec(&*world.driver, &key, &sh("true")).await, Err(DriverError::NotRunning { .. })));
        }
        let key = world.start("long", &["/bin/sh", "-c", "yes | head -c 1000000; printf 'the end'"]).await;
        let tail = world.driver.wait(&key).await.expect("ends").output_tail;
        assert!(tail.len() == 4096 && tail.ends_with(b"y\nthe end"), "{}", tail.len());
    });
}

#[test]
fn a_main_process_that_is_killed_or_told_to_end_says_so() {
    with_each_runtime("signals of the main process", |world| async move {
        let key = world.start("idle", &[]).await;
        world.sh(&key, "kill -TERM 1").await;
        assert_eq!(world.driver.wait(&key).await.expect("ends").exit, code(0));
        let key = world.start("killed", &[]).await;
        let pid = fs::read_to_string(world.dir.path().join("oci/instances/acme.killed.1/started")).expect("pid");
        Command::new("kill").args(["-KILL", pid.trim()]).status().expect("kill");
        assert_eq!(world.driver.wait(&key).await.expect("ends").exit, killed_by(9));
    });
}

#[test]
fn the_idle_main_process_reaps_and_survives_the_loss_of_its_sleep() {
    with_each_runtime("reaping", |world| async move {
        let key = world.start("a", &[]).await;
        // The shell ends before its child, so the child becomes process 1's.
        let orphan = world.sh(&key, "(sh -c 'sleep 0.05' & ) ; echo").await;
        assert_eq!(orphan.exit, code(0));
        let script =
            "for i in 1 2 3 4 5 6 7 8 9 10; do ps -o stat,comm | grep -q '^Z' || exit 0; sleep 0.2; done; ps; exit 1";
        let output = world.sh(&key, script).await;
        assert_eq!(output.exit, code(0), "{}", output.text());
        world.sh(&key, "kill $(ps -o pid,comm | grep sleep | grep -v grep | while read p c; do echo $p; done)").await;
        assert_eq!(world.sh(&key, "echo alive").await.text(), "alive");
    });
}
