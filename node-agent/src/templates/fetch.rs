//! Gets a template from other nodes: each holder in turn, verified, until one delivers.

use std::time::Duration;

use bytes::Bytes as Chunk;
use metrics::counter;
use tokio::time::timeout;
use tonic::Request;
use tonic::metadata::MetadataValue;
use warren_proto::client::{self, ClientTls};
use warren_proto::v1::DownloadTemplateRequest;
use warren_proto::v1::template_data_service_client::TemplateDataServiceClient;

use super::{TemplateError, TemplateStore, Turn};
use crate::assignment::{Source, TemplateRef};
use crate::metrics::{TEMPLATE_BYTES, TEMPLATE_INGESTS};

/// Holders that are tried for one start: the leader names more only in large regions, and a start must not wait long.
const MAX_SOURCES: usize = 8;

/// A peer that sends nothing for so long is given up.
pub const SILENCE: Duration = Duration::from_secs(15);

/// Makes sure that the node holds templates.
#[derive(Debug, Clone)]
pub struct Fetcher {
    pub store: TemplateStore,
    pub tls: ClientTls,
    /// This node's own data plane: never a source.
    pub own_address: String,
}

impl Fetcher {
    /// Returns once the template is here.
    pub async fn ensure(&self, template: &TemplateRef) -> Result<(), TemplateError> {
        if self.store.is_simulated() {
            self.store.add(template.digest);
            return Ok(());
        }
        let mut tries = Vec::new();
        let others = template.sources.iter().filter(|source| source.address != self.own_address);
        for source in others.take(MAX_SOURCES) {
            let Some(turn) = self.store.turn(template.digest).await else { return Ok(()) };
            match self.download(turn, template, source).await {
                Ok(()) => {
                    counter!(TEMPLATE_INGESTS, "source" => "peer", "result" => "ok").increment(1);
                    return Ok(());
                }
                Err(error) => {
                    counter!(TEMPLATE_INGESTS, "source" => "peer", "result" => "error").increment(1);
                    tracing::warn!(digest = %template.digest, peer = %source.address, %error, "template download failed");
                    tries.push(format!("{}: {error}", source.address));
                }
            }
        }
        // It may have been uploaded meanwhile, or be on its way: wait for whoever has the turn.
        if self.store.turn(template.digest).await.is_none() {
            return Ok(());
        }
        let tries = if tries.is_empty() { "none is known".to_owned() } else { tries.join("; ") };
        Err(TemplateError::Unavailable { digest: template.digest, tries })
    }

    async fn download(&self, turn: Turn, template: &TemplateRef, source: &Source) -> Result<(), TemplateError> {
        let plain = ClientTls::default();
        let channel = client::channel(&source.address, if source.tls { &self.tls } else { &plain })?;
        let mut request = Request::new(DownloadTemplateRequest { digest: template.digest.to_string() });
        let bearer = MetadataValue::try_from(format!("Bearer {}", template.download_token))
            .map_err(|_| TemplateError::Peer(Box::new(tonic::Status::unauthenticated("the token is not text"))))?;
        request.metadata_mut().insert("authorization", bearer);
        let mut peer = TemplateDataServiceClient::new(channel);
        let mut stream = in_time(peer.download_template(request)).await?.into_inner();
        let mut ingest = self.store.ingest(turn, template.size)?;
        while let Some(message) = in_time(stream.message()).await? {
            counter!(TEMPLATE_BYTES, "direction" => "in").increment(message.chunk.len() as u64);
            ingest = ingest.write(Chunk::from(message.chunk)).await?;
        }
        ingest.finish().await
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, TemplateError> {
    match timeout(SILENCE, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(status)) => Err(TemplateError::Peer(Box::new(status))),
        Err(_) => Err(TemplateError::Silent(SILENCE.as_secs())),
    }
}
