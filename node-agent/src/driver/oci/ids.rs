//! Which user ids of the host an instance gets: a range of its own, so that a process that got out of one sandbox is a
//! stranger to every other.
//!
//! Agents that share a host do not talk to each other, so a range is first looked for at a place that the instance's name
//! decides: two agents seldom choose the same, and one agent never does.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Ids that an instance has: 0 to 65535, all that files in a template can name.
pub const RANGE: u32 = 65_536;

/// First id of the first range. Below live the host's own users and `useradd`'s defaults for nested ones.
const FIRST: u32 = 1_000_000;

/// Ranges to choose from; the last ends below 2^31, where some tools stop counting.
const RANGES: u32 = 32_000;

/// The ranges that instances of this driver hold, by container id.
#[derive(Debug, Default)]
pub struct IdRanges(Mutex<BTreeMap<String, u32>>);

impl IdRanges {
    /// Records what an instance that is already there holds.
    pub fn adopt(&self, container_id: &str, first_id: u32) {
        self.lock().insert(container_id.to_owned(), first_id);
    }

    /// First id of a range that no other instance holds; `None` when all are taken.
    pub fn take(&self, container_id: &str) -> Option<u32> {
        let mut held = self.lock();
        let start = container_id.bytes().fold(0u32, |sum, b| sum.wrapping_mul(31).wrapping_add(u32::from(b))) % RANGES;
        let first_id = (start..RANGES)
            .chain(0..start)
            .map(|n| FIRST + n * RANGE)
            .find(|first| !held.values().any(|taken| taken == first))?;
        held.insert(container_id.to_owned(), first_id);
        Some(first_id)
    }

    /// Gives an instance's range back.
    pub fn give_back(&self, container_id: &str) {
        self.lock().remove(container_id);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_instances_share_an_id_and_all_lie_below_two_to_the_31() {
        let ranges = IdRanges::default();
        let taken: BTreeSet<u32> = (0..2_000).map(|n| ranges.take(&format!("{n:x}")).expect("enough ranges")).collect();
        assert_eq!(taken.len(), 2_000);
        assert!(taken.iter().all(|first| (first - FIRST).is_multiple_of(RANGE)));
        assert!(u64::from(FIRST) + u64::from(RANGES) * u64::from(RANGE) < 1 << 31);
    }

    #[test]
    fn a_range_that_is_held_is_passed_over_until_given_back() {
        let ranges = IdRanges::default();
        let first = ranges.take("a").expect("free");
        ranges.give_back("a");
        ranges.adopt("old", first);
        assert_eq!(ranges.take("a"), Some(first + RANGE));
        ranges.give_back("old");
        ranges.give_back("a");
        assert_eq!(ranges.take("a"), Some(first));
    }
}
