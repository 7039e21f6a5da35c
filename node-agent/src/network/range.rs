//! Which addresses this node's sandboxes have.
//!
//! Agents that share a host's network share the configured range: each claims a slice of it, under the lock on the
//! directory of short paths, by a file in its own directory there. The file goes with the directory, at `clean` or when the
//! host restarts, and until then names the same slice to every next agent process.

use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::NetworkError;
use super::egress::mask;

/// Bits of a slice: 2,046 addresses, about ten times the sandboxes that fill a large host.
pub const SLICE_BITS: u8 = 21;
/// Of it: the network's own address, the gateway, and the broadcast address.
pub const FIRST_NUMBER: u16 = 2;
/// Highest number of a sandbox in a slice.
pub const LAST_NUMBER: u16 = (1 << (32 - SLICE_BITS)) - 2;

/// File of a claim, in an agent's directory of short paths.
const CLAIM: &str = "network.json";

/// IPv4 addresses whose first bits are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub first: Ipv4Addr,
    pub bits: u8,
}

impl Range {
    /// The range of slices that is used where none is configured.
    pub const DEFAULT: Self = Self { first: Ipv4Addr::new(10, 224, 0, 0), bits: 14 };

    /// On which sandboxes' side the host is, and where it answers names.
    pub fn gateway(self) -> Ipv4Addr {
        self.address(1)
    }

    /// The address with that number.
    pub fn address(self, number: u16) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.first) + u32::from(number))
    }

    pub fn overlaps(self, other: Self) -> bool {
        let common = mask(self.bits.min(other.bits)).unwrap_or(0);
        u32::from(self.first) & common == u32::from(other.first) & common
    }

    /// The slices that it consists of.
    pub fn slices(self) -> impl Iterator<Item = Self> {
        let count = 1u32 << SLICE_BITS.saturating_sub(self.bits);
        (0..count).map(move |n| Self {
            first: Ipv4Addr::from(u32::from(self.first) + (n << (32 - SLICE_BITS))),
            bits: SLICE_BITS,
        })
    }
}

