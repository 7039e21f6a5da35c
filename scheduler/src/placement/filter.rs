//! Whether a node can take a request at all, and what it lacks.

use std::fmt;

use warren_proto::units::Resources;

use super::Request;
use super::view::Row;
use crate::state::sandbox::PendingCode;

/// Why a node cannot take a request: the first of these that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misfit {
    /// Its lease lapsed.
    Unreachable,
    /// An operator wants nothing more on it.
    Cordoned,
    /// No fence lives there, and the sandbox freezes on isolation.
    Unfenced,
    /// An earlier instance of the sandbox is still there.
    HoldsOld,
    /// Too small even when empty.
    TooSmall,
    ShortOfMemory,
    ShortOfCpu,
    ShortOfDisk,
    ShortOfGpus,
}

impl Misfit {
    /// What a sandbox that waits for this reason shows.
    pub fn code(self) -> PendingCode {
        match self {
            Self::Unreachable | Self::Cordoned | Self::Unfenced | Self::HoldsOld => PendingCode::NoNodes,
            Self::TooSmall => PendingCode::TooLarge,
            Self::ShortOfMemory => PendingCode::ShortOfMemory,
            Self::ShortOfCpu => PendingCode::ShortOfCpu,
            Self::ShortOfDisk => PendingCode::ShortOfDisk,
            Self::ShortOfGpus => PendingCode::ShortOfGpus,
        }
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "unreachable",
            Self::Cordoned => "cordoned",
            Self::Unfenced => "without a fence",
            Self::HoldsOld => "still holding an earlier instance of it",
            Self::TooSmall => "too small even when empty",
            Self::ShortOfMemory => "short of memory",
            Self::ShortOfCpu => "short of CPU",
            Self::ShortOfDisk => "short of disk",
            Self::ShortOfGpus => "short of GPUs",
        })
    }
}

/// `None` where the node can take the request. It compares as `apply` does when it verifies: also in a dimension that the request
/// does not ask for, where a host that shrank holds more than it has.
pub fn misfit(row: &Row, request: &Request) -> Option<Misfit> {
    let (wanted, capacity) = (request.resources, row.node.report.capacity);
    let Some(taken) = row.taken_with(wanted) else { return Some(Misfit::TooSmall) };
    if !row.node.is_ready() {
        Some(Misfit::Unreachable)
    } else if row.node.cordoned {
        Some(Misfit::Cordoned)
    } else if request.needs_fence && !row.node.report.fence {
        Some(Misfit::Unfenced)
    } else if request.avoids_old.as_ref().is_some_and(|name| row.node.has_other_instance_of(name)) {
        Some(Misfit::HoldsOld)
    } else if !wanted.fits_in(capacity) {
        Some(Misfit::TooSmall)
    } else if taken.memory > capacity.memory {
        Some(Misfit::ShortOfMemory)
    } else if taken.cpu > capacity.cpu {
        Some(Misfit::ShortOfCpu)
    } else if taken.disk > capacity.disk {
        Some(Misfit::ShortOfDisk)
    } else if taken.gpus > capacity.gpus || short_of_devices(row, wanted) {
        Some(Misfit::ShortOfGpus)
    } else {
        None
    }
}

/// Where devices have names, so many must be free: of those that are counted free one may be gone from the host.
fn short_of_devices(row: &Row, wanted: Resources) -> bool {
    !row.node.report.gpus.is_empty() && (row.free_gpus().count() as u64) < wanted.gpus.0
}
