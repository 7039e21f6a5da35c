//! What a new agent finds, whatever the last one left.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use warren_node_agent::driver::{Driver, DriverError, Presence};

use super::world::*;

#[test]
fn a_new_agent_adopts_what_runs_and_learns_how_it_ends() {
    with_each_runtime("adoption", |world| async move {
        let key = world.start("a", &["/bin/sh", "-c", "trap 'exit 6' TERM; while :; do sleep 0.01; done"]).await;
        let ended = world.start("b", &["/bin/sh", "-c", "exit 2"]).await;
        let driver = world.restarted();
        let _ = driver.wait(&ended).await.expect("ended");
        let list = driver.list().await.expect("lists");
        assert!(list.contains(&(key.clone(), Presence::Running)), "{list:?}");
        let waiting = tokio::spawn({
            let (driver, key) = (Arc::clone(&driver), key.clone());
            async move { driver.wait(&key).await }
        });
        // Process 1 may take it along before it ends by itself.
        run(&*driver, &key, &command(&["kill", "1"]), &[]).await;
        assert_eq!(waiting.await.expect("task").expect("ends").exit, code(6));
        assert_eq!(world.restarted().wait(&key).await.expect("known for good").exit, code(6));
        driver.remove(&key).await.expect("removes");
        driver.remove(&ended).await.expect("removes");
    });
}

#[test]
fn whatever_a_crash_left_can_be_removed() {
    with_each_runtime("remnants", |world| async move {
        let instances = world.dir.path().join("oci/instances");
        // Crashed right after the directory was made, and in the middle of writing files.
        fs::create_dir(instances.join("acme.empty.1")).expect("directory");
        fs::create_dir_all(instances.join("acme.half.1/disk")).expect("directory");
        fs::write(instances.join("acme.half.1/record.json"), "{\"vers").expect("file");
        // The runtime forgot it.
        world.start("forgotten", &[]).await;
        for entry in fs::read_dir(world.dir.path().join("oci/run")).expect("state").flatten() {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removes");
        }
        // Its removal was cut off after the first step.
        world.start("begun", &[]).await;
        fs::remove_file(instances.join("acme.begun.1/record.json")).expect("removes");
        // Its shim was killed: nobody can say how it will end.
        let orphan = world.start("orphan", &[]).await;
        kill_standing_in(&instances.join("acme.orphan.1"));
        assert!(matches!(world.driver.wait(&orphan).await, Err(DriverError::Runtime { .. })));
        let list = world.driver.list().await.expect("lists");
        let remnants: Vec<String> = list
            .iter()
            .filter(|(_, presence)| *presence == Presence::Remnant)
            .map(|(key, _)| key.sandbox.id.to_string())
            .collect();
        assert_eq!(list.len(), 5);
        for name in ["empty", "half", "begun", "orphan"] {
            assert!(remnants.contains(&name.to_owned()), "{name}: {list:?}");
        }
        for (key, _) in list {
            world.driver.remove(&key).await.unwrap_or_else(|e| panic!("{key:?}: {e}"));
            world.driver.remove(&key).await.expect("removes again");
        }
        assert!(world.driver.list().await.expect("lists").is_empty());
        let groups = fs::read_dir(Path::new("/sys/fs/cgroup/pids/warren").join(world.node.as_str()));
        assert_eq!(groups.into_iter().flatten().flatten().filter(|e| e.path().is_dir()).count(), 0);
    });
}

fn kill_standing_in(directory: &Path) {
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory) {
            Command::new("kill").arg("-KILL").arg(entry.file_name()).status().expect("kill");
        }
    }
}

/// A start that is dropped in the middle is what a crash of the agent is to the shim.
#[test]
fn a_start_that_is_cut_off_at_any_moment_can_be_removed() {
    with_each_runtime("cut-off starts", |world| async move {
        for round in 0..20u64 {
            let spec = world.spec("a", &[]);
            let start = world.driver.start(&spec);
            let _ = tokio::time::timeout(Duration::from_millis(round * 4), start).await;
            world.driver.remove(&spec.key).await.unwrap_or_else(|e| panic!("round {round}: {e}"));
            assert!(world.driver.list().await.expect("lists").is_empty());
        }
    });
}
