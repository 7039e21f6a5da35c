//! Who owns sandboxes, and how much of the region each may have.

use warren_proto::ids::{SandboxName, TenantId};
use warren_proto::units::{Bytes, Gpus, MilliCpu, Resources};

use super::State;
use super::command::LogTime;
use super::outcome::{Rejected, Reply};
use super::sandbox::{Life, MAX_SANDBOXES, Sandbox};

/// Most tenants of a region. A tenant's record is small; this bounds what a caller can make the ledger hold.
pub const MAX_TENANTS: u64 = 100_000;

/// Most sandboxes of one tenant without a quota, in any state: one tenant cannot fill the table for all others.
pub const MAX_SANDBOXES_OF_TENANT: u64 = MAX_SANDBOXES / 4 * 3;

/// Most sandboxes of one tenant that wait for a node. Few in unit tests, which fill it.
pub const MAX_PENDING_OF_TENANT: u64 = if cfg!(test) { 2_000 } else { 100_000 };

/// Most bytes that the sandboxes of a region take by what their creators chose ([`Sandbox::chosen_bytes`]): a KiB for each of
/// [`MAX_SANDBOXES`]. With specifications of 16 KiB there are 131,072.
pub const MAX_CHOSEN_BYTES: u64 = 2 << 30;

/// Most of them of one tenant: as of the sandboxes.
pub const MAX_CHOSEN_BYTES_OF_TENANT: u64 = MAX_CHOSEN_BYTES / 4 * 3;

/// Records that a new tenant looks at, after it and at the table's beginning: more than it adds, so the table shrinks.
const SWEPT_AT_ONCE: usize = 4;

/// Thousandths: a rate of less than one a minute still adds up.
const MILLI: u64 = 1000;

const MINUTE_MS: u64 = 60 * 1000;

/// Most that a tenant may have at once; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quota {
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
    pub disk: Option<Bytes>,
    pub gpus: Option<Gpus>,
    /// That have not ended.
    pub sandboxes: Option<u64>,
    /// On average; as many at once.
    pub creates_per_minute: Option<u64>,
}

/// A tenant. It comes into being with its first sandbox, or with its quota.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tenant {
    pub created: LogTime,
    /// Its own; the default holds where it has none.
    pub quota: Option<Quota>,
    /// Sandboxes that it has, in any state.
    pub sandboxes: u64,
    /// Those that have not ended, and what they ask for.
    pub live: u64,
    pub used: Resources,
    /// Those that wait for a node, and what of `used` they ask for. Derived, like `live` and `used`: never stored.
    pub pending: u64,
    pub waiting: Resources,
    /// What all of them take, by what their creators chose.
    pub chosen_bytes: u64,
    /// Creates that it may do at once, in thousandths, as of a time.
    pub creates_left: (u64, LogTime),
}

impl Tenant {
    /// The creates that it has left at `now` under a rate, in thousandths.
    fn creates_left(&self, now: LogTime, per_minute: u64) -> u64 {
        let full = per_minute.saturating_mul(MILLI);
        let (left, at) = self.creates_left;
        if at == LogTime::default() {
            return full;
        }
        let waited = now.0.saturating_sub(at.0);
        left.saturating_add(waited.saturating_mul(per_minute) / (MINUTE_MS / MILLI)).min(full)
    }

    /// What those of its sandboxes that are placed hold.
    pub fn holds(&self) -> Resources {
        self.used.saturating_sub(self.waiting)
    }

    fn count(&mut self, sandbox: &Sandbox) {
        self.sandboxes = self.sandboxes.saturating_add(1);
        self.chosen_bytes = self.chosen_bytes.saturating_add(sandbox.chosen_bytes());
        if sandbox.life.ended().is_none() {
            self.live = self.live.saturating_add(1);
            self.used = self.used.checked_add(sandbox.spec.resources).unwrap_or(self.used);
        }
        if matches!(sandbox.life, Life::Pending { .. }) {
            self.pending = self.pending.saturating_add(1);
            self.waiting = self.waiting.checked_add(sandbox.spec.resources).unwrap_or(self.waiting);
        }
    }

