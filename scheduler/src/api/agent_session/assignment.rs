//! A node's assignment, derived from state: the whole the first time, then only what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tracing::error;
use warren_proto::ids::{Digest, Epoch, Generation, NodeId, SandboxName};
use warren_proto::v1::assigned_sandbox::Desired;
use warren_proto::v1::open_session_response::Message;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::{
    AssignedGpu, AssignedSandbox, AssignedTemplate, Assignment, AssignmentDelta, Label, Resources, TemplateSource,
    TokenClaims,
};

use crate::api::convert;
use crate::clock;
use crate::controller::sessions::Concerned;
use crate::secrets::Sealer;
use crate::signer::Signer;
use crate::state::State;
use crate::state::gpu::GpuHold;
use crate::state::node::Node;
use crate::state::sandbox::{Life, Sandbox};
use crate::state::settings::Egress;
use crate::state::template::Template;

/// How long an agent may use the token to fetch a template. A fetch that takes longer fails, and the start is tried again.
const DOWNLOAD_TOKEN_TTL: Duration = Duration::from_secs(60 * 60);

/// Most nodes that are named as sources of a template: enough that one of them answers.
const MAX_SOURCES: usize = 5;

/// One instance of a sandbox.
type Instance = (SandboxName, Epoch);

/// What is to be done with it, and what it may reach.
type Want = (Desired, Egress);

/// What an agent has been told: nothing, or an assignment of some generation.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    generation: Option<Generation>,
    instances: BTreeMap<Instance, Want>,
    /// Of these names something was left over when they were last looked at.
    leftovers: BTreeSet<SandboxName>,
}

/// What an agent is to be told.
#[derive(Debug, PartialEq)]
struct News {
    /// It knows the assignment of this generation; `None`: it is told everything.
    base: Option<Generation>,
    upserts: Vec<(Instance, Desired)>,
    /// Names of which no instance is wanted any more.
    removes: BTreeSet<SandboxName>,
}

impl Pushed {
    /// The message that brings the agent up to date with `state`, if it is not, and remembers it as told. `concerned` was taken
    /// before `state`.
    pub(super) fn update(
        &mut self,
        state: &State,
        id: &NodeId,
        concerned: &Concerned,
        signer: &Signer,
        sealer: Option<&Sealer>,
    ) -> Option<Message> {
        let node = state.nodes.get(id)?;
        let news = self.look(state, node, concerned)?;
        let writer = Writer { state, node, signer, sealer };
        let generation = node.generation.0;
        let instances = news.upserts.iter().filter_map(|(instance, desired)| writer.instance(instance, *desired));
        Some(match news.base {
            None => Message::Assignment(Assignment { generation, sandboxes: instances.collect() }),
            Some(base) => Message::AssignmentDelta(AssignmentDelta {
                base_generation: base.0,
                generation,
                upserts: instances.collect(),
                removes: news.removes.iter().map(ToString::to_string).collect(),
            }),
        })
    }

    /// What changed since the last look. Only the names concerned are looked at where these are known to be all.
    fn look(&mut self, state: &State, node: &Node, concerned: &Concerned) -> Option<News> {
        let base = self.generation;
        if base == Some(node.generation) {
            return None;
        }
        let leftovers: BTreeSet<SandboxName> = node.leftovers.keys().map(|(name, _)| name.clone()).collect();
        let names = if base.is_some() && concerned.are_all_up_to(node.generation) {
            concerned.names().chain(&leftovers).chain(&self.leftovers).cloned().collect()
        } else {
            self.all_names(node, &leftovers)
        };
        let mut news = News { base, upserts: Vec::new(), removes: BTreeSet::new() };
        for name in names {
            self.look_at(state, node, name, &mut news);
        }
        self.generation = Some(node.generation);
        self.leftovers = leftovers;
        Some(news)
    }

