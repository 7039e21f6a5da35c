//! Splits what an agent saw into commands that fit a log entry.

use std::collections::BTreeSet;

use warren_proto::ids::Digest;

use crate::state::command::{Observation, Observed, Phase};
use crate::state::level::Level;

/// Bytes of one part: half of what an entry holds, which leaves room for names.
const MAX_BYTES: usize = 24 * 1024;

/// Names and numbers of one observation.
const FIXED_BYTES: usize = 200;

/// The commands' observations, in order: the templates in one of their own, where they changed. Level 1 knows no observation
/// without templates, so there each part repeats them.
pub(super) fn of(
    sandboxes: Vec<Observed>,
    templates: Option<BTreeSet<Digest>>,
    known: BTreeSet<Digest>,
    level: Level,
) -> Vec<Observation> {
    let mut parts = Vec::new();
    let repeated = (level == Level::FIRST).then(|| templates.clone().unwrap_or(known));
    if templates.is_some() {
        parts.push(Observation { sandboxes: Vec::new(), templates });
    }
    parts.extend(split(sandboxes).into_iter().map(|sandboxes| Observation { sandboxes, templates: repeated.clone() }));
    parts
}

fn split(sandboxes: Vec<Observed>) -> Vec<Vec<Observed>> {
    let mut parts: Vec<Vec<Observed>> = Vec::new();
    let mut bytes = MAX_BYTES;
    for seen in sandboxes {
        let size = size(&seen);
        if bytes.saturating_add(size) > MAX_BYTES {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes = bytes.saturating_add(size);
        if let Some(part) = parts.last_mut() {
            part.push(seen);
        }
    }
    parts
}

fn size(seen: &Observed) -> usize {
    let variable = match &seen.phase {
        Phase::Exited { output_tail, .. } => output_tail.len(),
        Phase::Failed { code, message } => code.len().saturating_add(message.len()),
        _ => 0,
    };
    variable.saturating_add(FIXED_BYTES)
}

#[cfg(test)]
mod tests {
    use warren_proto::ids::{Epoch, SandboxName};

    use super::*;

    fn seen(id: usize) -> Observed {
        let sandbox = SandboxName::parse(&format!("tenants/t/sandboxes/s{id}")).unwrap();
        let exit = crate::state::sandbox::Exit::default();
        Observed { sandbox, epoch: Epoch(1), phase: Phase::Exited { exit, output_tail: vec![0; 4096] } }
    }

    #[test]
    fn a_host_with_many_templates_and_outputs_is_split_into_entries_that_fit() {
        let templates: BTreeSet<Digest> = (0..1000u16).map(|n| Digest([n.to_le_bytes()[0]; 32])).collect();
        let all = of((0..100).map(seen).collect(), Some(templates.clone()), BTreeSet::new(), Level::SECOND);
        assert_eq!(all.iter().map(|part| part.sandboxes.len()).sum::<usize>(), 100);
        assert_eq!(all.iter().filter(|part| part.templates.is_some()).count(), 1, "told once");
        assert!(all.iter().all(|part| part.sandboxes.iter().map(size).sum::<usize>() <= MAX_BYTES));
    }

    #[test]
    fn nothing_new_is_no_part_and_level_1_repeats_the_templates() {
        assert!(of(vec![], None, BTreeSet::new(), Level::SECOND).is_empty());
        let known = BTreeSet::from([Digest([7; 32])]);
        let parts = of(vec![seen(1)], None, known.clone(), Level::FIRST);
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].templates, Some(known));
    }
}
