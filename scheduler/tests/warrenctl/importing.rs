//! `template import`: measured, brought to a node, recorded.

use sha2::{Digest, Sha256};
use tonic::{Code, Status};
use uuid::Uuid;
use warren_proto::v1::*;

use crate::fake::{Fake, error};
use crate::run::ctl;

/// Two and a half chunks that are not all alike.
fn tar() -> Vec<u8> {
    (0..5u32 << 17).flat_map(u32::to_le_bytes).collect()
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

struct File {
    _directory: tempfile::TempDir,
    path: String,
}

fn file(bytes: &[u8]) -> File {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("root.tar");
    std::fs::write(&path, bytes).expect("a file");
    File { path: path.to_str().expect("a path").to_owned(), _directory: directory }
}

#[tokio::test]
async fn the_bytes_reach_the_node_and_the_record_has_their_digest() {
    let fake = Fake::start().await;
    let (bytes, file) = (tar(), file(&tar()));
    let options = ["--env", "A=1", "--workdir", "/srv", "-o", "name", "--", "python3", "-i"];
    let ran = ctl(&fake, &[&["template", "import", "python", &file.path][..], &options[..]].concat()).await;
    assert_eq!(ran.clone().ok(), "templates/python\n");
    assert_eq!(ran.stderr, format!("nodes/n1 took {}\n", digest(&bytes)));

    let book = fake.book();
    let upload = &book.uploads[0];
    assert_eq!((&upload.header.digest, upload.header.size_bytes), (&digest(&bytes), 5 << 19));
    assert!(upload.bytes == bytes, "{} bytes arrived", upload.bytes.len());
    assert_eq!(upload.largest, 1 << 20);
    let create = &book.template_creates[0];
    assert_eq!(Uuid::parse_str(&create.request_id).expect("a UUID").get_version_num(), 7);
    let template = create.template.clone().expect("a template");
    assert_eq!((&template.digest, template.size_bytes), (&digest(&bytes), 5 << 19));
    assert_eq!(
        (template.default_command, template.working_directory.as_str()),
        (vec!["python3".into(), "-i".into()], "/srv")
    );
    assert_eq!(template.environment["A"], "1");
}

#[tokio::test]
async fn a_command_may_stand_in_flags_too() {
    let fake = Fake::start().await;
    let file = file(b"tar");
    let flags = ["--command", "sh", "--command", "-c", "--command=sleep 1", "--env", "A=1"];
    ctl(&fake, &[&["template", "import", "t", &file.path][..], &flags[..]].concat()).await.ok();
    let template = fake.book().template_creates[0].template.clone().expect("a template");
    assert_eq!(template.default_command, ["sh", "-c", "sleep 1"]);
    assert_eq!(template.environment["A"], "1");
}

#[tokio::test]
async fn an_upload_that_breaks_is_made_again_and_so_is_the_record() {
    let fake = Fake::start().await;
    let file = file(&tar());
    fake.fail("begin", [error(Code::Unavailable, ErrorReason::NoLeader, "no leader")]);
    fake.fail("upload", std::iter::repeat_n(Status::unavailable("the agent went away"), 2));
    fake.fail("create template", [error(Code::Unknown, ErrorReason::OutcomeUnknown, "leadership was lost")]);
    ctl(&fake, &["template", "import", "python", &file.path]).await.ok();
    let book = fake.book();
    assert_eq!((book.uploads.len(), book.uploads[0].bytes.len()), (1, tar().len()));
    assert_eq!((book.template_creates.len(), &book.template_creates[0]), (2, &book.template_creates[1]));
}

#[tokio::test]
async fn bytes_that_were_damaged_are_not_recorded() {
    let fake = Fake::start().await;
    let file = file(b"tar");
    fake.fail("upload", [error(Code::DataLoss, ErrorReason::DigestMismatch, "other bytes")]);
    let ran = ctl(&fake, &["template", "import", "python", &file.path]).await;
    assert_eq!((ran.code, fake.book().template_creates.len()), (1, 0), "{ran:?}");
}

#[tokio::test]
async fn a_file_that_is_not_there_or_empty_is_said_before_anything_is_done() {
    let fake = Fake::start().await;
    let missing = ctl(&fake, &["template", "import", "python", "/nonexistent/root.tar"]).await;
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("read /nonexistent/root.tar: No such file"), "{missing:?}");
    let file = file(b"");
    assert_eq!(ctl(&fake, &["template", "import", "python", &file.path]).await.code, 2);
}