    fn all_names(&self, node: &Node, leftovers: &BTreeSet<SandboxName>) -> BTreeSet<SandboxName> {
        let told = self.instances.keys().map(|(name, _)| name);
        told.chain(node.sandboxes.iter()).chain(leftovers).cloned().collect()
    }

    fn look_at(&mut self, state: &State, node: &Node, name: SandboxName, news: &mut News) {
        let of_name = (name.clone(), Epoch(0))..=(name.clone(), Epoch(u64::MAX));
        let told: BTreeMap<Instance, Want> =
            self.instances.range(of_name).map(|(k, v)| (k.clone(), v.clone())).collect();
        let wanted = wanted(state, node, &name);
        if wanted.is_empty() && !told.is_empty() {
            news.removes.insert(name);
        }
        for instance in told.keys().filter(|instance| !wanted.contains_key(*instance)) {
            self.instances.remove(instance);
        }
        for (instance, want) in wanted {
            if told.get(&instance) != Some(&want) {
                news.upserts.push((instance.clone(), want.0));
                self.instances.insert(instance, want);
            }
        }
    }
}

/// The instances of a sandbox that the node's assignment names: the one that lives there, and those left over there to be removed.
fn wanted(state: &State, node: &Node, name: &SandboxName) -> BTreeMap<Instance, Want> {
    let of_name = (name.clone(), Epoch(0))..=(name.clone(), Epoch(u64::MAX));
    let leftovers = node.leftovers.range(of_name);
    let mut all: BTreeMap<Instance, Want> =
        leftovers.map(|(instance, _)| (instance.clone(), (Desired::Removed, Egress::None))).collect();
    if let Some(sandbox) = state.sandboxes.get(name).filter(|sandbox| sandbox.life.node() == Some(&node.id)) {
        let want = (desired(&sandbox.life), sandbox.settings().egress.clone());
        all.entry((name.clone(), sandbox.epoch)).or_insert(want);
    }
    all
}

fn assigned_gpu(hold: &GpuHold) -> AssignedGpu {
    AssignedGpu { uuid: hold.uuid.to_string(), milli: hold.milli.into(), memory_bytes: saturated(hold.memory.0) }
}

fn desired(life: &Life) -> Desired {
    match life {
        Life::Starting { .. } | Life::Running { .. } => Desired::Running,
        Life::Stopping { .. } | Life::Stopped { .. } | Life::Pending { .. } | Life::Failed { .. } => Desired::Removed,
    }
}

struct Writer<'a> {
    state: &'a State,
    node: &'a Node,
    signer: &'a Signer,
    sealer: Option<&'a Sealer>,
}

