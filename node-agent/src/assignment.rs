//! What this node should be running, as the leader last said it.
//!
//! An assignment has a generation and only ever moves to a newer one. Applying is pure: a whole assignment replaces, a delta
//! changes the generation that it was made from, anything else asks for the whole. Wire messages are parsed here once.

use std::collections::BTreeMap;

use warren_proto::ids::{Digest, Epoch, Generation, IdError, SandboxName};
use warren_proto::units::{Bytes, MilliCpu, Resources};
use warren_proto::v1;

use crate::network::egress::Egress;

use crate::gpu::{Grant, WHOLE};

/// What the node should do with a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Desired {
    Running,
    /// Remove every trace and say so.
    Removed,
}

/// Where to get a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRef {
    pub digest: Digest,
    pub size: Bytes,
    pub sources: Vec<Source>,
    /// Good for a download at any of the sources.
    pub download_token: String,
}

/// Another node's data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub address: String,
    pub tls: bool,
}

/// How to start a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartSpec {
    pub resources: Resources,
    pub pids: u64,
    pub template: TemplateRef,
    pub command: Vec<String>,
    /// Sorted by key.
    pub environment: Vec<(String, String)>,
    pub working_directory: String,
    /// `None`: the node's default.
    pub driver: Option<String>,
    pub on_isolation: OnIsolation,
    pub egress: Egress,
    /// Devices that it holds, by uuid, none twice.
    pub gpus: Vec<Grant>,
}

/// What becomes of a sandbox when the node's lease lapses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnIsolation {
    #[default]
    Keep,
    /// It is frozen, so that it may be placed elsewhere.
    Freeze,
}

/// One sandbox of an assignment. What is to be removed needs no start spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Goal {
    pub epoch: Epoch,
    pub want: Want,
}

/// [`Desired`], with what it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    Running(Box<StartSpec>),
    Removed,
}

impl Goal {
    pub fn desired(&self) -> Desired {
        match self.want {
            Want::Running(_) => Desired::Running,
            Want::Removed => Desired::Removed,
        }
    }

    /// What it may reach; `None`: it should not run.
    pub fn egress(&self) -> Option<&Egress> {
        match &self.want {
            Want::Running(spec) => Some(&spec.egress),
            Want::Removed => None,
        }
    }

    /// Whether it runs only as long as the node has a lease.
    pub fn is_fenced(&self) -> bool {
        matches!(&self.want, Want::Running(spec) if spec.on_isolation == OnIsolation::Freeze)
    }
}

/// Why a message of the leader makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum AssignmentError {
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("{sandbox}: `{field}` is missing or out of range")]
    Field { sandbox: SandboxName, field: &'static str },
    #[error("{0} is named twice")]
    Twice(SandboxName),
}

/// A change of the assignment, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    Full { generation: Generation, goals: BTreeMap<SandboxName, Goal> },
    Delta { base: Generation, generation: Generation, upserts: BTreeMap<SandboxName, Goal>, removes: Vec<SandboxName> },
}

impl TryFrom<v1::Assignment> for Update {
    type Error = AssignmentError;
    fn try_from(wire: v1::Assignment) -> Result<Self, AssignmentError> {
        Ok(Self::Full { generation: Generation(wire.generation), goals: parse_goals(wire.sandboxes)? })
    }
}

impl TryFrom<v1::AssignmentDelta> for Update {
    type Error = AssignmentError;
    fn try_from(wire: v1::AssignmentDelta) -> Result<Self, AssignmentError> {
        let removes = wire.removes.iter().map(|name| SandboxName::parse(name)).collect::<Result<_, _>>()?;
        Ok(Self::Delta {
            base: Generation(wire.base_generation),
            generation: Generation(wire.generation),
            upserts: parse_goals(wire.upserts)?,
            removes,
        })
    }
}

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// Not newer than what the node has.
    Stale,
    /// Made from another generation: ask for the whole.
    NeedWhole,
}

/// The assignment that the node acts on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assignment {
    /// `None` until the first whole assignment: until then nobody knows what should not be here.
    generation: Option<Generation>,
    goals: BTreeMap<SandboxName, Goal>,
}

impl Assignment {
    /// 0 when there is none yet.
    pub fn generation(&self) -> Generation {
        self.generation.unwrap_or_default()
    }

    /// Whether a sandbox that is not named should not be here.
    pub fn is_known(&self) -> bool {
        self.generation.is_some()
    }

    pub fn goal(&self, sandbox: &SandboxName) -> Option<&Goal> {
        self.goals.get(sandbox)
    }

    pub fn goals(&self) -> &BTreeMap<SandboxName, Goal> {
        &self.goals
    }