impl FromStr for Range {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not a network for sandboxes: write address/bits, 8 to {SLICE_BITS} bits, e.g. 10.224.0.0/14"
            )
        };
        let (first, bits) = text.split_once('/').ok_or_else(wrong)?;
        let (first, bits): (Ipv4Addr, u8) = (first.parse().map_err(|_| wrong())?, bits.parse().map_err(|_| wrong())?);
        let aligned = mask(bits).is_some_and(|mask| u32::from(first) & !mask == 0);
        if aligned && (8..=SLICE_BITS).contains(&bits) { Ok(Self { first, bits }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

/// Which slice an agent holds, and in which network namespace: in another one nobody minds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub slice: Range,
    namespace: u64,
}

impl Claim {
    /// The claim of the agent whose directory is `own`: what an earlier process of it claimed, or a slice of `range` that
    /// no other agent in `root` holds and no route of the host leads into. Call it under the lock on `root`.
    pub fn take(root: &Path, own: &Path, range: Range) -> Result<Self, NetworkError> {
        let failed = |source| NetworkError::Io { what: format!("claim addresses in {}", own.display()), source };
        let namespace = namespace().map_err(failed)?;
        if let Some(held) = Self::read(own).map_err(failed)?.filter(|claim| claim.namespace == namespace) {
            return Ok(held);
        }
        let others = Self::all(root).map_err(failed)?;
        let mut taken: Vec<Range> = others.iter().filter(|c| c.namespace == namespace).map(|c| c.slice).collect();
        taken.extend(routes().map_err(failed)?.into_iter().filter(|route| route.bits >= range.bits));
        let free = range.slices().find(|slice| !taken.iter().any(|held| held.overlaps(*slice)));
        let slice = free.ok_or(NetworkError::NoSlice { range })?;
        let claim = Self { slice, namespace };
        let text = serde_json::to_vec(&claim).map_err(|e| failed(e.into()))?;
        let temporary = own.join(format!("{CLAIM}.tmp"));
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, own.join(CLAIM))).map_err(failed)?;
        Ok(claim)
    }

    /// Whether any agent holds a claim in this thread's network. Call it under the lock on `root`.
    pub fn any(root: &Path) -> io::Result<bool> {
        let namespace = namespace()?;
        Ok(Self::all(root)?.iter().any(|claim| claim.namespace == namespace))
    }

    /// Gives up the claim of the agent whose directory is `own`. Call it under the lock on the root.
    pub fn drop_of(own: &Path) -> io::Result<()> {
        match fs::remove_file(own.join(CLAIM)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn all(root: &Path) -> io::Result<Vec<Self>> {
        directories(root)?.iter().filter_map(|directory| Self::read(directory).transpose()).collect()
    }

    /// `None`: no claim. What cannot be read as one was not written by an agent, and claims nothing.
    fn read(directory: &Path) -> io::Result<Option<Self>> {
        match fs::read(directory.join(CLAIM)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn directories(root: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    let entries = fs::read_dir(root)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.into_iter().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect())
}

/// This thread's network namespace.
pub fn namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// Networks to which the host has routes, the default route aside.
fn routes() -> io::Result<Vec<Range>> {
    Ok(parse_routes(&fs::read_to_string("/proc/thread-self/net/route")?))
}

fn parse_routes(table: &str) -> Vec<Range> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::swap_bytes);
        let (first, mask) = (number(words.get(1)?)?, number(words.get(7)?)?);
        Some(Range { first: Ipv4Addr::from(first), bits: u8::try_from(mask.leading_ones()).ok()? })
    };
    table.lines().skip(1).filter_map(parse).filter(|route| route.bits > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Range {
        text.parse().expect("a range")
    }

    #[test]
    fn a_range_is_cut_into_slices_that_do_not_overlap() {
        let slices: Vec<Range> = range("10.224.0.0/19").slices().collect();
        assert_eq!(
            slices.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.224.0.0/21", "10.224.8.0/21", "10.224.16.0/21", "10.224.24.0/21"]
        );
        assert!(!slices[0].overlaps(slices[1]) && slices[1].overlaps(range("10.224.0.0/19")));
        assert_eq!(slices[1].gateway().to_string(), "10.224.8.1");
        assert_eq!(slices[1].address(LAST_NUMBER).to_string(), "10.224.15.254");
        for bad in ["10.224.0.0", "10.224.0.1/14", "10.0.0.0/22", "10.0.0.0/x", "0.0.0.0/0", "fc00::/8"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn agents_of_one_host_hold_slices_of_their_own_and_keep_them() {
        let root = tempfile::tempdir().expect("directory");
        let own: Vec<_> = ["a", "b", "c"].map(|name| root.path().join(name)).to_vec();
        own.iter().for_each(|dir| fs::create_dir(dir).expect("directory"));
        let take = |n: usize| Claim::take(root.path(), &own[n], range("10.224.0.0/20"));
        let (a, b) = (take(0).expect("free"), take(1).expect("free"));
        assert!(!a.slice.overlaps(b.slice));
        assert_eq!(take(0).expect("its own"), a);
        assert!(matches!(take(2), Err(NetworkError::NoSlice { .. })));
        for _ in 0..2 {
            Claim::drop_of(&own[0]).expect("drops");
        }
        assert!(Claim::any(root.path()).expect("reads"));
        assert_eq!(take(2).expect("given back").slice, a.slice);
        own[1..].iter().for_each(|own| Claim::drop_of(own).expect("drops"));
        assert!(!Claim::any(root.path()).expect("reads"));
    }

    #[test]
    fn routes_of_the_host_are_read() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n\
                     eth0\t0000E00A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\n";
        assert_eq!(parse_routes(table), [range("10.224.0.0/16")]);
    }
}
