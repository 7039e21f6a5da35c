//! The API of one replica, over gRPC, with an agent played by the test: errors by reason, pages, watches, a sandbox's life.

#![allow(clippy::unwrap_used, reason = "a helper of tests may panic")]

mod group;
mod ledger;
mod limits;
mod metrics;
mod reading;
mod refusals;

use std::collections::BTreeMap;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;
use warren_proto::client::{self, ClientTls};
use warren_proto::error::{reason_of, retry_after_of};
use warren_proto::ids::ReplicaId;
use warren_proto::v1::agent_session_service_client::AgentSessionServiceClient;
use warren_proto::v1::assigned_sandbox::Desired;
use warren_proto::v1::open_session_request::Message as Up;
use warren_proto::v1::open_session_response::Message as Down;
use warren_proto::v1::sandbox_observation::Phase;
use warren_proto::v1::sandbox_service_client::SandboxServiceClient;
use warren_proto::v1::template_service_client::TemplateServiceClient;
use warren_proto::v1::watch_sandboxes_response::Kind;
use warren_proto::v1::*;
use warren_scheduler::controller::{Controller, ControllerConfig, DebugSource};
use warren_scheduler::disk::DiskUse;
use warren_scheduler::raft::{Leadership, Member, Replica, ReplicaConfig};
use warren_scheduler::signer::Signer;
use warren_scheduler::state::level::Level;

const TENANT: &str = "tenants/t";
const PATIENCE: Duration = Duration::from_secs(20);

/// Of a replica that is alone: there is nobody that it could lose the office to.
const ELECTION: Duration = Duration::from_millis(200);

/// Of a group: a busy machine may keep a leader silent for a while.
const CALM_ELECTION: Duration = Duration::from_secs(2);

/// One replica that leads, and its address.
struct Region {
    member: Member,
    replica: Replica,
    controller: Controller,
    address: String,
    stop: CancellationToken,
    directory: TempDir,
}

/// Where a replica is to live.
struct Place {
    member: Member,
    peers: TcpListener,
    api: TcpListener,
    directory: TempDir,
}

impl Place {
    async fn new() -> Self {
        let (peers, api) = (bind().await, bind().await);
        let member = Member {
            peer_address: peers.local_addr().unwrap().to_string(),
            api_address: api.local_addr().unwrap().to_string(),
            standby: false,
        };
        Self { member, peers, api, directory: tempfile::tempdir().unwrap() }
    }
}

impl Region {
    async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    /// With a controller's configuration that the test changes, and at the second level.
    async fn start_with(change: impl FnOnce(&mut ControllerConfig)) -> Self {
        let region = Self::start_among(BTreeMap::new(), change).await;
        let mut leadership = region.replica.leadership();
        leadership.wait_for(|now| matches!(now, Leadership::Leader { .. })).await.unwrap();
        region.replica.watch_state().wait_for(|state| state.level == Level::SECOND).await.unwrap();
        region
    }

    /// The first replica of a group; nobody needs to lead yet.
    async fn start_among(others: BTreeMap<ReplicaId, Member>, change: impl FnOnce(&mut ControllerConfig)) -> Self {
        let place = Place::new().await;
        let mut members = others;
        // Among others an election that nobody asked for would end a test.
        let election = if members.is_empty() { ELECTION } else { CALM_ELECTION };
        members.insert(ReplicaId(1), place.member.clone());
        Self::start_at(place, 1, members, election, change).await
    }

    /// Some replicas, each with its API, at the second level; the one that leads comes first.
    async fn start_group(count: u64, change: impl Fn(u64, &mut ControllerConfig)) -> Vec<Self> {
        let mut places = Vec::new();
        for id in 1..=count {
            places.push((id, Place::new().await));
        }
        let members: BTreeMap<_, _> = places.iter().map(|(id, place)| (ReplicaId(*id), place.member.clone())).collect();
        let starting = places.into_iter().map(|(id, place)| {
            let (members, change) = (members.clone(), &change);
            Self::start_at(place, id, members, CALM_ELECTION, move |config| change(id, config))
        });
        let mut regions = futures::future::join_all(starting).await;
        for region in &regions {
            let mut leadership = region.replica.leadership();
            leadership.wait_for(|now| *now != Leadership::Follower { leader: None }).await.unwrap();
            region.replica.watch_state().wait_for(|state| state.level == Level::SECOND).await.unwrap();
        }
        let leads = |region: &Self| matches!(*region.replica.leadership().borrow(), Leadership::Leader { .. });
        let leader = regions.iter().position(leads).expect("one leads");
        regions.swap(0, leader);
        regions
    }