    /// Applies what is newer. The whole at the same generation is taken too: it says the same, with fresher tokens.
    pub fn apply(&mut self, update: Update) -> Outcome {
        match update {
            Update::Full { generation, .. } if self.generation.is_some_and(|have| generation < have) => Outcome::Stale,
            Update::Full { generation, goals } => {
                self.generation = Some(generation);
                self.goals = goals;
                Outcome::Applied
            }
            Update::Delta { base, generation, upserts, removes } => {
                let Some(have) = self.generation else { return Outcome::NeedWhole };
                if generation <= have {
                    return Outcome::Stale;
                }
                if base != have {
                    return Outcome::NeedWhole;
                }
                self.generation = Some(generation);
                removes.iter().for_each(|name| drop(self.goals.remove(name)));
                self.goals.extend(upserts);
                Outcome::Applied
            }
        }
    }
}

fn parse_goals(wire: Vec<v1::AssignedSandbox>) -> Result<BTreeMap<SandboxName, Goal>, AssignmentError> {
    let mut goals = BTreeMap::new();
    for sandbox in wire {
        let name = SandboxName::parse(&sandbox.sandbox)?;
        let goal = parse_goal(&name, sandbox)?;
        if goals.insert(name.clone(), goal).is_some() {
            return Err(AssignmentError::Twice(name));
        }
    }
    Ok(goals)
}

fn parse_goal(name: &SandboxName, wire: v1::AssignedSandbox) -> Result<Goal, AssignmentError> {
    use v1::assigned_sandbox::Desired as Wire;
    let bad = |field| AssignmentError::Field { sandbox: name.clone(), field };
    let epoch = Epoch(wire.epoch);
    if epoch == Epoch(0) {
        return Err(bad("epoch"));
    }
    let want = match wire.desired() {
        Wire::Running => Want::Running(Box::new(parse_start(name, wire)?)),
        Wire::Removed => Want::Removed,
        Wire::Unspecified => return Err(bad("desired")),
    };
    Ok(Goal { epoch, want })
}

fn parse_start(name: &SandboxName, wire: v1::AssignedSandbox) -> Result<StartSpec, AssignmentError> {
    let bad = |field| AssignmentError::Field { sandbox: name.clone(), field };
    let amount = |value: i64, field| u64::try_from(value).ok().filter(|n| *n > 0).ok_or_else(|| bad(field));
    let on_isolation = match wire.on_isolation() {
        v1::OnIsolation::Freeze => OnIsolation::Freeze,
        v1::OnIsolation::Keep | v1::OnIsolation::Unspecified => OnIsolation::Keep,
    };
    let egress = Egress::of_wire(wire.egress.as_ref());
    let resources = wire.resources.ok_or_else(|| bad("resources"))?;
    let template = wire.template.ok_or_else(|| bad("template"))?;
    let source = |s: v1::TemplateSource| Source { address: s.address, tls: s.tls };
    Ok(StartSpec {
        resources: Resources {
            cpu: MilliCpu(amount(resources.cpu_milli, "resources.cpu_milli")?),
            memory: Bytes(amount(resources.memory_bytes, "resources.memory_bytes")?),
            disk: Bytes(amount(resources.disk_bytes, "resources.disk_bytes")?),
            ..Resources::default()
        },
        pids: amount(resources.pids, "resources.pids")?,
        template: TemplateRef {
            digest: Digest::parse(&template.digest)?,
            size: Bytes(amount(template.size_bytes, "template.size_bytes")?),
            sources: template.sources.into_iter().map(source).collect(),
            download_token: template.download_token,
        },
        command: wire.command,
        environment: wire
            .environment
            .into_iter()
            .map(|l| (l.key, l.value))
            .collect::<BTreeMap<_, _>>()
            .into_iter()
            .collect(),
        working_directory: if wire.working_directory.is_empty() { "/".to_owned() } else { wire.working_directory },
        driver: (!wire.driver.is_empty()).then_some(wire.driver),
        on_isolation,
        egress,
        gpus: parse_gpus(name, wire.gpus)?,
    })
}

