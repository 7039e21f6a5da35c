//! Several runtimes on one node.

use std::fs;

use warren_node_agent::driver::{Driver, DriverError, InstanceSpec};

use super::world::*;

#[test]
fn each_sandbox_has_the_runtime_it_asked_for_and_an_agent_with_another_default_keeps_it() {
    with_each_runtime("several runtimes", |world| async move {
        // The one under test comes second; what is not here is left out.
        let several = driver(world.dir.path(), &format!("runc,{},no-such-runtime", world.runtime), &world.node);
        let mut offered = vec!["runc".to_owned(), world.runtime.clone()];
        offered.dedup();
        assert_eq!(several.runtimes(), offered);
        let spec = InstanceSpec { runtime: Some(world.runtime.clone()), ..world.spec("asked", &[]) };
        several.start(&spec).await.expect("starts");
        several.start(&world.spec("default", &[])).await.expect("starts");
        for (name, runtime) in [("asked", world.runtime.as_str()), ("default", "runc")] {
            let record = fs::read_to_string(world.dir.path().join(format!("oci/instances/acme.{name}.1/record.json")));
            assert!(record.expect("a record").contains(&format!("\"runtime\":\"{runtime}\"")), "{name}");
        }
        // `world.driver` offers only the one.
        assert_eq!(run(&*world.driver, &key("default"), &sh("echo runs"), &[]).await.text(), "runs");
        world.driver.remove(&key("default")).await.expect("removes");
        let spec = InstanceSpec { runtime: Some("no-such-runtime".into()), ..world.spec("none", &[]) };
        match several.start(&spec).await {
            Err(DriverError::Runtime { output, .. }) => assert!(output.contains("runc"), "{output}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(several.list().await.expect("lists").len(), 1);
    });
}