#[tokio::test]
async fn a_template_that_is_used_is_not_deleted() {
    let fake = Fake::start().await;
    ctl(&fake, &["template", "delete", "python"]).await.ok();
    fake.fail("delete template", [error(Code::FailedPrecondition, ErrorReason::TemplateInUse, "2 sandboxes use it")]);
    let ran = ctl(&fake, &["template", "delete", "python"]).await;
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.stderr.contains("hint: delete the sandboxes that use it first"), "{ran:?}");
}

#[tokio::test]
async fn a_directory_and_a_layout_go_to_a_node_as_archives() {
    let fake = Fake::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("hello"), b"world").expect("a file");
    let path = directory.path().to_str().expect("a path");
    ctl(&fake, &["template", "import", "box", path]).await.ok();
    ctl(&fake, &["template", "import", "box", &format!("oci:{path}:v1")]).await.ok();
    let imports = fake.book().imports.clone();
    for (import, tag) in imports.iter().zip(["", "v1"]) {
        let Some(import_template_header::Source::Archive(archive)) = &import.header.source else {
            panic!("{:?}", import.header)
        };
        assert_eq!((archive.tag.as_str(), archive.size_bytes), (tag, import.bytes.len() as i64));
        assert_eq!(&import.bytes[..5], b"hello", "a tar of the directory");
    }
    assert_eq!((imports.len(), fake.book().uploads.len()), (2, 0));
}

#[tokio::test]
async fn an_image_is_pulled_by_a_node_and_recorded_with_its_defaults() {
    let fake = Fake::start().await;
    fake.fail("import", [error(Code::Unavailable, ErrorReason::RegistryUnavailable, "no answer")]);
    let words = ["template", "pull", "docker.io/library/python:3.12", "--env", "B=mine", "-o", "name"];
    let credentials = ["--username", "u", "--password", "p"];
    let ran = ctl(&fake, &[&words[..], &credentials[..]].concat()).await;
    assert_eq!(ran.clone().ok(), "templates/python\n");
    assert!(ran.stderr.contains("trying again") && ran.stderr.contains("`nobody` is not kept"), "{ran:?}");
    let book = fake.book();
    let Some(import_template_header::Source::Registry(image)) = &book.imports[0].header.source else {
        panic!("{:?}", book.imports)
    };
    let told = (image.reference.as_str(), image.username.as_str(), image.password.as_str());
    assert_eq!(told, ("docker.io/library/python:3.12", "u", "p"));
    let template = book.template_creates[0].template.clone().expect("a template");
    assert_eq!((template.digest, template.size_bytes), (format!("sha256:{}", "1".repeat(64)), 10_240));
    assert_eq!((template.default_command, template.working_directory.as_str()), (vec!["python3".into()], "/image"));
    assert_eq!((template.environment["A"].as_str(), template.environment["B"].as_str()), ("image", "mine"));
}

#[tokio::test]
async fn an_image_that_is_not_there_is_not_asked_for_again() {
    let fake = Fake::start().await;
    fake.fail("import", [error(Code::NotFound, ErrorReason::ImageNotFound, "no such image")]);
    let ran = ctl(&fake, &["template", "pull", "docker.io/library/pyhton"]).await;
    assert_eq!((ran.code, fake.book().template_creates.len()), (3, 0), "{ran:?}");
    assert!(ran.stderr.contains("hint: is the name right?"), "{ran:?}");
}
