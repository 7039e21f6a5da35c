//! PURE: which sandboxes are on the network, with what number, and what they learnt from names.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::Member;
use super::egress::Egress;
use super::inside::Assigned;
use super::range::{FIRST_NUMBER, LAST_NUMBER, Range};
use super::rules::Learnt;
use crate::clock::BootInstant;

/// Most addresses that one sandbox may have from names at a time: more than any list's names have, and a bound to what a
/// sandbox can have the kernel keep.
const MAX_LEARNT: usize = 4096;

/// How much longer than asked for an address stays: so many requests for a name change nothing in the kernel.
const SPARE: Duration = Duration::from_secs(300);

/// By container id, and by number.
#[derive(Debug)]
pub struct Members {
    slice: Range,
    /// Begins every link's name.
    links: String,
    by_id: BTreeMap<String, (Assigned, Egress)>,
    ids: BTreeMap<u16, String>,
    learnt: BTreeMap<Learnt, BootInstant>,
}

impl Members {
    pub fn new(slice: Range, links: String, here: Vec<Member>) -> Self {
        let ids = here.iter().map(|(id, assigned, _)| (assigned.number, id.clone())).collect();
        let by_id = here.into_iter().map(|(id, assigned, egress)| (id, (assigned, egress))).collect();
        Self { slice, links, by_id, ids, learnt: BTreeMap::new() }
    }

    /// `None`: there is no number left.
    pub fn join(&mut self, id: &str, egress: Egress) -> Option<Assigned> {
        // First where its id says, as for user ids: two processes on one directory seldom choose the same.
        let sum = id.bytes().fold(0u32, |sum, b| sum.wrapping_mul(31).wrapping_add(u32::from(b)));
        let start = FIRST_NUMBER + u16::try_from(sum % u32::from(LAST_NUMBER + 1 - FIRST_NUMBER)).unwrap_or(0);
        let number = (start..=LAST_NUMBER).chain(FIRST_NUMBER..start).find(|n| !self.ids.contains_key(n))?;
        let assigned = Assigned {
            number,
            link: format!("{}{number:04x}", self.links),
            address: self.slice.address(number),
            gateway: self.slice.gateway(),
        };
        self.ids.insert(number, id.to_owned());
        self.by_id.insert(id.to_owned(), (assigned.clone(), egress));
        Some(assigned)
    }

    /// It is no member from now on; its number stays taken.
    pub fn leave(&mut self, id: &str) {
        self.by_id.remove(id);
    }

    /// Gives back the number of one that left.
    pub fn free(&mut self, number: u16) {
        self.ids.remove(&number);
    }

    pub fn get(&self, id: &str) -> Option<(Assigned, Egress)> {
        self.by_id.get(id).cloned()
    }

    pub fn set(&mut self, id: &str, egress: Egress) {
        if let Some((_, its)) = self.by_id.get_mut(id) {
            *its = egress;
        }
    }

    pub fn all(&self) -> impl Iterator<Item = (&Assigned, &Egress)> {
        self.by_id.values().map(|(assigned, egress)| (assigned, egress))
    }

    pub fn egress_of(&self, address: Ipv4Addr) -> Option<Egress> {
        let number = u16::try_from(u32::from(address).checked_sub(u32::from(self.slice.first))?).ok()?;
        let (assigned, egress) = self.by_id.get(self.ids.get(&number)?)?;
        (assigned.address == address).then(|| egress.clone())
    }

    /// Notes what is to be allowed until `timeout` from `now` at least; answers what the kernel must be told, and for how
    /// long. Nothing where the sandbox's policy is not `egress` any more.
    pub fn learn(
        &mut self,
        egress: &Egress,
        found: &[Learnt],
        timeout: Duration,
        now: BootInstant,
    ) -> Vec<(Learnt, Duration)> {
        self.learnt.retain(|_, until| *until > now);
        let mut new = Vec::new();
        for learnt in found {
            let known = self.learnt.get(learnt).is_some_and(|until| *until >= now.plus(timeout));
            let held = self.learnt.range(first_of(learnt.by)..).take_while(|(other, _)| other.by == learnt.by).count();
            if known || held >= MAX_LEARNT || self.egress_of(learnt.by).as_ref() != Some(egress) {
                continue;
            }
            self.learnt.insert(*learnt, now.plus(timeout + SPARE));
            new.push((*learnt, timeout + SPARE));
        }
        new
    }

    /// What is learnt and still good, and for how long.
    pub fn learnt(&self, now: BootInstant) -> Vec<(Learnt, Duration)> {
        let good = self.learnt.iter().filter(|(_, until)| **until > now);
        good.map(|(learnt, until)| (*learnt, until.since(now))).collect()
    }

    /// Forgets, and answers, what the sandbox with that address learnt.
    pub fn forget_learnt(&mut self, by: Ipv4Addr) -> Vec<Learnt> {
        let its: Vec<Learnt> = self.learnt.keys().filter(|learnt| learnt.by == by).copied().collect();
        self.learnt.retain(|learnt, _| learnt.by != by);
        its
    }
}

/// Not after anything that `by` learnt.
fn first_of(by: Ipv4Addr) -> Learnt {
    Learnt { by, address: Ipv4Addr::UNSPECIFIED, port: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members() -> Members {
        let slice = Range { first: Ipv4Addr::new(10, 224, 8, 0), bits: 21 };
        Members::new(slice, "wrnaaaaaa".to_owned(), Vec::new())
    }

    #[test]
    fn every_sandbox_has_a_number_of_its_own_until_all_are_taken() {
        let mut members = members();
        let first = members.join("a", Egress::None).expect("free");
        assert_eq!(first.link, format!("wrnaaaaaa{:04x}", first.number));
        assert_eq!(u32::from(first.address), u32::from(Ipv4Addr::new(10, 224, 8, 0)) + u32::from(first.number));
        let mut seen = vec![first.number];
        while let Some(next) = members.join(&format!("x{}", seen.len()), Egress::Public) {
            assert!(!seen.contains(&next.number) && next.link.len() <= 15);
            seen.push(next.number);
        }
        assert_eq!(seen.len(), 2045);
        members.leave("a");
        assert_eq!(members.join("b", Egress::None), None);
        members.free(first.number);
        assert_eq!(members.join("b", Egress::None).expect("given back").number, first.number);
        assert_eq!(members.egress_of(first.address), Some(Egress::None));
        assert_eq!(members.egress_of(Ipv4Addr::new(10, 224, 8, 1)), None);
        assert_eq!(members.egress_of(Ipv4Addr::new(1, 1, 1, 1)), None);
    }

    #[test]
    fn what_is_known_for_long_enough_is_not_told_again() {
        let mut members = members();
        let by = members.join("a", Egress::Public).expect("free").address;
        let found = [Learnt { by, address: Ipv4Addr::new(1, 2, 3, 4), port: Some(443) }];
        let (begin, minute) = (BootInstant::now(), Duration::from_secs(60));
        assert_eq!(members.learn(&Egress::Public, &found, minute, begin).len(), 1);
        assert!(members.learn(&Egress::Public, &found, minute, begin.plus(SPARE)).is_empty());
        assert_eq!(members.learn(&Egress::Public, &found, minute, begin.plus(SPARE + minute / 2)).len(), 1);
        assert!(members.learn(&Egress::None, &found, minute * 60, begin).is_empty(), "the policy changed meanwhile");
        assert_eq!(members.learnt(begin).len(), 1);
        assert_eq!(members.forget_learnt(by), found);
        assert!(members.learnt(begin).is_empty());
    }
}
