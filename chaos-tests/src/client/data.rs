//! The data plane: executing in a sandbox, and the bytes of templates.

use anyhow::{Context, bail};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};
use warren_proto::v1::sandbox_data_service_client::SandboxDataServiceClient;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::{
    BeginTemplateUploadRequest, CloseStdin, CreateTemplateRequest, ExecRequest, ExecResponse, ExecStart, ExitStatus,
    Template, UploadTemplateHeader, UploadTemplateRequest, exec_request, exec_response, upload_template_request,
};

use super::{Attempts, Client, retry};
use crate::image::Image;

/// What the data plane takes in one message.
const CHUNK_BYTES: usize = 1 << 20;

/// What a process in a sandbox wrote, and how it ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: ExitStatus,
}

impl ExecOutput {
    /// Standard output without the last line break, where the process succeeded.
    pub fn text(&self) -> anyhow::Result<String> {
        if self.exit.code != 0 {
            bail!("exit code {}: {}", self.exit.code, String::from_utf8_lossy(&self.stderr));
        }
        Ok(String::from_utf8(self.stdout.clone())?.trim_end_matches('\n').to_owned())
    }
}

impl Client {
    /// Executes a command to its end, with `stdin` as its input. After a break it is executed again: use for what may be.
    pub async fn exec(&self, sandbox: &str, command: &[&str], stdin: &[u8]) -> anyhow::Result<ExecOutput> {
        let mut attempts = Attempts::default();
        loop {
            match self.exec_once(sandbox, command, stdin).await {
                Ok(output) => return Ok(output),
                Err(status) => {
                    attempts.after(status).await.with_context(|| format!("exec {command:?} in {sandbox}"))?;
                }
            }
        }
    }

    /// Runs a shell script and gives back what it printed.
    pub async fn sh(&self, sandbox: &str, script: &str) -> anyhow::Result<String> {
        let output = self.exec(sandbox, &["sh", "-c", script], &[]).await?;
        output.text().with_context(|| format!("`{script}` in {sandbox}"))
    }

    /// One connect and one exec, without another attempt at the node.
    pub async fn exec_once(&self, sandbox: &str, command: &[&str], stdin: &[u8]) -> Result<ExecOutput, Status> {
        self.exec_noticing(sandbox, command, stdin, || {}).await
    }

    /// The same; `noticed` is called when output comes.
    pub async fn exec_noticing(
        &self,
        sandbox: &str,
        command: &[&str],
        stdin: &[u8],
        mut noticed: impl FnMut(),
    ) -> Result<ExecOutput, Status> {
        let place = self.connect(sandbox).await?;
        let channel = self.agent(&place.address).map_err(|error| Status::internal(format!("{error:#}")))?;
        let start =
            ExecStart { command: command.iter().map(|&word| word.to_owned()).collect(), ..ExecStart::default() };
        let mut messages = vec![exec_request::Message::Start(start)];
        messages.extend(stdin.chunks(CHUNK_BYTES).map(|chunk| exec_request::Message::Stdin(chunk.to_vec())));
        messages.push(exec_request::Message::CloseStdin(CloseStdin {}));
        let requests = messages.into_iter().map(|message| ExecRequest { message: Some(message) });
        // The stream stays open until the process ended: its end would be the caller's.
        let requests = tokio_stream::StreamExt::chain(tokio_stream::iter(requests), tokio_stream::pending());
        let request = authorized(requests, &place.token)?;
        let mut service = SandboxDataServiceClient::new(channel);
        let mut stream = retry::in_time(service.exec(request)).await?.into_inner();
        let mut output = ExecOutput::default();
        while let Some(ExecResponse { message }) = stream.message().await? {
            match message {
                Some(exec_response::Message::Stdout(bytes)) => {
                    noticed();
                    output.stdout.extend(bytes);
                }
                Some(exec_response::Message::Stderr(bytes)) => output.stderr.extend(bytes),
                Some(exec_response::Message::Exit(exit)) => return Ok(ExecOutput { exit, ..output }),
                Some(exec_response::Message::Started(_)) | None => {}
            }
        }
        Err(Status::unavailable("the stream ended before the process"))
    }

    /// Uploads an image to a node and records it as template `id`.
    pub async fn import_template(&self, id: &str, image: &Image) -> anyhow::Result<Template> {
        let mut attempts = Attempts::default();
        while let Err(status) = self.upload(image).await {
            attempts.after(status).await.context("upload the template")?;
        }
        let request = CreateTemplateRequest {
            template_id: id.to_owned(),
            template: Some(Template {
                digest: image.digest.clone(),
                size_bytes: i64::try_from(image.tar.len())?,
                ..Template::default()
            }),
            request_id: Self::request_id(),
        };
        let created = self
            .call(|channel| {
                let request = request.clone();
                async move { TemplateServiceClient::new(channel).create_template(request).await }
            })
            .await;
        created.context("record the template")
    }

    async fn upload(&self, image: &Image) -> Result<(), Status> {
        let size_bytes = i64::try_from(image.tar.len()).map_err(|_| Status::internal("image too large"))?;
        let begin = BeginTemplateUploadRequest { digest: image.digest.clone(), size_bytes };
        let place = self
            .call(|channel| {
                let begin = begin.clone();
                async move { TemplateServiceClient::new(channel).begin_template_upload(begin).await }
            })
            .await?;
        let header = UploadTemplateHeader { digest: image.digest.clone(), size_bytes };
        let mut messages = vec![upload_template_request::Message::Header(header)];
        messages
            .extend(image.tar.chunks(CHUNK_BYTES).map(|chunk| upload_template_request::Message::Chunk(chunk.to_vec())));
        let requests = messages.into_iter().map(|message| UploadTemplateRequest { message: Some(message) });
        let request = authorized(tokio_stream::iter(requests), &place.token)?;
        let channel = self.agent(&place.address).map_err(|error| Status::internal(format!("{error:#}")))?;
        TemplateDataServiceClient::new(channel).upload_template(request).await?;
        Ok(())
    }
}

fn authorized<T>(message: T, token: &str) -> Result<Request<T>, Status> {
    let value: MetadataValue<Ascii> =
        format!("Bearer {token}").parse().map_err(|_| Status::internal("the token is not ASCII"))?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}
