//! `sandbox cp` and the commands for files: what arrives, and that nothing hostile does.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tonic::Status;
use warren_proto::v1::*;

use crate::fake::{Fake, FakeFile};
use crate::run::{ctl, ctl_with};

fn file(data: &[u8], mode: u32) -> FakeFile {
    FakeFile { kind: FileKind::File, mode, data: data.to_vec(), target: String::new() }
}

fn directory(mode: u32) -> FakeFile {
    FakeFile { kind: FileKind::Directory, mode, ..FakeFile::default() }
}

fn symlink(target: &str) -> FakeFile {
    FakeFile { kind: FileKind::Symlink, target: target.into(), ..FakeFile::default() }
}

/// A region whose sandbox has these files.
async fn holding(files: &[(&str, FakeFile)]) -> Fake {
    let fake = Fake::start().await;
    fake.book().files = files.iter().map(|(path, file)| ((*path).to_owned(), file.clone())).collect();
    fake
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("a file").permissions().mode() & 0o7777
}

#[tokio::test]
async fn a_file_goes_in_with_its_mode_and_comes_out_again() {
    let fake = holding(&[("/srv", directory(0o755))]).await;
    let here = tempfile::tempdir().expect("a directory");
    let source = here.path().join("run.sh");
    let bytes: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&source, &bytes).expect("a file");
    std::fs::set_permissions(&source, PermissionsExt::from_mode(0o750)).expect("permissions");
    ctl(&fake, &["sandbox", "cp", "-u", "1000:1000", text(&source), "x:/srv/"]).await.ok();
    ctl(&fake, &["sandbox", "cp", text(&source), "x:/srv/other"]).await.ok();
    {
        let book = fake.book();
        assert!(book.files["/srv/run.sh"] == file(&bytes, 0o750) && book.files["/srv/other"].data == bytes);
        assert_eq!((book.writes[0].user.as_str(), book.writes[1].user.as_str()), ("1000:1000", ""));
    }
    let back = here.path().join("back");
    ctl(&fake, &["sandbox", "cp", "x:/srv/run.sh", text(&back)]).await.ok();
    assert!(std::fs::read(&back).expect("a file") == bytes);
    assert_eq!(mode(&back) & 0o700, 0o700);
    ctl(&fake, &["sandbox", "cp", "x:/srv/other", text(here.path())]).await.ok();
    assert!(here.path().join("other").exists(), "into a directory under its own name");
}

#[tokio::test]
async fn a_read_that_breaks_goes_on_where_it_broke_and_a_write_begins_anew() {
    let bytes: Vec<u8> = (0..25_000u32).map(|n| u8::try_from(n % 251).expect("small")).collect();
    let fake = holding(&[("/f", file(&bytes, 0o644))]).await;
    fake.book().break_reads = [4000, 6000].into();
    let here = tempfile::tempdir().expect("a directory");
    let back = here.path().join("f");
    ctl(&fake, &["sandbox", "cp", "x:/f", text(&back)]).await.ok();
    assert!(std::fs::read(&back).expect("a file") == bytes);
    assert_eq!(fake.book().reads, [0, 4000, 10_000]);
    fake.fail("write", [Status::unavailable("the agent went away")]);
    ctl(&fake, &["sandbox", "cp", text(&back), "x:/g"]).await.ok();
    assert!(fake.book().files["/g"].data == bytes);
}

#[tokio::test]
async fn a_tree_goes_in_and_comes_out_with_links_and_modes() {
    let fake = holding(&[]).await;
    let here = tempfile::tempdir().expect("a directory");
    let tree = here.path().join("tree");
    std::fs::create_dir_all(tree.join("sub/deep")).expect("directories");
    for n in 0..50 {
        std::fs::write(tree.join(format!("sub/ünï-{n}")), format!("{n}")).expect("a file");
    }
    std::os::unix::fs::symlink("../../outside", tree.join("sub/link")).expect("a link");
    std::fs::set_permissions(tree.join("sub/deep"), PermissionsExt::from_mode(0o500)).expect("permissions");
    ctl(&fake, &["sandbox", "cp", text(&tree), "x:/new"]).await.ok();
    ctl(&fake, &["sandbox", "cp", text(&tree), "x:/new"]).await.ok();
    {
        let book = fake.book();
        assert_eq!(
            (book.files["/new/sub/link"].target.as_str(), book.files["/new/sub/deep"].mode),
            ("../../outside", 0o500)
        );
        assert_eq!(book.files["/new/tree/sub/ünï-7"].data, b"7", "into what is there, under its own name");
    }
    let back = here.path().join("back");
    ctl(&fake, &["sandbox", "cp", "x:/new/sub", text(&back)]).await.ok();
    assert_eq!(std::fs::read(back.join("ünï-49")).expect("a file"), b"49");
    assert_eq!(std::fs::read_link(back.join("link")).expect("a link"), Path::new("../../outside"));
    assert_eq!(mode(&back.join("deep")), 0o500);
    // A link that is there already is replaced.
    ctl(&fake, &["sandbox", "cp", text(&tree), "x:/new"]).await.ok();
}

