//! Watches: what happens to sandboxes, without gaps.
//!
//! A watch reads the ring of events in committed state, from its own position, each time the state has moved. It holds no
//! queue that could overflow: one that is read too slowly finds its position gone from the ring and is told `COMPACTED`.
//! Positions mean the same on every replica, so a token continues anywhere.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::stream::{self, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::{self, WatchSandboxesResponse};

use super::filter::{Filter, Seen};
use super::shares::{Bounds, Share, Shares};
use super::{convert, status};
use crate::controller::Controller;
use crate::raft::Leadership;
use crate::state::State;
use crate::state::event::Position;

/// Watches of this replica, and of one tenant: each costs a task and a few buffers.
const WATCHES: Bounds = Bounds { what: "watches", whole: 4096, of_tenant: 1024 };

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
    shares: Shares,
}

impl Default for Watchers {
    fn default() -> Self {
        Self { shares: Shares::new(WATCHES) }
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
        let share = self.shares.take(filter.tenant(), 1)?;
        let begin = match token {
            "" => None,
            token => {
                let position = read_token(state, token)?;
                state.events.after(position, 0).map_err(status::compacted)?;
                Some(position)
            }
        };
        let (out, responses) = mpsc::channel(OUTBOUND);
        let (why, ended) = oneshot::channel();
        let watch = Watch {
            filter,
            position: begin.unwrap_or(Position::end_of(state.revision)),
            states: controller.replica().watch_state(),
            follows: !matches!(*controller.replica().leadership().borrow(), Leadership::Leader { .. }),
            leadership: controller.replica().leadership(),
            controller: controller.clone(),
            out,
            _share: share,
        };
        let current = begin.is_none().then(|| state.clone());
        tokio::spawn(watch.run(current, why));
        // After all that was sent: however slowly a client reads, it learns why the stream ends.
        let end = stream::once(ended).filter_map(async |why| why.ok().map(Err));
        Ok(Box::pin(ReceiverStream::new(responses).map(Ok).chain(end)))
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
    out: mpsc::Sender<WatchSandboxesResponse>,
    _share: Share,
}

/// A watch is over: what its client is told, if that is still there.
struct Over(Option<Status>);

impl Watch {
    async fn run(mut self, current: Option<Arc<State>>, why: oneshot::Sender<Status>) {
        let Err(Over(status)) = self.follow(current).await;
        if let Some(status) = status {
            let _gone = why.send(status);
        }
    }

    async fn follow(&mut self, current: Option<Arc<State>>) -> Result<Infallible, Over> {
        if let Some(state) = current {
            self.send_current(&state).await?;
        }
        loop {
            let state = self.states.borrow_and_update().clone();
            self.send_changes(&state).await?;
            tokio::select! {
                changed = self.states.changed() => changed.map_err(|_stopped| Over(Some(status::no_leader())))?,
                _ = self.leadership.changed() => {
                    if self.must_move() {
                        return Err(Over(Some(status::no_leader())));
                    }
                }
                () = self.controller.stopping() => return Err(Over(Some(status::no_leader()))),
                () = self.out.closed() => return Err(Over(None)),
            }
        }
    }

    async fn send_current(&self, state: &Arc<State>) -> Result<(), Over> {
        let current = self.filter.walk(state, None).map_err(|status| Over(Some(status)))?;
        for sandbox in current {
            self.send(state, Kind::Current, Some(convert::sandbox(state, sandbox))).await?;
        }
        self.send(state, Kind::Synced, None).await
    }

    /// Everything between the watch's position and `state`.
    async fn send_changes(&mut self, state: &Arc<State>) -> Result<(), Over> {
        loop {
            let events = state.events.after(self.position, READ_AT_ONCE);
            let events = events.map_err(|compacted| Over(Some(status::compacted(compacted))))?;
            if events.is_empty() {
                return Ok(());
            }
            for event in &events {
                self.position = event.position;
                let kind = match self.filter.see(event) {
                    None => continue,
                    Some(Seen::Appeared) => Kind::Created,
                    Some(Seen::Changed) => Kind::Updated,
                    Some(Seen::Disappeared) => Kind::Deleted,
                };
                self.send(state, kind, Some(convert::sandbox_of_event(event))).await?;
            }
        }
    }

    /// A watch that began on the leader ends with its leadership: it must see what is acknowledged elsewhere.
    fn must_move(&self) -> bool {
        !self.follows && !matches!(*self.leadership.borrow(), Leadership::Leader { .. })
    }

    async fn send(&self, state: &Arc<State>, kind: Kind, sandbox: Option<v1::Sandbox>) -> Result<(), Over> {
        let response =
            WatchSandboxesResponse { kind: kind.into(), sandbox, watch_token: watch_token(state, self.position) };
        // A client that reads nothing holds neither the replica's end up nor its slot for ever.
        let why = tokio::select! {
            sent = self.out.send(response) => return sent.map_err(|_closed| Over(None)),
            () = self.controller.stopping() => status::no_leader(),
            () = tokio::time::sleep(MAX_STALL) => status::compacted("it was read too slowly: list again"),
        };
        Err(Over(Some(why)))
    }
}
