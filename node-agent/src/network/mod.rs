//! The network of sandboxes: each has a link of its own to the host, and what it may reach is decided by the kernel.
//!
//! A node has a slice of addresses (`range`), one table of packet rules (`rules`, `nft`), an address at which the agent
//! answers names (`dns`), and for each sandbox a number in the slice, which says its address and its link. What a sandbox may
//! reach (`egress`) is elements of the table's sets. Nothing of this needs the agent to live: links and rules are the
//! kernel's, and a new agent derives all of it from the instances' records and makes it whole. Names are answered by the agent
//! only, so while it is away new ones are not.
//!
//! `inside` makes a sandbox's own end, in its shim, with `netlink`; `forwarding` is what the host must allow.

mod dns;
pub mod egress;
mod forwarding;
pub mod inside;
mod members;
mod netlink;
mod nft;
pub mod range;
mod rules;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use self::egress::Egress;
use self::inside::{Assigned, Paths};
use self::members::Members;
use self::netlink::Netlink;
use self::range::{Claim, Range};
use self::rules::{Element, Learnt, Rules, elements};
use crate::clock::BootInstant;

/// How often the agent looks whether somebody took the rules away, as `nft flush ruleset` does. Looking takes some
/// milliseconds of a processor.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Scope of an address that is this host's alone.
const SCOPE_HOST: u8 = 254;

/// Why a sandbox cannot have a network, or a node none for its sandboxes.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("nft refused: {output}")]
    Nft { output: String },
    #[error(
        "every slice of {range} is held by another agent of this host or lies in a network that it has routes to: give a larger one, or another, with --sandbox-network"
    )]
    NoSlice { range: Range },
    #[error("every address of {slice} is taken: this node runs as many sandboxes as it has addresses")]
    Full { slice: Range },
    #[error("the sandbox was started without a network: this needs a new start")]
    NotConnected,
}

/// What went through a sandbox's link, and what was refused of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetworkStats {
    pub received_bytes: u64,
    pub received_packets: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    /// Packets that it sent and its policy refused.
    pub denied_packets: u64,
}

/// What a node's network needs to know.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Directory of all agents' short paths, and this agent's in it.
    pub root: PathBuf,
    pub short: PathBuf,
    /// Names this agent on the host: hexadecimal, at least 6 digits.
    pub hash: String,
    /// From which the node takes its slice.
    pub range: Range,
    /// Who answers names; empty: the host's resolvers.
    pub upstreams: Vec<SocketAddr>,
}

/// A sandbox that is on the network: its container's id, what it has and what it may reach.
pub type Member = (String, Assigned, Egress);

/// The node's network. Dropping it ends the answering of names, and nothing else.
#[derive(Debug)]
pub struct Network {
    inner: Arc<Inner>,
    _tasks: DropGuard,
}

#[derive(Debug)]
struct Inner {
    config: NetworkConfig,
    claim: Claim,
    rules: Rules,
    members: Mutex<Members>,
    /// Held while the kernel's rules are changed: what is read from `members` and what is applied stay in step. Holds the
    /// rules as they were listed after they were last made whole.
    kernel: Mutex<String>,
}

