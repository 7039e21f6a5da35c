//! PURE: from what the node holds to what the leader is told: everything in the Hello, changes afterwards, in messages of
//! bounded size.

use std::collections::BTreeMap;

use warren_proto::v1::sandbox_observation::Phase as WirePhase;
use warren_proto::v1::{ExitStatus, Observation, SandboxObservation, StateReason};

use crate::driver::InstanceKey;
use crate::reconcile::Phase;
use crate::supervisor::Snapshot;

/// Sandboxes in one observation: with their tails of 4 KiB they stay far below a message of 4 MiB.
const MAX_SANDBOXES: usize = 256;

/// Tails that the Hello carries, in bytes; the others follow as changes.
const MAX_HELLO_TAILS: usize = 1 << 20;

/// What the leader was told last.
#[derive(Debug, Clone, Default)]
pub struct Told(Snapshot);

impl Told {
    /// Everything, for the Hello, and what it tells.
    pub fn everything(snapshot: &Snapshot) -> (Observation, Self) {
        let mut told = snapshot.clone();
        let mut room = MAX_HELLO_TAILS;
        for phase in told.reports.values_mut() {
            if let Phase::Exited(ended) = phase {
                match room.checked_sub(ended.output_tail.len()) {
                    Some(left) => room = left,
                    None => ended.output_tail.clear(),
                }
            }
        }
        let all: Vec<_> = told.reports.iter().collect();
        (observation(&told, true, &all), Self(told))
    }

    /// What changed since; nothing if nothing did.
    pub fn changes(&mut self, now: Snapshot) -> Vec<Observation> {
        if now == self.0 {
            return Vec::new();
        }
        // Both are in order: one walk through the two instead of a search for each.
        let mut told = self.0.reports.iter().peekable();
        let news = |(key, phase): &(&InstanceKey, &Phase)| {
            while told.next_if(|(other, _)| other < key).is_some() {}
            told.next_if(|(other, _)| other == key).is_none_or(|(_, known)| known != *phase)
        };
        let changed: Vec<_> = now.reports.iter().filter(news).collect();
        let messages = if changed.is_empty() {
            vec![observation(&now, false, &[])]
        } else {
            changed.chunks(MAX_SANDBOXES).map(|part| observation(&now, false, part)).collect()
        };
        self.0 = now;
        messages
    }
}

/// How many sandboxes are in each phase, by its label.
pub fn count_by_phase(reports: &BTreeMap<InstanceKey, Phase>) -> [(&'static str, usize); 6] {
    let labels = ["starting", "running", "exited", "failed", "removed", "orphan"];
    labels.map(|label| (label, reports.values().filter(|phase| phase_label(phase) == label).count()))
}

fn phase_label(phase: &Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Exited(_) => "exited",
        Phase::Failed(_) => "failed",
        Phase::Removed => "removed",
        Phase::Orphan => "orphan",
    }
}

fn observation(snapshot: &Snapshot, full: bool, reports: &[(&InstanceKey, &Phase)]) -> Observation {
    Observation {
        generation: snapshot.generation.0,
        full,
        sandboxes: reports.iter().map(|(key, phase)| sandbox(key, phase)).collect(),
        template_digests: snapshot.templates.iter().map(ToString::to_string).collect(),
    }
}

fn sandbox(key: &InstanceKey, phase: &Phase) -> SandboxObservation {
    let mut wire =
        SandboxObservation { sandbox: key.sandbox.to_string(), epoch: key.epoch.0, ..SandboxObservation::default() };
    let phase = match phase {
        Phase::Starting => WirePhase::Starting,
        Phase::Running => WirePhase::Running,
        Phase::Exited(ended) => {
            let exit = ended.exit;
            wire.exit_status = Some(ExitStatus { code: exit.code, signal: exit.signal, oom_killed: exit.oom_killed });
            wire.output_tail.clone_from(&ended.output_tail);
            WirePhase::Exited
        }
        Phase::Failed(reason) => {
            wire.reason = Some(StateReason { code: reason.code.clone(), message: reason.message.clone() });
            WirePhase::Failed
        }
        Phase::Removed => WirePhase::Removed,
        Phase::Orphan => WirePhase::Orphan,
    };
    wire.set_phase(phase);
    wire
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Ended;
    use warren_proto::ids::{Epoch, Generation, SandboxName};

    fn snapshot(generation: u64, phases: Vec<Phase>) -> Snapshot {
        let name = |n: usize| SandboxName::parse(&format!("tenants/t/sandboxes/s{n:05}")).expect("name");
        let key = |n| InstanceKey { sandbox: name(n), epoch: Epoch(1) };
        Snapshot {
            generation: Generation(generation),
            reports: phases.into_iter().enumerate().map(|(n, phase)| (key(n), phase)).collect(),
            templates: Vec::new(),
        }
    }

    #[test]
    fn only_changes_are_told_and_each_once() {
        let (hello, mut told) = Told::everything(&snapshot(1, vec![Phase::Starting, Phase::Running]));
        assert!(hello.full);
        assert_eq!(hello.sandboxes.len(), 2);
        let changes = told.changes(snapshot(2, vec![Phase::Running, Phase::Running]));
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].sandboxes.len(), 1);
        assert_eq!((changes[0].generation, changes[0].full), (2, false));
        assert!(told.changes(snapshot(2, vec![Phase::Running, Phase::Running])).is_empty());
        assert_eq!(told.changes(snapshot(3, vec![Phase::Running, Phase::Running])).len(), 1, "a generation is news");
    }

    #[test]
    fn messages_stay_small_and_no_tail_is_lost() {
        let ended = || Phase::Exited(Ended { output_tail: vec![b'x'; 4096], ..Ended::default() });
        let all = snapshot(1, (0..1000).map(|_| ended()).collect());
        let (hello, mut told) = Told::everything(&all);
        let tails = |o: &Observation| o.sandboxes.iter().filter(|s| s.output_tail.len() == 4096).count();
        assert_eq!((hello.sandboxes.len(), tails(&hello)), (1000, 256));
        let rest = told.changes(all);
        assert_eq!(rest.iter().map(tails).sum::<usize>(), 744);
        assert!(rest.iter().all(|o| o.sandboxes.len() <= MAX_SANDBOXES));
    }
}
