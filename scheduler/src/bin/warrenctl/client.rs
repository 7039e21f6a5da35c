//! Calls to the schedulers: endpoints in turn, retries that are safe, a bound on how long.
//!
//! Every change carries a request id, so a call whose outcome is unknown is simply made again.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::Rng;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use warren_proto::client::{self, ClientTls};
use warren_proto::error::retry_after_of;
use warren_proto::v1::cluster_service_client::ClusterServiceClient;
use warren_proto::v1::node_service_client::NodeServiceClient;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;

use crate::context::Settings;
use crate::failure::Failure;

/// Pause before the first retry; doubles, with jitter, up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// Longest that one attempt may take before another endpoint is tried.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(12);

/// The region's schedulers.
#[derive(Debug)]
pub struct Client {
    endpoints: Vec<(String, Channel)>,
    /// The endpoint that answered last.
    preferred: AtomicUsize,
    pub tenant: String,
    pub tls: ClientTls,
    pub timeout: Duration,
}

impl Client {
    pub fn new(settings: Settings, timeout: Duration) -> Result<Self, Failure> {
        let usage = |error: client::ChannelError| Failure::Usage(error.to_string());
        let tls = ClientTls::load(&settings.tls).map_err(usage)?;
        let connect = |address: String| client::channel(&address, &tls).map(|channel| (address, channel));
        let endpoints = settings.endpoints.into_iter().map(connect).collect::<Result<_, _>>().map_err(usage)?;
        Ok(Self { endpoints, preferred: AtomicUsize::new(0), tenant: settings.tenant, tls, timeout })
    }

    /// Every endpoint by itself.
    pub fn endpoints(&self) -> impl Iterator<Item = (&str, Channel)> {
        self.endpoints.iter().map(|(address, channel)| (address.as_str(), channel.clone()))
    }

    /// Makes a call until it is answered or time is up. `call` must be safe to make twice.
    pub async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_until(Instant::now() + self.timeout, call).await
    }

    /// As [`call`](Self::call), with a deadline of the caller's.
    pub async fn call_until<T, F>(&self, deadline: Instant, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            let at = self.preferred.load(Ordering::Relaxed) % self.endpoints.len();
            let attempt = tokio::time::timeout(ATTEMPT_TIMEOUT, call(self.endpoints[at].1.clone())).await;
            let status = match attempt {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_elapsed) => Status::unavailable(format!("{} does not answer", self.endpoints[at].0)),
            };
            if !is_transient(&status) || Instant::now() >= deadline {
                return Err(status.into());
            }
            // Another endpoint may do at once; the asked-for pause is for when all of them have been tried.
            self.preferred.store(at + 1, Ordering::Relaxed);
            let asked = retry_after_of(&status).unwrap_or(pause).min(LAST_PAUSE);
            let jitter = rand::rng().random_range(0.5..1.0);
            tokio::time::sleep(asked.mul_f64(jitter)).await;
            pause = LAST_PAUSE.min(pause * 2);
        }
    }
}

/// Nothing was done, or it is safe to do again.
fn is_transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Aborted | Code::Cancelled | Code::DeadlineExceeded
    ) || (status.code() == Code::ResourceExhausted && retry_after_of(status).is_some())
        || (status.code() == Code::Internal && std::error::Error::source(status).is_some())
}

/// A request whose deadline the server sees too.
pub fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ATTEMPT_TIMEOUT);
    request
}

/// A new id for one change and all its retries.
pub fn request_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

pub fn sandboxes(channel: Channel) -> SandboxServiceClient<Channel> {
    SandboxServiceClient::new(channel).max_decoding_message_size(64 << 20)
}

pub fn templates(channel: Channel) -> TemplateServiceClient<Channel> {
    TemplateServiceClient::new(channel)
}

pub fn nodes(channel: Channel) -> NodeServiceClient<Channel> {
    NodeServiceClient::new(channel).max_decoding_message_size(64 << 20)
}

pub fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel)
}
