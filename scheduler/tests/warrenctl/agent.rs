//! The node agent's part of the fake region.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use warren_proto::v1::exec_request::Message as Up;
use warren_proto::v1::exec_response::Message as Down;
use warren_proto::v1::sandbox_data_service_server::SandboxDataService;
use warren_proto::v1::template_data_service_server::TemplateDataService;
use warren_proto::v1::upload_template_request::Message as Piece;
use warren_proto::v1::*;

use crate::fake::{Import, Region, TOKEN, Upload, error};

pub fn authorized<T>(request: &Request<T>) -> Result<(), Status> {
    let expected = format!("Bearer {TOKEN}");
    match request.metadata().get("authorization") {
        Some(value) if value.as_bytes() == expected.as_bytes() => Ok(()),
        _ => Err(error(Code::Unauthenticated, ErrorReason::TokenInvalid, "no token")),
    }
}

#[tonic::async_trait]
impl SandboxDataService for Region {
    type ExecStream = Pin<Box<dyn Stream<Item = Result<ExecResponse, Status>> + Send>>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        authorized(&request)?;
        self.check("exec")?;
        let mut requests = request.into_inner();
        let Some(Up::Start(start)) = requests.message().await?.and_then(|request| request.message) else {
            return Err(Status::invalid_argument("start comes first"));
        };
        self.book().execs.push(start.clone());
        let (to, responses) = mpsc::channel(4);
        tokio::spawn(process(self.clone(), start.command, requests, to));
        Ok(Response::new(Box::pin(
            ReceiverStream::new(responses)
                .map(|message| message.map(|message| ExecResponse { message: Some(message) })),
        )))
    }
}

/// What the programs of the fake do: `echo` gives back its input until that ends, and exits 7; `hang` waits for its input to
/// end, `deaf` for ever, and both note signals, of which `hang` dies; `break` breaks the stream; any other says its name on both outputs and exits 0.
async fn process(
    region: Region,
    command: Vec<String>,
    mut requests: Streaming<ExecRequest>,
    to: mpsc::Sender<Result<Down, Status>>,
) {
    let program = command.first().cloned().unwrap_or_default();
    let _gone = to.send(Ok(Down::Started(ExecStarted::default()))).await;
    if !["echo", "hang", "deaf", "break"].contains(&program.as_str()) {
        let _gone = to.send(Ok(Down::Stdout(format!("{program}: out\n").into_bytes()))).await;
        let _gone = to.send(Ok(Down::Stderr(format!("{program}: err\n").into_bytes()))).await;
        let _gone = to.send(Ok(Down::Exit(ExitStatus::default()))).await;
        return;
    }
    if program == "break" {
        let _gone = to.send(Err(Status::unavailable("the agent went away"))).await;
        return;
    }
    while let Ok(Some(request)) = requests.message().await {
        match request.message {
            Some(Up::Stdin(bytes)) if program == "echo" => drop(to.send(Ok(Down::Stdout(bytes))).await),
            Some(Up::CloseStdin(_)) if program != "deaf" => break,
            Some(Up::Signal(signal)) => {
                region.book().signals.push(signal);
                region.changed.notify_waiters();
                if program == "hang" {
                    let killed = ExitStatus { code: 128 + signal, signal, ..Default::default() };
                    return drop(to.send(Ok(Down::Exit(killed))).await);
                }
            }
            Some(Up::Resize(size)) => {
                region.book().resizes.push(size);
                region.changed.notify_waiters();
            }
            _ => {}
        }
    }
    let _gone = to.send(Ok(Down::Exit(ExitStatus { code: 7, ..Default::default() }))).await;
}

#[tonic::async_trait]
impl TemplateDataService for Region {
    async fn upload_template(
        &self,
        request: Request<Streaming<UploadTemplateRequest>>,
    ) -> Result<Response<UploadTemplateResponse>, Status> {
        authorized(&request)?;
        self.check("upload")?;
        let mut pieces = request.into_inner();
        let mut upload = Upload::default();
        while let Some(piece) = pieces.message().await? {
            match piece.message {
                Some(Piece::Header(header)) => upload.header = header,
                Some(Piece::Chunk(chunk)) => {
                    upload.largest = upload.largest.max(chunk.len());
                    upload.bytes.extend(chunk);
                }
                None => {}
            }
        }
        self.book().uploads.push(upload);
        Ok(Response::new(UploadTemplateResponse { already_held: false }))
    }

    type ImportTemplateStream = Pin<Box<dyn Stream<Item = Result<ImportTemplateResponse, Status>> + Send>>;

    async fn import_template(
        &self,
        request: Request<Streaming<ImportTemplateRequest>>,
    ) -> Result<Response<Self::ImportTemplateStream>, Status> {
        authorized(&request)?;
        self.check("import")?;
        let mut messages = request.into_inner();
        let mut import = Import::default();
        while let Some(message) = messages.message().await? {
            match message.message {
                Some(import_template_request::Message::Header(header)) => import.header = header,
                Some(import_template_request::Message::Chunk(chunk)) => import.bytes.extend(chunk),
                None => {}
            }
        }
        self.book().imports.push(import);
        let progress = ImportProgress { stage: 2, done_bytes: 1, total_bytes: 2 };
        let imported = ImportedTemplate {
            digest: format!("sha256:{}", "1".repeat(64)),
            size_bytes: 10_240,
            default_command: vec!["python3".into()],
            environment: [("A".to_owned(), "image".to_owned()), ("B".to_owned(), "image".to_owned())].into(),
            working_directory: "/image".into(),
            user: "nobody".into(),
            image_digest: format!("sha256:{}", "2".repeat(64)),
        };
        let answers = [
            import_template_response::Message::Progress(progress),
            import_template_response::Message::Imported(imported),
        ];
        let answers = answers.map(|message| Ok(ImportTemplateResponse { message: Some(message) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    type DownloadTemplateStream = Pin<Box<dyn Stream<Item = Result<DownloadTemplateResponse, Status>> + Send>>;

    async fn download_template(
        &self,
        _: Request<DownloadTemplateRequest>,
    ) -> Result<Response<Self::DownloadTemplateStream>, Status> {
        Err(Status::unimplemented("for agents"))
    }
}
