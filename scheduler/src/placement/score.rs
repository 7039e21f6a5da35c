//! How good a node is for a request that it can take. The order of the fields is the policy.

use std::cmp::Reverse;

use warren_proto::units::Resources;

use super::Request;
use super::view::Row;

/// Greater is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    /// Not where its last start failed.
    pub untried: bool,
    /// Best fit: what would be left free, in thousandths of the node's capacity, summed over CPU, memory, disk and GPUs.
    pub left_over: Reverse<u64>,
    /// Already holds the template.
    pub holds_template: bool,
}

impl Score {
    pub fn of(row: &Row, request: &Request) -> Self {
        Self {
            untried: request.avoid.as_ref() != Some(&row.node.id),
            left_over: Reverse(left_over(row.free().saturating_sub(request.resources), row.node.report.capacity)),
            holds_template: request.template.is_some_and(|digest| row.node.templates.contains(&digest)),
        }
    }
}

fn left_over(left: Resources, capacity: Resources) -> u64 {
    let part = |left: u64, of: u64| {
        let thousandths = u128::from(left) * 1000 / u128::from(of.max(1));
        u64::try_from(thousandths).unwrap_or(u64::MAX)
    };
    part(left.cpu.0, capacity.cpu.0)
        .saturating_add(part(left.memory.0, capacity.memory.0))
        .saturating_add(part(left.disk.0, capacity.disk.0))
        .saturating_add(part(left.gpus.0, capacity.gpus.0))
}
