//! A small map that is written once: labels, annotations, variables.
//!
//! A sorted slice instead of a tree: every sandbox has some, and a tree's first leaf has room for eleven entries, more than
//! half of the 1 KiB that a sandbox may cost (section 7 of the design).

use std::collections::BTreeMap;
use std::fmt;

/// Keys in order, each once, with their values.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Pairs<V = Box<str>>(Box<[(Box<str>, V)]>);

impl<V> Pairs<V> {
    pub fn get(&self, key: &str) -> Option<&V> {
        let found = self.0.binary_search_by(|(own, _)| own.as_ref().cmp(key)).ok()?;
        self.0.get(found).map(|(_, value)| value)
    }

    /// In the order of the keys.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&str, &V)> {
        self.0.iter().map(|(key, value)| (key.as_ref(), value))
    }

    /// In order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(key, _)| key)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Pairs {
    /// As a map that can be changed.
    pub fn to_map<M: FromIterator<(String, String)>>(&self) -> M {
        self.iter().map(|(key, value)| (key.to_owned(), value.as_ref().to_owned())).collect()
    }
}

impl<V> Default for Pairs<V> {
    fn default() -> Self {
        Self(Box::new([]))
    }
}

impl<V: fmt::Debug> fmt::Debug for Pairs<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Of a key that comes twice, the last counts.
impl<K: Into<Box<str>>, W: Into<V>, V> FromIterator<(K, W)> for Pairs<V> {
    fn from_iter<I: IntoIterator<Item = (K, W)>>(pairs: I) -> Self {
        let sorted: BTreeMap<Box<str>, V> = pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Self(sorted.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_order_and_the_last_of_equal_ones_counts() {
        let pairs: Pairs = [("b", "1"), ("a", "2"), ("b", "3")].into_iter().collect();
        assert_eq!(pairs.iter().map(|(k, v)| (k, v.as_ref())).collect::<Vec<_>>(), [("a", "2"), ("b", "3")]);
        assert_eq!((pairs.get("b").map(AsRef::as_ref), pairs.get("c")), (Some("3"), None));
        assert_eq!(pairs.to_map::<BTreeMap<_, _>>().into_iter().collect::<Pairs>(), pairs);
        assert!(Pairs::<Vec<u8>>::default().is_empty());
    }
}
