//! About how many bytes a sandbox takes: what the bounds on memory count. Exact enough to bound, cheap, and equal on every replica.

use std::mem::size_of;
use std::sync::Arc;

use super::{Life, Sandbox, SandboxSpec};
use crate::state::pairs::Pairs;
use crate::state::settings::{Egress, Settings};

/// Of a pair, beside its text: two pointers with lengths.
const PAIR_BYTES: u64 = 32;

/// A sum of lengths.
fn sum(lengths: impl Iterator<Item = usize>) -> u64 {
    lengths.fold(0, |sum, length| sum.saturating_add(length as u64))
}

fn pairs<V: AsRef<B>, B: ?Sized>(of: &Pairs<V>, length: impl Fn(&B) -> usize) -> u64 {
    of.iter().fold(0, |sum: u64, (key, value)| {
        sum.saturating_add(key.len() as u64).saturating_add(length(value.as_ref()) as u64).saturating_add(PAIR_BYTES)
    })
}

impl Settings {
    fn bytes(&self) -> u64 {
        let hosts = match &self.egress {
            Egress::List(hosts) => sum(hosts.iter().map(String::len)),
            Egress::None | Egress::Public => 0,
        };
        [pairs(&self.labels, str::len), pairs(&self.annotations, str::len), hosts]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

impl SandboxSpec {
    /// What its creator chose.
    pub fn bytes(&self) -> u64 {
        let texts = [self.working_directory.len(), self.template.as_str().len()];
        [
            sum(self.command.iter().map(String::len)),
            pairs(&self.environment, str::len),
            pairs(&self.secrets, <[u8]>::len),
            sum(texts.into_iter()),
            self.settings.bytes(),
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

impl Sandbox {
    /// What its creator and updates chose: what a tenant's share of memory counts.
    pub fn chosen_bytes(&self) -> u64 {
        self.spec.bytes().saturating_add(self.updated.as_deref().map_or(0, Settings::bytes))
    }

    /// Whether [`chosen_bytes`](Self::chosen_bytes) may differ from another state's of it, at no cost.
    pub(in crate::state) fn chose_the_same(&self, other: &Self) -> bool {
        let same_update = match (&self.updated, &other.updated) {
            (None, None) => true,
            (Some(own), Some(others)) => Arc::ptr_eq(own, others),
            _ => false,
        };
        Arc::ptr_eq(&self.spec, &other.spec) && same_update
    }

    /// All of it.
    pub fn weight(&self) -> u64 {
        let told = match &self.life {
            Life::Pending { reason, .. } => reason.message.len(),
            Life::Stopped { ending, .. } => ending.output_tail.len(),
            Life::Failed { code, message, .. } => code.len().saturating_add(message.len()),
            Life::Starting { .. } | Life::Running { .. } | Life::Stopping { .. } => 0,
        };
        [size_of::<Self>() as u64, told as u64, self.chosen_bytes()].into_iter().fold(0, u64::saturating_add)
    }
}
