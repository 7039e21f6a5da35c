//! Watches: what happens to sandboxes, without gaps.
//!
//! A watch reads the ring of events in committed state, from its own position, each time the state has moved. It holds no
//! queue that could overflow: one that is read too slowly finds its position gone from the ring and is told `COMPACTED`.
//! Positions mean the same on every replica, so a token continues anywhere.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use warren_proto::v1::WatchSandboxesResponse;
use warren_proto::v1::watch_sandboxes_response::Kind;

use super::filter::{Filter, Seen};
use super::{convert, status};
use crate::controller::Controller;
use crate::raft::Leadership;
use crate::state::State;
use crate::state::event::Position;
use crate::state::sandbox::Sandbox;

/// Most watches of one replica: each costs a task and a few buffers.
const MAX_WATCHERS: usize = 4096;

/// Responses that wait for a slow client; then the watch waits, and reads on from the ring afterwards.
const OUTBOUND: usize = 64;

/// Events that are read from the ring at a time.
const READ_AT_ONCE: usize = 256;

/// How long a client may read nothing: by then a busy region's ring has passed it.
const MAX_STALL: Duration = Duration::from_secs(60);

pub type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchSandboxesResponse, Status>> + Send>>;

/// Where a watch continues: the ledger, and a position in it.
pub fn watch_token(state: &State, position: Position) -> String {
    let ledger = state.ledger_id.unwrap_or_default().0.to_be_bytes();
    let bytes = [&ledger[..], &position.index.to_be_bytes()[..], &position.ordinal.to_be_bytes()[..]].concat();
    URL_SAFE_NO_PAD.encode(bytes)
}

fn read_token(state: &State, token: &str) -> Result<Position, Status> {
    let wrong = || status::invalid_field("watch_token", "must be one that a list or a watch gave");
    let bytes: [u8; 28] = URL_SAFE_NO_PAD.decode(token).map_err(|_| wrong())?.try_into().map_err(|_| wrong())?;
    let (ledger, rest) = bytes.split_at(16);
    let (index, ordinal) = rest.split_at(8);
    if ledger != state.ledger_id.unwrap_or_default().0.to_be_bytes() {
        return Err(status::compacted("the token belongs to another ledger: list again"));
    }
    Ok(Position {
        index: u64::from_be_bytes(index.try_into().map_err(|_| wrong())?),
        ordinal: u32::from_be_bytes(ordinal.try_into().map_err(|_| wrong())?),
    })
}

/// The watches of one replica.
#[derive(Debug, Clone)]
pub struct Watchers {
    slots: Arc<Semaphore>,
}

impl Default for Watchers {
    fn default() -> Self {
        Self { slots: Arc::new(Semaphore::new(MAX_WATCHERS)) }
    }
}

impl Watchers {
    /// Starts a watch from `token`, or from what `state` holds where it is empty.
    pub fn start(
        &self,
        controller: &Controller,
        state: &Arc<State>,
        filter: Filter,
        token: &str,
    ) -> Result<WatchStream, Status> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| status::too_many_watchers(MAX_WATCHERS))?;
        let begin = match token {
            "" => None,
            token => {
                let position = read_token(state, token)?;
                state.events.after(position, 0).map_err(status::compacted)?;
                Some(position)
            }
        };
        let (out, responses) = mpsc::channel(OUTBOUND);
        let watch = Watch {
            filter,
            position: begin.unwrap_or(Position::end_of(state.revision)),
            states: controller.replica().watch_state(),
            follows: !matches!(*controller.replica().leadership().borrow(), Leadership::Leader { .. }),
            leadership: controller.replica().leadership(),
            controller: controller.clone(),
            out,
            _slot: slot,
        };
        let current = begin.is_none().then(|| state.clone());
        tokio::spawn(watch.run(current));
        Ok(Box::pin(ReceiverStream::new(responses)))
    }
}

struct Watch {
    filter: Filter,
    /// It began on a replica that does not lead, as its caller wanted, and goes on there.
    follows: bool,
    /// Everything up to here has been sent.
    position: Position,
    states: watch::Receiver<Arc<State>>,
    leadership: watch::Receiver<Leadership>,
    controller: Controller,
    out: mpsc::Sender<Result<WatchSandboxesResponse, Status>>,
    _slot: OwnedSemaphorePermit,
}

/// The client went away.
struct Gone;

impl Watch {
    async fn run(mut self, current: Option<Arc<State>>) {
        if let Some(state) = current
            && self.send_current(&state).await.is_err()
        {
            return;
        }
        loop {
            let state = self.states.borrow_and_update().clone();
            if self.send_changes(&state).await.is_err() {
                return;
            }
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return },
                _ = self.leadership.changed() => {
                    if self.must_move() {
                        return self.end(status::no_leader());
                    }
                }
                () = self.controller.stopping() => {
                    return self.end(status::no_leader());
                }
                () = self.out.closed() => return,
            }
        }
    }

    async fn send_current(&self, state: &Arc<State>) -> Result<(), Gone> {
        let Ok(current) = self.filter.walk(state, None) else { return Err(Gone) };
        for sandbox in current {
            self.send(state, Kind::Current, Some(sandbox)).await?;
        }
        self.send(state, Kind::Synced, None).await
    }

    /// Everything between the watch's position and `state`.
    async fn send_changes(&mut self, state: &Arc<State>) -> Result<(), Gone> {
        loop {
            let events = match state.events.after(self.position, READ_AT_ONCE) {
                Ok(events) => events,
                Err(compacted) => {
                    self.end(status::compacted(compacted));
                    return Err(Gone);
                }
            };
            if events.is_empty() {
                return Ok(());
            }
            for event in &events {
                self.position = event.position;
                let kind = match self.filter.see(state, event) {
                    None => continue,
                    Some(Seen::Appeared) => Kind::Created,
                    Some(Seen::Changed) => Kind::Updated,
                    Some(Seen::Disappeared) => Kind::Deleted,
                };
                self.send(state, kind, Some(&event.sandbox)).await?;
            }
        }
    }

    /// A watch that began on the leader ends with its leadership: it must see what is acknowledged elsewhere.
    fn must_move(&self) -> bool {
        !self.follows && !matches!(*self.leadership.borrow(), Leadership::Leader { .. })
    }

    /// Tells why, if the client still reads; it does not wait for one that does not.
    fn end(&self, status: Status) {
        let _not_read = self.out.try_send(Err(status));
    }

    async fn send(&self, state: &Arc<State>, kind: Kind, sandbox: Option<&Arc<Sandbox>>) -> Result<(), Gone> {
        let response = WatchSandboxesResponse {
            kind: kind.into(),
            sandbox: sandbox.map(|sandbox| convert::sandbox(state, sandbox)),
            watch_token: watch_token(state, self.position),
        };
        // A client that reads nothing holds neither the replica's end up nor its slot for ever.
        tokio::select! {
            sent = self.out.send(Ok(response)) => sent.map_err(|_closed| Gone),
            () = self.controller.stopping() => Err(Gone),
            () = tokio::time::sleep(MAX_STALL) => Err(Gone),
        }
    }
}