impl Writer<'_> {
    /// One that is to be removed needs no more than its name and epoch where the ledger no longer counts it as the sandbox.
    fn instance(&self, (name, epoch): &Instance, desired: Desired) -> Option<AssignedSandbox> {
        match self.state.sandboxes.get(name).filter(|sandbox| sandbox.epoch == *epoch) {
            Some(sandbox) if sandbox.life.node() == Some(&self.node.id) => self.sandbox(sandbox, desired),
            _ => Some(AssignedSandbox {
                sandbox: name.to_string(),
                epoch: epoch.0,
                desired: Desired::Removed.into(),
                ..AssignedSandbox::default()
            }),
        }
    }

    /// `None` only if its template is gone, which state's own rules exclude.
    fn sandbox(&self, sandbox: &Sandbox, desired: Desired) -> Option<AssignedSandbox> {
        let template = self.state.templates.get(&sandbox.spec.template)?;
        let spec = &sandbox.spec;
        let first = |own: &String, default: &String| if own.is_empty() { default.clone() } else { own.clone() };
        Some(AssignedSandbox {
            sandbox: sandbox.name.to_string(),
            epoch: sandbox.epoch.0,
            desired: desired.into(),
            resources: Some(Resources {
                cpu_milli: saturated(spec.resources.cpu.0),
                memory_bytes: saturated(spec.resources.memory.0),
                disk_bytes: saturated(spec.resources.disk.0),
                pids: saturated(spec.pids),
                gpus: saturated(spec.resources.gpus.0),
            }),
            template: Some(self.template(template)),
            command: if spec.command.is_empty() { template.spec.default_command.clone() } else { spec.command.clone() },
            environment: self.environment(sandbox, template),
            working_directory: first(&spec.working_directory, &template.spec.working_directory),
            driver: String::new(),
            on_isolation: convert::isolation(spec.isolation).into(),
            egress: Some(convert::egress(&sandbox.settings().egress)),
            gpus: sandbox.gpus.iter().map(assigned_gpu).collect(),
        })
    }

    /// The template's environment, with the sandbox's over it; sorted by key. A secret that cannot be opened is left out, and
    /// said: the sandbox starts without it rather than not at all.
    fn environment(&self, sandbox: &Sandbox, template: &Template) -> Vec<Label> {
        let mut merged = template.spec.environment.clone();
        merged.extend(sandbox.spec.environment.to_map::<BTreeMap<_, _>>());
        for (key, sealed) in sandbox.spec.secrets.iter() {
            match self.sealer.map(|sealer| sealer.open(&sandbox.name, key, sealed)) {
                Some(Ok(value)) => drop(merged.insert(key.to_owned(), value)),
                Some(Err(error)) => error!(%error, "open a secret"),
                None => error!(sandbox = %sandbox.name, variable = %key, "no key to open a secret with"),
            }
        }
        merged.into_iter().map(|(key, value)| Label { key, value }).collect()
    }

    /// With sources and a token only where the node lacks the bytes.
    fn template(&self, template: &Template) -> AssignedTemplate {
        let digest = template.spec.digest;
        let size_bytes = saturated(template.spec.size_bytes);
        if self.node.templates.contains(&digest) {
            return AssignedTemplate { digest: digest.to_string(), size_bytes, ..AssignedTemplate::default() };
        }
        AssignedTemplate {
            digest: digest.to_string(),
            size_bytes,
            sources: self.sources(&digest),
            download_token: self.download_token(&digest),
        }
    }

    fn sources(&self, digest: &Digest) -> Vec<TemplateSource> {
        let holders = self.state.nodes.values().filter(|node| node.is_ready() && node.templates.contains(digest));
        holders
            .take(MAX_SOURCES)
            .map(|node| TemplateSource { address: node.report.address.clone(), tls: node.report.tls })
            .collect()
    }

    fn download_token(&self, digest: &Digest) -> String {
        let expires = clock::log_time().plus_ms(u64::try_from(DOWNLOAD_TOKEN_TTL.as_millis()).unwrap_or(u64::MAX));
        self.signer.sign(TokenClaims {
            scope: Scope::TemplateDownload.into(),
            ledger_id: super::ledger_id(self.state),
            template_digest: digest.to_string(),
            expire_time_ms: saturated(expires.0),
            ..TokenClaims::default()
        })
    }
}