impl Network {
    /// Makes the network whole for the sandboxes that are here: sweeps what a crash left, puts back what somebody took. Call
    /// it under the lock on `config.root`, in the async runtime's context. Blocks; once, at start.
    pub fn open(config: NetworkConfig, here: Vec<Member>) -> Result<Self, NetworkError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| NetworkError::Io { what, source }
        };
        let claim = Claim::take(&config.root, &config.short, config.range)?;
        let paths = Paths::new(&config.short);
        paths.make().map_err(failed("make the files for namespaces"))?;
        let links = format!("{}{}", rules::LINKS, &config.hash[..6]);
        let rules = Rules { table: format!("warren_{}", config.hash), links, slice: claim.slice };
        let netlink = Netlink::open().map_err(failed("open netlink"))?;
        let lo = netlink.index("lo").map_err(failed("find lo"))?;
        netlink.set_up(lo).map_err(failed("set lo up"))?;
        netlink
            .add_address(lo, claim.slice.gateway(), SCOPE_HOST)
            .map_err(failed("give the host the gateway's address"))?;
        let kept: Vec<&str> = here.iter().map(|(_, assigned, _)| assigned.link.as_str()).collect();
        delete_links(&netlink, |name| name.starts_with(&rules.links) && !kept.contains(&name))
            .map_err(failed("sweep links"))?;
        // Those of another slice are from before the host restarted, and run no more.
        let gateway = claim.slice.gateway();
        let here = here.into_iter().filter(|(_, assigned, _)| assigned.gateway == gateway).collect();
        let members = Members::new(claim.slice, rules.links.clone(), here);
        let inner = Inner { config, claim, rules, members: Mutex::new(members), kernel: Mutex::new(String::new()) };
        inner.forget_strangers()?;
        inner.make_whole()?;
        // The rules first: nothing is forwarded before they hold.
        forwarding::enable(&inner.config.root).map_err(failed("let the host forward packets"))?;
        let inner = Arc::new(inner);
        let stop = CancellationToken::new();
        let until = stop.clone();
        let task = Arc::clone(&inner);
        tokio::spawn(async move {
            tokio::select! {
                () = until.cancelled() => {}
                () = dns::serve(&task) => {}
                () = look_after(&task) => {}
            }
        });
        Ok(Self { inner, _tasks: stop.drop_guard() })
    }

    /// The slice of the node.
    pub fn slice(&self) -> Range {
        self.inner.claim.slice
    }

    pub fn paths(&self) -> Paths {
        Paths::new(&self.inner.config.short)
    }

    /// Gives a sandbox its place on the network; its link is made by its shim.
    pub async fn join(&self, id: &str, egress: &Egress) -> Result<Assigned, NetworkError> {
        // At once, not in the other thread: should this call be dropped, whoever cleans up after it finds a member.
        let joined = self.inner.members().join(id, egress.clone());
        let assigned = joined.ok_or(NetworkError::Full { slice: self.inner.claim.slice })?;
        let (id, egress) = (id.to_owned(), egress.clone());
        self.blocking(move |inner| {
            let add = |rules: &Rules| match inner.members().get(&id) {
                Some(_) => rules.add(&elements(&assigned, &egress)),
                None => String::new(),
            };
            inner.change(add).inspect_err(|_| {
                let mut members = inner.members();
                members.leave(&id);
                members.free(assigned.number);
            })?;
            Ok(assigned)
        })
        .await
    }

    /// Takes link, rules and address of a sandbox away. Without effect for one that has none.
    pub async fn leave(&self, id: &str) -> Result<(), NetworkError> {
        let id = id.to_owned();
        self.blocking(move |inner| {
            let Some((assigned, egress)) = inner.members().get(&id) else { return Ok(()) };
            let gone = Netlink::open().and_then(|netlink| netlink.delete(&assigned.link));
            gone.map_err(|source| NetworkError::Io { what: format!("remove link {}", assigned.link), source })?;
            let learnt = {
                let mut members = inner.members();
                members.leave(&id);
                members.forget_learnt(assigned.address)
            };
            inner.change(|rules| rules.delete(&elements(&assigned, &egress)) + &unlearn(rules, &learnt))?;
            inner.members().free(assigned.number);
            Ok(())
        })
        .await
    }

    /// Changes what a sandbox may reach. Connections that the new policy allows go on; others end.
    pub async fn set_egress(&self, id: &str, egress: &Egress) -> Result<(), NetworkError> {
        let (id, egress) = (id.to_owned(), egress.clone());
        self.blocking(move |inner| {
            let (assigned, old) = inner.members().get(&id).ok_or(NetworkError::NotConnected)?;
            if old == egress {
                return Ok(());
            }
            inner.members().set(&id, egress.clone());
            let learnt = inner.members().forget_learnt(assigned.address);
            let [less, more] = [&old, &egress].map(|egress| elements(&assigned, egress));
            let (gone, new): (Vec<Element>, Vec<Element>) = (minus(&less, &more), minus(&more, &less));
            inner.change(|rules| rules.delete(&gone) + &unlearn(rules, &learnt) + &rules.add(&new))
        })
        .await
    }

    /// What a sandbox may reach now; `None`: it has no network.
    pub fn egress(&self, id: &str) -> Option<Egress> {
        self.inner.members().get(id).map(|(_, egress)| egress)
    }

    /// What went through a sandbox's link.
    pub async fn stats(&self, id: &str) -> Result<NetworkStats, NetworkError> {
        let (assigned, _) = self.inner.members().get(id).ok_or(NetworkError::NotConnected)?;
        self.blocking(move |inner| {
            let failed = |source| NetworkError::Io { what: format!("read the counters of {}", assigned.link), source };
            let host = Netlink::open().and_then(|netlink| netlink.find(&assigned.link)).map_err(failed)?.traffic;
            // What the host's end receives, the sandbox sent.
            Ok(NetworkStats {
                received_bytes: host.sent_bytes,
                received_packets: host.sent_packets,
                sent_bytes: host.received_bytes,
                sent_packets: host.received_packets,
                denied_packets: inner.denied()?.get(&assigned.link).copied().unwrap_or(0),
            })
        })
        .await
    }

    /// Takes everything of this node's network off the host. Call it under the lock on the root, once no sandbox is left.
    pub fn clean(&self) -> Result<(), NetworkError> {
        let inner = &self.inner;
        let failed = |source| NetworkError::Io { what: "take the network off the host".to_owned(), source };
        let netlink = Netlink::open().map_err(failed)?;
        delete_links(&netlink, |name| name.starts_with(&inner.rules.links)).map_err(failed)?;
        Claim::drop_of(&inner.config.short).map_err(failed)?;
        forwarding::disable(&inner.config.root).map_err(failed)?;
        let lo = netlink.index("lo").map_err(failed)?;
        netlink.delete_address(lo, inner.claim.slice.gateway()).map_err(failed)?;
        nft::apply(&inner.rules.remove())
    }

    /// Does blocking work where it disturbs nobody.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner)).await.expect("network work does not panic")
    }
}

