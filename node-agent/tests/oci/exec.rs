//! Executing processes: streams, arguments, signals, terminals.

use std::sync::Arc;

use warren_node_agent::driver::{Attachment, Driver, DriverError, Event, ExecSpec, TerminalSize};

use super::world::*;

#[test]
fn a_program_that_is_not_there_is_told_from_one_that_exits_127() {
    with_each_runtime("command not found", |world| async move {
        let key = world.start("a", &[]).await;
        assert_eq!(world.sh(&key, "exit 127").await.exit, code(127));
        assert_eq!(world.sh(&key, "exit 126").await.exit, code(126));
        for missing in ["nope", "/nope", "/etc/passwd"] {
            match exec(&*world.driver, &key, &command(&[missing])).await {
                Err(DriverError::CommandNotFound { command }) => assert_eq!(command, missing),
                Err(other) => panic!("{missing}: {other}"),
                Ok(_) => panic!("{missing} was executed"),
            }
        }
        let spec = ExecSpec { working_directory: Some("/nope".into()), ..sh("true") };
        match exec(&*world.driver, &key, &spec).await {
            Err(DriverError::Runtime { output, .. }) => {
                assert!(output.contains("/nope") && output.len() <= 4096, "{output}")
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("executed in a directory that is not there"),
        }
        match world.driver.start(&world.spec("b", &["/nope"])).await {
            Err(DriverError::CommandNotFound { command }) => assert_eq!(command, "/nope"),
            other => panic!("{other:?}"),
        }
        assert_eq!(world.driver.list().await.expect("lists").len(), 1, "nothing is left of a failed start");
    });
}

#[test]
fn streams_are_binary_separate_and_close_one_by_one() {
    with_each_runtime("streams", |world| async move {
        let key = world.start("a", &[]).await;
        let input: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let output = run(&*world.driver, &key, &command(&["cat"]), &input).await;
        assert!(output.stdout == input && output.stderr.is_empty());
        assert_eq!(output.exit, code(0));
        let output = world.sh(&key, "echo out; echo err >&2; exit 5").await;
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.exit, code(5));
        assert_eq!(world.sh(&key, "yes | head -n 2").await.text(), "y\ny");
        // A process that closed its standard output is waited for still.
        let output = world.sh(&key, "exec >&- 2>&-; sleep 0.1; exit 9").await;
        assert_eq!(output.exit, code(9));
    });
}

#[test]
fn arguments_environment_directory_and_user_arrive_as_they_are() {
    with_each_runtime("exec specification", |world| async move {
        let key = world.start("a", &[]).await;
        let output = run(&*world.driver, &key, &command(&["echo", "a b", "$HOME", "ü\n*"]), &[]).await;
        assert_eq!(output.text(), "a b $HOME ü\n*");
        let spec = ExecSpec {
            environment: vec![("GREETING".into(), "over".into()), ("X".into(), "a=b c".into())],
            working_directory: Some("/etc".into()),
            user: "1000".into(),
            ..sh("echo $GREETING; echo $X; pwd; id -u; id -g; grep -E 'Cap(Eff|Prm)' /proc/self/status | tr -d '\\t'")
        };
        let output = run(&*world.driver, &key, &spec, &[]).await;
        let none = "0000000000000000";
        assert_eq!(output.text(), format!("over\na=b c\n/etc\n1000\n1000\nCapPrm:{none}\nCapEff:{none}"));
    });
}

