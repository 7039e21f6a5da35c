//! Three members of etcd, as Debian packages it, and the two of its calls that are needed here.
//!
//! The messages are written out: of etcd's API they are these few fields, and what else comes is skipped.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use warren_proto::client::{ClientTls, channel};

use super::probe::Server;
use super::{Place, network};
use crate::cluster::process::Process;

/// As everywhere: a group that survives the loss of one.
pub const MEMBERS: usize = 3;

/// Durable syncs of its log since the member began, on its metrics page.
const SYNCS: &str = "etcd_disk_wal_fsync_duration_seconds_count";

/// More than a measurement writes: the default of 2 GiB may not be.
const QUOTA_BYTES: u64 = 8 << 30;

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Nothing {}

#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// etcd's processes. Dropping it kills them.
#[derive(Debug)]
pub struct Etcd {
    _directory: TempDir,
    network: String,
    members: Vec<Process>,
}

/// Where etcd is, or how to get it.
pub fn find() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join("etcd")).find(|path| path.is_file());
    found.context("no etcd to compare with. Install it: apt-get install etcd-server (its service need not run)")
}

impl Etcd {
    /// Starts three members and waits until each says that it is healthy.
    pub async fn start(place: &Place) -> anyhow::Result<Self> {
        let program = find()?;
        let directory = place.directory()?;
        let root = directory.path().to_owned();
        let mut etcd = Self { _directory: directory, network: network(), members: Vec::new() };
        etcd.members = (0..MEMBERS).map(|at| etcd.member(at, &root, &program)).collect();
        for member in &mut etcd.members {
            member.start()?;
        }
        for member in &mut etcd.members {
            member.await_ready().await?;
        }
        Ok(etcd)
    }

    fn member(&self, at: usize, root: &Path, program: &Path) -> Process {
        let name = format!("etcd-{}", at + 1);
        let url = |port| format!("http://{}", self.address(at, port));
        let cluster: Vec<String> =
            (0..MEMBERS).map(|at| format!("etcd-{}=http://{}", at + 1, self.address(at, 2380))).collect();
        let pairs = [
            ("name", name.clone()),
            ("data-dir", root.join(&name).display().to_string()),
            ("listen-client-urls", url(2379)),
            ("advertise-client-urls", url(2379)),
            ("listen-peer-urls", url(2380)),
            ("initial-advertise-peer-urls", url(2380)),
            ("initial-cluster", cluster.join(",")),
            ("listen-metrics-urls", url(2381)),
            ("quota-backend-bytes", QUOTA_BYTES.to_string()),
            ("log-level", "error".to_owned()),
        ];
        let arguments = pairs.iter().flat_map(|(key, value)| [format!("--{key}"), value.clone()]).collect();
        let log = root.join(format!("{name}.log"));
        Process::new(name, program.to_owned(), arguments, self.address(at, 2381), log).ready_at("/health")
    }

    fn address(&self, at: usize, port: u16) -> String {
        format!("{}.{}:{port}", self.network, at + 1)
    }

    pub fn channels(&self, at: usize, count: usize) -> anyhow::Result<Vec<Channel>> {
        let address = self.address(at, 2379);
        (0..count).map(|_| Ok(channel(&address, &ClientTls::default())?)).collect()
    }

    /// The member that leads now, and etcd's version.
    pub async fn leader(&self) -> anyhow::Result<(usize, String)> {
        for at in 0..MEMBERS {
            let channel = channel(&self.address(at, 2379), &ClientTls::default())?;
            let status: StatusResponse = unary(channel, "/etcdserverpb.Maintenance/Status", Nothing {}).await?;
            let own = status.header.unwrap_or_default().member_id;
            ensure!(status.leader != 0, "{} knows no leader", self.members[at].name());
            if own == status.leader {
                return Ok((at, status.version));
            }
        }
        bail!("no member says that it leads")
    }

    pub fn servers(&self) -> Vec<Server> {
        let server = |(at, process): (usize, &Process)| Server {
            name: process.name().to_owned(),
            process: process.id(),
            syncs: Some((self.address(at, 2381), SYNCS)),
        };
        self.members.iter().enumerate().map(server).collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in &mut self.members {
            if let Err(error) = process.kill() {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Answers once a quorum has the value on disk.
pub async fn put(channel: Channel, key: Vec<u8>, value: Vec<u8>) -> Result<(), Status> {
    unary::<_, Nothing>(channel, "/etcdserverpb.KV/Put", PutRequest { key, value }).await.map(drop)
}

async fn unary<Q, A>(channel: Channel, path: &'static str, request: Q) -> Result<A, Status>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<Q, A>::default();
    let answer = grpc.unary(Request::new(request), PathAndQuery::from_static(path), codec).await?;
    Ok(answer.into_inner())
}
