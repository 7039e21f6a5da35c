//! Directories, names, links.

use tonic::Code;
use warren_proto::v1::*;

use crate::lab::*;

#[test]
fn directories_and_links_are_made_moved_and_removed() {
    with_lab("tree", |lab| async move {
        let make =
            |path: &str, make_parents| MakeDirectoryRequest { path: path.into(), make_parents, ..Default::default() };
        assert_eq!(refused(lab.make_directory(make("/d/e", false)).await), missing());
        lab.make_directory(make("/d/e", true)).await.unwrap();
        lab.make_directory(make("/d/e", true)).await.unwrap();
        lab.make_directory(make("/", true)).await.unwrap();
        let exists = (Code::AlreadyExists, Some(ErrorReason::FileAlreadyExists));
        assert_eq!(refused(lab.make_directory(make("/d/e", false)).await), exists);
        let owned = MakeDirectoryRequest { mode: 0o1770, user: "7".into(), ..make("/d/o", false) };
        let info = lab.make_directory(owned).await.unwrap();
        assert_eq!((info.mode, info.uid, info.gid, info.kind()), (0o1770, 7, 7, FileKind::Directory));

        // An absolute link is one inside, also as a parent.
        let link = lab.make_symlink("/link", "/d/e").await.unwrap();
        assert_eq!((link.kind(), link.symlink_target.as_str()), (FileKind::Symlink, "/d/e"));
        lab.write("/link/f", b"through").await.unwrap();
        assert_eq!(lab.sh("cat /d/e/f").await, "through");
        let followed = StatFileRequest { path: "/link".into(), follow: true, ..Default::default() };
        let followed = lab.files().stat_file(lab.with(followed)).await.unwrap().into_inner();
        assert_eq!(followed.kind(), FileKind::Directory);
        // A link at the end is replaced, not followed.
        lab.make_symlink("/d/l", "e/f").await.unwrap();
        lab.write("/d/l", b"own").await.unwrap();
        assert_eq!(lab.sh("cat /d/e/f /d/l").await, "throughown");

        lab.move_file("/d/l", "/d/m", false).await.unwrap();
        lab.write("/d/n", b"n").await.unwrap();
        assert_eq!(refused(lab.move_file("/d/n", "/d/m", false).await), exists);
        lab.move_file("/d/n", "/d/m", true).await.unwrap();
        assert_eq!(lab.read("/d/m").await.unwrap(), b"n");
        assert_eq!(refused(lab.move_file("/d", "/d/e/x", false).await), wrong_kind());
        assert_eq!(refused(lab.move_file("/d/m", "/dev/shm/m", false).await), wrong_kind());
        assert_eq!(refused(lab.remove("/d", false).await), wrong_kind());
        lab.remove("/d", true).await.unwrap();
        assert_eq!(refused(lab.remove("/d", true).await), missing());
        let missing_is_fine = RemoveFileRequest { path: "/d/x".into(), allow_missing: true, ..Default::default() };
        lab.files().remove_file(lab.with(missing_is_fine)).await.unwrap();
        // A mount point stays, though nothing is mounted where the agent is.
        for mount in ["/dev/shm", "/proc", "/dev/null", "/sys"] {
            assert_eq!(refused(lab.remove(mount, true).await), wrong_kind(), "{mount}");
            assert_eq!(refused(lab.move_file(mount, "/moved", false).await), wrong_kind(), "{mount}");
        }
        assert_eq!(refused(lab.write("/dev/null", b"a file").await), wrong_kind());
        assert_eq!(lab.sh("echo > /dev/null && ls /proc/1 > /dev/null && echo there").await, "there");
        lab
    });
}

#[test]
fn every_entry_is_listed_whatever_it_is_called() {
    with_lab("list", |lab| async move {
        let long = "ü".repeat(127) + "x";
        let script = "mkdir -p /l/many /l/deep/er; i=0; while [ $i -lt 1500 ]; do echo > /l/many/$i; i=$((i+1)); done; \
             echo hi > /l/deep/er/f; busybox ln /l/deep/er/f /l/hard; busybox mkfifo /l/pipe; \
             touch \"$(busybox printf '/l/\\377bytes')\" '/l/a b\n'";
        lab.sh(script).await;
        lab.write(&format!("/l/{long}"), b"").await.unwrap();
        assert_eq!(lab.list("/l/many", false).await.unwrap().len(), 1500);
        let all = lab.list("/l", true).await.unwrap();
        assert_eq!(
            all.len(),
            1500 + 9,
            "{:?}",
            all.iter().filter(|e| !e.path.starts_with("/l/many")).collect::<Vec<_>>()
        );
        let of = |path: &str| all.iter().find(|entry| entry.path == path).unwrap_or_else(|| panic!("{path}"));
        assert_eq!(of("/l/pipe").kind(), FileKind::Other);
        assert_eq!(of("/l/deep/er/f").size_bytes, 3);
        assert_eq!((of(&format!("/l/{long}")).uid, of("/l/a b\n").kind()), (0, FileKind::File));
        let place = |path: &str| all.iter().position(|entry| entry.path == path);
        assert!(place("/l/deep") < place("/l/deep/er") && place("/l/deep/er") < place("/l/deep/er/f"));
        // A name that is no text goes out and comes back.
        let bytes = all.iter().find(|entry| entry.path.is_empty()).unwrap().path_bytes.clone();
        assert_eq!(bytes, b"/l/\xffbytes");
        let stat = StatFileRequest { path_bytes: bytes.clone(), ..Default::default() };
        assert_eq!(lab.files().stat_file(lab.with(stat)).await.unwrap().into_inner().path_bytes, bytes);
        let moved = MoveFileRequest { path_bytes: bytes, new_path: "/l/text".into(), ..Default::default() };
        lab.files().move_file(lab.with(moved)).await.unwrap();
        assert_eq!(lab.stat("/l/text").await.unwrap().size_bytes, 0);
        assert_eq!(refused(lab.list("/l/hard", false).await), wrong_kind());
        assert_eq!(refused(lab.write(&format!("/l/{}", "x".repeat(256)), b"").await).0, Code::InvalidArgument);
        lab
    });
}
