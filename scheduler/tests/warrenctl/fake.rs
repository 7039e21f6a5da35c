//! A region in the test process: one server that plays a scheduler and a node agent, keeps a small ledger, fails when it is
//! told to, and writes down what it is asked.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;
use tonic::{Code, Status};
use warren_proto::error::ErrorBuilder;
use warren_proto::v1::cluster_service_server::ClusterServiceServer;
use warren_proto::v1::node_service_server::NodeServiceServer;
use warren_proto::v1::sandbox_data_service_server::SandboxDataServiceServer;
use warren_proto::v1::sandbox_file_service_server::SandboxFileServiceServer;
use warren_proto::v1::sandbox_log_service_server::SandboxLogServiceServer;
use warren_proto::v1::sandbox_port_service_server::SandboxPortServiceServer;
use warren_proto::v1::sandbox_process_service_server::SandboxProcessServiceServer;
use warren_proto::v1::sandbox_service_server::SandboxServiceServer;
use warren_proto::v1::template_data_service_server::TemplateDataServiceServer;
use warren_proto::v1::template_service_server::TemplateServiceServer;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::*;

/// The token of every place that the region names.
pub const TOKEN: &str = "wt1.claims.signature";

/// What the region knows, what it will do, and what it was asked.
#[derive(Debug, Default)]
pub struct Book {
    pub sandboxes: BTreeMap<String, Sandbox>,
    pub nodes: Vec<Node>,
    pub templates: Vec<Template>,
    pub status: GetClusterStatusResponse,
    /// What it says of itself as a replica.
    pub replica: GetReplicaStatusResponse,
    /// What its check of the state finds.
    pub violations: Vec<String>,
    /// Everything that a watch tells; a token is a position in it.
    pub events: Vec<WatchSandboxesResponse>,
    /// What becomes of a sandbox that is created, after STARTING.
    pub fate: Option<Sandbox>,
    /// Where the node agent is said to be, if not here.
    pub agent: Option<String>,
    /// The next failures of a method.
    pub failures: BTreeMap<&'static str, VecDeque<Status>>,
    /// A watch breaks after so many events, once.
    pub break_watch_after: Option<usize>,
    pub creates: Vec<CreateSandboxRequest>,
    pub deletes: Vec<DeleteSandboxRequest>,
    pub lists: usize,
    /// What each list asked for: nothing, `stale`, or a revision.
    pub freshness: Vec<String>,
    pub batches: Vec<BatchCreateSandboxesRequest>,
    pub connects: usize,
    pub watches: Vec<WatchSandboxesRequest>,
    pub template_creates: Vec<CreateTemplateRequest>,
    pub uploads: Vec<Upload>,
    pub imports: Vec<Import>,
    pub execs: Vec<ExecStart>,
    pub resizes: Vec<TerminalSize>,
    /// Signals that processes were sent over their stream.
    pub signals: Vec<i32>,
    pub processes: Vec<Process>,
    pub starts: Vec<StartProcessRequest>,
    pub kills: Vec<SignalProcessRequest>,
    pub attaches: Vec<AttachStart>,
    /// What each next attachment is sent at once; then it echoes.
    pub attachments: VecDeque<Vec<Result<attach_process_response::Message, Status>>>,
    pub files: BTreeMap<String, FakeFile>,
    /// What a list says, whatever there is.
    pub listing: Vec<FileInfo>,
    /// The next reads break after so many bytes.
    pub break_reads: VecDeque<usize>,
    /// From where each read began.
    pub reads: Vec<i64>,
    pub writes: Vec<WriteFileHeader>,
    pub log_reads: Vec<ReadLogsRequest>,
    /// What each next reader of the log is sent.
    pub logs: VecDeque<Vec<Result<read_logs_response::Message, Status>>>,
    pub metrics: VecDeque<SandboxMetrics>,
    pub ports: Vec<u32>,
}

/// A file of the fake's only sandbox.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct FakeFile {
    pub kind: FileKind,
    pub mode: u32,
    pub data: Vec<u8>,
    pub target: String,
}

/// One upload, as it arrived.
#[derive(Debug, Default, Clone)]
pub struct Upload {
    pub header: UploadTemplateHeader,
    pub bytes: Vec<u8>,
    pub largest: usize,
}

/// One import, as it arrived.
#[derive(Debug, Default, Clone)]
pub struct Import {
    pub header: ImportTemplateHeader,
    pub bytes: Vec<u8>,
}

/// The region; its server ends with it.
#[derive(Debug)]
pub struct Fake {
    pub address: String,
    pub region: Region,
    _stop: DropGuard,
}

/// What the services share.
#[derive(Debug, Clone)]
pub struct Region {
    book: Arc<Mutex<Book>>,
    pub changed: Arc<Notify>,
    pub address: String,
}

impl Region {
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The failure that the method was told to have next.
    pub fn check(&self, method: &'static str) -> Result<(), Status> {
        match self.book().failures.get_mut(method).and_then(VecDeque::pop_front) {
            Some(status) => Err(status),
            None => Ok(()),
        }
    }

    pub fn tell(&self, kind: Kind, sandbox: &Sandbox) {
        let mut book = self.book();
        let watch_token = (book.events.len() + 1).to_string();
        book.events.push(WatchSandboxesResponse { kind: kind.into(), sandbox: Some(sandbox.clone()), watch_token });
        drop(book);
        self.changed.notify_waiters();
    }
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let replica = GetReplicaStatusResponse {
            replica_id: 3,
            version: "0.1.0".into(),
            term: 9,
            applied_index: 41,
            ..Default::default()
        };
        let book = Arc::new(Mutex::new(Book { replica, ..Book::default() }));
        let region = Region { book, changed: Arc::default(), address: address.clone() };
        let stop = CancellationToken::new();
        let (r, stopped) = (|| region.clone(), stop.clone());
        let server = Server::builder()
            .add_service(ClusterServiceServer::new(r()))
            .add_service(NodeServiceServer::new(r()))
            .add_service(SandboxServiceServer::new(r()))
            .add_service(TemplateServiceServer::new(r()))
            .add_service(SandboxDataServiceServer::new(r()))
            .add_service(SandboxProcessServiceServer::new(r()))
            .add_service(SandboxFileServiceServer::new(r()))
            .add_service(SandboxLogServiceServer::new(r()))
            .add_service(SandboxPortServiceServer::new(r()))
            .add_service(TemplateDataServiceServer::new(r()).max_decoding_message_size((1 << 20) + 1024))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(async move {
            tokio::select! {
                served = server => served.expect("a server"),
                () = stopped.cancelled() => {}
            }
        });
        Self { address, region, _stop: stop.drop_guard() }
    }

    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.region.book()
    }

    /// The next calls of `method` fail so, in this order.
    pub fn fail(&self, method: &'static str, failures: impl IntoIterator<Item = Status>) {
        self.book().failures.entry(method).or_default().extend(failures);
    }
}

/// An error as Warren makes them.
pub fn error(code: Code, reason: ErrorReason, message: &str) -> Status {
    ErrorBuilder::new(code, reason, message).build()
}

/// An address that takes connections and breaks each as soon as something was said on it.
pub async fn broken_endpoint() -> (String, DropGuard) {
    use tokio::io::AsyncReadExt;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(stopped.run_until_cancelled_owned(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut said = [0u8; 64];
            let _broken = connection.read(&mut said).await;
        }
    }));
    (address, stop.drop_guard())
}

/// An address that nobody listens at.
pub async fn silent_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").to_string()
}