#[test]
fn signals_reach_a_process_and_letting_go_kills_it() {
    with_each_runtime("exec signals", |world| async move {
        let key = world.start("a", &[]).await;
        let spec = process(sh("trap 'exit 42' USR1; echo ready; while :; do sleep 0.01; done"));
        let mut attached = world.driver.exec(&key, &spec).await.expect("executes");
        read_until(&mut attached, &mut String::new(), "ready").await;
        world.driver.signal_process(&key, &spec.id, 10).await.expect("signals");
        assert_eq!(read_all(attached.output).await.exit, code(42));
        world.driver.signal_process(&key, &spec.id, 9).await.expect("no effect");

        let spec = process(command(&["sleep", "1000"]));
        let attached = world.driver.exec(&key, &spec).await.expect("executes");
        world.driver.signal_process(&key, &spec.id, 15).await.expect("signals");
        assert_eq!(read_all(attached.output).await.exit, killed_by(15));

        // With all that it started.
        let spec = process(if world.has_own_kernel() { sh("exec sleep 1001") } else { sh("sleep 1001 & sleep 1002") });
        let attached = world.driver.exec(&key, &spec).await.expect("executes");
        drop(attached);
        world.driver.process_ended(&key, &spec.id).await;
        let task = tokio::spawn({
            let (driver, key) = (Arc::clone(&world.driver), key.clone());
            async move {
                let attached = exec(&*driver, &key, &sh("echo ready > /var/ready; exec sleep 1003")).await;
                read_all(attached.expect("executes").output).await
            }
        });
        while world.sh(&key, "cat /var/ready").await.exit != code(0) {
            look_again().await;
        }
        task.abort();
        let gone = "for i in $(seq 100); do ps -o args | grep -q '[s]leep 100[123]' || exit 0; sleep 0.1; done; exit 1";
        assert_eq!(world.sh(&key, &gone.replace("$(seq 100)", &"x ".repeat(100))).await.exit, code(0));
    });
}

#[test]
fn a_terminal_is_real_and_changes_size() {
    with_each_runtime("terminal", |world| async move {
        let key = world.start("a", &[]).await;
        let spec = process(ExecSpec {
            terminal: Some(TerminalSize { columns: 91, rows: 33 }),
            ..sh(
                "tty; echo go; read answer; stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.01; done",
            )
        });
        let mut attached = world.driver.exec(&key, &spec).await.expect("executes");
        let mut seen = String::new();
        read_until(&mut attached, &mut seen, "go").await;
        attached.input.write(b"answer\n").await.expect("writes");
        read_until(&mut attached, &mut seen, "ready").await;
        assert!((seen.contains("/dev/pts/0") || world.has_own_kernel()) && seen.contains("33 91"), "{seen}");
        let size = TerminalSize { columns: 120, rows: 40 };
        world.driver.resize_process(&key, &spec.id, size).await.expect("resizes");
        read_until(&mut attached, &mut seen, "40 120").await;
        assert_eq!(read_all(attached.output).await.exit, code(7));

        let terminal = Some(TerminalSize { columns: 80, rows: 24 });
        let spec = process(ExecSpec { terminal, ..command(&["sh"]) });
        let mut shell = world.driver.exec(&key, &spec).await.expect("executes");
        shell.input.write(b"sh -c 'echo $((6*7)); exec sleep 1000'\n").await.expect("writes");
        let mut seen = String::new();
        read_until(&mut shell, &mut seen, "42").await;
        // As the key does: to the foreground, not to the shell.
        world.driver.signal_process(&key, &spec.id, 2).await.expect("signals");
        shell.input.write(b"sh -c 'echo $((6*8)); exec sleep 1000'\n").await.expect("writes");
        read_until(&mut shell, &mut seen, "48").await;
        shell.input.write(b"\x03exit 4\n").await.expect("writes");
        assert_eq!(read_all(shell.output).await.exit, code(4));
        let nope = ExecSpec { terminal, ..command(&["nope"]) };
        assert!(exec(&*world.driver, &key, &nope).await.is_err());
    });
}

/// Reads until `wanted` was seen.
pub async fn read_until(attached: &mut Attachment, seen: &mut String, wanted: &str) {
    while !seen.contains(wanted) {
        match attached.output.next().await.expect("reads") {
            Event::Output { data, .. } => seen.push_str(&String::from_utf8_lossy(&data)),
            other => panic!("{other:?} before {wanted}: {seen}"),
        }
    }
}
