//! What freezes and thaws a group of sandboxes as a whole: one file of the kernel's, or of the driver `sim`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// How the file wants to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `freezer.state` of control groups version 1. It answers FREEZING until nothing runs any more.
    Freezer,
    /// `cgroup.freeze` of version 2; `cgroup.events` beside it says when nothing runs any more.
    Unified,
    /// A plain file with `1` or `0`: for simulated sandboxes.
    Plain,
}

/// A group's switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    pub kind: Kind,
    pub path: PathBuf,
}

impl Switch {
    /// Throws it; `true` once it has taken effect on everything in the group.
    pub fn set(&self, frozen: bool) -> io::Result<bool> {
        let text = match (self.kind, frozen) {
            (Kind::Freezer, true) => "FROZEN",
            (Kind::Freezer, false) => "THAWED",
            (Kind::Unified | Kind::Plain, true) => "1",
            (Kind::Unified | Kind::Plain, false) => "0",
        };
        // Not cut to length first: nobody may see an empty one.
        let create = self.kind == Kind::Plain;
        File::options().write(true).create(create).truncate(false).open(&self.path)?.write_all(text.as_bytes())?;
        if !frozen {
            return Ok(true);
        }
        match self.kind {
            Kind::Freezer => Ok(fs::read_to_string(&self.path)?.trim() == "FROZEN"),
            Kind::Unified => {
                let events = fs::read_to_string(self.path.with_file_name("cgroup.events"))?;
                // A group without processes is never `frozen`, and need not be.
                let says = |line: &str| events.lines().any(|has| has == line);
                Ok(says("frozen 1") || says("populated 0"))
            }
            Kind::Plain => Ok(true),
        }
    }

    /// Whether it was thrown to freeze.
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| matches!(text.trim(), "1" | "FROZEN" | "FREEZING"))
    }

    /// As one argument of a command line.
    pub fn to_argument(&self) -> String {
        let kind = match self.kind {
            Kind::Freezer => "v1",
            Kind::Unified => "v2",
            Kind::Plain => "plain",
        };
        format!("{kind}:{}", self.path.display())
    }

    pub fn parse(argument: &str) -> Option<Self> {
        let (kind, path) = argument.split_once(':')?;
        let kind = match kind {
            "v1" => Kind::Freezer,
            "v2" => Kind::Unified,
            "plain" => Kind::Plain,
            _ => return None,
        };
        path.starts_with('/').then(|| Self { kind, path: path.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_survives_a_command_line_and_nonsense_does_not() {
        for kind in [Kind::Freezer, Kind::Unified, Kind::Plain] {
            let switch = Switch { kind, path: "/sys/a b:c/freezer.state".into() };
            assert_eq!(Switch::parse(&switch.to_argument()), Some(switch));
        }
        for bad in ["", "v1", "v3:/x", "v1:relative"] {
            assert_eq!(Switch::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn version_two_is_frozen_when_the_kernel_says_so() {
        let directory = tempfile::tempdir().expect("directory");
        let switch = Switch { kind: Kind::Unified, path: directory.path().join("cgroup.freeze") };
        let events = directory.path().join("cgroup.events");
        assert!(switch.set(true).is_err() && !switch.is_frozen(), "no such group");
        fs::write(&switch.path, "0").expect("write");
        for (text, frozen) in
            [("populated 1\nfrozen 0\n", false), ("populated 1\nfrozen 1\n", true), ("populated 0\nfrozen 0\n", true)]
        {
            fs::write(&events, text).expect("write");
            assert_eq!(switch.set(true).expect("set"), frozen, "{text}");
        }
        assert!(switch.is_frozen());
        assert!(switch.set(false).expect("set") && !switch.is_frozen());
    }
}
