//! Whose turn it is in the queues: dominant-resource fairness (Ghodsi et al., NSDI 2011). A tenant's dominant share is the
//! greatest, over the dimensions, of what its placed sandboxes hold of what the region has; the smallest goes first. Made anew
//! from state in each pass, with what the pass itself plans added at once, so it needs no memory.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Bound;

use warren_proto::ids::{SandboxName, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};

use crate::state::State;
use crate::state::command::LogTime;

/// Most sandboxes that a tenant has looked at in one turn while none of them fits: more than the shapes that a queue usually
/// begins with, so that a large one in front does not cost the tenant its turn; few enough that all have one in a pass.
const MAX_MISSES: usize = 64;

/// Most searches for a node in one turn, of shapes that differ: an eighth of what the first part of a pass may do.
const MAX_SEARCHES: usize = 16;

/// A place in a tenant's queue.
pub type Rank = (u8, LogTime, SandboxName);

/// A part of the whole, as a fixed-point number with 64 bits behind the point.
type Share = u128;

/// What each tenant holds of the region.
#[derive(Debug)]
pub struct Shares<'a> {
    state: &'a State,
    capacity: Resources,
    /// What was planned for each in this pass.
    planned: BTreeMap<TenantId, Resources>,
}

impl<'a> Shares<'a> {
    pub fn new(state: &'a State) -> Self {
        let nodes = state.nodes.values().map(|node| node.report.capacity);
        let capacity = nodes.fold(Resources::default(), plus);
        Self { state, capacity, planned: BTreeMap::new() }
    }

    /// The pass gave a tenant this much.
    pub fn planned(&mut self, tenant: &TenantId, resources: Resources) {
        let sum = self.planned.entry(tenant.clone()).or_default();
        *sum = plus(*sum, resources);
    }

    /// The tenant's dominant share.
    pub fn of(&self, tenant: &TenantId) -> Share {
        let held = self.state.tenants.get(tenant).map(|tenant| tenant.holds()).unwrap_or_default();
        let held = plus(held, self.planned.get(tenant).copied().unwrap_or_default());
        let all = self.capacity;
        let parts = [
            part(held.cpu.0, all.cpu.0),
            part(held.memory.0, all.memory.0),
            part(held.disk.0, all.disk.0),
            part(held.gpus.0, all.gpus.0),
        ];
        parts.into_iter().max().unwrap_or_default()
    }
}

/// Of what no node has any more, whoever holds some holds more than all.
fn part(held: u64, all: u64) -> Share {
    match (held, all) {
        (0, _) => 0,
        (_, 0) => Share::MAX,
        _ => (Share::from(held) << 64) / Share::from(all),
    }
}

fn plus(a: Resources, b: Resources) -> Resources {
    Resources {
        cpu: MilliCpu(a.cpu.0.saturating_add(b.cpu.0)),
        memory: Bytes(a.memory.0.saturating_add(b.memory.0)),
        disk: Bytes(a.disk.0.saturating_add(b.disk.0)),
        gpus: Gpus(a.gpus.0.saturating_add(b.gpus.0)),
    }
}

/// Whose turn it is: the least goes first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn<'a> {
    /// How often its turn ended with nothing placed: others come before it is tried again.
    round: usize,
    share: Share,
    /// Of equal shares, the higher priority, then the older.
    next: &'a Rank,
    /// Its queue.
    queue: usize,
}

/// What looking at one sandbox came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Look {
    pub placed: bool,
    pub searched: bool,
}

/// One tenant's queue.
struct Queue<'a> {
    tenant: &'a TenantId,
    rest: Box<dyn Iterator<Item = &'a Rank> + 'a>,
    /// Since its turn began, or something of it was placed.
    misses: usize,
    searches: usize,
}

/// All queues after some places, and in whose turn the next sandbox is looked at.
pub struct Turns<'a> {
    queues: Vec<Queue<'a>>,
    turns: BinaryHeap<Reverse<Turn<'a>>>,
}

impl<'a> Turns<'a> {
    /// A tenant that stands in `after` goes on behind that place.
    pub fn new(state: &'a State, after: &BTreeMap<TenantId, Rank>, shares: &Shares<'_>) -> Self {
        let mut all = Self { queues: Vec::new(), turns: BinaryHeap::new() };
        for (tenant, queue) in &state.indexes.queues {
            let from = after.get(tenant).map_or(Bound::Unbounded, Bound::Excluded);
            let rest = Box::new(queue.range::<_, Rank>((from, Bound::Unbounded)));
            all.queues.push(Queue { tenant, rest, misses: 0, searches: 0 });
            all.go_on(all.queues.len() - 1, 0, shares);
        }
        all
    }

    /// Looks at the next sandbox; `false` when none is left.
    pub fn next(&mut self, shares: &mut Shares<'_>, look: impl FnOnce(&mut Shares<'_>, &'a Rank) -> Look) -> bool {
        let Some(Reverse(turn)) = self.turns.pop() else { return false };
        let look = look(shares, turn.next);
        let mut round = turn.round;
        if let Some(queue) = self.queues.get_mut(turn.queue) {
            queue.misses += 1;
            queue.searches += usize::from(look.searched);
            let over = !look.placed && (queue.misses >= MAX_MISSES || queue.searches >= MAX_SEARCHES);
            if look.placed || over {
                (queue.misses, queue.searches) = (0, 0);
            }
            round += usize::from(over);
        }
        self.go_on(turn.queue, round, shares);
        true
    }

    pub fn is_over(&self) -> bool {
        self.turns.is_empty()
    }

    fn go_on(&mut self, queue: usize, round: usize, shares: &Shares<'_>) {
        if let Some(own) = self.queues.get_mut(queue)
            && let Some(next) = own.rest.next()
        {
            self.turns.push(Reverse(Turn { round, share: shares.of(own.tenant), next, queue }));
        }
    }
}
