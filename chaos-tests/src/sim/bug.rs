//! Bugs that are planted in the harness around the real modules, so that it is shown that the oracle would find them.
//!
//! None touches product code: each is a wrong step of the model, or a change of state or command around `apply`.

/// One planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// `apply` places a sandbox although it does not fit.
    NoFitCheck,
    /// A placement keeps the epoch of the one before.
    EpochNotBumped,
    /// An agent counts its lease from the grant's arrival, not from sending the renewal.
    LeaseFromReceipt,
    /// A leader grants renewals without having heard from a quorum.
    RenewalWithoutQuorum,
    /// A checkpoint leaves out the answers to request ids.
    RequestsNotInCheckpoint,
    /// A leader grants a renewal while it declares the node down.
    DownRacesRenewal,
    /// A leader's commands carry its wall clock, right or wrong.
    ClockPoison,
    /// A watch goes on after the last index, not after the last event.
    LostWatchEvent,
    /// An agent removes what the ledger does not know.
    OrphanKilled,
    /// Room that an uncommitted removal will free is given away already.
    OverlayCountsFrees,
    /// The brake is released when few enough nodes are suspect, however many are down already.
    BrakeCountsSuspects,
    /// An update whose answer is known is made again.
    UpdateMadeTwice,
    /// A batch of which one cannot be created keeps those before it.
    HalfBatch,
}

impl Bug {
    pub const ALL: [Self; 13] = [
        Self::NoFitCheck,
        Self::EpochNotBumped,
        Self::LeaseFromReceipt,
        Self::RenewalWithoutQuorum,
        Self::RequestsNotInCheckpoint,
        Self::DownRacesRenewal,
        Self::ClockPoison,
        Self::LostWatchEvent,
        Self::OrphanKilled,
        Self::OverlayCountsFrees,
        Self::BrakeCountsSuspects,
        Self::UpdateMadeTwice,
        Self::HalfBatch,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::NoFitCheck => "no-fit-check",
            Self::EpochNotBumped => "epoch-not-bumped",
            Self::LeaseFromReceipt => "lease-from-receipt",
            Self::RenewalWithoutQuorum => "renewal-without-quorum",
            Self::RequestsNotInCheckpoint => "requests-not-in-checkpoint",
            Self::DownRacesRenewal => "down-races-renewal",
            Self::ClockPoison => "clock-poison",
            Self::LostWatchEvent => "lost-watch-event",
            Self::OrphanKilled => "orphan-killed",
            Self::OverlayCountsFrees => "overlay-counts-frees",
            Self::BrakeCountsSuspects => "brake-counts-suspects",
            Self::UpdateMadeTwice => "update-made-twice",
            Self::HalfBatch => "half-batch",
        }
    }

    /// The rule of the design that it breaks, and that must find it.
    pub fn rule(self) -> u8 {
        match self {
            Self::NoFitCheck => 1,
            Self::EpochNotBumped | Self::LeaseFromReceipt | Self::RenewalWithoutQuorum | Self::DownRacesRenewal => 2,
            Self::UpdateMadeTwice | Self::HalfBatch => 3,
            Self::OverlayCountsFrees => 4,
            Self::OrphanKilled => 6,
            Self::LostWatchEvent => 11,
            Self::RequestsNotInCheckpoint => 13,
            Self::ClockPoison => 14,
            Self::BrakeCountsSuspects => 15,
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bug| bug.name() == name)
    }
}
