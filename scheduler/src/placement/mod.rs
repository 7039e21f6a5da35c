//! PURE. Which node takes a sandbox: filter, then score, over a dense view of the fleet.
//!
//! A decision is a proposal: `apply` verifies it. The view counts what is in flight as taken, and never counts capacity that
//! an uncommitted command would free.

pub mod filter;
pub mod score;
pub mod view;

use std::collections::BTreeMap;

use warren_proto::ids::{Digest, NodeId, SandboxName};
use warren_proto::units::Resources;

use crate::state::State;
use crate::state::command::Spot;
use crate::state::gpu::GpuHold;
use crate::state::sandbox::{PendingCode, PendingReason, Sandbox, SandboxSpec};
use crate::state::settings::Isolation;
use filter::Misfit;
use score::Score;
use view::{Row, View};

/// What is to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub resources: Resources,
    /// The template's digest: nodes that hold it start faster.
    pub template: Option<Digest>,
    /// Where its last start failed.
    pub avoid: Option<NodeId>,
    /// It freezes on isolation, so a fence must live on the node.
    pub needs_fence: bool,
    /// Its name, if it waits: a node that still holds another instance of it cannot take it. A new name may have one too, of an
    /// earlier ledger.
    pub avoids_old: Option<SandboxName>,
}

impl Request {
    /// What a new sandbox asks for.
    pub fn new(state: &State, spec: &SandboxSpec) -> Self {
        Self {
            resources: spec.resources,
            template: state.templates.get(&spec.template).map(|template| template.spec.digest),
            avoid: None,
            needs_fence: spec.isolation == Isolation::Freeze,
            avoids_old: None,
        }
    }

    /// What a sandbox that waits asks for.
    pub fn of(state: &State, sandbox: &Sandbox) -> Self {
        Self { avoid: sandbox.avoid.clone(), avoids_old: Some(sandbox.name.clone()), ..Self::new(state, &sandbox.spec) }
    }
}

/// Why nothing can take it: how many nodes failed for which reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaceable {
    pub request: Resources,
    pub misfits: BTreeMap<Misfit, u64>,
}

/// The best node by [`Score`], ties to the first id, and the first of its free devices.
pub fn place(view: &View, request: &Request) -> Result<Spot, Unplaceable> {
    let mut misfits = BTreeMap::new();
    let mut best = None;
    for row in view.rows() {
        if let Some(misfit) = filter::misfit(row, request) {
            *misfits.entry(misfit).or_insert(0u64) += 1;
            continue;
        }
        let score = Score::of(row, request);
        if best.as_ref().is_none_or(|(highest, _)| score > *highest) {
            best = Some((score, row));
        }
    }
    best.map(|(_, row)| spot(row, request)).ok_or(Unplaceable { request: request.resources, misfits })
}

/// A node that only counts its GPUs gives no devices away.
fn spot(row: &Row, request: &Request) -> Spot {
    let wanted = usize::try_from(request.resources.gpus.0).unwrap_or(usize::MAX);
    Spot { node: row.node.id.clone(), gpus: row.free_gpus().take(wanted).map(GpuHold::whole).collect() }
}

