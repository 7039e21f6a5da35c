//! `SandboxFileService`: a call names a path, a helper process opens or changes it, and bytes go through descriptors.
//!
//! Children: `read` what is streamed out, `write` what is streamed in, `watch`.

mod read;
mod watch;
mod write;

use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::sandbox_file_service_server::SandboxFileService;
use warren_proto::v1::*;

use super::held::{Held, Instances};
use super::status::Refusal;
use crate::files::{Fault, FileError, How, Ownership, Request as Ask, info};

/// Calls about files under way on a node: each may keep a thread, a helper process and some descriptors.
const MAX_CALLS: usize = 256;

/// Directories watched on a node, of the kernel's bound for a user; one takes about 1 KiB.
const MAX_WATCHES: usize = 65_536;

/// Responses under way to a client, each at most 256 KiB.
const OUTBOUND: usize = 4;

type Responses<T> = mpsc::Sender<Result<T, Status>>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// `SandboxFileService`.
#[derive(Debug)]
pub struct FileService {
    instances: Instances,
    slots: Arc<Semaphore>,
    watches: Arc<Semaphore>,
}

/// One call about the files of an instance, with its share of what is bounded.
#[derive(Debug)]
struct Call {
    held: Arc<Held>,
    _slots: [OwnedSemaphorePermit; 2],
}

impl Call {
    async fn ask(&self, path: &[u8], request: Ask) -> Result<(Vec<OwnedFd>, u32), Refusal> {
        self.held.call(path, request, Vec::new()).await
    }

    /// Opens one file.
    async fn open(&self, path: &[u8], how: How) -> Result<(OwnedFd, u32), Refusal> {
        let (fds, first_id) = self.ask(path, Ask::Open { path: path.to_vec(), how }).await?;
        let fd = fds.into_iter().next().ok_or_else(|| FileError::new(path, Fault::Os(libc::EBADF)))?;
        Ok((fd, first_id))
    }

    async fn stat(&self, path: &[u8], follow: bool) -> Result<FileInfo, Refusal> {
        let (fd, first_id) = self.open(path, How::Look { follow }).await?;
        info(&fd, path, first_id)
    }
}

/// What an open file is.
fn info(fd: &OwnedFd, path: &[u8], first_id: u32) -> Result<FileInfo, Refusal> {
    Ok(info::of(fd.as_fd(), c"", path, first_id).map_err(|fault| FileError::new(path, fault))?)
}

impl FileService {
    pub fn new(instances: Instances) -> Self {
        Self { instances, slots: Arc::new(Semaphore::new(MAX_CALLS)), watches: Arc::new(Semaphore::new(MAX_WATCHES)) }
    }

    fn enter(&self, metadata: &MetadataMap) -> Result<Call, Refusal> {
        let held = self.instances.enter(metadata)?;
        let slot =
            |from: &Arc<Semaphore>, what| Arc::clone(from).try_acquire_owned().map_err(|_| Refusal::Overloaded(what));
        let own = slot(&held.calls, "calls about files of this sandbox")?;
        let all = slot(&self.slots, "calls about files")?;
        Ok(Call { held, _slots: [own, all] })
    }

    async fn make_directory(&self, request: Request<MakeDirectoryRequest>) -> Result<FileInfo, Refusal> {
        let call = self.enter(request.metadata())?;
        let MakeDirectoryRequest { path, make_parents, mode, user, path_bytes } = request.into_inner();
        let path = one_path(path, path_bytes);
        let ask = Ask::MakeDirectory { path: path.clone(), make_parents, ownership: ownership(mode, &user)? };
        call.ask(&path, ask).await?;
        call.stat(&path, true).await
    }

    async fn make_symlink(&self, request: Request<MakeSymlinkRequest>) -> Result<FileInfo, Refusal> {
        let call = self.enter(request.metadata())?;
        let MakeSymlinkRequest { path, target, path_bytes } = request.into_inner();
        if target.is_empty() || target.contains('\0') {
            return Err(Refusal::Field { field: "target", what: "must be a path: not empty, no zero byte".to_owned() });
        }
        let path = one_path(path, path_bytes);
        call.ask(&path, Ask::MakeSymlink { path: path.clone(), target: target.into_bytes() }).await?;
        call.stat(&path, false).await
    }