#[tokio::test]
async fn hostile_names_and_links_write_nothing_outside() {
    let here = tempfile::tempdir().expect("a directory");
    let (outside, to) = (here.path().join("outside"), here.path().join("to"));
    std::fs::create_dir(&outside).expect("a directory");
    let fake = holding(&[
        ("/evil", directory(0o755)),
        ("/evil/good", file(b"good", 0o644)),
        ("/evil/suid", file(b"suid", 0o4755)),
    ])
    .await;
    // A link to the outside, and files that are said to lie behind it; and names that climb.
    let entry = |path: &str, kind: FileKind, target: &str| FileInfo {
        path: path.into(),
        kind: kind.into(),
        symlink_target: target.into(),
        mode: 0o644,
        ..FileInfo::default()
    };
    fake.book().listing = vec![
        entry("/evil/link", FileKind::Symlink, text(&outside)),
        entry("/evil/link/planted", FileKind::File, ""),
        entry("/evil/../../climbed", FileKind::File, ""),
        entry("/etc/elsewhere", FileKind::File, ""),
        entry("/evil/pipe", FileKind::Other, ""),
    ];
    for path in ["/evil/link/planted", "/evil/../../climbed", "/etc/elsewhere"] {
        fake.book().files.insert(path.into(), file(b"planted", 0o644));
    }
    for _ in 0..2 {
        let ran = ctl(&fake, &["sandbox", "cp", "x:/evil/.", text(&to)]).await;
        assert_ne!(ran.code, 0, "{ran:?}");
        assert!(ran.stderr.contains("`/evil/../../climbed` is no name for a file here"), "{ran:?}");
        assert!(ran.stderr.contains("left out: /evil/pipe"), "{ran:?}");
    }
    assert_eq!(std::fs::read(to.join("good")).expect("a file"), b"good");
    assert_eq!(mode(&to.join("suid")) & 0o6000, 0, "no privileges of the caller's");
    assert_eq!(std::fs::read_dir(&outside).expect("a directory").count(), 0);
    assert!(!here.path().join("climbed").exists() && !to.join("planted").exists());
}

#[tokio::test]
async fn streams_are_the_bytes_of_a_file_or_the_tar_of_a_directory() {
    let fake = holding(&[
        ("/srv", directory(0o755)),
        ("/srv/a", file(b"content", 0o640)),
        ("/srv/b", symlink("a")),
        ("/srv/empty", directory(0o700)),
    ])
    .await;
    assert_eq!(ctl(&fake, &["sandbox", "cp", "x:/srv/a", "-"]).await.ok(), "content");
    let tar = ctl(&fake, &["sandbox", "cp", "x:/srv", "-"]).await.ok();
    ctl_with(&fake, &["sandbox", "cp", "-", "x:/copy/"], tar.as_bytes()).await.ok();
    ctl_with(&fake, &["sandbox", "cp", "-", "x:/plain"], b"bytes").await.ok();
    let book = fake.book();
    for name in ["a", "b", "empty"] {
        assert_eq!(book.files[&format!("/copy/srv/{name}")], book.files[&format!("/srv/{name}")], "{name}");
    }
    assert_eq!(book.files["/plain"].data, b"bytes");
}

#[tokio::test]
async fn what_makes_no_sense_is_said() {
    let fake = holding(&[]).await;
    for wrong in [["a", "b"], ["x:/a", "x:/b"], ["-", "-"], ["x:relative", "."], ["x:/../a", "."]] {
        let ran = ctl(&fake, &["sandbox", "cp", wrong[0], wrong[1]]).await;
        assert_eq!(ran.code, 2, "{wrong:?}: {ran:?}");
    }
    let missing = ctl(&fake, &["sandbox", "cp", "x:/none", "."]).await;
    assert_eq!(missing.code, 3, "{missing:?}");
    let here = ctl(&fake, &["sandbox", "cp", "/nonexistent/file", "x:/a"]).await;
    assert!(here.stderr.contains("read /nonexistent/file: No such file"), "{here:?}");
}

#[tokio::test]
async fn files_are_listed_shown_moved_and_removed() {
    let fake = holding(&[
        ("/srv", directory(0o755)),
        ("/srv/b", file(b"12345", 0o644)),
        ("/srv/a\x1b[2J", symlink("b")),
        ("/srv/d", directory(0o1777)),
        ("/srv/d/deep", file(b"", 0o600)),
    ])
    .await;
    assert_eq!(ctl(&fake, &["sandbox", "ls", "x:/srv"]).await.ok(), "a\\u{1b}[2J\nb\nd\n");
    let long = ctl(&fake, &["sandbox", "ls", "-lR", "x:/srv"]).await.ok();
    for line in
        ["drwxrwxrwt   0:0     0                 /srv/d\n", "-rw-------   0:0     0                 /srv/d/deep\n"]
    {
        assert!(long.contains(line), "{long}");
    }
    let json = ctl(&fake, &["sandbox", "ls", "x:/srv/b", "-o", "json"]).await.ok();
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json[0]["path"], &json[0]["sizeBytes"]), (&"/srv/b".into(), &5.into()));
    assert_eq!(ctl(&fake, &["sandbox", "cat", "x:/srv/b"]).await.ok(), "12345");
    ctl(&fake, &["sandbox", "mkdir", "-p", "x:/srv/new/one"]).await.ok();
    ctl(&fake, &["sandbox", "mv", "x:/srv/b", "/srv/new/one/b"]).await.ok();
    assert_eq!(ctl(&fake, &["sandbox", "rm", "x:/srv/b"]).await.code, 3);
    ctl(&fake, &["sandbox", "rm", "-f", "x:/srv/b"]).await.ok();
    ctl(&fake, &["sandbox", "rm", "-r", "x:/srv/d"]).await.ok();
    let paths: Vec<_> = fake.book().files.keys().cloned().collect();
    assert_eq!(paths, ["/srv", "/srv/a\x1b[2J", "/srv/d/deep", "/srv/new/one", "/srv/new/one/b"]);
}