    fn discount(&mut self, sandbox: &Sandbox) {
        self.sandboxes = self.sandboxes.saturating_sub(1);
        self.chosen_bytes = self.chosen_bytes.saturating_sub(sandbox.chosen_bytes());
        if sandbox.life.ended().is_none() {
            self.live = self.live.saturating_sub(1);
            self.used = self.used.saturating_sub(sandbox.spec.resources);
        }
        if matches!(sandbox.life, Life::Pending { .. }) {
            self.pending = self.pending.saturating_sub(1);
            self.waiting = self.waiting.saturating_sub(sandbox.spec.resources);
        }
    }
}

/// The quota that holds for a tenant.
pub fn quota_of(state: &State, id: &TenantId) -> Quota {
    state.tenants.get(id).and_then(|tenant| tenant.quota).or(state.region.default_quota).unwrap_or_default()
}

/// The same name, with the tenant's id as its record holds it: a million sandboxes do not hold it each for itself.
pub fn shared_name(state: &State, name: &SandboxName) -> SandboxName {
    let known = state.tenants.get_key_value(&name.tenant);
    known.map_or_else(|| name.clone(), |(tenant, _)| SandboxName::new(tenant.clone(), name.id.clone()))
}

/// Keeps a tenant's counts over the change of one of its sandboxes; `None`: it is not there.
pub(super) fn recount(state: &mut State, before: Option<&Sandbox>, after: Option<&Sandbox>) {
    let counts = |sandbox: &Sandbox| {
        let waits = matches!(sandbox.life, Life::Pending { .. });
        (sandbox.life.ended().is_some(), waits, sandbox.spec.resources)
    };
    let same_bytes = before.zip(after).is_some_and(|(before, after)| before.chose_the_same(after));
    let changed = !same_bytes || before.map(counts) != after.map(counts);
    let Some(sandbox) = after.or(before).filter(|_| changed) else { return };
    let created = state.log_time;
    let new = || Tenant { created, ..Tenant::default() };
    let tenant = state.tenants.entry(sandbox.name.tenant.clone()).or_insert_with(new);
    if let Some(sandbox) = before {
        tenant.discount(sandbox);
    }
    if let Some(sandbox) = after {
        tenant.count(sandbox);
    }
}

/// Drops the record of a tenant that has nothing left. One whose rate is limited stays: its next create is counted.
pub(super) fn drop_empty(state: &mut State, id: &TenantId) {
    let limited = quota_of(state, id).creates_per_minute.is_some();
    let empty = state.tenants.get(id).is_some_and(|tenant| tenant.sandboxes == 0 && tenant.quota.is_none());
    if empty && !limited {
        state.tenants.remove(id);
    }
}

/// Drops some records that say nothing any more, next to where a new one is to stand: empty, and with their whole rate left. So a
/// region whose rates are limited has room for any number of tenants over time.
fn sweep(state: &mut State, id: &TenantId) {
    let now = state.log_time;
    let spent = |(_, tenant): &(&TenantId, &Tenant)| {
        let rate = state.region.default_quota.and_then(|quota| quota.creates_per_minute);
        let whole = rate.is_none_or(|rate| tenant.creates_left(now, rate) == rate.saturating_mul(MILLI));
        tenant.sandboxes == 0 && tenant.quota.is_none() && whole
    };
    let after = state.tenants.range(id.clone()..).take(SWEPT_AT_ONCE);
    let around = after.chain(state.tenants.iter().take(SWEPT_AT_ONCE));
    let names: Vec<TenantId> = around.filter(spent).map(|(id, _)| id.clone()).collect();
    for name in names {
        state.tenants.remove(&name);
    }
}

