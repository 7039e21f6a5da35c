//! PURE: the node's table of packet rules, as text for `nft`.
//!
//! The rules never change; what each sandbox may do is elements of sets, so one sandbox's change is one small transaction.
//!
//! ```text
//!  from a sandbox ─▶ arrive: its own link with its own address, else denied
//!     to the host  ─▶ input: names at the gateway, and answers; else denied
//!     onwards      ─▶ forward ─▶ leave: established under the current policy, else what the sets allow, else denied
//!  to a sandbox    ─▶ forward ─▶ enter: only answers, under the current policy or by what the sets allow
//!     from the host ─▶ output: answers, and connections of root
//! ```
//! A connection bears the mark of the policy that let it out. After a change of policy it bears an old one, so its next packet
//! is looked at as if it were new. Connections to a name outlive the name's entry, which is only for new ones.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::egress::{Destination, Egress, NEVER, NOT_PUBLIC, Place, mask};
use super::inside::Assigned;
use super::range::Range;

/// Begins the name of every link of every agent's sandboxes.
pub const LINKS: &str = "wrn";

/// The sets whose elements say what sandboxes may do, with their types. The last two hold what was learnt from names.
const SETS: [(&str, &str); 9] = [
    ("links", "type ifname . ipv4_addr;"),
    ("public", "type ipv4_addr;"),
    ("networks", "type ipv4_addr . ipv4_addr; flags interval;"),
    ("network_ports", "type ipv4_addr . ipv4_addr . inet_service; flags interval;"),
    ("marks", "type ipv4_addr : mark;"),
    ("current", "type ipv4_addr . mark;"),
    ("denied", "type ifname; counter;"),
    (NAMES, "type ipv4_addr . ipv4_addr; flags timeout;"),
    (NAME_PORTS, "type ipv4_addr . ipv4_addr . inet_service; flags timeout;"),
];
const NAMES: &str = "names";
const NAME_PORTS: &str = "name_ports";

/// What the rules need to know of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub table: String,
    /// Begins the name of every link of this node's sandboxes.
    pub links: String,
    pub slice: Range,
}

/// One element of a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    set: &'static str,
    text: String,
}

impl Element {
    /// Counts what the sandbox on that link was denied.
    pub fn denied(link: &str) -> Self {
        Self { set: "denied", text: format!("\"{link}\"") }
    }
}

/// An address that a name had when a sandbox asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Learnt {
    pub by: Ipv4Addr,
    pub address: Ipv4Addr,
    pub port: Option<u16>,
}

impl Learnt {
    fn element(&self) -> Element {
        let Self { by, address, port } = self;
        match port {
            None => Element { set: NAMES, text: format!("{by} . {address}") },
            Some(port) => Element { set: NAME_PORTS, text: format!("{by} . {address} . {port}") },
        }
    }
}

/// What a sandbox has in the sets, what it learnt aside.
pub fn elements(assigned: &Assigned, egress: &Egress) -> Vec<Element> {
    let Assigned { link, address, .. } = assigned;
    let element = |set, text| Element { set, text };
    let mark = egress.mark();
    let mut all = vec![
        element("links", format!("\"{link}\" . {address}")),
        Element::denied(link),
        element("marks", format!("{address} : {mark}")),
        element("current", format!("{address} . {mark}")),
    ];
    match egress {
        Egress::None => {}
        Egress::Public => all.push(element("public", address.to_string())),
        Egress::List(list) => all.extend(networks(list).into_iter().map(|(first, bits, port)| match port {
            None => element("networks", format!("{address} . {first}/{bits}")),
            Some(port) => element("network_ports", format!("{address} . {first}/{bits} . {port}")),
        })),
    }
    all
}

/// The networks of a list, without those that lie in another one with the same port: sets refuse what overlaps.
fn networks(list: &[Destination]) -> Vec<(Ipv4Addr, u8, Option<u16>)> {
    let network = |to: &Destination| match to.place {
        Place::Network { first, bits } => Some((first, bits, to.port)),
        Place::Name(_) => None,
    };
    let mut all: Vec<_> = list.iter().filter_map(network).collect();
    all.sort_by_key(|(_, bits, _)| *bits);
    let mut kept: Vec<(Ipv4Addr, u8, Option<u16>)> = Vec::new();
    for (first, bits, port) in all {
        let within = |(outer, bits, its): &(Ipv4Addr, u8, Option<u16>)| {
            *its == port && mask(*bits).is_some_and(|mask| u32::from(first) & mask == u32::from(*outer))
        };
        if !kept.iter().any(within) {
            kept.push((first, bits, port));
        }
    }
    kept
}

