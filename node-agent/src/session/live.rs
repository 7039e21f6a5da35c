//! One stream to one replica: Hello and Welcome, then renewals, assignments and observations until it breaks.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use rand::Rng;
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use warren_proto::v1::agent_session_service_client::AgentSessionServiceClient;
use warren_proto::v1::open_session_request::Message as Up;
use warren_proto::v1::open_session_response::Message as Down;
use warren_proto::v1::{Hello, Label, OpenSessionRequest, OpenSessionResponse, RenewLease, ResyncAssignment, Welcome};

use super::wire::Told;
use super::{End, Session};
use crate::assignment::{AssignmentError, Outcome, Update};
use crate::clock::BootInstant;
use crate::fence::Fence;
use crate::metrics::{RENEWAL_SECONDS, RESYNCS, SESSION_UP};
use crate::supervisor::Supervisor;

/// From connecting to the Welcome; the leader may have to commit the registration first.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Messages under way to the leader; one that does not read them for a third of a lease is given up.
const OUTBOUND: usize = 32;
/// Changes that come within this time of what was sent last travel together: a burst of starts is a few messages, and one alone
/// waits for nothing.
const COALESCE: Duration = Duration::from_millis(10);
/// Renewals whose grant is awaited; an older one is forgotten.
const MAX_PENDING: usize = 8;
/// An assignment of 1,000 sandboxes of 16 KiB each, twice.
const MAX_MESSAGE: usize = 32 << 20;
/// Shortest lease that is believed: below, renewals would be all that a node does.
const MIN_LEASE: Duration = Duration::from_millis(100);

/// A registered stream.
struct Live<'a> {
    session: &'a Session,
    up: mpsc::Sender<OpenSessionRequest>,
    down: Streaming<OpenSessionResponse>,
    lease: Duration,
    told: Told,
    sequence: u64,
    /// When each renewal without a grant was sent.
    pending: BTreeMap<u64, BootInstant>,
    resync_asked: bool,
    /// A renewal was granted.
    leased: bool,
    /// Before the Hello was sent.
    opened: BootInstant,
    /// Whether the Hello said that a fence lives.
    fenced: bool,
}

impl Session {
    /// Lives through one stream.
    pub(super) async fn live(&mut self, channel: Channel, address: &str) -> End {
        let (up, rx) = mpsc::channel(OUTBOUND);
        let opened = BootInstant::now();
        let fenced = self.facts.fence.as_ref().is_some_and(Fence::is_alive);
        let mut changes = self.supervisor.listen();
        let (observation, told) = Told::everything(&self.supervisor.observe());
        let hello = OpenSessionRequest { message: Some(Up::Hello(self.hello(observation, fenced))) };
        if up.try_send(hello).is_err() {
            return End::Refused("the Hello does not fit".into());
        }
        let mut client = AgentSessionServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let handshake = async {
            let mut down = client.open_session(ReceiverStream::new(rx)).await?.into_inner();
            let first = down.message().await?;
            Ok::<_, tonic::Status>((down, first))
        };
        let (down, welcome) = match timeout(HANDSHAKE, handshake).await {
            Ok(Ok((down, Some(OpenSessionResponse { message: Some(Down::Welcome(welcome)) })))) => (down, welcome),
            Ok(Ok(_)) => return End::Refused("the first message was no Welcome".into()),
            Ok(Err(status)) => return End::of(&status, false),
            Err(_) => return End::Refused(format!("no Welcome within {HANDSHAKE:?}")),
        };
        let lease = match self.welcomed(&welcome).await {
            Ok(lease) => lease,
            Err(end) => return end,
        };
        tracing::info!(address, ledger = welcome.ledger_id, ?lease, "registered");
        gauge!(SESSION_UP).set(1.0);
        self.counters.opened();
        let live = Live {
            session: self,
            up,
            down,
            lease,
            told,
            sequence: 0,
            pending: BTreeMap::new(),
            resync_asked: false,
            leased: false,
            opened,
            fenced,
        };
        live.run(&mut changes).await
    }

