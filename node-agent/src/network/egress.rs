//! PURE: what a sandbox may reach, and whether a name is part of it.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use warren_proto::v1;

/// What a sandbox may reach. IPv6 is off inside, so nothing of it can be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Egress {
    #[default]
    None,
    /// The public internet.
    Public,
    /// These and nothing else.
    List(Vec<Destination>),
}

/// A place, and one port of it or all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Destination {
    pub place: Place,
    /// `None`: every port and protocol; a port is of TCP and UDP.
    pub port: Option<u16>,
}

/// Where a destination is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// A host name, lower case, without a dot at its end: the public addresses that it has when the sandbox asks for them.
    Name(String),
    /// Addresses whose first `bits` bits are those of `first`, of which the others are 0.
    Network { first: Ipv4Addr, bits: u8 },
}

impl Egress {
    /// From the wire, whose entries the scheduler checked. An entry that this build cannot read allows nothing.
    pub fn of_wire(wire: Option<&v1::Egress>) -> Self {
        match wire.map(v1::Egress::mode) {
            Some(v1::EgressMode::Public) => Self::Public,
            Some(v1::EgressMode::List) => {
                let allow = wire.map(|egress| egress.allow.as_slice()).unwrap_or_default();
                let mut all: Vec<Destination> = allow.iter().filter_map(|entry| Destination::parse(entry)).collect();
                all.sort();
                all.dedup();
                Self::List(all)
            }
            Some(v1::EgressMode::None | v1::EgressMode::Unspecified) | None => Self::None,
        }
    }

    /// Tells policies apart: connections bear the mark of the policy that let them out, so that they go on under the same
    /// policy and are looked at again under another. Never 0, which connections have that nobody marked.
    pub fn mark(&self) -> u32 {
        let hash = Sha256::digest(format!("{self:?}"));
        u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) | 1
    }

    /// On which ports (`None`: all) the list allows what `name` names; empty: it does not name it.
    pub fn ports_of(&self, name: &str) -> Vec<Option<u16>> {
        let Self::List(all) = self else { return Vec::new() };
        let named = all.iter().filter(|to| matches!(&to.place, Place::Name(listed) if listed == name));
        named.map(|to| to.port).collect()
    }
}

impl Destination {
    /// `host`, `host:port`, `address`, `address/bits`, each also with a port; `None` for anything else, IPv6 included.
    pub fn parse(text: &str) -> Option<Self> {
        let (place, port) = match text.split_once(':') {
            Some((place, port)) => (place, Some(port.parse().ok().filter(|port| *port != 0)?)),
            None => (text, None),
        };
        let place = match place.split_once('/') {
            Some((address, bits)) => Place::network(address.parse().ok()?, bits.parse().ok()?)?,
            None => match place.parse() {
                Ok(address) => Place::network(address, 32)?,
                Err(_) => Place::name(place)?,
            },
        };
        Some(Self { place, port })
    }
}

impl Place {
    fn network(address: Ipv4Addr, bits: u8) -> Option<Self> {
        let mask = mask(bits)?;
        Some(Self::Network { first: Ipv4Addr::from(u32::from(address) & mask), bits })
    }

    fn name(text: &str) -> Option<Self> {
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
        let text = text.trim_end_matches('.');
        (!text.is_empty() && text.chars().all(legal)).then(|| Self::Name(text.to_ascii_lowercase()))
    }
}

/// The mask of a network; `None` where there are no so many bits.
pub fn mask(bits: u8) -> Option<u32> {
    match bits {
        0 => Some(0),
        1..=32 => Some(u32::MAX << (32 - bits)),
        _ => None,
    }
}

/// Networks that are never the public internet: the host's, its neighbours', metadata services', and what nobody routes.
pub const NOT_PUBLIC: [(Ipv4Addr, u8); 15] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// What not even a list allows: this network, loopback, link-local with its metadata services, multicast, the reserved.
pub const NEVER: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Whether an address is of the public internet.
pub fn is_public(address: Ipv4Addr) -> bool {
    let inside =
        |(first, bits): &(Ipv4Addr, u8)| mask(*bits).is_some_and(|m| u32::from(address) & m == u32::from(*first));
    !NOT_PUBLIC.iter().any(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(allow: &[&str]) -> Egress {
        let allow = allow.iter().map(ToString::to_string).collect();
        Egress::of_wire(Some(&v1::Egress { mode: v1::EgressMode::List.into(), allow }))
    }

    #[test]
    fn entries_of_a_list_are_names_and_networks_with_or_without_a_port() {
        let network = |first: &str, bits| Place::Network { first: first.parse().expect("address"), bits };
        let parse = |text| Destination::parse(text).map(|to| (to.place, to.port));
        assert_eq!(parse("Example.com."), Some((Place::Name("example.com".into()), None)));
        assert_eq!(parse("example.com:443"), Some((Place::Name("example.com".into()), Some(443))));
        assert_eq!(parse("10.1.2.3/8"), Some((network("10.0.0.0", 8), None)));
        assert_eq!(parse("10.1.2.3:22"), Some((network("10.1.2.3", 32), Some(22))));
        assert_eq!(parse("0.0.0.0/0:53"), Some((network("0.0.0.0", 0), Some(53))));
        for bad in ["", "a b", "10.0.0.0/33", "x:0", "x:99999", "fc00::/7", "[fc00::1]:80", "10.0.0.0/8:x", "a;b"] {
            assert_eq!(Destination::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn nothing_is_allowed_that_nobody_named() {
        assert_eq!(Egress::of_wire(None), Egress::None);
        assert_eq!(Egress::of_wire(Some(&v1::Egress::default())), Egress::None);
        assert_eq!(list(&["fc00::/7"]), Egress::List(Vec::new()));
        assert_eq!(list(&["b:1", "a", "b:1"]), list(&["a", "b:1"]));
        let egress = list(&["a.b:443", "a.b:80", "c.d"]);
        assert_eq!(egress.ports_of("a.b"), [Some(80), Some(443)]);
        assert_eq!(egress.ports_of("c.d"), [None]);
        assert!(egress.ports_of("b").is_empty() && Egress::Public.ports_of("a.b").is_empty());
    }

    #[test]
    fn each_policy_has_a_mark_of_its_own_that_no_process_changes() {
        assert_ne!(Egress::None.mark(), Egress::Public.mark());
        assert_ne!(list(&["a"]).mark(), list(&["a:1"]).mark());
        // Connections bear it while agents come and go.
        assert_eq!((Egress::None.mark(), Egress::Public.mark()), (3_700_652_889, 1_494_824_369));
    }

    #[test]
    fn private_and_special_addresses_are_not_public() {
        for address in
            ["10.1.1.1", "172.31.0.1", "192.168.0.1", "100.100.0.1", "169.254.169.254", "127.0.0.1", "224.0.0.1"]
        {
            assert!(!is_public(address.parse().expect("address")), "{address}");
        }
        for address in ["1.1.1.1", "11.0.0.1", "172.32.0.1", "100.128.0.1", "9.255.255.255"] {
            assert!(is_public(address.parse().expect("address")), "{address}");
        }
        assert!(
            NOT_PUBLIC
                .iter()
                .chain(&NEVER)
                .all(|(first, bits)| mask(*bits).is_some_and(|m| u32::from(*first) & !m == 0))
        );
    }
}