    async fn start_at(
        place: Place,
        id: u64,
        members: BTreeMap<ReplicaId, Member>,
        election: Duration,
        change: impl FnOnce(&mut ControllerConfig),
    ) -> Self {
        let Place { member, peers, api, directory } = place;
        let address = member.api_address.clone();
        let replica = start_replica(id, directory.path(), members, peers, election).await;
        let stop = CancellationToken::new();
        let mut config = ControllerConfig {
            // The test's agents do not renew it.
            lease: Duration::from_secs(600),
            api_advertise: address.clone(),
            replica_grace: Duration::from_secs(600),
            sealer: None,
            disk: DiskUse::default(),
            debug: DebugSource::default(),
            stop: stop.clone(),
        };
        change(&mut config);
        let signer = Signer::load_or_create(directory.path(), ReplicaId(id)).unwrap();
        let controller = Controller::start(replica.clone(), signer, config);
        tokio::spawn(warren_scheduler::api::serve(controller.clone(), api, None, ClientTls::default(), stop.clone()));
        Self { member, replica, controller, address, stop, directory }
    }

    fn channel(&self) -> Channel {
        client::channel(&self.address, &ClientTls::default()).unwrap()
    }

    fn sandboxes(&self) -> SandboxServiceClient<Channel> {
        SandboxServiceClient::new(self.channel())
    }

    fn templates(&self) -> TemplateServiceClient<Channel> {
        TemplateServiceClient::new(self.channel())
    }

    async fn create(&self, id: &str) -> Result<Sandbox, Status> {
        let request = CreateSandboxRequest { sandbox_id: id.into(), ..create_request() };
        Ok(self.sandboxes().create_sandbox(request).await?.into_inner())
    }

    async fn end(self) {
        self.stop.cancel();
        self.replica.shutdown().await;
    }
}

/// A replica that serves its peers.
async fn start_replica(
    id: u64,
    data_dir: &std::path::Path,
    initial_members: BTreeMap<ReplicaId, Member>,
    peers: TcpListener,
    election_timeout: Duration,
) -> Replica {
    let config = ReplicaConfig {
        id: ReplicaId(id),
        data_dir: data_dir.to_owned(),
        initial_members,
        heartbeat: Duration::from_millis(50),
        election_timeout,
        tls: ClientTls::default(),
        checkpoint_every: 10_000,
    };
    let replica = Replica::start(config).await.unwrap();
    replica.serve_peers(peers, None).unwrap();
    replica
}

async fn bind() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn create_request() -> CreateSandboxRequest {
    CreateSandboxRequest {
        parent: TENANT.into(),
        sandbox: Some(Sandbox { template: "templates/base".into(), ..Sandbox::default() }),
        ..CreateSandboxRequest::default()
    }
}

fn digest() -> String {
    format!("sha256:{}", "0a".repeat(32))
}

/// A node agent that does what the test says.
struct Agent {
    up: mpsc::Sender<OpenSessionRequest>,
    down: Streaming<OpenSessionResponse>,
}

impl Agent {
    async fn start(region: &Region) -> Self {
        Self::open(region, |_| ()).await.unwrap()
    }