    fn hello(&self, observation: warren_proto::v1::Observation, fence: bool) -> Hello {
        let facts = &self.facts;
        let label = |(key, value): (&String, &String)| Label { key: key.clone(), value: value.clone() };
        Hello {
            node: facts.name.clone(),
            incarnation: facts.incarnation.to_string(),
            ledger_id: self.membership.ledger_id().unwrap_or_default(),
            data_plane_address: facts.data_plane_address.clone(),
            data_plane_tls: facts.data_plane_tls,
            capacity: Some(facts.capacity),
            labels: facts.labels.iter().map(label).collect(),
            drivers: facts.drivers.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            observation: Some(observation),
            fence,
            gpus: facts.gpus.clone(),
        }
    }

    /// Checks the Welcome and keeps what it says.
    async fn welcomed(&mut self, welcome: &Welcome) -> Result<Duration, End> {
        let lease = Duration::from_millis(u64::try_from(welcome.lease_ms).unwrap_or(0));
        if lease < MIN_LEASE || welcome.ledger_id.is_empty() {
            return Err(End::Refused(format!("a Welcome with lease {lease:?}, ledger `{}`", welcome.ledger_id)));
        }
        match self.membership.ledger_id() {
            Some(ours) if ours != welcome.ledger_id => self.change_ledger(&ours, &welcome.ledger_id).await?,
            Some(_) => {}
            None => self.remember(&welcome.ledger_id).await?,
        }
        let keys = welcome.token_keys.clone().unwrap_or_default();
        self.membership.replace_keys(&keys).map_err(|error| End::Refused(error.to_string()))?;
        self.membership.register(&welcome.ledger_id);
        self.candidates.welcomed(&welcome.scheduler_addresses);
        Ok(lease)
    }

    /// The leader knows the node's ledger as the one that its own was restored from (others it refuses). First the journal
    /// says whose the sandboxes are, then the node belongs to the new ledger: killed in between it starts over.
    async fn change_ledger(&self, ours: &str, theirs: &str) -> Result<(), End> {
        tracing::warn!(
            from = ours,
            to = theirs,
            "the ledger was restored: what it does not name is frozen and reported"
        );
        let marked = self.supervisor.change_ledger().await;
        marked.map_err(|error| End::Refused(format!("the journal cannot be written: {error}")))?;
        self.remember(theirs).await
    }

    /// On disk before the node counts as registered there.
    async fn remember(&self, ledger_id: &str) -> Result<(), End> {
        let (file, id) = (self.ledger_file.clone(), ledger_id.to_owned());
        let written = tokio::task::spawn_blocking(move || file.write(&id)).await;
        match written.map_err(|e| e.to_string()).and_then(|r| r.map_err(|e| e.to_string())) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "the ledger id cannot be written");
                Err(End::Refused(error))
            }
        }
    }
}

