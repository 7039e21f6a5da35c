//! GPUs: the devices that a node reports, and what is held of them.
//!
//! A node whose agent reports devices has each of them given away by name: a decision names them, and `apply` holds exactly those
//! or none. A node that only counts its GPUs, as agents before this did, has them counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use warren_proto::units::{Bytes, Gpus};

/// All of a device, in thousandths.
pub const WHOLE: u32 = 1000;

/// Most devices of a node: a host has 8 to 16, and as MIG instances at most 7 times as many.
pub const MAX_DEVICES: usize = 128;

/// A device that an agent can inject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuDevice {
    pub uuid: Box<str>,
    pub model: Box<str>,
    pub memory: Bytes,
    /// The hardware separates it from its neighbours; a share of any other device is advisory.
    pub enforced: bool,
}

/// What a sandbox holds of a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct GpuHold {
    pub uuid: Box<str>,
    /// Thousandths of it, 1 to [`WHOLE`].
    pub milli: u32,
    pub memory: Bytes,
}

impl GpuHold {
    /// All of a device.
    pub fn whole(device: &GpuDevice) -> Self {
        Self { uuid: device.uuid.clone(), milli: WHOLE, memory: device.memory }
    }
}

/// The devices of one sandbox, by uuid. Costs a pointer where there are none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuHolds(Option<Arc<[GpuHold]>>);

impl GpuHolds {
    pub fn iter(&self) -> impl Iterator<Item = &GpuHold> {
        self.0.iter().flat_map(|holds| holds.iter())
    }

    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |holds| holds.len())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl FromIterator<GpuHold> for GpuHolds {
    fn from_iter<I: IntoIterator<Item = GpuHold>>(holds: I) -> Self {
        let mut holds: Vec<GpuHold> = holds.into_iter().collect();
        holds.sort_unstable();
        Self((!holds.is_empty()).then(|| holds.into()))
    }
}

/// What is held of one device, by all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuUsed {
    pub milli: u32,
    pub memory: Bytes,
}

/// What is held of a node's devices; one of which nothing is held is not in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuUse(BTreeMap<Box<str>, GpuUsed>);

impl GpuUse {
    pub fn of(&self, uuid: &str) -> GpuUsed {
        self.0.get(uuid).copied().unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, GpuUsed)> {
        self.0.iter().map(|(uuid, used)| (uuid.as_ref(), *used))
    }

    pub fn add(&mut self, holds: &GpuHolds) {
        for hold in holds.iter() {
            let used = self.0.entry(hold.uuid.clone()).or_default();
            used.milli = used.milli.saturating_add(hold.milli);
            used.memory = Bytes(used.memory.0.saturating_add(hold.memory.0));
        }
    }

    pub fn remove(&mut self, holds: &GpuHolds) {
        for hold in holds.iter() {
            let Some(used) = self.0.get_mut(&hold.uuid) else { continue };
            used.milli = used.milli.saturating_sub(hold.milli);
            used.memory = Bytes(used.memory.0.saturating_sub(hold.memory.0));
            if *used == GpuUsed::default() {
                self.0.remove(&hold.uuid);
            }
        }
    }
}

impl FromIterator<(Box<str>, GpuUsed)> for GpuUse {
    fn from_iter<I: IntoIterator<Item = (Box<str>, GpuUsed)>>(used: I) -> Self {
        Self(used.into_iter().collect())
    }
}

/// The devices of which nothing is held.
pub fn free<'a>(devices: &'a [GpuDevice], used: &'a GpuUse) -> impl Iterator<Item = &'a GpuDevice> {
    devices.iter().filter(|device| used.of(&device.uuid).milli == 0)
}

/// Whether `holds` is what a sandbox that asks for `wanted` may take of these devices.
pub fn fits(devices: &[GpuDevice], used: &GpuUse, wanted: Gpus, holds: &GpuHolds) -> bool {
    if devices.is_empty() {
        return holds.is_empty();
    }
    let is_free = |hold: &GpuHold| {
        let device = devices.iter().find(|device| device.uuid == hold.uuid);
        device.is_some_and(|device| *hold == GpuHold::whole(device)) && used.of(&hold.uuid).milli == 0
    };
    let twice = holds.iter().zip(holds.iter().skip(1)).any(|(one, next)| one.uuid == next.uuid);
    holds.len() as u64 == wanted.0 && !twice && holds.iter().all(is_free)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(uuid: &str) -> GpuDevice {
        GpuDevice { uuid: uuid.into(), model: "A100".into(), memory: Bytes(40), enforced: false }
    }

    fn holds(uuids: &[&str]) -> GpuHolds {
        uuids.iter().map(|uuid| GpuHold::whole(&device(uuid))).collect()
    }

    #[test]
    fn a_device_is_held_once_whole_and_only_where_it_is() {
        let devices = [device("a"), device("b"), device("c")];
        let mut used = GpuUse::default();
        assert!(fits(&devices, &used, Gpus(2), &holds(&["b", "a"])));
        used.add(&holds(&["a"]));
        for (wanted, wrong) in [
            (2, holds(&["a", "b"])),
            (2, holds(&["b"])),
            (1, holds(&[])),
            (1, holds(&["d"])),
            (2, holds(&["b", "b"])),
            (1, [GpuHold { milli: 500, ..GpuHold::whole(&device("b")) }].into_iter().collect()),
        ] {
            assert!(!fits(&devices, &used, Gpus(wanted), &wrong), "{wrong:?}");
        }
        assert!(fits(&devices, &used, Gpus(0), &holds(&[])));
        assert_eq!(free(&devices, &used).map(|d| &*d.uuid).collect::<Vec<_>>(), ["b", "c"]);
        used.remove(&holds(&["a"]));
        assert_eq!(used, GpuUse::default());
    }

    #[test]
    fn what_is_only_counted_is_given_no_names() {
        assert!(fits(&[], &GpuUse::default(), Gpus(2), &holds(&[])));
        assert!(!fits(&[], &GpuUse::default(), Gpus(1), &holds(&["a"])));
    }
}
