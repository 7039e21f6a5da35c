//! `TemplateDataService`: templates in from clients and registries, and out to other agents.

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
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::ids::Digest;
use warren_proto::units::Bytes;
use warren_proto::v1::import_template_header::Source;
use warren_proto::v1::import_template_request::Message as In;
use warren_proto::v1::import_template_response::Message as Out;
use warren_proto::v1::template_data_service_server::TemplateDataService;
use warren_proto::v1::upload_template_request::Message as Up;
use warren_proto::v1::{
    DownloadTemplateRequest, DownloadTemplateResponse, ImageArchive, ImportProgress, ImportTemplateRequest,
    ImportTemplateResponse, ImportedTemplate, UploadTemplateHeader, UploadTemplateRequest, UploadTemplateResponse,
};

use super::status::Refusal;
use super::{Authority, MAX_CHUNK};
use crate::metrics::{TEMPLATE_BYTES, TEMPLATE_INGESTS};
use crate::templates::fetch::SILENCE;
use crate::templates::image::registry::Credentials;
use crate::templates::import::{self, Imported, Incoming, Progress};
use crate::templates::{MAX_TEMPLATE, TemplateError, TemplateStore};

/// Downloads served at once: enough to fill a network, few enough to leave the disk to sandboxes.
const MAX_DOWNLOADS: usize = 16;
/// Uploads served at once, waiting for their turn included.
const MAX_UPLOADS: usize = 16;
/// Imports at once, waiting for their turn included.
const MAX_IMPORTS: usize = 16;

/// `TemplateDataService`.
#[derive(Debug)]
pub struct TemplateService {
    store: TemplateStore,
    authority: Authority,
    downloads: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    imports: Arc<Semaphore>,
    /// Registries that are spoken to without TLS.
    insecure: Arc<[String]>,
    stop: CancellationToken,
}

