//! How much may be under way on this replica at once, and how much of that one tenant may have: one that calls without end is told to
//! come back, and the others do not notice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;
use warren_proto::ids::TenantId;

use super::status;

/// The bounds of one kind of call.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// What is counted, as errors call it.
    pub what: &'static str,
    /// Most of this replica.
    pub whole: usize,
    /// Most of one tenant.
    pub of_tenant: usize,
}

/// What is under way of one kind. Clones share it.
#[derive(Debug, Clone)]
pub struct Shares {
    bounds: Bounds,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// Only tenants that have some.
    tenants: BTreeMap<TenantId, usize>,
}

/// A part that is taken until it is dropped.
#[derive(Debug)]
pub struct Share {
    taken: Arc<Mutex<Taken>>,
    tenant: Option<TenantId>,
    count: usize,
}

impl Shares {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, taken: Arc::default() }
    }

    /// Takes `count` for a tenant; what is about no tenant or all of them counts for the whole alone.
    pub fn take(&self, tenant: Option<&TenantId>, count: usize) -> Result<Share, Status> {
        let Bounds { what, whole, of_tenant } = self.bounds;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all = taken.all.saturating_add(count);
        if let Some(tenant) = tenant {
            let own = taken.tenants.get(tenant).map_or(0, |own| *own).saturating_add(count);
            if own > of_tenant {
                return Err(status::tenant_overloaded(what, tenant, of_tenant));
            }
            if all <= whole {
                taken.tenants.insert(tenant.clone(), own);
            }
        }
        if all > whole {
            return Err(status::replica_overloaded(what, whole));
        }
        taken.all = all;
        Ok(Share { taken: self.taken.clone(), tenant: tenant.cloned(), count })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all = taken.all.saturating_sub(self.count);
        let Some(tenant) = &self.tenant else { return };
        let left = taken.tenants.get(tenant).map_or(0, |own| own.saturating_sub(self.count));
        if left == 0 {
            taken.tenants.remove(tenant);
        } else {
            taken.tenants.insert(tenant.clone(), left);
        }
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::error::{metadata_of, reason_of, retry_after_of};
    use warren_proto::v1::ErrorReason;

    use super::*;

    #[test]
    fn a_tenant_has_its_share_the_replica_its_whole_and_what_ends_makes_room() {
        let tenant = |id| TenantId::parse(id).unwrap();
        let (a, b) = (tenant("a"), tenant("b"));
        let shares = Shares::new(Bounds { what: "waits", whole: 5, of_tenant: 3 });
        let three = shares.take(Some(&a), 3).unwrap();
        let more = shares.take(Some(&a), 1).unwrap_err();
        assert_eq!(
            (reason_of(&more), metadata_of(&more, "tenant").as_deref()),
            (Some(ErrorReason::Overloaded), Some("a"))
        );
        let two = shares.take(Some(&b), 2).unwrap();
        for tenant in [Some(&b), None] {
            let full = shares.take(tenant, 1).unwrap_err();
            assert_eq!(metadata_of(&full, "limit").as_deref(), Some("5"));
            assert!(retry_after_of(&full).is_some(), "it says to retry");
        }
        drop(three);
        let _one = shares.take(Some(&a), 1).unwrap();
        drop(two);
        let _all = shares.take(None, 4).unwrap();
        assert!(shares.take(None, 1).is_err());
        drop((_one, _all));
        assert!(shares.taken.lock().unwrap().tenants.is_empty(), "nothing is left of those that ended");
    }
}
