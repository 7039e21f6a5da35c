//! A node's assignment, derived from state: the whole the first time, then only what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tracing::error;
use warren_proto::ids::{Digest, Epoch, Generation, NodeId, SandboxName};
use warren_proto::v1::assigned_sandbox::Desired;
use warren_proto::v1::open_session_response::Message;
use warren_proto::v1::token_claims::Scope;
use warren_proto::v1::{
    AssignedSandbox, AssignedTemplate, Assignment, AssignmentDelta, Label, Resources, TemplateSource, TokenClaims,
};

use crate::api::convert;
use crate::clock;
use crate::secrets::Sealer;
use crate::signer::Signer;
use crate::state::State;
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

/// What an agent has been told: nothing, or an assignment of some generation.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    generation: Option<Generation>,
    instances: BTreeMap<Instance, (Desired, Egress)>,
}

impl Pushed {
    /// How many instances the agent was told of.
    pub(super) fn len(&self) -> usize {
        self.instances.len()
    }

    /// The message that brings the agent up to date with `state`, if it is not, and remembers it as told.
    pub(super) fn update(
        &mut self,
        state: &State,
        id: &NodeId,
        signer: &Signer,
        sealer: Option<&Sealer>,
    ) -> Option<Message> {
        let node = state.nodes.get(id)?;
        if self.generation == Some(node.generation) {
            return None;
        }
        let wanted = wanted(state, node);
        let writer = Writer { state, node, signer, sealer };
        let message = match self.generation {
            None => Message::Assignment(Assignment {
                generation: node.generation.0,
                sandboxes: wanted.iter().filter_map(|(instance, want)| writer.instance(instance, want.0)).collect(),
            }),
            Some(base) => Message::AssignmentDelta(AssignmentDelta {
                base_generation: base.0,
                generation: node.generation.0,
                upserts: wanted
                    .iter()
                    .filter(|(instance, want)| self.instances.get(*instance) != Some(*want))
                    .filter_map(|(instance, want)| writer.instance(instance, want.0))
                    .collect(),
                removes: self.gone(&wanted),
            }),
        };
        self.generation = Some(node.generation);
        self.instances = wanted;
        Some(message)
    }

    /// Names of which no instance is wanted any more.
    fn gone(&self, wanted: &BTreeMap<Instance, (Desired, Egress)>) -> Vec<String> {
        let named: BTreeSet<&SandboxName> = wanted.keys().map(|(name, _)| name).collect();
        let told: BTreeSet<&SandboxName> = self.instances.keys().map(|(name, _)| name).collect();
        told.difference(&named).map(ToString::to_string).collect()
    }
}

/// What lives there, and what is left over there to be removed.
fn wanted(state: &State, node: &Node) -> BTreeMap<Instance, (Desired, Egress)> {
    let lives = node.sandboxes.iter().filter_map(|name| state.sandboxes.get(name));
    let lives = lives.map(|sandbox| {
        let egress = sandbox.settings().egress.clone();
        ((sandbox.name.clone(), sandbox.epoch), (desired(&sandbox.life), egress))
    });
    let leftovers = node.leftovers.keys().map(|instance| (instance.clone(), (Desired::Removed, Egress::None)));
    lives.chain(leftovers).collect()
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
