//! The drivers that this node offers, by name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::driver::Driver;

/// At least one driver; the first is the default.
#[derive(Clone)]
pub struct Drivers {
    default: &'static str,
    by_name: BTreeMap<&'static str, Arc<dyn Driver>>,
}

impl Drivers {
    /// `None` where the list is empty.
    pub fn new(drivers: Vec<Arc<dyn Driver>>) -> Option<Self> {
        let default = drivers.first()?.name();
        let by_name = drivers.into_iter().map(|driver| (driver.name(), driver)).collect();
        Some(Self { default, by_name })
    }

    /// The driver of that name, or the default.
    pub fn get(&self, name: Option<&str>) -> Option<Arc<dyn Driver>> {
        self.by_name.get(name.unwrap_or(self.default)).cloned()
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<dyn Driver>> {
        self.by_name.values()
    }

    /// The default first.
    pub fn names(&self) -> Vec<String> {
        let others = self.by_name.keys().filter(|name| **name != self.default);
        std::iter::once(&self.default).chain(others).map(ToString::to_string).collect()
    }
}

impl fmt::Debug for Drivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
