//! The files of the fake's node agent: a map.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use warren_proto::v1::read_file_response::Message as Down;
use warren_proto::v1::sandbox_file_service_server::SandboxFileService;
use warren_proto::v1::write_file_request::Message as Up;
use warren_proto::v1::*;

use crate::agent::authorized;
use crate::fake::{FakeFile, Region, error};

/// Bytes in one piece of a read.
const PIECE: usize = 1000;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn info(path: &str, file: &FakeFile) -> FileInfo {
    FileInfo {
        path: path.into(),
        kind: file.kind.into(),
        size_bytes: i64::try_from(file.data.len()).unwrap_or(0),
        mode: file.mode,
        symlink_target: file.target.clone(),
        ..FileInfo::default()
    }
}

impl Region {
    fn found(&self, path: &str) -> Result<FileInfo, Status> {
        if path == "/" {
            return Ok(info(path, &FakeFile { kind: FileKind::Directory, ..FakeFile::default() }));
        }
        let missing = || error(Code::NotFound, ErrorReason::InvalidField, &format!("there is no {path}"));
        self.book().files.get(path).map(|file| info(path, file)).ok_or_else(missing)
    }

    fn put(&self, path: &str, file: FakeFile) -> Result<Response<FileInfo>, Status> {
        self.book().files.insert(path.into(), file);
        Ok(Response::new(self.found(path)?))
    }
}

#[tonic::async_trait]
impl SandboxFileService for Region {
    type ReadFileStream = Answers<ReadFileResponse>;
    type ListDirectoryStream = Answers<ListDirectoryResponse>;
    type WatchFilesStream = Answers<WatchFilesResponse>;

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Result<Response<Self::ReadFileStream>, Status> {
        authorized(&request)?;
        let request = request.into_inner();
        let first = self.found(&request.path)?;
        let mut book = self.book();
        book.reads.push(request.offset);
        let data = book.files[&request.path].data.clone();
        let from = usize::try_from(request.offset).unwrap_or(0).min(data.len());
        let breaks = book.break_reads.pop_front();
        let end = breaks.map_or(data.len(), |after| (from + after).min(data.len()));
        let pieces = data[from..end].chunks(PIECE).map(|bytes| match bytes.iter().any(|&byte| byte != 0) {
            true => Down::Data(bytes.to_vec()),
            false => Down::Hole(i64::try_from(bytes.len()).unwrap_or(0)),
        });
        let mut messages: Vec<_> = [Down::File(first)].into_iter().chain(pieces).map(Ok).collect();
        messages.extend(breaks.map(|_| Err(Status::unavailable("the agent went away"))));
        let wire = |message: Result<Down, Status>| message.map(|m| ReadFileResponse { message: Some(m) });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages).map(wire))))
    }

    async fn write_file(&self, request: Request<Streaming<WriteFileRequest>>) -> Result<Response<FileInfo>, Status> {
        authorized(&request)?;
        self.check("write")?;
        let mut pieces = request.into_inner();
        let (mut header, mut data) = (WriteFileHeader::default(), Vec::new());
        while let Some(piece) = pieces.message().await? {
            match piece.message {
                Some(Up::Header(first)) => header = first,
                Some(Up::Data(bytes)) => data.extend(bytes),
                Some(Up::Hole(length)) => data.resize(data.len() + usize::try_from(length).unwrap_or(0), 0),
                None => {}
            }
        }
        self.book().writes.push(header.clone());
        let file = FakeFile { kind: FileKind::File, mode: header.mode, data, target: String::new() };
        self.put(&header.path, file)
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Result<Response<FileInfo>, Status> {
        authorized(&request)?;
        Ok(Response::new(self.found(&request.get_ref().path)?))
    }

    async fn list_directory(
        &self,
        request: Request<ListDirectoryRequest>,
    ) -> Result<Response<Self::ListDirectoryStream>, Status> {
        authorized(&request)?;
        let request = request.into_inner();
        let root = format!("{}/", request.path.trim_end_matches('/'));
        let book = self.book();
        let below = |path: &&String| match path.strip_prefix(&root) {
            Some(name) => request.recursive || !name.contains('/'),
            None => false,
        };
        let there = book.files.keys().filter(below).map(|path| info(path, &book.files[path]));
        let pages: Vec<_> = there.chain(book.listing.clone()).map(|entry| vec![entry]).collect();
        let wire = |entries| Ok(ListDirectoryResponse { entries });
        Ok(Response::new(Box::pin(tokio_stream::iter(pages).map(wire))))
    }

    async fn make_directory(&self, request: Request<MakeDirectoryRequest>) -> Result<Response<FileInfo>, Status> {
        let request = request.into_inner();
        let file = FakeFile { kind: FileKind::Directory, mode: request.mode, ..FakeFile::default() };
        self.put(&request.path, file)
    }

    async fn make_symlink(&self, request: Request<MakeSymlinkRequest>) -> Result<Response<FileInfo>, Status> {
        let request = request.into_inner();
        if self.found(&request.path).is_ok() {
            return Err(error(Code::AlreadyExists, ErrorReason::InvalidField, "it is there"));
        }
        let file = FakeFile { kind: FileKind::Symlink, target: request.target, ..FakeFile::default() };
        self.put(&request.path, file)
    }

    async fn move_file(&self, request: Request<MoveFileRequest>) -> Result<Response<FileInfo>, Status> {
        let request = request.into_inner();
        self.found(&request.path)?;
        let file = self.book().files.remove(&request.path).unwrap_or_default();
        self.put(&request.new_path, file)
    }

    async fn remove_file(&self, request: Request<RemoveFileRequest>) -> Result<Response<RemoveFileResponse>, Status> {
        let request = request.into_inner();
        if !request.allow_missing {
            self.found(&request.path)?;
        }
        self.book().files.remove(&request.path);
        Ok(Response::new(RemoveFileResponse {}))
    }

    async fn watch_files(&self, _: Request<WatchFilesRequest>) -> Result<Response<Self::WatchFilesStream>, Status> {
        Err(Status::unimplemented("nobody watches"))
    }
}