impl Rules {
    /// Makes the table what it should be, whatever there is of it: the rules, and these elements only. `denied` counts on
    /// for those that stay.
    pub fn whole(&self, elements: &[Element], learnt: &[(Learnt, Duration)]) -> String {
        let table = &self.table;
        let mut text = format!("add table inet {table}\n");
        for (set, kind) in SETS {
            let what = if kind.contains(" : ") { "map" } else { "set" };
            // Writing to a string does not fail.
            let _ = writeln!(text, "add {what} inet {table} {set} {{ {kind} }}");
            if set != "denied" {
                let _ = writeln!(text, "flush {what} inet {table} {set}");
            }
        }
        text.push_str(&self.chains());
        text.push_str(&self.add(elements));
        learnt.iter().for_each(|(learnt, rest)| text.push_str(&self.learn(learnt, *rest)));
        text
    }

    /// Takes the whole table away.
    pub fn remove(&self) -> String {
        // It must be there to be deleted.
        format!("add table inet {0}\ndelete table inet {0}\n", self.table)
    }

    pub fn add(&self, elements: &[Element]) -> String {
        self.each("add", elements)
    }

    pub fn delete(&self, elements: &[Element]) -> String {
        self.each("delete", elements)
    }

    /// Lets a sandbox reach an address for a while from now on, also where it may already for another while.
    pub fn learn(&self, learnt: &Learnt, timeout: Duration) -> String {
        let Element { set, text } = learnt.element();
        let (table, seconds) = (&self.table, timeout.as_secs().max(1));
        let add = format!("add element inet {table} {set} {{ {text} timeout {seconds}s }}\n");
        format!("{add}delete element inet {table} {set} {{ {text} }}\n{add}")
    }

    /// Takes back what a sandbox learnt, where it is still there.
    pub fn unlearn(&self, learnt: &Learnt) -> String {
        let Element { set, text } = learnt.element();
        let table = &self.table;
        format!(
            "add element inet {table} {set} {{ {text} timeout 1s }}\ndelete element inet {table} {set} {{ {text} }}\n"
        )
    }

    fn each(&self, verb: &str, elements: &[Element]) -> String {
        let line = |e: &Element| format!("{verb} element inet {} {} {{ {} }}\n", self.table, e.set, e.text);
        elements.iter().map(line).collect()
    }

