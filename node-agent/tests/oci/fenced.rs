//! Instances that are frozen as a whole, below a switch that the fence throws.

use std::time::Duration;

use warren_node_agent::driver::{Driver, DriverError, InstanceSpec, Presence};

use super::world::*;

fn fenced(world: &World, name: &str) -> InstanceSpec {
    InstanceSpec { fenced: true, ..world.spec(name, &[]) }
}

#[test]
fn a_frozen_group_holds_all_of_its_instances_and_each_can_still_be_frozen_and_removed() {
    with_each_runtime("fenced group", |world| async move {
        let driver = &world.driver;
        let switch = driver.switch().expect("a switch");
        let [a, b] = ["a", "b"].map(|name| fenced(&world, name));
        driver.start(&a).await.expect("starts");
        driver.start(&b).await.expect("starts");
        let free = world.start("free", &[]).await;
        assert!(driver.is_fenced(&a.key) && !driver.is_fenced(&free));
        while !switch.set(true).expect("throws") {
            crate::world::look_again().await;
        }
        let refused = exec(&**driver, &a.key, &sh("true")).await;
        assert!(matches!(refused, Err(DriverError::NotRunning { .. })));
        assert_eq!(world.sh(&free, "echo runs").await.text(), "runs");
        // By itself it is not frozen; then it is, and stays so when the group goes on.
        assert!(driver.list().await.expect("lists").contains(&(a.key.clone(), Presence::Running)));
        driver.freeze(&a.key).await.expect("freezes");
        driver.remove(&b.key).await.expect("removes below the frozen group");
        switch.set(false).expect("throws");
        assert!(driver.list().await.expect("lists").contains(&(a.key.clone(), Presence::Frozen)));
        driver.thaw(&a.key).await.expect("thaws");
        assert_eq!(world.sh(&a.key, "echo runs").await.text(), "runs");
        assert_eq!(world.restarted().list().await.expect("lists").len(), 2);
        assert!(world.restarted().is_fenced(&a.key), "a new agent sees it too");
    });
}

#[test]
fn a_start_into_a_frozen_group_does_not_run_and_can_be_removed() {
    with_each_runtime("start into a frozen group", |world| async move {
        let switch = world.driver.switch().expect("a switch");
        switch.set(true).expect("throws");
        let spec = fenced(&world, "a");
        let started = tokio::time::timeout(Duration::from_secs(2), world.driver.start(&spec)).await;
        assert!(!matches!(started, Ok(Ok(()))), "it ran");
        world.driver.remove(&spec.key).await.expect("removes");
        assert!(world.driver.list().await.expect("lists").is_empty());
        switch.set(false).expect("throws");
        world.driver.start(&spec).await.expect("starts");
        // Cleaning up works in a frozen group too.
        switch.set(true).expect("throws");
    });
}
