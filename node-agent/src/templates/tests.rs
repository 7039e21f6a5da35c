//! The store on a real directory.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bytes::Bytes as Chunk;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::*;

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(1234);
    header.set_gid(4321);
    header.set_mtime(1);
    header.set_size(size);
    header
}

fn rootfs_tar() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    tar.append_data(&mut header(EntryType::Directory, 0o555, 0), "./locked", &[][..]).expect("directory");
    tar.append_data(&mut header(EntryType::Regular, 0o4755, 5), "./locked/suid", &b"hello"[..]).expect("file");
    tar.append_link(&mut header(EntryType::Link, 0o644, 0), "./hard", "locked/suid").expect("hard link");
    tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), "./link", "/etc/passwd").expect("link");
    tar.append_data(&mut header(EntryType::Char, 0o666, 0), "./null", &[][..]).expect("device");
    tar.into_inner().expect("tar")
}

fn digest_of(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

async fn put(store: &TemplateStore, digest: Digest, size: usize, bytes: Vec<u8>) -> Result<(), TemplateError> {
    let Some(turn) = store.turn(digest).await else { return Ok(()) };
    let mut ingest = store.ingest(turn, Bytes(size as u64))?;
    for part in bytes.chunks(700) {
        ingest = ingest.write(Chunk::copy_from_slice(part)).await?;
    }
    ingest.finish().await
}

fn open(directory: &tempfile::TempDir) -> TemplateStore {
    TemplateStore::open(directory.path(), Changes::default()).expect("open")
}

fn entries(directory: &tempfile::TempDir) -> usize {
    fs::read_dir(directory.path().join("templates")).expect("list").count()
}

#[tokio::test]
async fn a_template_is_unpacked_with_modes_owners_and_links_and_survives_a_restart() {
    let directory = tempfile::tempdir().expect("directory");
    let tar = rootfs_tar();
    let digest = digest_of(&tar);
    put(&open(&directory), digest, tar.len(), tar.clone()).await.expect("put");

    let store = open(&directory);
    assert_eq!(store.digests(), [digest]);
    let rootfs = store.rootfs(&digest).expect("held");
    let suid = fs::metadata(rootfs.join("locked/suid")).expect("file");
    assert_eq!(suid.permissions().mode() & 0o7777, 0o4755);
    assert_eq!(suid.nlink(), 2);
    if rustix::process::geteuid().is_root() {
        assert_eq!((suid.uid(), suid.gid()), (1234, 4321));
    }
    assert_eq!(fs::metadata(rootfs.join("locked")).expect("directory").permissions().mode() & 0o7777, 0o555);
    assert_eq!(fs::read_link(rootfs.join("link")).expect("link"), Path::new("/etc/passwd"));
    assert!(!rootfs.join("null").exists(), "devices are left out");
    assert_eq!(fs::read(directory.path().join("templates").join(digest.hex()).join(TAR)).expect("tar"), tar);
}

#[tokio::test]
async fn wrong_bytes_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let store = open(&directory);
    let tar = rootfs_tar();
    let digest = digest_of(&tar);
    let mut flipped = tar.clone();
    flipped[600] ^= 1;
    assert!(matches!(put(&store, digest, tar.len(), flipped).await, Err(TemplateError::Digest { .. })));
    assert!(matches!(put(&store, digest, tar.len() + 1, tar.clone()).await, Err(TemplateError::Size { .. })));
    assert!(matches!(put(&store, digest, tar.len() - 1, tar.clone()).await, Err(TemplateError::Size { .. })));
    let text = b"not a tar, though long enough to hold a header ".repeat(20);
    assert!(matches!(put(&store, digest_of(&text), text.len(), text.clone()).await, Err(TemplateError::Unpack { .. })));
    assert_eq!(entries(&directory), 0);
    assert!(store.digests().is_empty());
}

#[tokio::test]
async fn nothing_leads_out_of_the_root() {
    let outside = tempfile::tempdir().expect("directory");
    let mut through_link = Builder::new(Vec::new());
    through_link.append_link(&mut header(EntryType::Symlink, 0o777, 0), "out", outside.path()).expect("link");
    through_link.append_data(&mut header(EntryType::Regular, 0o644, 1), "out/file", &b"x"[..]).expect("file");
    let mut hard_link = Builder::new(Vec::new());
    hard_link.append_link(&mut header(EntryType::Link, 0o644, 0), "stolen", "/etc/passwd").expect("link");
    let mut dots = header(EntryType::Regular, 0o644, 1);
    dots.as_gnu_mut().expect("gnu").name[..7].copy_from_slice(b"../file");
    dots.set_cksum();
    let mut upward = Builder::new(Vec::new());
    upward.append(&dots, &b"x"[..]).expect("file");

    let directory = tempfile::tempdir().expect("directory");
    let store = open(&directory);
    for tar in [through_link, hard_link, upward] {
        let bytes = tar.into_inner().expect("tar");
        let result = put(&store, digest_of(&bytes), bytes.len(), bytes.clone()).await;
        assert!(matches!(result, Err(TemplateError::Unpack { .. })), "{result:?}");
    }
    assert_eq!(fs::read_dir(outside.path()).expect("list").count(), 0);
    assert_eq!(entries(&directory), 0);
}

#[tokio::test]
async fn those_who_come_together_share_the_work() {
    let directory = tempfile::tempdir().expect("directory");
    let store = open(&directory);
    let tar = rootfs_tar();
    let digest = digest_of(&tar);
    let first = store.turn(digest).await.expect("first");
    let second = tokio::spawn({
        let store = store.clone();
        async move { store.turn(digest).await.is_none() }
    });
    let ingest = store.ingest(first, Bytes(tar.len() as u64)).expect("ingest");
    ingest.write(Chunk::from(tar)).await.expect("write").finish().await.expect("finish");
    assert!(second.await.expect("second"), "the second finds it done");
}

#[tokio::test]
async fn what_a_crash_left_is_cleared_away() {
    let directory = tempfile::tempdir().expect("directory");
    let templates = directory.path().join("templates");
    fs::create_dir_all(templates.join("tmp-x/rootfs")).expect("leftover");
    fs::create_dir_all(templates.join("00".repeat(32))).expect("without its mark");
    fs::write(templates.join("file"), b"").expect("file");
    assert!(open(&directory).digests().is_empty());
    assert_eq!(entries(&directory), 0);
}