impl TemplateService {
    pub fn new(store: TemplateStore, authority: Authority, insecure: Vec<String>, stop: CancellationToken) -> Self {
        let slots = |n| Arc::new(Semaphore::new(n));
        Self {
            store,
            authority,
            downloads: slots(MAX_DOWNLOADS),
            uploads: slots(MAX_UPLOADS),
            imports: slots(MAX_IMPORTS),
            insecure: insecure.into(),
            stop,
        }
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

    /// Begins an import, which ends with the stream that tells of it.
    fn import(&self, request: Request<Streaming<ImportTemplateRequest>>) -> Result<Import, Refusal> {
        let (metadata, _, stream) = request.into_parts();
        self.authority.import(&metadata)?;
        let slot = Arc::clone(&self.imports).try_acquire_owned();
        let slot = slot.map_err(|_| Refusal::Overloaded("template imports"))?;
        let (progress, told) = Progress::new();
        let (store, insecure, stop) = (self.store.clone(), self.insecure.clone(), self.stop.clone());
        let work = tokio::spawn(async move {
            let _slot = slot;
            let result = tokio::select! {
                result = import_from(&store, &insecure, stream, progress) => result,
                () = stop.cancelled() => Err(Refusal::Stopping),
            };
            let label = if result.is_ok() { "ok" } else { "error" };
            counter!(TEMPLATE_INGESTS, "source" => "import", "result" => label).increment(1);
            result
        });
        Ok(Import { told, work: Some(AbortOnDropHandle::new(work)) })
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

async fn import_from(
    store: &TemplateStore,
    insecure: &[String],
    mut stream: Streaming<ImportTemplateRequest>,
    progress: Progress,
) -> Result<Imported, Refusal> {
    let Some(ImportTemplateRequest { message: Some(In::Header(header)) }) = next(&mut stream).await? else {
        return Err(field("header", "must be the first message"));
    };
    let imported = match header.source {
        Some(Source::Registry(image)) => {
            let credentials = Credentials { username: image.username, password: image.password };
            import::from_registry(store, &image.reference, &credentials, insecure, progress).await?
        }
        Some(Source::Archive(archive)) => receive(store, archive, stream, progress).await?,
        None => return Err(field("header.source", "must be `registry` or `archive`")),
    };
    tracing::info!(digest = %imported.digest, size = %imported.size, "template imported");
    Ok(imported)
}

async fn receive(
    store: &TemplateStore,
    archive: ImageArchive,
    mut stream: Streaming<ImportTemplateRequest>,
    progress: Progress,
) -> Result<Imported, Refusal> {
    let size = size("header.archive.size_bytes", archive.size_bytes)?;
    let _turn = store.import_turn().await;
    let mut incoming = Incoming::begin(store, size, progress)?;
    while let Some(request) = next(&mut stream).await? {
        let Some(In::Chunk(chunk)) = request.message else {
            return Err(field("chunk", "must follow the header, and nothing else"));
        };
        incoming = incoming.write(Chunk::from(chunk)).await?;
    }
    Ok(incoming.finish(store, archive.tag).await?)
}

/// An import under way, for its client: progress whenever there is some, the outcome last. Dropping it calls the import off.
struct Import {
    told: tokio::sync::watch::Receiver<ImportProgress>,
    work: Option<AbortOnDropHandle<Result<Imported, Refusal>>>,
}

impl Import {
    async fn next(mut self) -> Result<Option<(ImportTemplateResponse, Self)>, Status> {
        let Some(mut work) = self.work.take() else { return Ok(None) };
        let message = tokio::select! {
            biased;
            changed = self.told.changed() => match changed {
                Ok(()) => {
                    let progress = *self.told.borrow_and_update();
                    self.work = Some(work);
                    Out::Progress(progress)
                }
                // All is told: only the outcome is left.
                Err(_) => Out::Imported(outcome((&mut work).await)?),
            },
            result = &mut work => Out::Imported(outcome(result)?),
        };
        Ok(Some((ImportTemplateResponse { message: Some(message) }, self)))
    }
}

fn outcome(result: Result<Result<Imported, Refusal>, tokio::task::JoinError>) -> Result<ImportedTemplate, Status> {
    let ended = |error| TemplateError::Io { what: "import".into(), source: std::io::Error::other(error) };
    let imported = result.map_err(|error| Refusal::from(ended(error)))??;
    let defaults = imported.defaults;
    Ok(ImportedTemplate {
        digest: imported.digest.to_string(),
        size_bytes: i64::try_from(imported.size.0).unwrap_or(i64::MAX),
        default_command: defaults.command,
        environment: defaults.environment.into_iter().collect(),
        working_directory: defaults.working_directory,
        user: defaults.user,
        image_digest: defaults.image_digest,
    })
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

    type ImportTemplateStream = Pin<Box<dyn Stream<Item = Result<ImportTemplateResponse, Status>> + Send>>;

    async fn import_template(
        &self,
        request: Request<Streaming<ImportTemplateRequest>>,
    ) -> Result<Response<Self::ImportTemplateStream>, Status> {
        let import = self.import(request)?;
        Ok(Response::new(Box::pin(try_unfold(import, Import::next))))
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
async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Refusal> {
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
    let size = size("header.size_bytes", size_bytes)?;
    Ok((digest("header.digest", &text)?, size))
}

fn size(name: &'static str, bytes: i64) -> Result<Bytes, Refusal> {
    let size = u64::try_from(bytes).ok().filter(|size| (1..=MAX_TEMPLATE.0).contains(size));
    size.map(Bytes).ok_or_else(|| field(name, "must be 1 byte to 64 GiB"))
}

fn digest(name: &'static str, text: &str) -> Result<Digest, Refusal> {
    Digest::parse(text).map_err(|error| Refusal::Field { field: name, what: error.to_string() })
}

fn field(field: &'static str, what: &str) -> Refusal {
    Refusal::Field { field, what: what.to_owned() }
}
