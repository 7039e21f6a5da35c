//! `template`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use futures::stream;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use tonic::Request;
use warren_proto::client;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::upload_template_request::Message as Upload;
use warren_proto::v1::{
    BeginTemplateUploadRequest, BeginTemplateUploadResponse, CreateTemplateRequest, DeleteTemplateRequest,
    GetTemplateRequest, ListTemplatesRequest, Template, UploadTemplateHeader, UploadTemplateRequest,
};

use crate::client::{Client, request_id, templates, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Output, Row};
use crate::table::{age, bytes, details, last_segment, or_dash};

/// Bytes of a template in one message; agents take at most 1 MiB.
const CHUNK_BYTES: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Makes a template of a root file system tar
    Import {
        /// Id of the template
        name: String,
        /// The tar, uncompressed
        tar: PathBuf,
        /// Main process of sandboxes that name none: a program and its arguments
        #[arg(long, num_args = 1.., value_name = "ARG", allow_hyphen_values = true)]
        command: Vec<String>,
        /// Environment of every process
        #[arg(long, value_name = "KEY=VALUE", value_parser = names::pair)]
        env: Vec<(String, String)>,
        /// Working directory of every process
        #[arg(long, value_name = "DIR", default_value = "")]
        workdir: String,
    },
    /// All templates
    List,
    /// One template
    Show { name: String },
    /// Removes a template that no sandbox uses
    Delete { name: String },
}

impl Row for Template {
    const TYPE: &'static str = "warren.v1.Template";
    const HEADERS: &'static [&'static str] = &["TEMPLATE", "SIZE", "HOLDERS", "DIGEST", "AGE"];

    fn cells(&self) -> Vec<String> {
        vec![
            last_segment(&self.name),
            bytes(self.size_bytes),
            self.holders.len().to_string(),
            self.digest.chars().take(19).collect(),
            age(self.create_time.as_ref()),
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

pub async fn run(client: &Client, output: &Output, command: TemplateCommand) -> Result<ExitCode, Failure> {
    match command {
        TemplateCommand::Import { name, tar, command, env, workdir } => {
            let defaults = Template {
                default_command: command,
                environment: env.into_iter().collect(),
                working_directory: workdir,
                ..Template::default()
            };
            let template = import(client, &name, &tar, defaults).await?;
            output.one(&template, || template_details(&template))?;
        }
        TemplateCommand::List => output.list(&all(client).await?)?,
        TemplateCommand::Show { name } => {
            let name = names::in_collection("templates", &name);
            let get = |c| {
                let request = within(GetTemplateRequest { name: name.clone() });
                async move { templates(c).get_template(request).await }
            };
            let template = client.call(get).await?;
            output.one(&template, || template_details(&template))?;
        }
        TemplateCommand::Delete { name } => {
            let name = names::in_collection("templates", &name);
            let delete = |c| {
                let request = within(DeleteTemplateRequest { name: name.clone() });
                async move { templates(c).delete_template(request).await }
            };
            client.call(delete).await?;
            eprintln!("{name} deleted");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn template_details(template: &Template) -> String {
    details(&[
        ("Name", template.name.clone()),
        ("Digest", template.digest.clone()),
        ("Size", bytes(template.size_bytes)),
        ("Command", or_dash(template.default_command.join(" "))),
        ("Working directory", template.working_directory.clone()),
        ("Holders", or_dash(template.holders.join(", "))),
        ("Created", format!("{} ago", age(template.create_time.as_ref()))),
    ])
}

async fn all(client: &Client) -> Result<Vec<Template>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = within(ListTemplatesRequest { page_size: 1000, page_token: page_token.clone() });
            async move { templates(c).list_templates(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.templates);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

async fn import(client: &Client, name: &str, tar: &Path, defaults: Template) -> Result<Template, Failure> {
    let path = tar.to_owned();
    let hashing = tokio::task::spawn_blocking(move || hash(&path)).await;
    let (digest, size) = hashing.map_err(|error| Failure::Failed(error.to_string()))??;
    let begin = |c| {
        let request = within(BeginTemplateUploadRequest { digest: digest.clone(), size_bytes: size });
        async move { templates(c).begin_template_upload(request).await }
    };
    let place = client.call(begin).await?;
    upload(client, &place, tar, &digest, size).await?;
    let template = Template { digest, size_bytes: size, ..defaults };
    let id = request_id();
    let create = |c| {
        let request = within(CreateTemplateRequest {
            template_id: name.to_owned(),
            template: Some(template.clone()),
            request_id: id.clone(),
        });
        async move { templates(c).create_template(request).await }
    };
    client.call(create).await
}

fn bar(size: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}");
    let bar = ProgressBar::new(size).with_message(what);
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}

/// SHA-256 and size of a file.
fn hash(path: &Path) -> Result<(String, i64), Failure> {
    let what = || format!("read {}", path.display());
    let mut file = File::open(path).map_err(Failure::io(what()))?;
    let size = file.metadata().map_err(Failure::io(what()))?.len();
    let progress = bar(size, "hashing ");
    let mut hasher = Sha256::new();
    std::io::copy(&mut progress.wrap_read(&mut file), &mut hasher).map_err(Failure::io(what()))?;
    progress.finish_and_clear();
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((format!("sha256:{hex}"), i64::try_from(size).unwrap_or(i64::MAX)))
}

async fn upload(
    client: &Client,
    place: &BeginTemplateUploadResponse,
    tar: &Path,
    digest: &str,
    size: i64,
) -> Result<(), Failure> {
    let channel = client::channel(&place.address, &client.tls).map_err(|error| Failure::Usage(error.to_string()))?;
    let file = File::open(tar).map_err(Failure::io(format!("read {}", tar.display())))?;
    let progress = bar(u64::try_from(size).unwrap_or(0), "uploading");
    let header = Upload::Header(UploadTemplateHeader { digest: digest.to_owned(), size_bytes: size });
    let chunks = stream::unfold((Some(header), file, progress.clone()), |(header, file, progress)| async move {
        if let Some(header) = header {
            return Some((UploadTemplateRequest { message: Some(header) }, (None, file, progress)));
        }
        // A file that cannot be read ends early; the agent sees that bytes are missing.
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::new();
            let result = (&file).take(CHUNK_BYTES).read_to_end(&mut chunk);
            result.map(|_| (chunk, file))
        });
        let (chunk, file) = read.await.ok()?.ok()?;
        progress.inc(chunk.len() as u64);
        let more = !chunk.is_empty();
        more.then_some((UploadTemplateRequest { message: Some(Upload::Chunk(chunk)) }, (None, file, progress)))
    });
    let mut request = Request::new(chunks);
    let bearer = format!("Bearer {}", place.token).parse();
    let bearer = bearer.map_err(|_| Failure::Failed("the scheduler gave an unusable token".to_owned()))?;
    request.metadata_mut().insert("authorization", bearer);
    let response = TemplateDataServiceClient::new(channel).upload_template(request).await?.into_inner();
    progress.finish_and_clear();
    let held = if response.already_held { "held it already" } else { "holds it" };
    eprintln!("{} {held}", place.node);
    Ok(())
}
