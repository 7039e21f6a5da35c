//! Many at once, and how long one takes.

use std::sync::Arc;

use warren_node_agent::driver::{Driver, Presence};

use super::world::*;

#[test]
fn many_instances_at_once_start_answer_and_go() {
    with_each_runtime("many at once", |world| async move {
        // A kernel each: two processors start about one a second.
        let count = if world.has_own_kernel() { 20 } else { 100 };
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..count {
            let world = Arc::clone(&world);
            tasks.spawn(async move {
                let key = world.start(&format!("s-{n}"), &[]).await;
                assert_eq!(world.sh(&key, &format!("echo {n}")).await.text(), n.to_string());
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("task");
        }
        let list = world.driver.list().await.expect("lists");
        assert_eq!(list.len(), count);
        assert!(list.iter().all(|(_, presence)| *presence == Presence::Running));
        for (key, _) in list {
            let world = Arc::clone(&world);
            tasks.spawn(async move { world.driver.remove(&key).await.expect("removes") });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("task");
        }
        assert!(world.driver.list().await.expect("lists").is_empty());
    });
}

/// Prints, does not judge: how long it takes from asking for an instance to the first answer from inside.
#[test]
fn the_time_to_the_first_answer_is_printed() {
    with_each_runtime("latency", |world| async move {
        let mut times = Vec::new();
        for n in 0..15 {
            let before = std::time::Instant::now();
            let key = world.start(&format!("s-{n}"), &[]).await;
            let started = before.elapsed();
            assert_eq!(world.sh(&key, "echo x").await.text(), "x");
            let answered = before.elapsed();
            world.driver.remove(&key).await.expect("removes");
            times.push((answered, started, before.elapsed() - answered));
        }
        times.sort();
        let (answered, started, removed) = times[times.len() / 2];
        eprintln!("{}: median start {started:?}, first answer {answered:?}, removal {removed:?}", world.runtime);
    });
}
