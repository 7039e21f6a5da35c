//! Making templates of images and directories: a node does it; this tells it of what, sends it the bytes, and shows how far it is.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use futures::{Stream, stream};
use indicatif::{ProgressBar, ProgressStyle};
use warren_proto::v1::import_progress::Stage;
use warren_proto::v1::import_template_header::Source as WireSource;
use warren_proto::v1::import_template_request::Message as In;
use warren_proto::v1::import_template_response::Message as Out;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::{
    BeginTemplateImportRequest, BeginTemplateImportResponse, ImageArchive, ImportProgress, ImportTemplateHeader,
    ImportTemplateRequest, ImportedTemplate, RegistryImage,
};

use crate::client::{Client, bearing, templates, within};
use crate::failure::Failure;
use crate::pack;
use crate::upload::{self, MAX_UPLOADS};

const GZIP: [u8; 2] = [0x1f, 0x8b];

/// What a template is made of.
#[derive(Debug)]
pub enum Source {
    Registry(RegistryImage),
    Archive { file: ArchiveFile, tag: String },
}

/// A tar that is there, or one that was made and goes with this.
#[derive(Debug)]
pub enum ArchiveFile {
    Given(PathBuf),
    Packed(tempfile::NamedTempFile),
}

impl ArchiveFile {
    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Packed(file) => file.path(),
        }
    }
}

/// What the words after a template's name mean.
#[derive(Debug)]
pub enum Named {
    /// A plain tar of a root file system, which is uploaded as it is.
    Tar(PathBuf),
    /// All else is made into one by a node.
    Other(Source),
}

/// `oci:PATH[:TAG]`, a directory, a tar or a compressed tar.
pub fn named(text: &str) -> Result<Named, Failure> {
    if let Some(rest) = text.strip_prefix("oci:") {
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (rest, ""),
        };
        return archive(Path::new(path), tag).map(Named::Other);
    }
    let path = Path::new(text);
    let is_packed = path.is_dir() || is_gzip(path).map_err(Failure::io(format!("read {text}")))?;
    if is_packed { archive(path, "").map(Named::Other) } else { Ok(Named::Tar(path.to_owned())) }
}

fn is_gzip(path: &Path) -> std::io::Result<bool> {
    let mut magic = Vec::new();
    File::open(path)?.take(2).read_to_end(&mut magic)?;
    Ok(magic == GZIP)
}

fn archive(path: &Path, tag: &str) -> Result<Source, Failure> {
    let failed = || Failure::io(format!("read {}", path.display()));
    let file = if fs::metadata(path).map_err(failed())?.is_dir() {
        let file = tempfile::NamedTempFile::new().map_err(Failure::io("make a temporary file"))?;
        let out = file.reopen().map_err(Failure::io("open a temporary file"))?;
        pack::pack(path, out).map_err(Failure::io(format!("pack {}", path.display())))?;
        ArchiveFile::Packed(file)
    } else {
        ArchiveFile::Given(path.to_owned())
    };
    Ok(Source::Archive { file, tag: tag.to_owned() })
}

impl Source {
    fn header(&self) -> Result<(WireSource, Option<File>), Failure> {
        match self {
            Self::Registry(image) => Ok((WireSource::Registry(image.clone()), None)),
            Self::Archive { file, tag } => {
                let path = file.path();
                let failed = || Failure::io(format!("read {}", path.display()));
                let file = File::open(path).map_err(failed())?;
                let size = file.metadata().map_err(failed())?.len();
                let size_bytes = i64::try_from(size).unwrap_or(i64::MAX);
                Ok((WireSource::Archive(ImageArchive { size_bytes, tag: tag.clone() }), Some(file)))
            }
        }
    }
}

/// Has a node make the template's bytes; another, or the same again, when that breaks.
pub async fn import(client: &Client, source: &Source) -> Result<ImportedTemplate, Failure> {
    let mut tries = 0;
    let mut deadline = client.deadline();
    loop {
        let begin = |c| async move { templates(c).begin_template_import(within(BeginTemplateImportRequest {})).await };
        let place = client.call_until(deadline, begin).await?;
        let failure = match send(client, &place, source).await {
            Ok(imported) => {
                eprintln!("{} made {}", place.node, imported.digest);
                return Ok(imported);
            }
            Err(failure) => failure,
        };
        tries += 1;
        if tries == MAX_UPLOADS || !upload::is_worth_another(&failure) {
            return Err(failure);
        }
        eprintln!("{}: {failure}; trying again", place.node);
        deadline = client.deadline();
        upload::pause(&failure, deadline).await;
    }
}

async fn send(
    client: &Client,
    place: &BeginTemplateImportResponse,
    source: &Source,
) -> Result<ImportedTemplate, Failure> {
    let channel = client.connect_agent(&place.address, place.tls).await?;
    let (header, file) = source.header()?;
    let header = In::Header(ImportTemplateHeader { source: Some(header) });
    let request = bearing(messages(header, file), &place.token)?;
    let mut answers = TemplateDataServiceClient::new(channel).import_template(request).await?.into_inner();
    let bar = bar();
    let mut imported = None;
    while let Some(answer) = answers.message().await? {
        match answer.message {
            Some(Out::Progress(progress)) => show(&bar, progress),
            Some(Out::Imported(last)) => imported = Some(last),
            None => {}
        }
    }
    bar.finish_and_clear();
    imported.ok_or_else(|| Failure::Failed("the node ended the import without a result".into()))
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template("{msg:10} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show(bar: &ProgressBar, progress: ImportProgress) {
    bar.set_message(match progress.stage() {
        Stage::Unspecified => "waiting",
        Stage::Receiving => "uploading",
        Stage::Pulling => "pulling",
        Stage::Flattening => "flattening",
        Stage::Unpacking => "unpacking",
    });
    bar.set_length(u64::try_from(progress.total_bytes).unwrap_or(0));
    bar.set_position(u64::try_from(progress.done_bytes).unwrap_or(0));
}

/// The header, then the file in pieces, if there is one.
fn messages(header: In, file: Option<File>) -> impl Stream<Item = ImportTemplateRequest> + Send {
    stream::unfold((Some(header), file), |(header, file)| async move {
        let (message, file) = match (header, file) {
            (Some(header), file) => (header, file),
            (None, Some(file)) => {
                let (chunk, file) = tokio::task::spawn_blocking(move || upload::read(file)).await.ok()??;
                (In::Chunk(chunk), Some(file))
            }
            (None, None) => return None,
        };
        Some((ImportTemplateRequest { message: Some(message) }, (None, file)))
    })
}