    async fn move_file(&self, request: Request<MoveFileRequest>) -> Result<FileInfo, Refusal> {
        let call = self.enter(request.metadata())?;
        let MoveFileRequest { path, new_path, replace, path_bytes, new_path_bytes } = request.into_inner();
        let (from, to) = (one_path(path, path_bytes), one_path(new_path, new_path_bytes));
        call.ask(&from, Ask::Move { from: from.clone(), to: to.clone(), replace }).await?;
        call.stat(&to, false).await
    }

    async fn remove_file(&self, request: Request<RemoveFileRequest>) -> Result<RemoveFileResponse, Refusal> {
        let call = self.enter(request.metadata())?;
        let RemoveFileRequest { path, recursive, allow_missing, path_bytes } = request.into_inner();
        let path = one_path(path, path_bytes);
        call.ask(&path, Ask::Remove { path: path.clone(), recursive, allow_missing }).await?;
        Ok(RemoveFileResponse {})
    }
}

/// The path that a request names, in one of two fields.
fn one_path(text: String, bytes: Vec<u8>) -> Vec<u8> {
    if bytes.is_empty() { text.into_bytes() } else { bytes }
}

fn ownership(mode: u32, user: &str) -> Result<Ownership, Refusal> {
    if mode > 0o7777 {
        return Err(Refusal::Field { field: "mode", what: format!("{mode:#o} is above 07777") });
    }
    let owner = match user {
        "" => None,
        text => Some(owner(text).ok_or_else(|| Refusal::Field {
            field: "user",
            what: format!("`{text}` is neither `uid` nor `uid:gid`, numbers up to 65535"),
        })?),
    };
    Ok(Ownership { mode: (mode != 0).then_some(mode), owner })
}

fn owner(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| text.parse::<u16>().ok().map(u32::from);
    match text.split_once(':') {
        Some((user, group)) => Some((number(user)?, number(group)?)),
        None => Some((number(text)?, number(text)?)),
    }
}

fn one<T>(result: Result<T, Refusal>) -> Result<Response<T>, Status> {
    Ok(Response::new(result?))
}

#[tonic::async_trait]
impl SandboxFileService for FileService {
    type ReadFileStream = Answers<ReadFileResponse>;
    type ListDirectoryStream = Answers<ListDirectoryResponse>;
    type WatchFilesStream = Answers<WatchFilesResponse>;

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Result<Response<Self::ReadFileStream>, Status> {
        let call = self.enter(request.metadata())?;
        one(read::read(call, request.into_inner()).await)
    }

    async fn write_file(&self, request: Request<Streaming<WriteFileRequest>>) -> Result<Response<FileInfo>, Status> {
        let call = self.enter(request.metadata())?;
        one(write::write(call, request.into_inner()).await)
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Result<Response<FileInfo>, Status> {
        let call = self.enter(request.metadata())?;
        let StatFileRequest { path, follow, path_bytes } = request.into_inner();
        one(call.stat(&one_path(path, path_bytes), follow).await)
    }

    async fn list_directory(
        &self,
        request: Request<ListDirectoryRequest>,
    ) -> Result<Response<Self::ListDirectoryStream>, Status> {
        let call = self.enter(request.metadata())?;
        one(read::list(call, request.into_inner()).await)
    }

    async fn make_directory(&self, request: Request<MakeDirectoryRequest>) -> Result<Response<FileInfo>, Status> {
        one(self.make_directory(request).await)
    }

    async fn make_symlink(&self, request: Request<MakeSymlinkRequest>) -> Result<Response<FileInfo>, Status> {
        one(self.make_symlink(request).await)
    }

    async fn move_file(&self, request: Request<MoveFileRequest>) -> Result<Response<FileInfo>, Status> {
        one(self.move_file(request).await)
    }

    async fn remove_file(&self, request: Request<RemoveFileRequest>) -> Result<Response<RemoveFileResponse>, Status> {
        one(self.remove_file(request).await)
    }

    async fn watch_files(
        &self,
        request: Request<WatchFilesRequest>,
    ) -> Result<Response<Self::WatchFilesStream>, Status> {
        let call = self.enter(request.metadata())?;
        one(watch::watch(call, request.into_inner(), Arc::clone(&self.watches)).await)
    }
}
