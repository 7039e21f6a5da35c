//! `TemplateDataService`: bytes of templates in from clients and out to other agents.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes as Chunk;
use futures::Stream;
use futures::stream::try_unfold;
use metrics::counter;
use tokio::io::AsyncReadExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;
use warren_proto::v1::template_data_service_server::TemplateDataService;
use warren_proto::v1::upload_template_request::Message as Up;
use warren_proto::v1::{
    DownloadTemplateRequest, DownloadTemplateResponse, UploadTemplateHeader, UploadTemplateRequest,
    UploadTemplateResponse,
};

use super::status::Refusal;
use super::{Authority, MAX_CHUNK};
use crate::metrics::{TEMPLATE_BYTES, TEMPLATE_INGESTS};
use crate::templates::fetch::SILENCE;
use crate::templates::{MAX_TEMPLATE, TemplateError, TemplateStore};

/// Downloads served at once: enough to fill a network, few enough to leave the disk to sandboxes.
const MAX_DOWNLOADS: usize = 16;
/// Uploads served at once, waiting for their turn included.
const MAX_UPLOADS: usize = 16;

/// `TemplateDataService`.
#[derive(Debug)]
pub struct TemplateService {
    store: TemplateStore,
    authority: Authority,
    downloads: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    stop: CancellationToken,
}

impl TemplateService {
    pub fn new(store: TemplateStore, authority: Authority, stop: CancellationToken) -> Self {
        let slots = |n| Arc::new(Semaphore::new(n));
        Self { store, authority, downloads: slots(MAX_DOWNLOADS), uploads: slots(MAX_UPLOADS), stop }
    }

    async fn upload(&self, request: Request<Streaming<UploadTemplateRequest>>) -> Result<bool, Refusal> {
        let (metadata, _, mut stream) = request.into_parts();
        let (digest, size) = header(next(&mut stream).await?)?;
        self.authority.upload(&metadata, &digest)?;
        let _slot = self.uploads.try_acquire().map_err(|_| Refusal::Overloaded("template uploads"))?;
        let Some(turn) = self.store.turn(digest).await else { return Ok(true) };
        let mut ingest = self.store.ingest(turn, size)?;
        while let Some(request) = next(&mut stream).await? {
            let Some(Up::Chunk(chunk)) = request.message else {
                return Err(field("chunk", "must follow the header, and nothing else"));
            };
            if chunk.len() > MAX_CHUNK {
                return Err(field("chunk", "must be at most 1 MiB"));
            }
            counter!(TEMPLATE_BYTES, "direction" => "in").increment(chunk.len() as u64);
            ingest = ingest.write(Chunk::from(chunk)).await?;
        }
        ingest.finish().await?;
        tracing::info!(%digest, %size, "template uploaded");
        Ok(false)
    }

    async fn download(&self, request: Request<DownloadTemplateRequest>) -> Result<Download, Refusal> {
        let digest = digest("digest", &request.get_ref().digest)?;
        self.authority.download(request.metadata(), &digest)?;
        let slot =
            Arc::clone(&self.downloads).try_acquire_owned().map_err(|_| Refusal::Overloaded("template downloads"))?;
        let tar = self.store.open_tar(&digest).await?;
        Ok(Download { tar, stop: self.stop.clone(), _slot: slot })
    }
}

/// A tar on its way out.
struct Download {
    tar: tokio::fs::File,
    stop: CancellationToken,
    _slot: OwnedSemaphorePermit,
}

impl Download {
    /// The next chunk; read only when the peer has taken the last one.
    async fn next(mut self) -> Result<Option<(DownloadTemplateResponse, Self)>, Status> {
        if self.stop.is_cancelled() {
            return Err(Refusal::Stopping.into());
        }
        let mut chunk = Vec::with_capacity(MAX_CHUNK);
        let read = (&mut self.tar).take(MAX_CHUNK as u64).read_to_end(&mut chunk).await;
        let failed = |source| Refusal::Template(TemplateError::Io { what: "read a template".into(), source });
        let length = read.map_err(failed)?;
        counter!(TEMPLATE_BYTES, "direction" => "out").increment(length as u64);
        Ok((length > 0).then_some((DownloadTemplateResponse { chunk }, self)))
    }
}

#[tonic::async_trait]
impl TemplateDataService for TemplateService {
    async fn upload_template(
        &self,
        request: Request<Streaming<UploadTemplateRequest>>,
    ) -> Result<Response<UploadTemplateResponse>, Status> {
        let result = tokio::select! {
            result = self.upload(request) => result,
            () = self.stop.cancelled() => Err(Refusal::Stopping),
        };
        let label = if result.is_ok() { "ok" } else { "error" };
        counter!(TEMPLATE_INGESTS, "source" => "client", "result" => label).increment(1);
        Ok(Response::new(UploadTemplateResponse { already_held: result? }))
    }

    type DownloadTemplateStream = Pin<Box<dyn Stream<Item = Result<DownloadTemplateResponse, Status>> + Send>>;

    async fn download_template(
        &self,
        request: Request<DownloadTemplateRequest>,
    ) -> Result<Response<Self::DownloadTemplateStream>, Status> {
        let download = self.download(request).await?;
        Ok(Response::new(Box::pin(try_unfold(download, Download::next))))
    }
}

/// The next message of a client that is not silent for too long: it holds a turn.
async fn next(stream: &mut Streaming<UploadTemplateRequest>) -> Result<Option<UploadTemplateRequest>, Refusal> {
    match timeout(SILENCE, stream.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(status)) => Err(Refusal::Stream(Box::new(status))),
        Err(_) => Err(TemplateError::Silent(SILENCE.as_secs()).into()),
    }
}

fn header(first: Option<UploadTemplateRequest>) -> Result<(Digest, Bytes), Refusal> {
    let Some(UploadTemplateRequest { message: Some(Up::Header(UploadTemplateHeader { digest: text, size_bytes })) }) =
        first
    else {
        return Err(field("header", "must be the first message"));
    };
    let size = u64::try_from(size_bytes).ok().filter(|size| (1..=MAX_TEMPLATE.0).contains(size));
    let size = size.ok_or_else(|| field("header.size_bytes", "must be 1 byte to 64 GiB"))?;
    Ok((digest("header.digest", &text)?, Bytes(size)))
}

fn digest(name: &'static str, text: &str) -> Result<Digest, Refusal> {
    Digest::parse(text).map_err(|error| Refusal::Field { field: name, what: error.to_string() })
}

fn field(field: &'static str, what: &str) -> Refusal {
    Refusal::Field { field, what: what.to_owned() }
}
