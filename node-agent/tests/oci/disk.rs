//! The disk of an instance is as large as was asked for, and nobody else's.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use warren_node_agent::driver::{Driver, DriverError, Presence};

use super::world::*;

#[test]
fn a_full_disk_stops_who_fills_it_and_nobody_else() {
    with_each_runtime("full disk", |world| async move {
        let key = world.start("a", &[]).await;
        let other = world.start("b", &[]).await;
        let fill = world.sh(&key, &format!("dd if=/dev/zero of=/tmp/big bs=1024k count={}", 2 * DISK_MIB)).await;
        assert_ne!(fill.exit, code(0));
        assert!(String::from_utf8_lossy(&fill.stderr).contains("No space left"), "{fill:?}");
        assert_ne!(world.sh(&key, "dd if=/dev/zero of=/var/more bs=1024k count=2").await.exit, code(0), "one disk");
        let image = fs::metadata(world.dir.path().join("oci/instances/acme.a.1/image")).expect("an image");
        assert!(image.len() == DISK_MIB << 20 && image.blocks() * 512 <= DISK_MIB << 20);
        assert_eq!(world.sh(&other, "echo x > /tmp/x && cat /tmp/x").await.text(), "x", "its neighbour has its own");
        // Both go on, and what was freed can be used again.
        let again = "rm /tmp/big && dd if=/dev/zero of=/root/again bs=1024k count=16 2>/dev/null && echo written";
        assert_eq!(world.sh(&key, again).await.text(), "written");
        assert!(world.driver.list().await.expect("lists").iter().all(|(_, presence)| *presence == Presence::Running));
    });
}

#[test]
fn files_run_out_before_the_host_s_do() {
    with_each_runtime("inodes", |world| async move {
        let key = world.start("a", &[]).await;
        let count = "mkdir /tmp/d; i=0; while echo > /tmp/d/$i; do i=$((i+1)); done 2>/dev/null; echo $i";
        let made: u64 = world.sh(&key, count).await.text().parse().expect("a number");
        let most = (DISK_MIB << 20) / (16 << 10);
        assert!((most / 2..=most).contains(&made), "{made} of {most}");
        assert_eq!(world.sh(&key, "rm /tmp/d/1 && echo > /tmp/d/new && echo goes on").await.text(), "goes on");
    });
}

#[test]
fn tmp_lies_on_the_disk_and_is_everybody_s() {
    with_each_runtime("/tmp", |world| async move {
        let key = world.start("a", &[]).await;
        assert_eq!(
            world.sh(&key, "stat -c %a:%u:%g /tmp; df /tmp | tail -n 1 | grep -c ' /$'").await.text(),
            "1777:0:0\n1"
        );
    });
}

#[test]
fn a_link_for_tmp_leads_nowhere_outside() {
    with_each_runtime("/tmp as a link", |world| async move {
        let outside = world.dir.path().join("outside");
        fs::create_dir(&outside).expect("directory");
        let before = fs::metadata(&outside).expect("there").mode();
        fs::remove_dir(world.base.join("tmp")).expect("removes");
        symlink(&outside, world.base.join("tmp")).expect("links");
        let spec = world.spec("a", &[]);
        match world.driver.start(&spec).await {
            Ok(()) => assert_eq!(world.sh(&spec.key, "echo runs").await.text(), "runs"),
            // It mounts something there in any case, and refuses to follow the link.
            Err(error) => assert!(world.has_own_kernel() && error.to_string().contains("/tmp"), "{error}"),
        }
        assert_eq!(fs::metadata(&outside).expect("there").mode(), before);
    });
}

#[test]
fn a_host_without_room_says_so() {
    with_each_runtime("full host", |world| async move {
        // A file system with less room than an agent keeps for itself, where the instances lie.
        let instances = world.dir.path().join("oci/instances");
        let path = instances.to_str().expect("text").to_owned();
        run_on_host("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", &path]);
        let started = world.driver.start(&world.spec("a", &[])).await;
        let left = fs::read_dir(&instances).expect("lists").count();
        run_on_host("umount", &[&path]);
        match started {
            Err(error @ DriverError::HostDiskFull { .. }) => assert!(error.to_string().contains("another node")),
            other => panic!("{other:?}"),
        }
        assert_eq!(left, 0, "nothing is left of a failed start");
    });
}

fn run_on_host(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status().expect("runs");
    assert!(status.success(), "{program} {arguments:?}");
}
