//! A sandbox `a` of a real runtime, behind a whole agent, and a client of it.

use std::sync::Arc;

use tokio_stream::iter;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use warren_node_agent::agent::Agent;
use warren_node_agent::driver::InstanceKey;
use warren_proto::client::{ClientTls, channel};
use warren_proto::error::reason_of;
use warren_proto::token;
use warren_proto::v1::read_file_response::Message as Read;
use warren_proto::v1::sandbox_file_service_client::SandboxFileServiceClient;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::write_file_request::Message as Write;
use warren_proto::v1::*;

use crate::support::scheduler::Manner;
use crate::support::*;
use crate::world::{World, with_each_runtime};

pub struct Lab {
    pub world: Arc<World>,
    pub key: InstanceKey,
    pub agent: Agent,
    pub peer: Peer,
    _scheduler: Scheduler,
}

/// Runs `test` once for each runtime, with a sandbox that waits.
pub fn with_lab<F: Future<Output = Lab> + Send + 'static>(
    test: &str,
    run: impl Fn(Lab) -> F + Copy + Send + Sync + 'static,
) {
    with_each_runtime(test, move |world| async move {
        if !["runc", "crun"].contains(&world.runtime.as_str()) {
            eprintln!("SKIPPED: the files of a sandbox with {} are not reached from outside", world.runtime);
            return;
        }
        let lab = run(Lab::new(world).await).await;
        lab.agent.stop().await;
    });
}

impl Lab {
    async fn new(world: Arc<World>) -> Self {
        let scheduler = Scheduler::start(Manner::default()).await;
        let mut layer = layer(world.node.as_str(), world.dir.path(), &scheduler.address);
        layer.fence = Some("none".into());
        let driver = Arc::clone(&world.driver);
        let agent = agent_of(layer, driver).await;
        let mut peer = scheduler.peer().await;
        peer.assign(1, &[]).await;
        peer.until("generation 1", |peer| peer.generation == 1).await;
        let mut tar = tar::Builder::new(Vec::new());
        tar.follow_symlinks(false);
        tar.append_dir_all(".", &world.base).unwrap();
        let tar = tar.into_inner().unwrap();
        upload(&agent, digest(&tar), &tar).await.unwrap();
        let mut sandbox = running("a", 1);
        let template = sandbox.template.as_mut().unwrap();
        (template.digest, template.size_bytes) = (digest(&tar).to_string(), tar.len() as i64);
        peer.assign(2, &[sandbox]).await;
        peer.until_phase("a", 1, Phase::Running).await;
        Self { world, key: instance("a", 1), agent, peer, _scheduler: scheduler }
    }

    /// What a shell inside prints.
    pub async fn sh(&self, script: &str) -> String {
        self.world.sh(&self.key, script).await.text().to_owned()
    }

    pub fn channel(&self) -> Channel {
        channel(&self.agent.data_plane.to_string(), &ClientTls::default()).unwrap()
    }

    pub fn files(&self) -> SandboxFileServiceClient<Channel> {
        SandboxFileServiceClient::new(self.channel()).max_decoding_message_size(8 << 20)
    }

    /// `message` with a token for the sandbox.
    pub fn with<T>(&self, message: T) -> Request<T> {
        let claims = TokenClaims { sandbox: name("a").to_string(), epoch: 1, ..claims(Scope::Sandbox) };
        bearer(message, &token::sign(&claims, &key()))
    }

    pub async fn read(&self, path: &str) -> Result<Vec<u8>, Status> {
        self.read_part(ReadFileRequest { path: path.into(), ..Default::default() }).await.map(|(bytes, _)| bytes)
    }

    /// Data, and how many bytes were holes.
    pub async fn read_part(&self, request: ReadFileRequest) -> Result<(Vec<u8>, i64), Status> {
        let mut stream = self.files().read_file(self.with(request)).await?.into_inner();
        let (mut data, mut holes, mut first) = (Vec::new(), 0, true);
        while let Some(response) = stream.message().await? {
            match response.message.unwrap() {
                Read::File(_) => assert!(std::mem::take(&mut first), "once, and first"),
                Read::Data(bytes) => data.extend(bytes),
                Read::Hole(count) => holes += count,
            }
        }
        assert!(!first);
        Ok((data, holes))
    }

    pub async fn write(&self, path: &str, bytes: &[u8]) -> Result<FileInfo, Status> {
        self.write_as(WriteFileHeader { path: path.into(), ..Default::default() }, bytes).await
    }

    pub async fn write_as(&self, header: WriteFileHeader, bytes: &[u8]) -> Result<FileInfo, Status> {
        let pieces = bytes.chunks(100_000).map(|piece| Write::Data(piece.to_vec())).collect();
        self.write_pieces(header, pieces).await
    }

    pub async fn write_pieces(&self, header: WriteFileHeader, pieces: Vec<Write>) -> Result<FileInfo, Status> {
        let messages = std::iter::once(Write::Header(header)).chain(pieces);
        let messages: Vec<_> = messages.map(|message| WriteFileRequest { message: Some(message) }).collect();
        Ok(self.files().write_file(self.with(iter(messages))).await?.into_inner())
    }

    pub async fn stat(&self, path: &str) -> Result<FileInfo, Status> {
        let request = StatFileRequest { path: path.into(), ..Default::default() };
        Ok(self.files().stat_file(self.with(request)).await?.into_inner())
    }

    pub async fn list(&self, path: &str, recursive: bool) -> Result<Vec<FileInfo>, Status> {
        let request = ListDirectoryRequest { path: path.into(), recursive, ..Default::default() };
        let mut stream = self.files().list_directory(self.with(request)).await?.into_inner();
        let mut entries = Vec::new();
        while let Some(batch) = stream.message().await? {
            assert!(batch.entries.len() <= 256);
            entries.extend(batch.entries);
        }
        Ok(entries)
    }

    pub async fn make_directory(&self, request: MakeDirectoryRequest) -> Result<FileInfo, Status> {
        Ok(self.files().make_directory(self.with(request)).await?.into_inner())
    }

    pub async fn make_symlink(&self, path: &str, target: &str) -> Result<FileInfo, Status> {
        let request = MakeSymlinkRequest { path: path.into(), target: target.into(), ..Default::default() };
        Ok(self.files().make_symlink(self.with(request)).await?.into_inner())
    }

    pub async fn move_file(&self, from: &str, to: &str, replace: bool) -> Result<FileInfo, Status> {
        let request = MoveFileRequest { path: from.into(), new_path: to.into(), replace, ..Default::default() };
        Ok(self.files().move_file(self.with(request)).await?.into_inner())
    }

    pub async fn remove(&self, path: &str, recursive: bool) -> Result<(), Status> {
        let request = RemoveFileRequest { path: path.into(), recursive, ..Default::default() };
        self.files().remove_file(self.with(request)).await.map(drop)
    }
}

/// Code and reason of what must have failed.
pub fn refused<T>(result: Result<T, Status>) -> (Code, Option<ErrorReason>) {
    match result {
        Ok(_) => panic!("it was allowed"),
        Err(status) => (status.code(), reason_of(&status)),
    }
}

pub fn missing() -> (Code, Option<ErrorReason>) {
    (Code::NotFound, Some(ErrorReason::FileNotFound))
}

pub fn wrong_kind() -> (Code, Option<ErrorReason>) {
    (Code::FailedPrecondition, Some(ErrorReason::FileKind))
}

pub fn denied() -> (Code, Option<ErrorReason>) {
    (Code::PermissionDenied, Some(ErrorReason::FileDenied))
}