fn saturated(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::command::{Body, Caller, Change, Command, Decision, LogTime, Observation, Observed, Phase};
    use crate::state::event::Position;
    use crate::state::level::Level;
    use crate::state::node::Condition;
    use crate::state::node::testing::report;
    use crate::state::sandbox::{Exit, SandboxSpec};
    use crate::state::settings::Isolation;
    use crate::state::testing::{name, node, resources, spec, with_node_and_template};

    fn run(state: &mut State, body: Body) {
        let index = state.revision + 1;
        let command = Command { caller: Caller::system("test"), time: LogTime(index), body };
        let _accepted_or_rejected = state.apply(index, &command);
    }

    fn any_body() -> impl Strategy<Value = Body> {
        let sandbox = || prop::sample::select(vec!["x", "y", "z"]).prop_map(name);
        let host = || prop::sample::select(vec!["a", "b"]).prop_map(node);
        let egress = prop::sample::select(vec![Egress::None, Egress::Public]);
        let condition = prop::sample::select(vec![Condition::Ready, Condition::Suspect, Condition::Down]);
        let phase = prop::sample::select(vec![
            Phase::Running,
            Phase::Removed,
            Phase::Orphan,
            Phase::Failed { code: "X".into(), message: String::new() },
            Phase::Exited { exit: Exit::default(), output_tail: vec![] },
        ]);
        prop_oneof![
            4 => (sandbox(), host()).prop_map(|(sandbox, on)| {
                let spec = SandboxSpec { isolation: Isolation::Freeze, ..spec(1, 1) };
                Body::CreateSandbox { sandbox, spec: spec.into(), decision: Decision::Place(on.into()), request: None }
            }),
            3 => (sandbox(), 0u64..6, host()).prop_map(|(sandbox, epoch, node)| Body::PlaceSandbox { sandbox, epoch: Epoch(epoch), spot: node.into() }),
            2 => sandbox().prop_map(|sandbox| Body::DeleteSandbox { sandbox, request: None }),
            2 => (sandbox(), egress).prop_map(|(sandbox, egress)| {
                let change = Change { egress: Some(egress), ..Change::default() };
                Body::UpdateSandbox { sandbox, change, if_revision: None, request: None }
            }),
            6 => (host(), sandbox(), 0u64..6, phase).prop_map(|(node, sandbox, epoch, phase)| {
                let sandboxes = vec![Observed { sandbox, epoch: Epoch(epoch), phase }];
                Body::Observe { node, incarnation: 1, observation: Observation { sandboxes, templates: None } }
            }),
            2 => (host(), condition).prop_map(|(node, to)| Body::SetNodeCondition { node, incarnation: 1, to }),
            2 => (sandbox(), 0u64..6).prop_map(|(sandbox, epoch)| Body::RequeueSandbox { sandbox, epoch: Epoch(epoch) }),
            1 => (host(), sandbox(), 0u64..6).prop_map(|(node, sandbox, epoch)| Body::StopOrphan { node, sandbox, epoch: Epoch(epoch) }),
        ]
    }

    proptest! {
        /// Whatever happens and however often it is looked at, an agent that is told what changed knows what one that is told
        /// everything does.
        #[test]
        fn what_changed_adds_up_to_the_whole(bodies in prop::collection::vec((any_body(), any::<bool>()), 1..60)) {
            let mut state = with_node_and_template("a", resources(1000, 1000));
            state.level = Level::SECOND;
            run(&mut state, Body::RegisterNode { node: node("b"), report: report(1, resources(1000, 1000)) });
            let mut told: BTreeMap<NodeId, Pushed> = BTreeMap::new();
            let mut looked_at = Position::default();
            let mut events = Vec::new();
            for (body, looks) in bodies {
                run(&mut state, body);
                events.extend(state.events.after(looked_at, usize::MAX).unwrap());
                looked_at = events.last().map_or(looked_at, |event| event.position);
                if !looks {
                    continue;
                }
                for id in ["a", "b"].map(node) {
                    let (pushed, record) = (told.entry(id.clone()).or_default(), &state.nodes[&id]);
                    let before = pushed.instances.clone();
                    let news = pushed.look(&state, record, &Concerned::of(&events, &id, record.generation));
                    let mut whole = Pushed::default();
                    whole.look(&state, record, &Concerned::default());
                    prop_assert_eq!(&pushed.instances, &whole.instances);
                    let changed = pushed.instances.iter().filter(|(instance, want)| before.get(*instance) != Some(*want));
                    let changed: Vec<_> = changed.map(|(instance, want)| (instance.clone(), want.0)).collect();
                    prop_assert_eq!(news.map_or_else(Vec::new, |news| news.upserts), changed);
                }
                events.clear();
            }
        }
    }
}
