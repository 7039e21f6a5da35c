//! What of a sandbox may change, and the choices of its creator. Defaults are absent, so a sandbox that says none of this has the
//! bytes that it had before there was any of it.

use warren_proto::v1 as pb;
use warren_proto::v1::stored_settings::Expiry as WireExpiry;
use warren_proto::v1::{StoredEgressMode, StoredIsolation, StoredRestart};

use super::CodecError;
use super::part::{map, small_pairs};
use crate::state::command::LogTime;
use crate::state::settings::{Egress, Expiry, Isolation, MAX_PRIORITY, Restart, Settings};

pub(super) fn settings_to(from: &Settings) -> pb::StoredSettings {
    let (egress, egress_allow) = match &from.egress {
        Egress::None => (StoredEgressMode::Unspecified, Vec::new()),
        Egress::Public => (StoredEgressMode::Public, Vec::new()),
        Egress::List(allow) => (StoredEgressMode::List, allow.clone()),
    };
    pb::StoredSettings {
        labels: small_pairs(&from.labels),
        annotations: small_pairs(&from.annotations),
        expiry: match from.expiry {
            Expiry::Never => None,
            Expiry::At(at) => Some(WireExpiry::AtMs(at.0)),
            Expiry::After(ms) => Some(WireExpiry::AfterMs(ms)),
        },
        egress: egress.into(),
        egress_allow,
        priority: u32::from(from.priority),
    }
}

/// A spec's, whose labels stand beside them.
pub(super) fn settings_beside_labels(from: &Settings) -> Option<pb::StoredSettings> {
    let stored = pb::StoredSettings { labels: Vec::new(), ..settings_to(from) };
    (stored != pb::StoredSettings::default()).then_some(stored)
}

pub(super) fn settings(from: pb::StoredSettings) -> Result<Settings, CodecError> {
    let egress = match from.egress() {
        StoredEgressMode::Unspecified | StoredEgressMode::None => Egress::None,
        StoredEgressMode::Public => Egress::Public,
        StoredEgressMode::List => Egress::List(from.egress_allow),
    };
    let priority = u8::try_from(from.priority).ok().filter(|priority| *priority <= MAX_PRIORITY);
    Ok(Settings {
        labels: map(from.labels),
        annotations: map(from.annotations),
        expiry: match from.expiry {
            None => Expiry::Never,
            Some(WireExpiry::AtMs(at)) => Expiry::At(LogTime(at)),
            Some(WireExpiry::AfterMs(ms)) => Expiry::After(ms),
        },
        egress,
        priority: priority.ok_or(CodecError::Malformed { field: "settings.priority" })?,
    })
}

pub(super) fn restart_to(from: Restart) -> i32 {
    match from {
        Restart::Never => StoredRestart::Unspecified,
        Restart::OnFailure => StoredRestart::OnFailure,
        Restart::Always => StoredRestart::Always,
    }
    .into()
}

pub(super) fn restart(from: i32) -> Restart {
    match StoredRestart::try_from(from) {
        Ok(StoredRestart::OnFailure) => Restart::OnFailure,
        Ok(StoredRestart::Always) => Restart::Always,
        Ok(StoredRestart::Unspecified | StoredRestart::Never) | Err(_) => Restart::Never,
    }
}

pub(super) fn isolation_to(from: Isolation) -> i32 {
    match from {
        Isolation::Keep => StoredIsolation::Unspecified,
        Isolation::Freeze => StoredIsolation::Freeze,
    }
    .into()
}

pub(super) fn isolation(from: i32) -> Isolation {
    match StoredIsolation::try_from(from) {
        Ok(StoredIsolation::Freeze) => Isolation::Freeze,
        Ok(StoredIsolation::Unspecified | StoredIsolation::Keep) | Err(_) => Isolation::Keep,
    }
}