    fn chains(&self) -> String {
        let (links, gateway, slice) = (&self.links, self.slice.gateway(), self.slice);
        let (not_public, never) = (list_of(&NOT_PUBLIC), list_of(&NEVER));
        let chains: [(&str, &str, Vec<String>); 10] = [
            ("deny", "", vec!["iifname @denied drop".into(), "drop".into()]),
            ("pass", "", vec!["ct mark set ip saddr map @marks".into(), "accept".into()]),
            ("pass_back", "", vec!["ct mark set ip daddr map @marks".into(), "accept".into()]),
            (
                "arrive",
                "type filter hook prerouting priority raw; policy accept;",
                vec![
                    format!("iifname != \"{links}*\" accept"),
                    "meta nfproto != ipv4 goto deny".into(),
                    "iifname . ip saddr != @links goto deny".into(),
                    format!("ip daddr {gateway} accept"),
                    "fib daddr type != unicast goto deny".into(),
                ],
            ),
            (
                "input",
                "type filter hook input priority filter - 10; policy accept;",
                vec![
                    format!("iifname != \"{links}*\" accept"),
                    format!("ip daddr {gateway} udp dport 53 accept"),
                    format!("ip daddr {gateway} tcp dport 53 accept"),
                    "ct direction reply ct state established,related accept".into(),
                    "goto deny".into(),
                ],
            ),
            (
                "output",
                "type filter hook output priority filter - 10; policy accept;",
                vec![
                    format!("oifname != \"{links}*\" accept"),
                    "ct state established,related accept".into(),
                    "meta skuid 0 meta l4proto tcp accept".into(),
                    "drop".into(),
                ],
            ),
            (
                "leave",
                "",
                vec![
                    format!("oifname \"{LINKS}*\" goto deny"),
                    "ct state established,related ip saddr . ct mark @current accept".into(),
                    format!("ip daddr {never} goto deny"),
                    format!("ip saddr @public ip daddr != {not_public} goto pass"),
                    "ip saddr . ip daddr @networks goto pass".into(),
                    "meta l4proto { tcp, udp } ip saddr . ip daddr . th dport @network_ports goto pass".into(),
                    format!("ip saddr . ip daddr @{NAMES} goto pass"),
                    format!("meta l4proto {{ tcp, udp }} ip saddr . ip daddr . th dport @{NAME_PORTS} goto pass"),
                    "goto deny".into(),
                ],
            ),
            (
                "enter",
                "",
                // The mirror of the above: a connection that only receives is looked at again too.
                vec![
                    "ct direction original drop".into(),
                    "ct state != { established, related } drop".into(),
                    "ip daddr . ct mark @current accept".into(),
                    format!("ip daddr @public ip saddr != {not_public} goto pass_back"),
                    "ip daddr . ip saddr @networks goto pass_back".into(),
                    "meta l4proto { tcp, udp } ip daddr . ip saddr . th sport @network_ports goto pass_back".into(),
                    format!("ip daddr . ip saddr @{NAMES} goto pass_back"),
                    format!("meta l4proto {{ tcp, udp }} ip daddr . ip saddr . th sport @{NAME_PORTS} goto pass_back"),
                    "drop".into(),
                ],
            ),
            (
                "forward",
                "type filter hook forward priority filter - 10; policy accept;",
                vec![format!("iifname \"{links}*\" goto leave"), format!("oifname \"{links}*\" goto enter")],
            ),
            (
                "masquerade_out",
                "type nat hook postrouting priority srcnat; policy accept;",
                vec![format!("ip saddr {slice} oifname != \"{LINKS}*\" masquerade")],
            ),
        ];
        let table = &self.table;
        let declare = |(name, hook, _): &(&str, &str, Vec<String>)| match *hook {
            "" => format!("add chain inet {table} {name}\nflush chain inet {table} {name}\n"),
            hook => format!("add chain inet {table} {name} {{ {hook} }}\nflush chain inet {table} {name}\n"),
        };
        let fill = |(name, _, rules): &(&str, &str, Vec<String>)| -> String {
            rules.iter().map(|rule| format!("add rule inet {table} {name} {rule}\n")).collect()
        };
        chains.iter().map(declare).chain(chains.iter().map(fill)).collect()
    }
}

/// Packets by link, of what `nft -j` lists of the set `denied`.
pub fn parse_counters(json: &serde_json::Value) -> BTreeMap<String, u64> {
    let sets = json["nftables"].as_array().into_iter().flatten();
    let elements = sets.filter_map(|item| item["set"]["elem"].as_array()).flatten();
    let read = |element: &serde_json::Value| {
        let link = element["elem"]["val"].as_str()?.to_owned();
        Some((link, element["elem"]["counter"]["packets"].as_u64()?))
    };
    elements.filter_map(read).collect()
}

fn list_of(networks: &[(Ipv4Addr, u8)]) -> String {
    let all: Vec<String> = networks.iter().map(|(first, bits)| format!("{first}/{bits}")).collect();
    format!("{{ {} }}", all.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Egress {
        Egress::List(entries.iter().map(|entry| Destination::parse(entry).expect("an entry")).collect())
    }

    fn texts(egress: &Egress) -> Vec<String> {
        let assigned = Assigned {
            number: 2,
            link: "wrnaaaaaa0002".into(),
            address: Ipv4Addr::new(10, 224, 0, 2),
            gateway: Ipv4Addr::new(10, 224, 0, 1),
        };
        let common = ["links", "denied", "marks", "current"];
        let all = elements(&assigned, egress).into_iter().filter(|e| !common.contains(&e.set));
        all.map(|e| format!("{} {}", e.set, e.text)).collect()
    }

    #[test]
    fn a_policy_is_elements_and_what_lies_in_another_network_is_none() {
        assert!(texts(&Egress::None).is_empty());
        assert_eq!(texts(&Egress::Public), ["public 10.224.0.2"]);
        assert_eq!(
            texts(&list(&["10.1.0.0/16", "10.0.0.0/8", "10.1.0.0/16:80", "1.2.3.4:53", "name.example"])),
            [
                "networks 10.224.0.2 . 10.0.0.0/8",
                "network_ports 10.224.0.2 . 10.1.0.0/16 . 80",
                "network_ports 10.224.0.2 . 1.2.3.4/32 . 53",
            ]
        );
    }
}
