//! Who owns sandboxes.

use super::command::LogTime;

/// Most tenants of a region. A tenant's record is small; this bounds what a caller can make the ledger hold.
pub const MAX_TENANTS: u64 = 100_000;

/// A tenant. It comes into being with its first sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    pub created: LogTime,
    /// Sandboxes that it has, in any state.
    pub sandboxes: u64,
}
