//! Devices come into a sandbox exactly as they were granted. The devices are the host's `/dev/full` and `/dev/zero`, described as a
//! vendor would describe GPUs: what is tested is the way in, which is the same for real ones.

use std::fs;

use warren_node_agent::driver::{Driver, DriverError, InstanceSpec};
use warren_node_agent::gpu::{GpuConfig, GpuError, Gpus, Grant, Source, WHOLE};
use warren_proto::units::Bytes;

use super::world::*;

const SPEC: &str = r#"{"cdiVersion": "0.6.0", "kind": "warren.dev/fake",
    "containerEdits": {"env": ["FAKE_DRIVER=1"], "mounts": [{"hostPath": "LIBRARY", "containerPath": "/opt/libfake.so", "options": ["ro", "bind"]}]},
    "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/fake0", "hostPath": "/dev/full"}]}},
        {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/fake1", "hostPath": "/dev/zero"}]}}]}"#;

fn fakes(world: &World) -> Gpus {
    let library = world.dir.path().join("libfake.so");
    fs::write(&library, "library").expect("write");
    fs::create_dir_all(world.dir.path().join("cdi")).expect("directory");
    fs::write(world.dir.path().join("cdi/fake.json"), SPEC.replace("LIBRARY", library.to_str().expect("text")))
        .expect("write");
    let device =
        |n: u32| format!("[[device]]\nuuid='GPU-{n}'\nmodel='Fake'\nmemory='1GiB'\ncdi='warren.dev/fake={n}'\n");
    fs::write(world.dir.path().join("gpus.toml"), [device(0), device(1)].concat()).expect("write");
    let config = GpuConfig {
        source: Source::File(world.dir.path().join("gpus.toml")),
        cdi_dirs: vec![world.dir.path().join("cdi")],
    };
    Gpus::discover(&config).expect("listed")
}

fn granted(world: &World, name: &str, uuid: &str, milli: u32) -> InstanceSpec {
    let grant = Grant { uuid: uuid.to_owned(), milli, memory: Bytes(1 << 30) };
    InstanceSpec { gpus: vec![grant], ..world.spec(name, &[]) }
}

#[test]
fn a_sandbox_has_the_devices_that_it_was_given_and_no_other() {
    with_each_runtime("gpus", |world| async move {
        let driver = world.with_gpus(fakes(&world));
        for (spec, mine, other) in [
            (granted(&world, "zero", "GPU-0", WHOLE), "fake0", "fake1"),
            (granted(&world, "one", "GPU-1", 250), "fake1", "fake0"),
        ] {
            driver.start(&spec).await.unwrap_or_else(|e| panic!("start with {}: {e}", world.runtime));
            let seen = world
                .sh(&spec.key, &format!("test -c /dev/{mine} && ! test -e /dev/{other} && cat /opt/libfake.so"))
                .await;
            assert_eq!((seen.exit, seen.text()), (code(0), "library"), "{seen:?}");
        }
        let zero = granted(&world, "zero", "GPU-0", WHOLE).key;
        // It is the device, not a file of its name: /dev/full takes nothing and reads as zeros.
        let full = world.sh(&zero, "echo x > /dev/fake0 && exit 1; head -c 3 /dev/fake0 | wc -c").await;
        assert_eq!((full.exit, full.text().trim()), (code(0), "3"), "{full:?}");
        let told = world.sh(&zero, "echo $FAKE_DRIVER $WARREN_GPU_SHARES").await;
        assert_eq!(told.text().trim(), "1 GPU-0=1000:1073741824:enforced");
        let one = granted(&world, "one", "GPU-1", 250).key;
        let told = world.sh(&one, "echo $WARREN_GPU_SHARES").await;
        assert_eq!(told.text().trim(), "GPU-1=250:1073741824:advisory");
        let none = world.start("none", &[]).await;
        let seen = world.sh(&none, "ls /dev | grep -c fake; echo $FAKE_DRIVER$WARREN_GPU_SHARES").await;
        assert_eq!(seen.text().split_whitespace().collect::<Vec<_>>(), ["0"], "{seen:?}");
        // A node of the same number as a device of another sandbox is of no use here: nobody may make one.
        let made = world.sh(&none, "mknod /tmp/full c 1 7").await;
        assert_ne!(made.exit, code(0), "{made:?}");
    });
}

#[test]
fn a_device_that_is_not_here_stops_the_start_and_leaves_nothing() {
    with_each_runtime("gpus that are not here", |world| async move {
        let driver = world.with_gpus(fakes(&world));
        let spec = granted(&world, "nine", "GPU-9", WHOLE);
        let refused = driver.start(&spec).await.expect_err("no such device");
        assert!(matches!(&refused, DriverError::Gpu(GpuError::Unknown(uuid)) if uuid == "GPU-9"), "{refused}");
        assert_eq!(driver.list().await.expect("listed"), []);
    });
}