/// Whether a sandbox may take `wanted` bytes by what was chosen for it, instead of `had`.
pub(super) fn admit_bytes(state: &State, id: &TenantId, had: u64, wanted: u64) -> Result<(), Rejected> {
    let own = state.tenants.get(id).map_or(0, |tenant| tenant.chosen_bytes);
    let bounds = [
        ("the tenant's share of memory for specifications", own, MAX_CHOSEN_BYTES_OF_TENANT),
        ("the region's memory for specifications", state.indexes.chosen_bytes, MAX_CHOSEN_BYTES),
    ];
    for (what, all, limit) in bounds {
        if wanted > had && all.saturating_sub(had).saturating_add(wanted) > limit {
            return Err(Rejected::LimitReached { what, limit });
        }
    }
    Ok(())
}

/// Whether the tenant may have one more sandbox of this size, now; takes it off the rate. A refusal changes nothing but what
/// [`sweep`] drops.
pub(super) fn admit(state: &mut State, name: &SandboxName, wanted: Resources) -> Result<(), Rejected> {
    let id = &name.tenant;
    if !state.tenants.contains_key(id) {
        sweep(state, id);
    }
    if !state.tenants.contains_key(id) && state.tenants.len() as u64 >= MAX_TENANTS {
        return Err(Rejected::LimitReached { what: "the table of tenants", limit: MAX_TENANTS });
    }
    let quota = quota_of(state, id);
    let now = state.log_time;
    let new = || Tenant { created: now, ..Tenant::default() };
    let mut tenant = state.tenants.get(id).cloned().unwrap_or_else(new);
    if tenant.sandboxes >= MAX_SANDBOXES_OF_TENANT {
        return Err(Rejected::LimitReached { what: "the tenant's share of sandboxes", limit: MAX_SANDBOXES_OF_TENANT });
    }
    if tenant.pending >= MAX_PENDING_OF_TENANT {
        return Err(Rejected::LimitReached { what: "the tenant's share of the queue", limit: MAX_PENDING_OF_TENANT });
    }
    let Some(sum) = tenant.used.checked_add(wanted) else {
        return Err(Rejected::LimitReached { what: "the sum of what the tenant asks for", limit: u64::MAX });
    };
    within(&tenant, &quota, sum)?;
    if let Some(per_minute) = quota.creates_per_minute {
        let left = tenant.creates_left(now, per_minute);
        let Some(rest) = left.checked_sub(MILLI) else {
            let wait = MILLI.saturating_sub(left).saturating_mul(MINUTE_MS / MILLI).div_ceil(per_minute.max(1));
            return Err(Rejected::CreateRate { per_minute, retry_after_ms: wait });
        };
        tenant.creates_left = (rest, now);
    }
    state.tenants.insert(id.clone(), tenant);
    Ok(())
}

fn within(tenant: &Tenant, quota: &Quota, sum: Resources) -> Result<(), Rejected> {
    let live = tenant.live.saturating_add(1);
    let used = tenant.used;
    let dimensions = [
        ("sandboxes", quota.sandboxes, tenant.live, live),
        ("cpu_milli", quota.cpu.map(|n| n.0), used.cpu.0, sum.cpu.0),
        ("memory_bytes", quota.memory.map(|n| n.0), used.memory.0, sum.memory.0),
        ("disk_bytes", quota.disk.map(|n| n.0), used.disk.0, sum.disk.0),
        ("gpus", quota.gpus.map(|n| n.0), used.gpus.0, sum.gpus.0),
    ];
    for (dimension, limit, used, wanted) in dimensions {
        if let Some(limit) = limit
            && wanted > limit
            && wanted > used
        {
            return Err(Rejected::QuotaExceeded { dimension, used, limit });
        }
    }
    Ok(())
}

pub(super) fn set_quota(state: &mut State, id: Option<&TenantId>, quota: Option<Quota>) -> Result<Reply, Rejected> {
    let Some(id) = id else {
        state.region.default_quota = quota;
        return Ok(Reply::Done);
    };
    if !state.tenants.contains_key(id) && state.tenants.len() as u64 >= MAX_TENANTS {
        return Err(Rejected::LimitReached { what: "the table of tenants", limit: MAX_TENANTS });
    }
    let created = state.log_time;
    state.tenants.entry(id.clone()).or_insert_with(|| Tenant { created, ..Tenant::default() }).quota = quota;
    drop_empty(state, id);
    Ok(Reply::Done)
}
