//! What an instance uses is told, and its limits change while it runs.

use warren_node_agent::driver::stats::Limits;
use warren_node_agent::driver::{Driver, DriverError};
use warren_proto::units::{Bytes, MilliCpu};

use super::world::*;

const MIB: u64 = Bytes::MIB;

#[test]
fn what_a_sandbox_uses_is_told() {
    with_each_runtime("stats", |world| async move {
        let spec = world.spec("a", &[]);
        world.driver.start(&spec).await.expect("starts");
        let before = world.driver.stats(&spec.key).await.expect("told");
        assert_eq!(before.limits, Limits { cpu: spec.resources.cpu, memory: spec.resources.memory, pids: spec.pids });
        assert!(before.started.is_some() && before.pids >= 1 && before.oom_kills == 0);
        let limit = DISK_MIB * MIB;
        assert!((limit / 2..=limit).contains(&before.disk_limit.0) && before.inodes_limit >= 1024, "{before:?}");
        let work = "dd if=/dev/zero of=/root/x bs=1024k count=16 2>/dev/null; for n in 1 2 3 4 5 6 7 8; do echo > /root/$n; done; \
                    i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
        assert_eq!(world.sh(&spec.key, work).await.exit, code(0));
        let after = world.driver.stats(&spec.key).await.expect("told");
        assert!(after.disk_used.0 >= before.disk_used.0 + 15 * MIB, "{before:?} {after:?}");
        assert!(after.inodes_used >= before.inodes_used + 9, "{before:?} {after:?}");
        assert!(after.cpu_usage_ns > before.cpu_usage_ns);
        assert!(after.memory_peak >= after.memory_working_set && after.memory_usage.0 > 0);
        world.driver.remove(&spec.key).await.expect("removes");
        assert!(matches!(world.driver.stats(&spec.key).await, Err(DriverError::NotFound(_))));
    });
}

#[test]
fn limits_grow_and_shrink_while_it_runs_and_what_is_in_use_is_not_taken() {
    with_each_runtime("resize", |world| async move {
        let spec = world.spec("a", &[]);
        world.driver.start(&spec).await.expect("starts");
        let key = &spec.key;
        // Memory that cannot be given back: half of the limit.
        let half = spec.resources.memory.0 / 2 / MIB;
        let hold = format!("dd if=/dev/zero of=/dev/shm/held bs=1024k count={half} 2>/dev/null");
        world.sh(key, &hold).await;
        let larger = Limits { cpu: MilliCpu(500), memory: Bytes(spec.resources.memory.0 * 2), pids: 40 };
        world.driver.resize(key, &larger).await.expect("grows");
        assert_eq!(world.driver.stats(key).await.expect("told").limits, larger);
        assert_eq!(world.restarted().stats(key).await.expect("told").limits, larger, "a new agent knows it too");
        let smaller = Limits { memory: Bytes(16 * MIB), ..larger };
        match world.driver.resize(key, &smaller).await {
            Err(error @ DriverError::MemoryInUse { .. }) => assert!(error.to_string().contains("nothing was changed")),
            other => panic!("{other:?}"),
        }
        assert_eq!(world.driver.stats(key).await.expect("told").limits, larger);
        assert_eq!(world.sh(key, "rm /dev/shm/held; echo runs").await.text(), "runs");
        let back = Limits { cpu: MilliCpu(1000), memory: spec.resources.memory, pids: 64 };
        world.driver.resize(key, &back).await.expect("shrinks");
        assert_eq!(world.sh(key, "echo runs").await.text(), "runs");
        // The kernel holds it to the new limit, not only the record.
        let held = world.pids_file("pids.max").expect("a group");
        assert_eq!(held.trim(), if world.has_own_kernel() { "192" } else { "64" });
    });
}
