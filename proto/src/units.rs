//! Quantities, as integers whose type says the unit. Arithmetic never wraps: sums are checked or saturate.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Thousandths of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct MilliCpu(pub u64);

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Bytes(pub u64);

/// Whole GPU devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Gpus(pub u64);

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Bytes {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;
    pub const GIB: u64 = 1 << 30;
}

impl fmt::Display for MilliCpu {
    /// In vCPU: `0.25`, `2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, milli) = (self.0 / 1000, self.0 % 1000);
        if milli == 0 {
            write!(f, "{whole}")
        } else {
            write!(f, "{}", format!("{whole}.{milli:03}").trim_end_matches('0'))
        }
    }
}

impl fmt::Display for Bytes {
    /// In the largest binary unit that gives at least 1, with one decimal place where it is not whole: `256 MiB`, `1.5 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            n if n >= Self::GIB => (Self::GIB, "GiB"),
            n if n >= Self::MIB => (Self::MIB, "MiB"),
            n if n >= Self::KIB => (Self::KIB, "KiB"),
            _ => (1, "B"),
        };
        let tenths = u128::from(self.0) * 10 / u128::from(unit);
        match tenths % 10 {
            0 => write!(f, "{} {name}", tenths / 10),
            tenth => write!(f, "{}.{tenth} {name}", tenths / 10),
        }
    }
}

/// What a sandbox holds of a node, or what a node has: the dimensions of placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Resources {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    pub disk: Bytes,
    #[serde(default)]
    pub gpus: Gpus,
}

impl Resources {
    /// The sum, or `None` where a dimension would overflow.
    #[must_use]
    pub fn checked_add(self, other: Self) -> Option<Self> {
        Some(Self {
            cpu: MilliCpu(self.cpu.0.checked_add(other.cpu.0)?),
            memory: Bytes(self.memory.0.checked_add(other.memory.0)?),
            disk: Bytes(self.disk.0.checked_add(other.disk.0)?),
            gpus: Gpus(self.gpus.0.checked_add(other.gpus.0)?),
        })
    }

    /// The difference, zero where `other` is more.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self {
            cpu: MilliCpu(self.cpu.0.saturating_sub(other.cpu.0)),
            memory: Bytes(self.memory.0.saturating_sub(other.memory.0)),
            disk: Bytes(self.disk.0.saturating_sub(other.disk.0)),
            gpus: Gpus(self.gpus.0.saturating_sub(other.gpus.0)),
        }
    }

    /// The greater of the two in each dimension.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.max(other.cpu),
            memory: self.memory.max(other.memory),
            disk: self.disk.max(other.disk),
            gpus: self.gpus.max(other.gpus),
        }
    }

    /// Whether this much fits into `free` in every dimension.
    #[must_use]
    pub fn fits_in(self, free: Self) -> bool {
        self.cpu <= free.cpu && self.memory <= free.memory && self.disk <= free.disk && self.gpus <= free.gpus
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_people_write_them() {
        assert_eq!(MilliCpu(250).to_string(), "0.25");
        assert_eq!(MilliCpu(2000).to_string(), "2");
        assert_eq!(MilliCpu(1).to_string(), "0.001");
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(256 << 20).to_string(), "256 MiB");
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "17179869183.9 GiB");
    }

    #[test]
    fn sums_do_not_wrap() {
        let most = Resources { cpu: MilliCpu(u64::MAX), ..Resources::default() };
        let one = Resources { cpu: MilliCpu(1), ..Resources::default() };
        assert_eq!(most.checked_add(one), None);
        assert_eq!(one.saturating_sub(most), Resources::default());
        assert!(one.fits_in(most) && !most.fits_in(one));
    }
}