impl Unplaceable {
    /// The reason that a waiting sandbox shows: the shortage that most nodes have, and the whole tally in words. It is too large
    /// only where it exceeds them all: on one that is merely taken it will fit some day.
    pub fn reason(&self) -> PendingReason {
        let candidates = self.misfits.iter().filter(|(misfit, _)| misfit.code() != PendingCode::NoNodes);
        let code = candidates
            .max_by_key(|(misfit, count)| (**misfit != Misfit::TooSmall, **count, std::cmp::Reverse(**misfit)))
            .map_or(PendingCode::NoNodes, |(misfit, _)| misfit.code());
        let tally: Vec<String> = self.misfits.iter().map(|(misfit, count)| format!("{count} {misfit}")).collect();
        let total: u64 = self.misfits.values().sum();
        let Resources { cpu, memory, disk, gpus } = self.request;
        let message = match total {
            0 => "no node is registered".to_owned(),
            _ => {
                format!(
                    "needs {cpu} vCPU, {memory} memory, {disk} disk, {gpus} GPUs; of {total} nodes: {}",
                    tally.join(", ")
                )
            }
        };
        PendingReason { code, message }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use warren_proto::units::{Bytes, Gpus, MilliCpu};

    use super::*;
    use crate::state::node::testing::node;

    fn resources(cpu: u64, memory: u64) -> Resources {
        Resources { cpu: MilliCpu(cpu), memory: Bytes(memory), disk: Bytes(0), ..Resources::default() }
    }

    fn request(cpu: u64, memory: u64) -> Request {
        let resources = resources(cpu, memory);
        Request { resources, template: None, avoid: None, needs_fence: false, avoids_old: None }
    }

    fn view(nodes: &[(&str, Resources)]) -> View {
        let mut view = View::default();
        view.sync(&State {
            nodes: nodes
                .iter()
                .map(|(id, capacity)| (NodeId::parse(id).unwrap(), Arc::new(node(id, *capacity))))
                .collect(),
            ..State::default()
        });
        view
    }

    #[test]
    fn the_fullest_node_that_fits_is_chosen() {
        let view =
            view(&[("big", resources(4000, 4000)), ("small", resources(1000, 1000)), ("tiny", resources(10, 10))]);
        assert_eq!(place(&view, &request(500, 500)).unwrap().node.as_str(), "small");
        assert_eq!(place(&view, &request(2000, 500)).unwrap().node.as_str(), "big");
    }

    #[test]
    fn a_node_where_the_start_failed_is_the_last_resort() {
        let view = view(&[("a", resources(1000, 1000)), ("b", resources(4000, 4000))]);
        let avoid = |id: &str| Request { avoid: Some(NodeId::parse(id).unwrap()), ..request(500, 500) };
        assert_eq!(place(&view, &avoid("a")).unwrap().node.as_str(), "b");
        let only = super::tests::view(&[("a", resources(1000, 1000))]);
        assert_eq!(place(&only, &avoid("a")).unwrap().node.as_str(), "a");
    }

    #[test]
    fn what_is_in_flight_is_taken() {
        let mut view = view(&[("a", resources(1000, 1000))]);
        let a = Spot::from(NodeId::parse("a").unwrap());
        let held = view.reserve(&a, resources(600, 600));
        let refused = place(&view, &request(500, 100)).unwrap_err();
        assert_eq!(refused.reason().code, PendingCode::ShortOfCpu);
        view.release(&held);
        assert_eq!(place(&view, &request(500, 100)), Ok(a));
    }

    /// A host that lost devices holds more than it has: `apply` lets nothing more hold anything there, so nothing is proposed.
    #[test]
    fn a_host_that_shrank_takes_nothing_also_of_what_it_has() {
        let gpus = |count| Resources { gpus: Gpus(count), ..resources(1000, 1000) };
        let mut view = view(&[("a", gpus(1))]);
        view.reserve(&NodeId::parse("a").unwrap().into(), Resources { gpus: Gpus(2), ..Resources::default() });
        let refused = place(&view, &request(100, 100)).unwrap_err();
        assert_eq!(refused.reason().code, PendingCode::ShortOfGpus);
    }

    #[test]
    fn a_refusal_says_which_dimension_is_short() {
        let fleet = view(&[("a", resources(1000, 100)), ("b", resources(1000, 100))]);
        assert_eq!(place(&fleet, &request(500, 500)).unwrap_err().reason().code, PendingCode::TooLarge);
        assert_eq!(place(&View::default(), &request(1, 1)).unwrap_err().reason().code, PendingCode::NoNodes);
        let mut mixed = view(&[("a", resources(10, 10)), ("b", resources(10, 10)), ("c", resources(1000, 1000))]);
        mixed.reserve(&NodeId::parse("c").unwrap().into(), resources(800, 100));
        assert_eq!(place(&mixed, &request(500, 500)).unwrap_err().reason().code, PendingCode::ShortOfCpu);
    }

    proptest! {
        #[test]
        fn no_decision_oversells(
            capacities in prop::collection::vec((0u64..2000, 0u64..2000), 1..8),
            requests in prop::collection::vec((1u64..900, 1u64..900), 1..40),
        ) {
            let ids: Vec<String> = (0..capacities.len()).map(|i| format!("n{i}")).collect();
            let nodes: Vec<_> = ids.iter().zip(&capacities).map(|(id, (c, m))| (id.as_str(), resources(*c, *m))).collect();
            let mut view = view(&nodes);
            let mut used: BTreeMap<NodeId, Resources> = BTreeMap::new();
            for (cpu, memory) in requests {
                let wanted = request(cpu, memory);
                let fits_somewhere = view.rows().any(|row| wanted.resources.fits_in(row.free()));
                match place(&view, &wanted) {
                    Ok(spot) => {
                        view.reserve(&spot, wanted.resources);
                        let id = spot.node;
                        let sum = used.entry(id.clone()).or_default();
                        *sum = sum.checked_add(wanted.resources).unwrap();
                        let (_, capacity) = nodes.iter().find(|(name, _)| *name == id.as_str()).unwrap();
                        prop_assert!(sum.fits_in(*capacity));
                    }
                    Err(_) => prop_assert!(!fits_somewhere, "refused although a node fits"),
                }
            }
        }
    }
}
