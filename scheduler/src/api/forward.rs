//! A follower forwards API calls to the leader, as they are: unary and streaming alike, nothing is decoded.
//!
//! So a plain client works against any replica, behind any balancer. Calls that are about one replica (its agents' sessions,
//! its own status, reflection, health) stay. A call that was forwarded once is not forwarded again: a leader that has just
//! lost its office answers `NO_LEADER`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response};
use tonic::body::Body;
use tonic::transport::Channel;
use tower::{Layer, Service, ServiceExt};
use tracing::debug;
use warren_proto::client::{self, ClientTls};

use super::{read, status};
use crate::raft::{LeaderInfo, Leadership, Replica};

/// Set on a forwarded call.
const FORWARDED: &str = "warren-forwarded";

/// On every answer: a ledger index that holds what the answer says.
const REVISION: &str = "warren-revision";

/// How long a call waits for a leader to appear: about an election.
const LEADER_PATIENCE: Duration = Duration::from_secs(2);

/// Calls that last: each holds a stream of a connection for as long as it is open.
const LASTING: [&str; 3] = [
    "/warren.v1.SandboxService/WatchSandboxes",
    "/warren.v1.SandboxService/WaitSandbox",
    "/warren.v1.ClusterService/Backup",
];

/// Connections to the leader for calls that last, beside the one for all others: 4,096 streams each, together more than the waits and
/// watches that a replica serves. Where they are all taken, calls that last wait, and no other does.
const LANES: usize = 8;

/// What any replica answers by itself.
const LOCAL: [&str; 6] = [
    "/warren.v1.AgentSessionService/",
    "/warren.v1.ClusterService/GetReplicaStatus",
    "/warren.v1.ClusterService/CheckState",
    "/warren.v1.ClusterService/GetDebugInfo",
    "/grpc.reflection.",
    "/grpc.health.",
];

/// Puts [`Forward`] before the services.
#[derive(Debug, Clone)]
pub struct ForwardLayer {
    peers: Arc<Peers>,
}

#[derive(Debug)]
struct Peers {
    replica: Replica,
    tls: ClientTls,
    /// By address and lane; lane 0 is for calls that do not last.
    channels: Mutex<BTreeMap<(String, usize), Channel>>,
    /// Calls that last take turns.
    turn: AtomicUsize,
}

impl ForwardLayer {
    pub fn new(replica: Replica, tls: ClientTls) -> Self {
        Self { peers: Arc::new(Peers { replica, tls, channels: Mutex::default(), turn: AtomicUsize::new(0) }) }
    }
}

impl<S> Layer<S> for ForwardLayer {
    type Service = Forward<S>;

    fn layer(&self, inner: S) -> Forward<S> {
        Forward { inner, peers: self.peers.clone() }
    }
}

/// Serves here, or hands on.
#[derive(Debug, Clone)]
pub struct Forward<S> {
    inner: S,
    peers: Arc<Peers>,
}

/// Where a call is served.
enum Route {
    Here,
    Leader(LeaderInfo),
    Nowhere,
}

impl Peers {
    async fn route(&self, forwarded: bool) -> Route {
        let mut leadership = self.replica.leadership();
        let known = leadership.wait_for(|now| !matches!(now, Leadership::Follower { leader: None }));
        let now = match tokio::time::timeout(LEADER_PATIENCE, known).await {
            Ok(Ok(now)) => now.clone(),
            Ok(Err(_)) | Err(_) => return Route::Nowhere,
        };
        match now {
            Leadership::Leader { .. } => Route::Here,
            Leadership::Follower { leader: Some(leader) } if !forwarded => Route::Leader(leader),
            Leadership::Follower { .. } => Route::Nowhere,
        }
    }

    /// One channel a replica and lane; there are as many replicas as there were leaders.
    fn channel(&self, address: &str, lane: usize) -> Option<Channel> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (address.to_owned(), lane);
        if let Some(channel) = channels.get(&key) {
            return Some(channel.clone());
        }
        let channel = client::channel(address, &self.tls).ok()?;
        channels.insert(key, channel.clone());
        Some(channel)
    }

    fn lane(&self, path: &str) -> usize {
        if LASTING.contains(&path) { 1 + self.turn.fetch_add(1, Ordering::Relaxed) % LANES } else { 0 }
    }

    /// Says how far this replica has come: everything that the answer says stands at or before that revision.
    fn with_revision(&self, mut response: Response<Body>) -> Response<Body> {
        let revision = HeaderValue::from(self.replica.state().revision);
        response.headers_mut().insert(REVISION, revision);
        response
    }

    async fn forward(&self, leader: &LeaderInfo, mut request: Request<Body>) -> Response<Body> {
        let lane = self.lane(request.uri().path());
        let Some(mut channel) = self.channel(&leader.api_address, lane) else {
            return status::no_leader().into_http();
        };
        if let Err(error) = channel.ready().await {
            debug!(leader = %leader.api_address, %error, "the leader cannot be reached");
            return status::no_leader().into_http();
        }
        request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
        match channel.call(request).await {
            Ok(response) => response,
            Err(error) if never_sent(&error) => {
                debug!(leader = %leader.api_address, %error, "the leader cannot be connected to");
                status::no_leader().into_http()
            }
            Err(error) => {
                debug!(leader = %leader.api_address, %error, "forwarding broke");
                status::outcome_unknown().into_http()
            }
        }
    }
}

/// Whether a call failed because there was no connection: then nothing was done.
fn never_sent(error: &tonic::transport::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

impl<S> Service<Request<Body>> for Forward<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let peers = self.peers.clone();
        // The one that was polled ready must be the one that is called.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let path = request.uri().path();
        if LOCAL.iter().any(|prefix| path.starts_with(prefix)) {
            return Box::pin(inner.call(request));
        }
        let forwarded = request.headers().contains_key(FORWARDED);
        let local = read::is_local(path, request.headers());
        Box::pin(async move {
            let route = if local { Route::Here } else { peers.route(forwarded).await };
            match route {
                Route::Here => inner.call(request).await.map(|response| peers.with_revision(response)),
                Route::Leader(leader) => Ok(peers.forward(&leader, request).await),
                Route::Nowhere => Ok(status::no_leader().into_http()),
            }
        })
    }
}
