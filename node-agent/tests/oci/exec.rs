//! Executing processes: streams, arguments, signals, terminals.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use warren_node_agent::driver::{Driver, DriverError, ExecSpec, Execution, TerminalSize};

use super::world::*;

#[test]
fn a_program_that_is_not_there_is_told_from_one_that_exits_127() {
    with_each_runtime("command not found", |world| async move {
        let key = world.start("a", &[]).await;
        assert_eq!(world.sh(&key, "exit 127").await.exit, code(127));
        assert_eq!(world.sh(&key, "exit 126").await.exit, code(126));
        for missing in ["nope", "/nope", "/etc/passwd"] {
            match world.driver.exec(&key, &command(&[missing])).await {
                Err(DriverError::CommandNotFound { command }) => assert_eq!(command, missing),
                Err(other) => panic!("{missing}: {other}"),
                Ok(_) => panic!("{missing} was executed"),
            }
        }
        let spec = ExecSpec { working_directory: Some("/nope".into()), ..sh("true") };
        match world.driver.exec(&key, &spec).await {
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
            user: (1000, 1000),
            ..sh("echo $GREETING; echo $X; pwd; id -u; id -g; grep -E 'Cap(Eff|Prm)' /proc/self/status | tr -d '\\t'")
        };
        let output = run(&*world.driver, &key, &spec, &[]).await;
        let none = "0000000000000000";
        assert_eq!(output.text(), format!("over\na=b c\n/etc\n1000\n1000\nCapPrm:{none}\nCapEff:{none}"));
    });
}

#[test]
fn signals_reach_an_execution_and_letting_go_kills_it() {
    with_each_runtime("exec signals", |world| async move {
        let key = world.start("a", &[]).await;
        let execution =
            world.driver.exec(&key, &sh("trap 'exit 42' USR1; echo ready; while :; do sleep 0.01; done")).await;
        let mut execution = execution.expect("executes");
        let mut ready = [0u8; 6];
        execution.stdout.read_exact(&mut ready).await.expect("ready");
        assert!(execution.control.signal(0).await.is_err() && execution.control.signal(65).await.is_err());
        execution.control.signal(libc_signal("USR1")).await.expect("signals");
        assert_eq!(execution.control.wait().await.expect("ends"), code(42));
        execution.control.signal(9).await.expect("no effect");

        let execution = world.driver.exec(&key, &command(&["sleep", "1000"])).await.expect("executes");
        execution.control.signal(libc_signal("TERM")).await.expect("signals");
        assert_eq!(execution.control.wait().await.expect("ends"), killed_by(15));

        let execution = world.driver.exec(&key, &command(&["sleep", "1001"])).await.expect("executes");
        let Execution { mut stdout, control, .. } = execution;
        drop(control);
        assert_eq!(stdout.read(&mut [0u8; 1]).await.expect("reads"), 0, "its pipe closes when it is killed");
        let task = tokio::spawn({
            let (driver, key) = (Arc::clone(&world.driver), key.clone());
            async move {
                let execution =
                    driver.exec(&key, &sh("echo ready > /var/ready; exec sleep 1002")).await.expect("executes");
                execution.control.wait().await
            }
        });
        let ready = world.root(&key).join("var/ready");
        while !ready.exists() {
            crate::world::look_again().await;
        }
        task.abort();
        let gone = "for i in $(seq 100); do ps -o args | grep -q '[s]leep 100[12]' || exit 0; sleep 0.1; done; exit 1";
        assert_eq!(world.sh(&key, &gone.replace("$(seq 100)", &"x ".repeat(100))).await.exit, code(0));
    });
}

fn libc_signal(name: &str) -> i32 {
    match name {
        "USR1" => 10,
        "TERM" => 15,
        other => panic!("{other}"),
    }
}

#[test]
fn a_terminal_is_real_and_changes_size() {
    with_each_runtime("terminal", |world| async move {
        let key = world.start("a", &[]).await;
        let spec = ExecSpec {
            terminal: Some(TerminalSize { columns: 91, rows: 33 }),
            ..sh(
                "tty; echo go; read answer; stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.01; done",
            )
        };
        let mut execution = world.driver.exec(&key, &spec).await.expect("executes");
        assert!(execution.stderr.is_none());
        let mut seen = String::new();
        read_until(&mut execution, &mut seen, "go").await;
        execution.stdin.write_all(b"answer\n").await.expect("writes");
        read_until(&mut execution, &mut seen, "ready").await;
        assert!((seen.contains("/dev/pts/0") || world.has_own_kernel()) && seen.contains("33 91"), "{seen}");
        execution.control.resize(TerminalSize { columns: 120, rows: 40 }).await.expect("resizes");
        read_until(&mut execution, &mut seen, "40 120").await;
        assert_eq!(execution.control.wait().await.expect("ends"), code(7));
        execution.stdout.read_to_string(&mut seen).await.expect("end of file, not an error");

        let spec = ExecSpec { terminal: Some(TerminalSize { columns: 80, rows: 24 }), ..command(&["sh"]) };
        let mut shell = world.driver.exec(&key, &spec).await.expect("executes");
        shell.stdin.write_all(b"sh -c 'echo $((6*7)); exec sleep 1000'\n").await.expect("writes");
        let mut seen = String::new();
        read_until(&mut shell, &mut seen, "42").await;
        shell.stdin.write_all(b"\x03exit 4\n").await.expect("writes");
        shell.stdout.read_to_string(&mut seen).await.expect("reads");
        assert_eq!(shell.control.wait().await.expect("ends"), code(4));
        assert!(world.driver.exec(&key, &ExecSpec { command: vec!["nope".into()], ..spec }).await.is_err());
    });
}

async fn read_until(execution: &mut Execution, seen: &mut String, wanted: &str) {
    let mut buffer = [0u8; 1024];
    while !seen.contains(wanted) {
        let count = execution.stdout.read(&mut buffer).await.expect("reads");
        assert!(count > 0, "ended before {wanted}: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}