fn parse_gpus(name: &SandboxName, wire: Vec<v1::AssignedGpu>) -> Result<Vec<Grant>, AssignmentError> {
    let bad = |field| AssignmentError::Field { sandbox: name.clone(), field };
    let mut grants: Vec<Grant> = Vec::with_capacity(wire.len());
    for gpu in wire {
        let milli = u32::try_from(gpu.milli).ok().filter(|milli| (1..=WHOLE).contains(milli));
        let memory = u64::try_from(gpu.memory_bytes).map_err(|_| bad("gpus.memory_bytes"))?;
        if gpu.uuid.is_empty() || grants.iter().any(|other| other.uuid == gpu.uuid) {
            return Err(bad("gpus.uuid"));
        }
        grants.push(Grant { uuid: gpu.uuid, milli: milli.ok_or_else(|| bad("gpus.milli"))?, memory: Bytes(memory) });
    }
    grants.sort_unstable();
    Ok(grants)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(id: &str) -> SandboxName {
        SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).expect("name")
    }

    fn removed(epoch: u64) -> Goal {
        Goal { epoch: Epoch(epoch), want: Want::Removed }
    }

    fn full(generation: u64, goals: &[(&str, u64)]) -> Update {
        let goals = goals.iter().map(|(id, epoch)| (name(id), removed(*epoch))).collect();
        Update::Full { generation: Generation(generation), goals }
    }

    fn delta(base: u64, generation: u64, upserts: &[(&str, u64)], removes: &[&str]) -> Update {
        Update::Delta {
            base: Generation(base),
            generation: Generation(generation),
            upserts: upserts.iter().map(|(id, epoch)| (name(id), removed(*epoch))).collect(),
            removes: removes.iter().map(|id| name(id)).collect(),
        }
    }

    #[test]
    fn only_newer_generations_are_applied() {
        let mut assignment = Assignment::default();
        assert!(!assignment.is_known());
        assert_eq!(assignment.apply(delta(0, 1, &[], &[])), Outcome::NeedWhole);
        assert_eq!(assignment.apply(full(5, &[("a", 1)])), Outcome::Applied);
        assert_eq!(assignment.apply(full(4, &[])), Outcome::Stale);
        assert_eq!(assignment.apply(delta(3, 5, &[], &["a"])), Outcome::Stale);
        assert_eq!(assignment.goal(&name("a")), Some(&removed(1)));
        assert_eq!(assignment.apply(full(5, &[("a", 1)])), Outcome::Applied);
    }

    #[test]
    fn a_delta_changes_the_generation_it_was_made_from_and_no_other() {
        let mut assignment = Assignment::default();
        assignment.apply(full(5, &[("a", 1), ("b", 1)]));
        assert_eq!(assignment.apply(delta(5, 7, &[("b", 2), ("c", 1)], &["a"])), Outcome::Applied);
        assert_eq!(assignment.generation(), Generation(7));
        assert_eq!(assignment.goals().keys().cloned().collect::<Vec<_>>(), [name("b"), name("c")]);
        assert_eq!(assignment.goal(&name("b")), Some(&removed(2)));
        let before = assignment.clone();
        assert_eq!(assignment.apply(delta(8, 9, &[], &["b"])), Outcome::NeedWhole);
        assert_eq!(assignment, before);
    }

    #[test]
    fn a_message_that_makes_no_sense_is_refused_whole() {
        let good = v1::AssignedSandbox {
            sandbox: name("a").to_string(),
            epoch: 1,
            desired: v1::assigned_sandbox::Desired::Removed.into(),
            ..Default::default()
        };
        let parse = |sandboxes| Update::try_from(v1::Assignment { generation: 1, sandboxes });
        assert!(parse(vec![good.clone()]).is_ok());
        assert!(matches!(parse(vec![good.clone(), good.clone()]), Err(AssignmentError::Twice(_))));
        let field = |change: fn(&mut v1::AssignedSandbox)| {
            let mut bad = good.clone();
            change(&mut bad);
            parse(vec![bad])
        };
        assert!(matches!(field(|s| s.epoch = 0), Err(AssignmentError::Field { field: "epoch", .. })));
        assert!(matches!(field(|s| s.desired = 0), Err(AssignmentError::Field { field: "desired", .. })));
        assert!(matches!(field(|s| s.desired = 1), Err(AssignmentError::Field { field: "resources", .. })));
        assert!(matches!(field(|s| s.sandbox = "x".into()), Err(AssignmentError::Id(_))));
    }

    #[test]
    fn a_device_is_granted_once_and_no_more_than_whole() {
        let gpu = |uuid: &str, milli| v1::AssignedGpu { uuid: uuid.into(), milli, memory_bytes: 7 };
        let parse = |gpus| parse_gpus(&name("a"), gpus);
        let grants = parse(vec![gpu("b", 1000), gpu("a", 250)]).expect("grants");
        assert_eq!(grants.iter().map(|g| (g.uuid.as_str(), g.milli)).collect::<Vec<_>>(), [("a", 250), ("b", 1000)]);
        for (bad, field) in [
            (vec![gpu("a", 0)], "gpus.milli"),
            (vec![gpu("a", 1001)], "gpus.milli"),
            (vec![gpu("", 1000)], "gpus.uuid"),
            (vec![gpu("a", 500), gpu("a", 500)], "gpus.uuid"),
        ] {
            assert!(matches!(parse(bad), Err(AssignmentError::Field { field: found, .. }) if found == field));
        }
    }
}