    /// With a hello that the test changes.
    async fn open(region: &Region, change: impl FnOnce(&mut Hello)) -> Result<Self, Status> {
        let (up, requests) = mpsc::channel(8);
        let mut hello = Hello {
            node: "nodes/n".into(),
            incarnation: Uuid::now_v7().to_string(),
            data_plane_address: "127.0.0.1:1".into(),
            capacity: Some(Resources { cpu_milli: 1000, memory_bytes: 1 << 30, disk_bytes: 8 << 30, pids: 0, gpus: 0 }),
            observation: Some(Observation { full: true, template_digests: vec![digest()], ..Observation::default() }),
            ..Hello::default()
        };
        change(&mut hello);
        up.send(OpenSessionRequest { message: Some(Up::Hello(hello)) }).await.unwrap();
        let mut client = AgentSessionServiceClient::new(region.channel());
        let mut down = client.open_session(ReceiverStream::new(requests)).await?.into_inner();
        let first = down.message().await?.unwrap().message;
        assert!(matches!(first, Some(Down::Welcome(_))), "{first:?}");
        Ok(Self { up, down })
    }

    /// Renews the lease until what this answers is dropped.
    fn renew(&self) -> impl Drop + use<> {
        let up = self.up.clone();
        let renewing = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            for sequence in 1.. {
                ticks.tick().await;
                let renewal = Up::RenewLease(RenewLease { sequence });
                if up.send(OpenSessionRequest { message: Some(renewal) }).await.is_err() {
                    return;
                }
            }
        });
        tokio_util::task::AbortOnDropHandle::new(renewing)
    }

    /// How the scheduler ends the session.
    async fn end(mut self) -> Status {
        let end = async {
            loop {
                match self.down.message().await {
                    Ok(message) => assert!(message.is_some(), "it ends without a word"),
                    Err(status) => return status,
                }
            }
        };
        tokio::time::timeout(PATIENCE, end).await.expect("an end")
    }

    /// The next message about the assignment: what it says of each sandbox.
    async fn assigned(&mut self) -> Vec<(String, u64, Desired)> {
        let next = async {
            loop {
                match self.down.message().await.unwrap().unwrap().message {
                    Some(Down::Assignment(whole)) => return whole.sandboxes,
                    Some(Down::AssignmentDelta(delta)) => return delta.upserts,
                    _ => {}
                }
            }
        };
        let sandboxes = tokio::time::timeout(PATIENCE, next).await.expect("an assignment");
        sandboxes.into_iter().map(|s| (s.sandbox.clone(), s.epoch, s.desired())).collect()
    }

    /// The environment that a sandbox is assigned with.
    async fn environment_of(mut self, sandbox: &str) -> BTreeMap<String, String> {
        let next = async {
            loop {
                let sandboxes = match self.down.message().await.unwrap().unwrap().message {
                    Some(Down::Assignment(whole)) => whole.sandboxes,
                    Some(Down::AssignmentDelta(delta)) => delta.upserts,
                    _ => continue,
                };
                if let Some(found) = sandboxes.into_iter().find(|assigned| assigned.sandbox == sandbox) {
                    return found.environment.into_iter().map(|label| (label.key, label.value)).collect();
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("an assignment")
    }

    async fn report(&self, sandbox: &str, epoch: u64, phase: Phase) {
        let seen =
            SandboxObservation { sandbox: sandbox.into(), epoch, phase: phase.into(), ..SandboxObservation::default() };
        let observation =
            Observation { sandboxes: vec![seen], template_digests: vec![digest()], ..Observation::default() };
        self.up.send(OpenSessionRequest { message: Some(Up::Observation(observation)) }).await.unwrap();
    }
}

/// A region with a node and template `base`.
async fn region_with_node() -> (Region, Agent) {
    let region = Region::start().await;
    let agent = Agent::start(&region).await;
    create_template(&region).await;
    (region, agent)
}

async fn create_template(region: &Region) {
    let template = Template { digest: digest(), size_bytes: 1, ..Template::default() };
    let request = CreateTemplateRequest {
        template_id: "base".into(),
        template: Some(template),
        ..CreateTemplateRequest::default()
    };
    region.templates().create_template(request).await.unwrap();
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, reason: ErrorReason) -> Status {
    let status = result.expect_err("it was accepted");
    assert_eq!((status.code(), reason_of(&status)), (code, Some(reason)), "{status:?}");
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_life_over_the_wire() {
    let (region, mut agent) = region_with_node().await;
    assert_eq!(agent.assigned().await, vec![], "the whole assignment comes first");
    let created = region.create("s").await.unwrap();
    assert_eq!(created.state(), SandboxState::Starting);
    let name = created.name.clone();
    assert_eq!(agent.assigned().await, vec![(name.clone(), 1, Desired::Running)]);

    let connect = ConnectSandboxRequest { name: name.clone(), token_ttl: None };
    let early = region.sandboxes().connect_sandbox(connect.clone()).await;
    let early = refused(early, Code::FailedPrecondition, ErrorReason::SandboxState);
    assert!(retry_after_of(&early).is_some(), "it is about to run");

    let mut watch = region
        .sandboxes()
        .watch_sandboxes(WatchSandboxesRequest {
            parent: TENANT.into(),
            watch_token: String::new(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    agent.report(&name, 1, Phase::Running).await;
    let mut kinds = Vec::new();
    loop {
        let event = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
        kinds.push(event.kind());
        if event.sandbox.is_some_and(|sandbox| sandbox.state() == SandboxState::Running) {
            break;
        }
    }
    assert_eq!(kinds, [Kind::Current, Kind::Synced, Kind::Updated]);
    let place = region.sandboxes().connect_sandbox(connect).await.unwrap().into_inner();
    assert_eq!((place.epoch, place.node.as_str(), place.address.as_str()), (1, "nodes/n", "127.0.0.1:1"));

    let in_use = DeleteTemplateRequest { name: "templates/base".into() };
    let in_use = region.templates().delete_template(in_use).await;
    refused(in_use, Code::FailedPrecondition, ErrorReason::TemplateInUse);

    let delete = DeleteSandboxRequest { name: name.clone(), ..DeleteSandboxRequest::default() };
    region.sandboxes().delete_sandbox(delete).await.unwrap();
    assert_eq!(agent.assigned().await, vec![(name.clone(), 1, Desired::Removed)]);
    agent.report(&name, 1, Phase::Removed).await;
    loop {
        let event = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
        if event.kind() == Kind::Deleted {
            break;
        }
    }
    let gone = region.sandboxes().get_sandbox(GetSandboxRequest { name }).await;
    refused(gone, Code::NotFound, ErrorReason::SandboxNotFound);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_its_reason() {
    use Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Unavailable};
    let bare = Region::start().await;
    let upload = BeginTemplateUploadRequest { digest: digest(), size_bytes: 1 };
    let nowhere = bare.templates().begin_template_upload(upload).await;
    refused(nowhere, Unavailable, ErrorReason::NoNodeAvailable);
    refused(bare.create("s").await, NotFound, ErrorReason::TemplateNotFound);
    bare.end().await;

    let (region, _agent) = region_with_node().await;
    let mut api = region.sandboxes();
    let create = |change: fn(&mut CreateSandboxRequest)| {
        let mut request = create_request();
        change(&mut request);
        request
    };
    let wrong = [
        create(|r| r.parent = "t".into()),
        create(|r| r.parent = "tenants/-".into()),
        create(|r| r.sandbox_id = "Not-An-Id".into()),
        create(|r| r.sandbox = None),
        create(|r| r.request_id = Uuid::new_v4().to_string()),
    ];
    for request in wrong {
        refused(api.create_sandbox(request).await, InvalidArgument, ErrorReason::InvalidField);
    }
    let other = create(|r| r.sandbox.as_mut().unwrap().template = "templates/none".into());
    refused(api.create_sandbox(other).await, NotFound, ErrorReason::TemplateNotFound);

    region.create("s").await.unwrap();
    let same_id = create(|r| {
        r.sandbox_id = "s".into();
        r.sandbox.as_mut().unwrap().command = vec!["true".into()];
    });
    refused(api.create_sandbox(same_id).await, AlreadyExists, ErrorReason::SandboxAlreadyExists);

    let request_id = Uuid::now_v7().to_string();
    let first = CreateSandboxRequest { request_id: request_id.clone(), ..create_request() };
    let made = api.create_sandbox(first.clone()).await.unwrap().into_inner();
    assert_eq!(api.create_sandbox(first.clone()).await.unwrap().into_inner().name, made.name);
    let reused = CreateSandboxRequest { sandbox_id: "other".into(), ..first };
    refused(api.create_sandbox(reused).await, InvalidArgument, ErrorReason::RequestIdReused);
    // A UUIDv7 of the year 2020.
    let old = CreateSandboxRequest { request_id: "01700000-0000-7000-8000-000000000000".into(), ..create_request() };
    refused(api.create_sandbox(old).await, FailedPrecondition, ErrorReason::RequestIdExpired);

    let list = ListSandboxesRequest {
        parent: TENANT.into(),
        page_size: 0,
        page_token: "rubbish".into(),
        ..Default::default()
    };
    refused(api.list_sandboxes(list).await, InvalidArgument, ErrorReason::InvalidPageToken);
    let watch =
        |token: &str| WatchSandboxesRequest { parent: TENANT.into(), watch_token: token.into(), ..Default::default() };
    refused(api.watch_sandboxes(watch("rubbish")).await, InvalidArgument, ErrorReason::InvalidField);
    let foreign = "A".repeat(38);
    refused(api.watch_sandboxes(watch(&foreign)).await, OutOfRange, ErrorReason::Compacted);

    let template = Template { digest: digest(), size_bytes: 2, ..Template::default() };
    let taken = CreateTemplateRequest {
        template_id: "base".into(),
        template: Some(template),
        ..CreateTemplateRequest::default()
    };
    refused(region.templates().create_template(taken).await, AlreadyExists, ErrorReason::TemplateAlreadyExists);
    let mut nodes = node_service_client::NodeServiceClient::new(region.channel());
    let missing = nodes.get_node(GetNodeRequest { name: "nodes/none".into() }).await;
    refused(missing, NotFound, ErrorReason::NodeNotFound);
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_each_sandbox_once_in_order() {
    let (region, _agent) = region_with_node().await;
    let mut wanted: Vec<String> = (0..23).map(|n| format!("{TENANT}/sandboxes/s{n}")).collect();
    for n in 0..23 {
        region.create(&format!("s{n}")).await.unwrap();
    }
    wanted.sort();
    for page_size in [1, 7, 23, 100] {
        let (mut seen, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListSandboxesRequest { parent: TENANT.into(), page_size, page_token, ..Default::default() };
            let page = region.sandboxes().list_sandboxes(request).await.unwrap().into_inner();
            assert!(page.sandboxes.len() <= page_size as usize);
            seen.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.name));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, wanted, "pages of {page_size}");
    }
    let all = ListSandboxesRequest { parent: TENANT.into(), ..ListSandboxesRequest::default() };
    let all = region.sandboxes().list_sandboxes(all).await.unwrap().into_inner().sandboxes;
    let waiting = all.into_iter().filter(|sandbox| sandbox.state() == SandboxState::Pending);
    let codes: Vec<String> = waiting.map(|s| s.reason.unwrap().code).collect();
    assert!(!codes.is_empty() && codes.iter().all(|code| code.starts_with("SHORT_OF_")), "{codes:?}");
    region.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_returning_agent_does_not_name_is_lost_and_said_to_be() {
    let (region, agent) = region_with_node().await;
    let name = region.create("s").await.unwrap().name;
    agent.report(&name, 1, Phase::Running).await;
    let is = |wanted: &'static str| {
        let name = name.clone();
        let mut states = region.replica.watch_state();
        async move {
            let arrived = states.wait_for(|state| {
                state.sandboxes.values().any(|s| s.name.to_string() == name && s.life.kind() == wanted)
            });
            assert!(tokio::time::timeout(PATIENCE, arrived).await.is_ok(), "never {wanted}");
        }
    };
    is("RUNNING").await;
    drop(agent);
    let _again = Agent::start(&region).await;
    is("LOST").await;
    let sandbox = region.sandboxes().get_sandbox(GetSandboxRequest { name: name.clone() }).await.unwrap().into_inner();
    assert_eq!(sandbox.reason.unwrap().code, "LOST");
    region.end().await;
}
