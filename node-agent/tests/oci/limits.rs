//! What a sandbox may not do, see or use up.

use std::fs;

use warren_node_agent::driver::{Driver, Ended, Exit};

use super::world::*;

#[test]
fn a_sandbox_is_confined() {
    with_each_runtime("confinement", |world| async move {
        let a = world.start("a", &[]).await;
        let b = world.start("b", &[]).await;
        if world.has_own_kernel() {
            let kernel = world.sh(&a, "cat /proc/version; cat /proc/self/status").await;
            let host = fs::read_to_string("/proc/version").expect("a version");
            assert!(!kernel.text().contains(host.trim()) && !kernel.text().contains("CapEff:\t0000003fffffffff"));
            let denied = "mount -t tmpfs x /var && exit 1; unshare -m true && exit 1; exit 0";
            assert_eq!(world.sh(&a, denied).await.exit, code(0));
            return;
        }
        let map_a = world.sh(&a, "cat /proc/self/uid_map /proc/self/gid_map").await;
        let words: Vec<&str> = map_a.text().split_whitespace().collect();
        assert!(words.len() == 6 && words[0] == "0" && words[2] == "65536", "{words:?}");
        assert!(words[1].parse::<u32>().expect("a number") >= 1_000_000, "{words:?}");
        assert_ne!(world.sh(&b, "cat /proc/self/uid_map").await.text(), map_a.text());
        let status = world.sh(&a, "cat /proc/self/status").await;
        assert!(status.text().contains("Seccomp:\t2") && status.text().contains("NoNewPrivs:\t1"), "{}", status.text());
        assert!(!status.text().contains("CapEff:\t0000003fffffffff"));
        let denied = "mount -t tmpfs x /var; unshare -U true && exit 1; unshare -m true && exit 1; mount | grep -q ' /var ' && exit 1; \
                      echo 1 > /proc/sys/kernel/panic && exit 1; ls /sys/fs/cgroup/*/* 2>/dev/null && exit 1; exit 0";
        let output = world.sh(&a, denied).await;
        assert_eq!(output.exit, code(0), "{output:?}");
        let links = world.sh(&a, "ip -o link; ip -o addr show lo").await;
        let names = links.text().lines().filter_map(|line| line.split([' ', ':', '@']).nth(2)).collect::<Vec<_>>();
        assert!(names.iter().all(|name| ["lo", "eth0"].contains(name)), "{names:?}: {}", links.text());
        assert!(links.text().contains("LOOPBACK,UP"), "{}", links.text());
        assert_eq!(world.sh(&a, "ps -o pid | wc -l").await.exit, code(0));
        let host = fs::read_link("/proc/self/ns/net").expect("namespace");
        for kind in ["net", "pid", "ipc", "uts", "mnt", "user"] {
            let inside = world.sh(&a, &format!("ls -l /proc/self/ns/{kind}")).await;
            let outside = fs::read_link(format!("/proc/self/ns/{kind}")).expect("namespace");
            assert!(!inside.text().contains(outside.to_str().expect("text")), "{kind} {host:?}");
        }
    });
}

#[test]
fn what_one_writes_no_other_sees() {
    with_each_runtime("overlay", |world| async move {
        let a = world.start("a", &[]).await;
        let b = world.start("b", &[]).await;
        let change = "echo mine > /etc/shared && touch /etc/new && chown 1000:1000 /etc/new && stat -c %u:%g /etc/new /etc/passwd";
        assert_eq!(world.sh(&a, change).await.text(), "1000:1000\n0:0");
        assert_eq!(world.sh(&a, "cat /etc/shared").await.text(), "mine");
        assert_eq!(
            world.sh(&b, "cat /etc/shared; ls /etc | grep -v ^resolv.conf").await.text(),
            "from the base\ngroup\npasswd\nshared"
        );
        assert_eq!(fs::read_to_string(world.base.join("etc/shared")).expect("reads"), "from the base\n");
        world.driver.remove(&a).await.expect("removes");
        let a = world.start("a", &[]).await;
        assert_eq!(world.sh(&a, "cat /etc/shared").await.text(), "from the base");
        let tmp = world.sh(&a, "echo x > /tmp/x && echo x > /dev/shm/x && cat /tmp/x /dev/null /dev/shm/x").await;
        assert_eq!(tmp.text(), "x\nx");
    });
}

#[test]
fn memory_beyond_the_limit_ends_in_an_oom_kill_that_is_reported() {
    with_each_runtime("memory", |world| async move {
        let key = world.start("main", &["tail", "/dev/zero"]).await;
        let Ended { exit, .. } = world.driver.wait(&key).await.expect("ends");
        assert_eq!(exit, Exit { code: 137, signal: 9, oom_killed: true });
        let key = world.start("exec", &[]).await;
        let output = run(&*world.driver, &key, &command(&["tail", "/dev/zero"]), &[]).await;
        assert_eq!(output.exit, Exit { code: 137, signal: 9, oom_killed: true });
        if world.has_own_kernel() {
            let Ended { exit, .. } = world.driver.wait(&key).await.expect("ends with the kernel that ran it");
            assert_eq!(exit, Exit { code: 137, signal: 9, oom_killed: true });
        } else {
            assert_eq!(world.sh(&key, "exit 1").await.exit, code(1), "an earlier kill is not this one's");
        }
    });
}

#[test]
fn a_fork_bomb_is_held_by_the_limit_and_can_be_removed() {
    with_each_runtime("pids", |world| async move {
        let key = world.start("a", &[]).await;
        let bomb = "echo armed; f() { while :; do f & done; }; f 2>/dev/null & wait";
        let mut execution = exec(&*world.driver, &key, &sh(bomb)).await.expect("executes");
        super::exec::read_until(&mut execution, &mut String::new(), "armed").await;
        while world.pids_file("pids.events").is_none_or(|text| text.contains("max 0")) {
            let running: u64 = world.pids_file("pids.current").expect("a group").trim().parse().expect("a number");
            // With a kernel of its own there are that one's threads too.
            assert!(running <= if world.has_own_kernel() { 64 + 128 } else { 64 }, "{running}");
            tokio::task::yield_now().await;
        }
        world.driver.remove(&key).await.expect("removes");
        assert!(!read_all(execution.output).await.exit.oom_killed);
    });
}
