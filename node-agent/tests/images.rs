//! Imports, with the tools that others make images with: a real registry, skopeo and umoci. Skips aloud where they are missing.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::scheduler::Manner;
use support::*;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_stream::iter;
use tonic::{Code, Status};
use warren_node_agent::agent::Agent;
use warren_proto::error::reason_of;
use warren_proto::token;
use warren_proto::v1::import_template_header::Source;
use warren_proto::v1::import_template_request::Message as In;
use warren_proto::v1::import_template_response::Message as Out;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::*;

/// A registered agent.
struct Lab {
    agent: Agent,
    _scheduler: Scheduler,
    _peer: Peer,
    directory: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Self {
        let scheduler = Scheduler::start(Manner::default()).await;
        let directory = tempfile::tempdir().unwrap();
        let agent = agent("n1", directory.path(), &scheduler.address, &FakeDriver::default()).await;
        let mut peer = scheduler.peer().await;
        peer.assign(1, &[]).await;
        peer.until("generation 1", |peer| peer.generation == 1).await;
        Self { agent, _scheduler: scheduler, _peer: peer, directory }
    }

    async fn import(&self, scope: Scope, source: Source, bytes: &[u8]) -> Result<(ImportedTemplate, usize), Status> {
        let mut messages = vec![In::Header(ImportTemplateHeader { source: Some(source) })];
        messages.extend(bytes.chunks(100_000).map(|piece| In::Chunk(piece.to_vec())));
        let messages = messages.into_iter().map(|message| ImportTemplateRequest { message: Some(message) });
        let request = bearer(iter(messages.collect::<Vec<_>>()), &token::sign(&claims(scope), &key()));
        let mut answers = template_client(&self.agent).import_template(request).await?.into_inner();
        let mut told = 0;
        while let Some(answer) = timeout(PATIENCE, answers.message()).await.expect("silent")? {
            match answer.message.unwrap() {
                Out::Progress(_) => told += 1,
                Out::Imported(imported) => return Ok((imported, told)),
            }
        }
        panic!("it ended without a result");
    }

    async fn archive(&self, bytes: &[u8], tag: &str) -> Result<ImportedTemplate, Status> {
        let source = Source::Archive(ImageArchive { size_bytes: bytes.len() as i64, tag: tag.into() });
        self.import(Scope::TemplateImport, source, bytes).await.map(|(imported, _)| imported)
    }

    async fn pull(&self, reference: &str) -> Result<ImportedTemplate, Status> {
        let image = RegistryImage { reference: reference.into(), ..RegistryImage::default() };
        self.import(Scope::TemplateImport, Source::Registry(image), &[]).await.map(|(imported, _)| imported)
    }

    /// Text of a file of a template.
    fn file(&self, imported: &ImportedTemplate, path: &str) -> Option<String> {
        let hex = imported.digest.strip_prefix("sha256:").unwrap();
        std::fs::read_to_string(self.directory.path().join("templates").join(hex).join("rootfs").join(path)).ok()
    }

    fn kept(&self) -> usize {
        std::fs::read_dir(self.directory.path().join("templates")).unwrap().count()
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, Option<ErrorReason>) {
    let status = result.unwrap_err();
    (status.code(), reason_of(&status))
}

#[tokio::test]
async fn a_root_file_system_is_imported_once_whatever_it_comes_in() {
    let lab = Lab::new().await;
    let first = lab.archive(&rootfs(), "").await.unwrap();
    assert_eq!(lab.file(&first, "file").unwrap().len(), 3000);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packed, &rootfs()).unwrap();
    assert_eq!(lab.archive(&packed.finish().unwrap(), "").await.unwrap(), first);
    assert_eq!(lab.kept(), 1);
    lab.agent.stop().await;
}

#[tokio::test]
async fn what_is_no_image_is_refused_and_leaves_nothing() {
    let lab = Lab::new().await;
    let invalid = (Code::InvalidArgument, Some(ErrorReason::ImageInvalid));
    assert_eq!(refusal(lab.archive(&b"no tar ".repeat(200), "").await), invalid);
    assert_eq!(refusal(lab.archive(&rootfs(), "v1").await), invalid);
    assert_eq!(refusal(lab.pull("not a reference").await), invalid);
    let short = Source::Archive(ImageArchive { size_bytes: 1 << 20, tag: String::new() });
    let lost = (Code::DataLoss, Some(ErrorReason::DigestMismatch));
    assert_eq!(refusal(lab.import(Scope::TemplateImport, short.clone(), &rootfs()).await), lost);
    let denied = (Code::PermissionDenied, Some(ErrorReason::PermissionDenied));
    assert_eq!(refusal(lab.import(Scope::TemplateUpload, short, &rootfs()).await), denied);
    // Nobody listens there.
    let unavailable = (Code::Unavailable, Some(ErrorReason::RegistryUnavailable));
    assert_eq!(refusal(lab.pull("127.0.0.1:9/a/b:c").await), unavailable);
    assert_eq!(lab.kept(), 0);
    lab.agent.stop().await;
}

fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|tool| !Path::new("/usr/bin").join(tool).exists()).collect();
    if !missing.is_empty() {
        println!("skipped: {missing:?} are not installed");
    }
    missing.is_empty()
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image layout of two layers, tag `v1`: the second hides a file of the first.
fn make_layout(at: &Path) -> String {
    let layout = at.join("layout").to_str().unwrap().to_owned();
    let image = format!("{layout}:v1");
    let bundle = at.join("bundle");
    let root = bundle.join("rootfs");
    run("umoci", &["init", "--layout", &layout]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    std::fs::create_dir(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/name"), "first").unwrap();
    std::fs::write(root.join("etc/gone"), "gone").unwrap();
    std::fs::hard_link(root.join("etc/name"), root.join("again")).unwrap();
    run("umoci", &["repack", "--image", &image, bundle.to_str().unwrap()]);
    std::fs::remove_dir_all(&bundle).unwrap();
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    std::fs::remove_file(root.join("etc/gone")).unwrap();
    std::fs::write(root.join("etc/second"), "second").unwrap();
    run("umoci", &["repack", "--image", &image, bundle.to_str().unwrap()]);
    let settings = ["--config.entrypoint=/bin/sh", "--config.cmd=-i", "--config.env=A=1", "--config.workingdir=/etc"];
    run("umoci", &[&["config", "--image", &image][..], &settings[..]].concat());
    layout
}

/// A registry on loopback; it ends with this.
struct Registry {
    process: Child,
    address: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _gone = self.process.kill();
        let _ended = self.process.wait();
    }
}

impl Registry {
    async fn start(at: &Path) -> Self {
        // The port is free now; whoever takes it meanwhile makes the registry end, and the test fail.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            at.join("registry").display()
        );
        let path = at.join("registry.yml");
        std::fs::write(&path, config).unwrap();
        let mut command = Command::new("docker-registry");
        let process = command.arg("serve").arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let registry = Self { process, address };
        let ready = async {
            while TcpStream::connect(&registry.address).await.is_err() {
                look_again().await;
            }
        };
        timeout(PATIENCE, ready).await.expect("the registry never listened");
        registry
    }
}

#[tokio::test]
async fn an_image_is_the_same_template_from_a_layout_and_from_a_registry() {
    if !have(&["docker-registry", "skopeo", "umoci"]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let layout = make_layout(work.path());
    let lab = Lab::new().await;

    let archive = work.path().join("layout.tar");
    run("tar", &["-C", &layout, "-cf", archive.to_str().unwrap(), "."]);
    let from_layout = lab.archive(&std::fs::read(&archive).unwrap(), "v1").await.unwrap();
    assert_eq!(lab.file(&from_layout, "etc/name").unwrap(), "first");
    assert_eq!(lab.file(&from_layout, "again").unwrap(), "first");
    assert_eq!(lab.file(&from_layout, "etc/second").unwrap(), "second");
    assert_eq!(lab.file(&from_layout, "etc/gone"), None);
    assert_eq!(from_layout.default_command, ["/bin/sh", "-i"]);
    assert_eq!((from_layout.environment["A"].as_str(), from_layout.working_directory.as_str()), ("1", "/etc"));

    let registry = Registry::start(work.path()).await;
    let reference = format!("{}/team/tool:v1", registry.address);
    let (from, to) = (format!("oci:{layout}:v1"), format!("docker://{reference}"));
    run("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &from, &to]);
    let image = RegistryImage { reference: reference.clone(), ..RegistryImage::default() };
    let (pulled, told) = lab.import(Scope::TemplateImport, Source::Registry(image), &[]).await.unwrap();
    assert_eq!(pulled, from_layout, "digest, defaults and the image's own digest");
    assert!(told > 0, "progress is told");
    assert_eq!(lab.kept(), 1);
    let by_digest = format!("{}/team/tool@{}", registry.address, pulled.image_digest);
    assert_eq!(lab.pull(&by_digest).await.unwrap(), pulled);

    let missing = (Code::NotFound, Some(ErrorReason::ImageNotFound));
    assert_eq!(refusal(lab.pull(&format!("{}/team/tool:v2", registry.address)).await), missing);
    assert_eq!(refusal(lab.pull(&format!("{}/nobody/none:v1", registry.address)).await), missing);
    lab.agent.stop().await;
}