impl Live<'_> {
    async fn run(mut self, changes: &mut crate::changes::Listener) -> End {
        let mut renewal = soon(Duration::ZERO);
        let mut silence = soon(self.lease);
        // What changed between the Hello and now, and tails that did not fit into it: after the first renewal, so that after a
        // failover every node has its lease before any sends much.
        let mut flush = Some(soon(self.lease / 3));
        let mut observed = self.opened;
        let mut fence_changed = pin!(fence_changed(self.session.facts.fence.clone(), self.fenced));
        loop {
            let step = tokio::select! {
                message = self.down.message() => match message {
                    Ok(Some(message)) => self.receive(message, &mut silence, &mut flush).await,
                    Ok(None) => Err(End::Broken("the leader closed it".into())),
                    Err(status) => Err(End::of(&status, true)),
                },
                () = &mut renewal => {
                    renewal = soon(jittered_third(self.lease));
                    self.renew().await
                }
                () = changes.heard(), if flush.is_none() => {
                    flush = Some(soon(COALESCE.saturating_sub(BootInstant::now().since(observed))));
                    Ok(())
                }
                () = due(&mut flush) => {
                    flush = None;
                    observed = BootInstant::now();
                    self.observe().await
                }
                () = &mut fence_changed => Err(End::Broken("the fence came or went".into())),
                () = &mut silence => Err(End::Broken("no renewal was granted for a whole lease".into())),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    async fn receive(
        &mut self,
        message: OpenSessionResponse,
        silence: &mut Pin<Box<Sleep>>,
        flush: &mut Option<Pin<Box<Sleep>>>,
    ) -> Result<(), End> {
        match message.message {
            Some(Down::LeaseGranted(granted)) => {
                let first = !self.leased;
                if self.granted(granted.sequence)? {
                    *silence = soon(self.lease);
                    if first {
                        *flush = Some(soon(COALESCE));
                    }
                }
                Ok(())
            }
            Some(Down::Assignment(assignment)) => {
                self.resync_asked = false;
                self.assign(Update::try_from(assignment)).await
            }
            Some(Down::AssignmentDelta(delta)) => self.assign(Update::try_from(delta)).await,
            Some(Down::TokenKeys(keys)) => {
                let membership = &self.session.membership;
                membership.replace_keys(&keys).map_err(|error| End::Broken(error.to_string()))
            }
            Some(Down::Welcome(_)) => Err(End::Broken("a second Welcome".into())),
            // From a newer leader: what it needs an answer to, it asks by an older message too.
            None => Ok(()),
        }
    }

    async fn assign(&mut self, update: Result<Update, AssignmentError>) -> Result<(), End> {
        let update = update.map_err(|error| {
            tracing::error!(%error, "the leader sent an assignment that makes no sense");
            End::Broken(error.to_string())
        })?;
        let supervisor: &Supervisor = &self.session.supervisor;
        match supervisor.apply(update, self.opened) {
            Outcome::NeedWhole if !self.resync_asked => {
                self.resync_asked = true;
                counter!(RESYNCS).increment(1);
                self.send(Up::Resync(ResyncAssignment {})).await
            }
            Outcome::Applied | Outcome::Stale | Outcome::NeedWhole => Ok(()),
        }
    }

    async fn renew(&mut self) -> Result<(), End> {
        self.sequence += 1;
        let sequence = self.sequence;
        // The lease counts from before the sending: it can only be shorter than the leader thinks.
        self.pending.insert(sequence, BootInstant::now());
        if self.pending.len() > MAX_PENDING {
            self.pending.pop_first();
        }
        self.send(Up::RenewLease(RenewLease { sequence })).await
    }

    /// Whether it was a grant of a renewal that was sent.
    fn granted(&mut self, sequence: u64) -> Result<bool, End> {
        let Some(sent) = self.pending.remove(&sequence) else { return Ok(false) };
        self.pending = self.pending.split_off(&sequence);
        let now = BootInstant::now();
        let took = now.since(sent);
        histogram!(RENEWAL_SECONDS).record(took.as_secs_f64());
        self.session.counters.granted(took > self.lease / 3);
        let (membership, supervisor) = (&self.session.membership, &self.session.supervisor);
        if supervisor.needs_new_session(self.opened, membership.lapsed_since(self.opened, now)) {
            // The ledger may have moved sandboxes meanwhile, and this session's assignment may not say so yet.
            return Err(End::Broken("the lease had lapsed: starting anew".into()));
        }
        let until = sent.plus(self.lease);
        membership.extend_lease(until);
        supervisor.leased(until, self.opened);
        self.leased = true;
        Ok(true)
    }

    async fn observe(&mut self) -> Result<(), End> {
        for observation in self.told.changes(self.session.supervisor.observe()) {
            self.send(Up::Observation(observation)).await?;
        }
        Ok(())
    }

    async fn send(&self, message: Up) -> Result<(), End> {
        let sending = self.up.send(OpenSessionRequest { message: Some(message) });
        match timeout(self.lease / 3, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Broken("the stream is closed".into())),
            Err(_) => Err(End::Broken("the leader does not read".into())),
        }
    }
}

/// Returns once a Hello that said `fenced` is wrong.
async fn fence_changed(fence: Option<Fence>, fenced: bool) {
    let changed = match fence {
        Some(fence) => fence.watch_alive().wait_for(|alive| *alive != fenced).await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending::<()>().await;
    }
}

fn soon(after: Duration) -> Pin<Box<Sleep>> {
    Box::pin(sleep(after))
}

/// When `timer` is over; never without one.
async fn due(timer: &mut Option<Pin<Box<Sleep>>>) {
    match timer {
        Some(timer) => timer.await,
        None => std::future::pending().await,
    }
}

/// A little less than a third, so that renewals of many nodes spread and two may be lost.
fn jittered_third(lease: Duration) -> Duration {
    (lease / 3).mul_f64(rand::rng().random_range(0.8..=1.0))
}
