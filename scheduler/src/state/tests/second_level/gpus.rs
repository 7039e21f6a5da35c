//! Devices are given away by name, to one at a time.

use warren_proto::units::{Bytes, Gpus};

use super::*;
use crate::state::gpu::{GpuDevice, GpuHold};
use crate::state::node::NodeReport;

/// Node `a` says that it has these devices.
fn with_devices(uuids: &[&str]) -> Ledger {
    let mut ledger = Ledger::second();
    ledger.run(Body::RegisterNode { node: node("a"), report: with_gpus(1, uuids) }).unwrap();
    ledger
}

fn with_gpus(incarnation: u128, uuids: &[&str]) -> NodeReport {
    let capacity = Resources { gpus: Gpus(uuids.len() as u64), ..resources(1000, 1000) };
    NodeReport { gpus: uuids.iter().map(|uuid| gpu(uuid)).collect(), ..report(incarnation, capacity) }
}

fn gpu(uuid: &str) -> GpuDevice {
    GpuDevice { uuid: uuid.into(), model: "A100".into(), memory: Bytes(40), enforced: false }
}

fn with(gpus: u64, isolation: Isolation) -> SandboxSpec {
    let resources = Resources { gpus: Gpus(gpus), ..resources(100, 100) };
    SandboxSpec { resources, isolation, ..spec(100, 100) }
}

fn spot(uuids: &[&str]) -> Decision {
    let gpus = uuids.iter().map(|uuid| GpuHold::whole(&gpu(uuid))).collect();
    Decision::Place(Spot { node: node("a"), gpus })
}

fn held(ledger: &Ledger) -> Vec<&str> {
    ledger.state.nodes[&node("a")].gpu_use.iter().map(|(uuid, _)| uuid).collect()
}

#[test]
fn a_sandbox_holds_the_devices_of_its_decision_until_nothing_of_it_is_left() {
    let mut ledger = with_devices(&["g1", "g2", "g3"]);
    ledger.create_spec("one", with(2, Isolation::Keep), spot(&["g1", "g3"])).unwrap();
    assert_eq!((ledger.kind("one"), held(&ledger)), ("STARTING", vec!["g1", "g3"]));
    let wrong = [spot(&["g1"]), spot(&["g2", "g3"]), spot(&[]), spot(&["g9"]), on("a")];
    for (number, decision) in wrong.into_iter().enumerate() {
        let id = format!("wrong-{number}");
        ledger.create_spec(&id, with(1, Isolation::Keep), decision).unwrap();
        assert_eq!(ledger.kind(&id), "PENDING", "what was decided wrongly waits");
    }
    assert_eq!(held(&ledger), ["g1", "g3"]);
    ledger.observe("a", "one", 1, Phase::Running).unwrap();
    ledger.run(Body::DeleteSandbox { sandbox: name("one"), request: None }).unwrap();
    assert_eq!(held(&ledger), ["g1", "g3"], "it is still there");
    ledger.observe("a", "one", 1, Phase::Removed).unwrap();
    assert_eq!(held(&ledger), Vec::<&str>::new());
    ledger.create_spec("two", with(1, Isolation::Keep), spot(&["g1"])).unwrap();
    assert_eq!(ledger.kind("two"), "STARTING");
}

#[test]
fn what_is_left_over_of_a_sandbox_keeps_its_devices() {
    let mut ledger = with_devices(&["g1", "g2"]);
    ledger.create_spec("s", with(1, Isolation::Freeze), spot(&["g2"])).unwrap();
    ledger.turn("a", Condition::Suspect).unwrap();
    ledger.turn("a", Condition::Down).unwrap();
    ledger.run(Body::RequeueSandbox { sandbox: name("s"), epoch: Epoch(1) }).unwrap();
    assert_eq!((ledger.kind("s"), held(&ledger)), ("PENDING", vec!["g2"]));
    assert!(ledger.state.sandboxes[&name("s")].gpus.is_empty());
    ledger.run(Body::RegisterNode { node: node("a"), report: with_gpus(2, &["g1", "g2"]) }).unwrap();
    let observed = Observed { sandbox: name("s"), epoch: Epoch(1), phase: Phase::Removed };
    let observation = Observation { sandboxes: vec![observed], templates: None };
    ledger.run(Body::Observe { node: node("a"), incarnation: 2, observation }).unwrap();
    assert_eq!(held(&ledger), Vec::<&str>::new());
}

#[test]
fn a_start_that_failed_gives_its_devices_back() {
    let mut ledger = with_devices(&["g1"]);
    ledger.create_spec("s", with(1, Isolation::Keep), spot(&["g1"])).unwrap();
    let failed = Phase::Failed { code: "START_FAILED".into(), message: "no such device".into() };
    ledger.observe("a", "s", 1, failed).unwrap();
    assert_eq!((ledger.kind("s"), held(&ledger)), ("PENDING", vec![]));
}