impl Inner {
    fn members(&self) -> MutexGuard<'_, Members> {
        // Changed in whole steps.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kernel(&self) -> MutexGuard<'_, String> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the kernel's rules; where they are not what they should be, so that the change cannot be made, makes them
    /// whole, which includes it.
    fn change(&self, script: impl FnOnce(&Rules) -> String) -> Result<(), NetworkError> {
        let mut kernel = self.kernel();
        let script = script(&self.rules);
        if script.is_empty() {
            return Ok(());
        }
        match nft::apply(&script) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "packet rules could not be changed; they are made anew");
                self.make_whole_locked(&mut kernel)
            }
        }
    }

    fn make_whole(&self) -> Result<(), NetworkError> {
        self.make_whole_locked(&mut self.kernel())
    }

    fn make_whole_locked(&self, kernel: &mut String) -> Result<(), NetworkError> {
        let (elements, learnt) = {
            let members = self.members();
            let all: Vec<Element> = members.all().flat_map(|(assigned, egress)| elements(assigned, egress)).collect();
            (all, members.learnt(BootInstant::now()))
        };
        let script = self.rules.whole(&elements, &learnt);
        // Sets of another build's kind refuse: then from scratch, in one step too.
        nft::apply(&script).or_else(|_| nft::apply(&(self.rules.remove() + &script)))?;
        *kernel = self.listed()?;
        Ok(())
    }

    /// The rules as they are, without the sets' elements.
    fn listed(&self) -> Result<String, NetworkError> {
        let listed = nft::list(&["-s", "-t", "list", "table", "inet", &self.rules.table])?;
        Ok(String::from_utf8_lossy(&listed).into_owned())
    }

    /// Makes the rules whole where somebody changed them.
    fn repair(&self) -> Result<(), NetworkError> {
        let mut kernel = self.kernel();
        if self.listed().is_ok_and(|listed| listed == *kernel) {
            return Ok(());
        }
        tracing::warn!(table = self.rules.table, "somebody changed the packet rules; they are made anew");
        self.make_whole_locked(&mut kernel)
    }

    /// Removes the counters of sandboxes that are not here.
    fn forget_strangers(&self) -> Result<(), NetworkError> {
        let here: Vec<String> = self.members().all().map(|(assigned, _)| assigned.link.clone()).collect();
        // No table, no counters.
        let strangers = self.denied().unwrap_or_default().into_keys().filter(|link| !here.contains(link));
        let script: String = strangers.map(|link| self.rules.delete(&[Element::denied(&link)])).collect();
        if script.is_empty() { Ok(()) } else { nft::apply(&script) }
    }

    /// Denied packets, by link.
    fn denied(&self) -> Result<BTreeMap<String, u64>, NetworkError> {
        let listed = nft::list(&["-j", "list", "set", "inet", &self.rules.table, "denied"])?;
        let json: serde_json::Value = serde_json::from_slice(&listed)
            .map_err(|e| NetworkError::Io { what: "read what nft lists".to_owned(), source: e.into() })?;
        Ok(rules::parse_counters(&json))
    }

    /// What a sandbox that sends from `address` may reach; `None`: there is none.
    fn policy_of(&self, address: Ipv4Addr) -> Option<Egress> {
        self.members().egress_of(address)
    }

    /// Lets a sandbox reach addresses that a name has, for at least `timeout`, unless its policy is another by now.
    fn learn(&self, egress: &Egress, found: &[Learnt], timeout: Duration) -> Result<(), NetworkError> {
        let new = self.members().learn(egress, found, timeout, BootInstant::now());
        if new.is_empty() {
            return Ok(());
        }
        self.change(|rules| new.iter().map(|(learnt, rest)| rules.learn(learnt, *rest)).collect())
    }
}

fn unlearn(rules: &Rules, learnt: &[Learnt]) -> String {
    learnt.iter().map(|learnt| rules.unlearn(learnt)).collect()
}

fn minus(these: &[Element], those: &[Element]) -> Vec<Element> {
    these.iter().filter(|element| !those.contains(element)).cloned().collect()
}

fn delete_links(netlink: &Netlink, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
    netlink.links()?.iter().filter(|link| wanted(&link.name)).try_for_each(|link| netlink.delete(&link.name))
}

async fn look_after(inner: &Arc<Inner>) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let inner = Arc::clone(inner);
        match tokio::task::spawn_blocking(move || inner.repair()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "packet rules cannot be made whole: sandboxes may reach more or less than they should")
            }
            Err(error) => tracing::error!(%error, "looking after packet rules failed"),
        }
    }
}
