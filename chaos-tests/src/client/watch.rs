//! Changes of sandboxes, as one sequence over any number of breaks.

use tonic::metadata::MetadataValue;
use tonic::{Request, Status, Streaming};
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{WatchSandboxesRequest, WatchSandboxesResponse};

use super::{Attempts, Client, TENANT, retry};

/// A watch that opens itself again, at another scheduler, from its last token.
#[derive(Debug)]
pub struct Watcher {
    client: Client,
    token: String,
    stream: Option<Streaming<WatchSandboxesResponse>>,
    at: usize,
    stale: bool,
    /// How often it was opened.
    pub opened: u32,
}

impl Client {
    /// From `token`; when that is empty, first everything that is there.
    pub fn watch(&self, token: String) -> Watcher {
        Watcher { client: self.clone(), token, stream: None, at: 0, stale: false, opened: 0 }
    }
}

impl Watcher {
    /// At any replica, by what that has applied.
    #[must_use]
    pub fn stale(self) -> Self {
        Self { stale: true, ..self }
    }

    /// The next event.
    pub async fn next(&mut self) -> Result<WatchSandboxesResponse, Status> {
        let mut attempts = Attempts::default();
        loop {
            let failure = match self.receive().await {
                Ok(Some(event)) => {
                    self.remember(&event);
                    return Ok(event);
                }
                Ok(None) => Status::unavailable("the watch ended"),
                Err(status) => status,
            };
            self.stream = None;
            self.client.leave(self.at);
            attempts.after(failure).await?;
        }
    }

    async fn receive(&mut self) -> Result<Option<WatchSandboxesResponse>, Status> {
        if self.stream.is_none() {
            self.at = self.client.shared.current.load(std::sync::atomic::Ordering::Relaxed);
            let mut request = Request::new(WatchSandboxesRequest {
                parent: TENANT.to_owned(),
                watch_token: self.token.clone(),
                ..Default::default()
            });
            if self.stale {
                request.metadata_mut().insert("warren-consistency", MetadataValue::from_static("stale"));
            }
            let mut service = SandboxServiceClient::new(self.client.scheduler(self.at));
            self.stream = Some(retry::in_time(service.watch_sandboxes(request)).await?.into_inner());
            self.opened += 1;
        }
        match &mut self.stream {
            Some(stream) => stream.message().await,
            None => Ok(None),
        }
    }

    /// Before everything current was sent, a break means to begin again.
    fn remember(&mut self, event: &WatchSandboxesResponse) {
        if event.kind() != Kind::Current && !event.watch_token.is_empty() {
            self.token.clone_from(&event.watch_token);
        }
    }
}
