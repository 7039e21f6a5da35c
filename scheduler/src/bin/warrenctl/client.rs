//! Calls to the schedulers: endpoints in turn, retries that are safe, a bound on how long.
//!
//! Every change carries a request id that all its retries share, so a call whose outcome is unknown is simply made again.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use warren_proto::client::{self, ChannelError, ClientTls};
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::tenant_service_client::TenantServiceClient;

use crate::context::Settings;
use crate::failure::Failure;
use crate::retry::{Backoff, is_transient};

/// Longest that one attempt may take before another endpoint is tried: a little more than the longest that a healthy
/// scheduler thinks about an answer (10 s, for a template's first holder).
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(12);

/// Largest answer: a page of 1,000 sandboxes with specifications of 16 KiB and tails of 4 KiB.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// How long stale reads are tried: no election has to be waited for.
const STALE_PATIENCE: Duration = Duration::from_secs(5);

/// Items on a page of a list: the most that a scheduler gives.
pub const PAGE_SIZE: i32 = 1000;

/// How fresh what is read must be.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Reads {
    /// Read what any replica has, which may be behind, instead of asking the leader
    #[arg(long, global = true)]
    stale: bool,
    /// Read from any replica that has reached this revision, as an earlier answer carried it
    #[arg(long, global = true, value_name = "N", conflicts_with = "stale")]
    min_revision: Option<u64>,
}

/// The region's schedulers.
#[derive(Debug)]
pub struct Client {
    endpoints: Vec<(String, Channel)>,
    /// The endpoint that answered last, counted on from there.
    preferred: AtomicUsize,
    tls: ClientTls,
    reads: Reads,
    pub tenant: String,
    pub timeout: Duration,
}

impl Client {
    pub fn new(settings: Settings, reads: Reads, timeout: Duration) -> Result<Self, Failure> {
        let tls = ClientTls::load(&settings.tls).map_err(usage)?;
        let connect = |address: String| client::channel(&address, &tls).map(|channel| (address, channel));
        let endpoints = settings.endpoints.into_iter().map(connect).collect::<Result<Vec<_>, _>>().map_err(usage)?;
        if endpoints.is_empty() {
            return Err(Failure::Usage("no endpoints: --endpoints names schedulers, as host:port,...".to_owned()));
        }
        Ok(Self { endpoints, preferred: AtomicUsize::new(0), tls, reads, tenant: settings.tenant, timeout })
    }

    /// The same schedulers, asked for what any of them has: for when none leads. One that is there answers at once.
    pub fn reading_stale(&self) -> Self {
        Self {
            endpoints: self.endpoints.clone(),
            preferred: AtomicUsize::new(0),
            tls: self.tls.clone(),
            reads: Reads { stale: true, min_revision: None },
            tenant: self.tenant.clone(),
            timeout: self.timeout.min(STALE_PATIENCE),
        }
    }

    /// Another replica, by the address that the group knows.
    pub fn channel(&self, address: &str) -> Result<Channel, Failure> {
        client::channel(address, &self.tls).map_err(usage)
    }

    /// Every endpoint by itself.
    pub fn endpoints(&self) -> impl Iterator<Item = (&str, Channel)> {
        self.endpoints.iter().map(|(address, channel)| (address.as_str(), channel.clone()))
    }

    /// A connection to a node agent's data plane that stands, so a failure to connect is known to have done nothing.
    pub async fn connect_agent(&self, address: &str, tls: bool) -> Result<Channel, Failure> {
        if tls && !self.tls.enabled() {
            return Err(Failure::Usage(format!("the node agent at {address} speaks TLS: give --tls-ca")));
        }
        let plain = ClientTls::default();
        let connecting = client::connected(address, if tls { &self.tls } else { &plain });
        connecting.await.map_err(|error| match error {
            ChannelError::Unreachable { address, source } => {
                Failure::Unreachable { what: format!("the node agent at {address}"), error: source }
            }
            other => usage(other),
        })
    }

    /// A request that only reads, as fresh as was asked for.
    pub fn reading<T>(&self, message: T) -> Request<T> {
        let mut request = within(message);
        if let Some(revision) = self.reads.min_revision {
            request.metadata_mut().insert("warren-min-revision", revision.into());
        }
        if self.reads.stale { stale(request) } else { request }
    }

    /// When a call that begins now gives up.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Makes a call until it is answered or time is up. `call` must be safe to make twice.
    pub async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_until(self.deadline(), call).await
    }

    /// As [`call`](Self::call), with a deadline of the caller's.
    pub async fn call_until<T, F>(&self, deadline: Instant, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut backoff = Backoff::new(self.endpoints.len(), deadline);
        // How the last attempt failed, unless it was only cut short by the deadline: that says less.
        let mut last = None;
        loop {
            let at = self.preferred.load(Ordering::Relaxed);
            let (address, channel) = &self.endpoints[at % self.endpoints.len()];
            let patience = ATTEMPT_TIMEOUT.min(deadline.saturating_duration_since(Instant::now()));
            let status = match tokio::time::timeout(patience, call(channel.clone())).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_elapsed) => match last.take() {
                    Some(failure) if patience < ATTEMPT_TIMEOUT => return Err(failure),
                    _ => Status::unavailable(format!("no answer within {patience:.1?}")),
                },
            };
            if !is_transient(&status) {
                return Err(status.into());
            }
            // Only the first of many calls that failed there moves on.
            let _moved = self.preferred.compare_exchange(at, at.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
            let pause = backoff.pause(&status);
            let failure = Failure::GaveUp { endpoint: address.clone(), status: Box::new(status) };
            let Some(pause) = pause else { return Err(failure) };
            last = Some(failure);
            tokio::time::sleep(pause).await;
        }
    }
}

fn usage(error: ChannelError) -> Failure {
    Failure::Usage(error.to_string())
}

/// A request whose deadline the server sees too.
pub fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ATTEMPT_TIMEOUT);
    request
}

/// A request that any replica answers from what it has, also without a leader.
pub fn stale<T>(mut request: Request<T>) -> Request<T> {
    request.metadata_mut().insert("warren-consistency", MetadataValue::from_static("stale"));
    request
}

/// A request to a node agent, with the token that a scheduler gave for it.
pub fn bearing<T>(message: T, token: &str) -> Result<Request<T>, Failure> {
    let mut request = Request::new(message);
    let bearer = format!("Bearer {token}").parse();
    let bearer = bearer.map_err(|_| Failure::Failed("the scheduler gave an unusable token".to_owned()))?;
    request.metadata_mut().insert("authorization", bearer);
    Ok(request)
}

/// A new id for one change and all its retries.
pub fn request_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

pub fn sandboxes(channel: Channel) -> SandboxServiceClient<Channel> {
    SandboxServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

pub fn templates(channel: Channel) -> TemplateServiceClient<Channel> {
    TemplateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

pub fn nodes(channel: Channel) -> NodeServiceClient<Channel> {
    NodeServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

pub fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

pub fn tenants(channel: Channel) -> TenantServiceClient<Channel> {
    TenantServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}
