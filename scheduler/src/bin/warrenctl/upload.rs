//! The bytes of a template, from a file to a node: measured first, then streamed to where a scheduler says.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::{Stream, stream};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::upload_template_request::Message as Up;
use warren_proto::v1::{
    BeginTemplateUploadRequest, BeginTemplateUploadResponse, ErrorReason, UploadTemplateHeader, UploadTemplateRequest,
};

use crate::client::{Client, bearing, templates, within};
use crate::failure::Failure;
use crate::retry::{Backoff, is_transient};

/// Bytes in one message; agents take at most 1 MiB.
const CHUNK_BYTES: u64 = 1 << 20;

/// Bytes hashed at a time.
const HASH_BYTES: usize = 1 << 20;

/// Uploads of one file before giving up: a node that vanishes in the middle is replaced, an ill one is not fed for ever.
pub const MAX_UPLOADS: usize = 4;

/// A file that is to become a template.
#[derive(Debug)]
pub struct Tar {
    path: PathBuf,
    /// `sha256:` and hexadecimal digits.
    pub digest: String,
    pub size_bytes: i64,
}

impl Tar {
    /// Reads the file once, for its digest and size.
    pub async fn measure(path: PathBuf) -> Result<Self, Failure> {
        let hashing = tokio::task::spawn_blocking(move || hash(&path).map(|(digest, size)| (path, digest, size)));
        let hashed = hashing.await.map_err(|error| Failure::Failed(format!("hashing: {error}")))?;
        let (path, digest, size) = hashed?;
        let size_bytes = i64::try_from(size).map_err(|_| Failure::Usage(format!("{} is too large", path.display())))?;
        if size_bytes == 0 {
            return Err(Failure::Usage(format!("{} is empty: expected a tar of a root file system", path.display())));
        }
        Ok(Self { path, digest, size_bytes })
    }
}

/// Digest and size of a file.
fn hash(path: &Path) -> Result<(String, u64), Failure> {
    let failed = || Failure::io(format!("read {}", path.display()));
    let mut file = File::open(path).map_err(failed())?;
    let expected = file.metadata().map_err(failed())?.len();
    let progress = bar(expected, "hashing");
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; HASH_BYTES];
    let mut size = 0u64;
    loop {
        let count = file.read(&mut buffer).map_err(failed())?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        size += count as u64;
        progress.set_position(size);
    }
    progress.finish_and_clear();
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((format!("sha256:{hex}"), size))
}

/// A bar on stderr; nothing where that is no terminal.
fn bar(size: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(size).with_message(what);
    match ProgressStyle::with_template("{msg:9} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Brings the bytes to the node that a scheduler names; to another, or the same again, when that breaks.
pub async fn upload(client: &Client, tar: &Tar) -> Result<(), Failure> {
    let mut uploads = 0;
    let mut deadline = client.deadline();
    loop {
        let place = begin(client, tar, deadline).await?;
        let failure = match send(client, &place, tar).await {
            Ok(already_held) => {
                eprintln!("{} {} {}", place.node, if already_held { "held" } else { "took" }, tar.digest);
                return Ok(());
            }
            Err(failure) => failure,
        };
        uploads += 1;
        if uploads == MAX_UPLOADS || !is_worth_another(&failure) {
            return Err(failure);
        }
        eprintln!("{}: {failure}; trying again", place.node);
        // The bytes took their time: what follows has all of its own.
        deadline = client.deadline();
        pause(&failure, deadline).await;
    }
}

pub async fn pause(failure: &Failure, deadline: Instant) {
    let again = tonic::Status::unavailable("again");
    if let Some(pause) = Backoff::new(1, deadline).pause(failure.status().unwrap_or(&again)) {
        tokio::time::sleep(pause).await;
    }
}

pub fn is_worth_another(failure: &Failure) -> bool {
    match failure {
        Failure::Unreachable { .. } => true,
        Failure::Status(status) => is_transient(status) || failure.reason() == Some(ErrorReason::TokenInvalid),
        _ => false,
    }
}

async fn begin(client: &Client, tar: &Tar, deadline: Instant) -> Result<BeginTemplateUploadResponse, Failure> {
    let request = BeginTemplateUploadRequest { digest: tar.digest.clone(), size_bytes: tar.size_bytes };
    let begin = |c| {
        let request = within(request.clone());
        async move { templates(c).begin_template_upload(request).await }
    };
    client.call_until(deadline, begin).await
}

/// Streams the file; whether the node held the bytes already.
async fn send(client: &Client, place: &BeginTemplateUploadResponse, tar: &Tar) -> Result<bool, Failure> {
    let channel = client.connect_agent(&place.address, place.tls).await?;
    let file = File::open(&tar.path).map_err(Failure::io(format!("read {}", tar.path.display())))?;
    let progress = bar(u64::try_from(tar.size_bytes).unwrap_or(0), "uploading");
    let header = Up::Header(UploadTemplateHeader { digest: tar.digest.clone(), size_bytes: tar.size_bytes });
    let messages = messages(header, file, progress.clone());
    let sent = TemplateDataServiceClient::new(channel).upload_template(bearing(messages, &place.token)?).await;
    progress.finish_and_clear();
    Ok(sent?.into_inner().already_held)
}

/// The header, then the file in pieces, each read when the one before was taken. A file that cannot be read ends early: the
/// node sees that bytes are missing, and takes nothing.
fn messages(header: Up, file: File, progress: ProgressBar) -> impl Stream<Item = UploadTemplateRequest> + Send {
    stream::unfold((Some(header), file), move |(header, file)| {
        let progress = progress.clone();
        async move {
            let (message, file) = match header {
                Some(header) => (header, file),
                None => {
                    let (chunk, file) = tokio::task::spawn_blocking(move || read(file)).await.ok()??;
                    progress.inc(chunk.len() as u64);
                    (Up::Chunk(chunk), file)
                }
            };
            Some((UploadTemplateRequest { message: Some(message) }, (None, file)))
        }
    })
}

pub fn read(file: File) -> Option<(Vec<u8>, File)> {
    let mut chunk = Vec::new();
    (&file).take(CHUNK_BYTES).read_to_end(&mut chunk).ok()?;
    (!chunk.is_empty()).then_some((chunk, file))
}
