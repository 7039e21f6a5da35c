//! What a hostile sandbox prepares for the agent, which is the host's root.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use warren_proto::v1::*;

use crate::lab::*;

/// Renames crossed by writes: a window of some microseconds, met several times in so many.
const ROUNDS: usize = 300;

#[test]
fn no_link_leads_out() {
    with_lab("links", |lab| async move {
        let secret = lab.world.dir.path().join("secret");
        fs::write(&secret, "of the host").unwrap();
        let host = lab.world.dir.path().to_str().unwrap().to_owned();
        let up = "../".repeat(40);
        lab.sh(&format!(
            "busybox ln -s {host}/secret /abs; busybox ln -s {up}{host}/secret /rel; busybox ln -s {host} /dir; \
             busybox ln -s /proc/1/root /magic; busybox ln -s /proc/self/fd/3 /fd; busybox ln -s /proc/self/cwd /cwd; \
             busybox ln -s /abs /etc/chain; busybox ln -s .. /etc/up"
        ))
        .await;
        for path in ["/abs", "/rel", "/dir/secret", "/etc/chain", "/../../../../abs", "/etc/up/abs"] {
            assert_eq!(refused(lab.read(path).await), missing(), "{path}");
        }
        assert_eq!(refused(lab.read(&format!("/etc/../../..{host}/secret")).await), missing());
        // A magic link jumps: it is not followed at all, and the helper is nobody in the sandbox's /proc.
        for path in ["/magic/etc/passwd", "/fd", "/cwd/etc/passwd", "/proc/1/root/etc/passwd", "/proc/self/exe"] {
            let refused = refused(lab.read(path).await);
            assert!([missing(), wrong_kind(), denied()].contains(&refused), "{path}: {refused:?}");
        }
        assert_eq!(refused(lab.write("/dir/new", b"x").await), missing());
        let parents = WriteFileHeader { path: "/dir/new".into(), make_parents: true, ..Default::default() };
        // What it makes, it makes inside; a link that leads nowhere is in the way.
        assert!(lab.write_as(parents, b"x").await.is_err());
        assert!(!lab.world.dir.path().join("new").exists());
        lab.write("/abs", b"inside").await.unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "of the host");
        lab.remove("/dir", true).await.unwrap();
        assert!(secret.exists());
        lab
    });
}

#[test]
fn the_kernel_s_own_files_and_devices_are_never_opened() {
    with_lab("kernel files", |lab| async move {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        for path in [
            "/proc/1/status",
            "/proc/sys/kernel/hostname",
            "/proc/sys/kernel/core_pattern",
            "/sys/kernel/uevent_seqnum",
        ] {
            assert_eq!(refused(lab.read(path).await).1.unwrap().as_str_name(), "ERROR_REASON_FILE_DENIED", "{path}");
        }
        assert_eq!(refused(lab.write("/proc/sys/kernel/hostname", b"mine").await), denied());
        let append =
            WriteFileHeader { path: "/proc/sys/kernel/core_pattern".into(), append: true, ..Default::default() };
        assert_eq!(refused(lab.write_as(append, b"h").await), denied());
        assert_eq!(refused(lab.list("/proc", false).await), denied());
        assert_eq!(refused(lab.list("/sys", true).await), denied());
        assert_eq!(refused(lab.move_file("/etc/passwd", "/proc/x", false).await), denied());
        assert_eq!(refused(lab.list("/dev/pts", false).await), denied());
        assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), host);
        // Listing all goes around them.
        let all = lab.list("/", true).await.unwrap();
        assert!(
            all.iter().any(|entry| entry.path == "/proc") && !all.iter().any(|entry| entry.path.starts_with("/proc/"))
        );

        lab.sh("busybox mkfifo /pipe").await;
        let place = |path: &str| WriteFileHeader { path: path.into(), offset: Some(0), ..Default::default() };
        for path in ["/pipe", "/dev/null", "/dev/zero"] {
            let read = timeout(Duration::from_secs(20), lab.read(path)).await.expect("it must not block");
            assert_eq!(refused(read), wrong_kind(), "{path}");
            assert_eq!(refused(lab.write_as(place(path), b"x").await), wrong_kind(), "{path}");
        }
        assert_eq!(refused(lab.read("/tmp").await), wrong_kind());
        // Replaced like any other name; nothing was opened.
        lab.write("/pipe", b"a file now").await.unwrap();
        assert_eq!(lab.sh("cat /pipe").await, "a file now");
        lab
    });
}

/// A process inside swaps a directory for a link to the host's, over and over, while the agent works below it.
#[test]
fn a_race_of_renames_is_never_won() {
    with_lab("rename race", |lab| async move {
        let target = lab.world.dir.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("host-file"), "host").unwrap();
        let path = target.to_str().unwrap();
        lab.sh(&format!("mkdir /real; echo inside > /real/host-file; busybox ln -s {path} /evil")).await;
        let lab = Arc::new(lab);
        let swapping = tokio::spawn({
            let lab = Arc::clone(&lab);
            let script = "while [ ! -e /stop ]; do busybox mv /real /r; busybox mv /evil /real; busybox mv /real /evil; busybox mv /r /real; done";
            async move { lab.sh(script).await }
        });
        let (mut reached, mut missed) = (0, 0);
        for round in 0..ROUNDS {
            let read = lab.read("/real/host-file").await;
            match read {
                Ok(bytes) => {
                    assert_eq!(bytes, b"inside\n");
                    reached += 1;
                }
                Err(_) => missed += 1,
            }
            let _ = lab.write(&format!("/real/{round}"), b"x").await;
            let parents = MakeDirectoryRequest { path: "/real/d/e".into(), make_parents: true, ..Default::default() };
            let _ = lab.make_directory(parents).await;
            let _ = lab.remove("/real/d", true).await;
        }
        lab.write("/stop", b"").await.unwrap();
        swapping.await.unwrap();
        eprintln!("{}: {reached} reads inside, {missed} found nothing", lab.world.runtime);
        assert!(reached > 0);
        let left: Vec<_> = fs::read_dir(&target).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["host-file"]);
        Arc::into_inner(lab).unwrap()
    });
}
