//! What replicas say, one by one: all that the leader knows of. Without a leader, all that were named and all that those know
//! of, so that a region can be looked at when it is not well.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tonic::transport::Channel;
use tonic::{Response, Status};
use warren_proto::v1::{
    CheckStateRequest, CheckStateResponse, GetClusterStatusRequest, GetClusterStatusResponse, GetReplicaStatusRequest,
    GetReplicaStatusResponse, Member, MemberRole,
};

use crate::client::{Client, cluster, stale, within};
use crate::failure::{Failure, UNAVAILABLE, in_full};

/// How long a leader is looked for: a few elections. Who asks how things are does not want to wait for them to be well.
const LEADER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a replica may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long it may take to check a whole state.
const CHECK_PATIENCE: Duration = Duration::from_secs(60);

/// What to do when nobody answers.
pub const NOBODY_ADVICE: &str =
    "is a scheduler listening there? --endpoints, WARREN_ENDPOINTS or a context name them; otherwise start them";

/// What to do when none leads.
pub const NO_LEADER_ADVICE: &str = "start the missing schedulers; if their disks are lost for good: `warren-scheduler \
    recover-quorum` on the replica that has applied most (`warrenctl raft status`)";

/// One replica's address, and what it answered.
pub struct Answer<T> {
    pub address: String,
    pub said: Result<T, Status>,
}

/// The replicas that can be asked, and what their leader says.
pub struct Group {
    addresses: Vec<String>,
    pub leader: Result<GetClusterStatusResponse, Leaderless>,
}

/// None leads.
pub struct Leaderless {
    /// What came of looking for one.
    failure: Failure,
    /// The voters, as the furthest replica that answers knows them; empty where none answers.
    voters: Vec<Member>,
    /// Ids of the replicas that answer.
    answer: BTreeSet<u64>,
}

pub async fn cluster_status(client: &Client, deadline: Instant) -> Result<GetClusterStatusResponse, Failure> {
    let get = |c| async move { cluster(c).get_cluster_status(within(GetClusterStatusRequest {})).await };
    client.call_until(deadline, get).await
}

pub fn votes(member: &Member) -> bool {
    matches!(member.role(), MemberRole::Leader | MemberRole::Follower)
}

/// Finds the group by its leader, or else by what the endpoints know.
pub async fn group(client: &Client) -> Result<Group, Failure> {
    match cluster_status(client, Instant::now() + client.timeout.min(LEADER_PATIENCE)).await {
        Ok(status) => {
            let addresses = status.members.iter().map(|member| member.api_address.clone()).collect();
            Ok(Group { addresses, leader: Ok(status) })
        }
        Err(failure) if failure.exit_code() == UNAVAILABLE => Ok(leaderless(client, failure).await),
        Err(failure) => Err(failure),
    }
}

async fn leaderless(client: &Client, failure: Failure) -> Group {
    let mut addresses: Vec<String> = client.endpoints().map(|(address, _)| address.to_owned()).collect();
    let views = ask_each(client, &addresses, PATIENCE, |channel| async move {
        cluster(channel).get_cluster_status(stale(within(GetClusterStatusRequest {}))).await
    })
    .await;
    let furthest = views.into_iter().filter_map(|view| view.said.ok()).max_by_key(|view| (view.term, view.revision));
    let members = furthest.map(|view| view.members).unwrap_or_default();
    let asked = own_status(client, &addresses).await;
    let mut answer: BTreeSet<u64> = ids(&asked).collect();
    // Those that were named may be the same by other names.
    let others = members.iter().filter(|m| !answer.contains(&m.replica_id) && !addresses.contains(&m.api_address));
    let others: Vec<String> = others.map(|member| member.api_address.clone()).collect();
    answer.extend(ids(&own_status(client, &others).await));
    addresses.extend(others);
    let voters = members.into_iter().filter(votes).collect();
    Group { addresses, leader: Err(Leaderless { failure, voters, answer }) }
}

fn ids(answers: &[Answer<GetReplicaStatusResponse>]) -> impl Iterator<Item = u64> {
    answers.iter().filter_map(|answer| answer.said.as_ref().ok()).map(|own| own.replica_id)
}

impl Group {
    /// What each replica says of itself.
    pub async fn replicas(&self, client: &Client) -> Vec<Answer<GetReplicaStatusResponse>> {
        own_status(client, &self.addresses).await
    }

    /// What each replica's check of its own state found.
    pub async fn checks(&self, client: &Client) -> Vec<Answer<CheckStateResponse>> {
        ask_each(client, &self.addresses, CHECK_PATIENCE, |channel| async move {
            cluster(channel).check_state(tonic::Request::new(CheckStateRequest {})).await
        })
        .await
    }

    /// An error where there was no leader or not every replica answered: what was seen is then not all that there is.
    pub fn complete<T>(self, answers: &[Answer<T>]) -> Result<(), Failure> {
        if let Err(leaderless) = self.leader {
            return Err(leaderless.into());
        }
        let missing = unreached(answers);
        if missing.is_empty() { Ok(()) } else { Err(Failure::Unreached(missing.join("; "))) }
    }
}

/// Who did not answer, and why.
fn unreached<T>(answers: &[Answer<T>]) -> Vec<String> {
    let failed = answers.iter().filter_map(|Answer { address, said }| Some((address, said.as_ref().err()?)));
    failed.map(|(address, status)| format!("{address} ({})", in_full(status))).collect()
}

impl Leaderless {
    /// Whether nobody answers at all.
    pub fn is_deserted(&self) -> bool {
        self.answer.is_empty()
    }

    /// How many of the voters answer, and which do not.
    pub fn seen(&self) -> String {
        let missing = self.voters.iter().filter(|member| !self.answer.contains(&member.replica_id));
        let missing: Vec<String> = missing.map(|m| format!("replica {} ({})", m.replica_id, m.api_address)).collect();
        let all = self.voters.len();
        let (here, needed) = (all - missing.len(), all / 2 + 1);
        match (all, self.is_deserted()) {
            (_, true) => self.failure.to_string(),
            (0, _) => format!("{} of the replicas that were asked answer, and none leads", self.answer.len()),
            _ if here < needed => {
                format!("{here} of {all} voters answer and {needed} must; missing: {}", missing.join(", "))
            }
            _ => format!(
                "{here} of {all} voters answer and none leads: they may be electing one, or not reach each other"
            ),
        }
    }
}

impl From<Leaderless> for Failure {
    /// Where nobody answers at all, that is what is said.
    fn from(none: Leaderless) -> Self {
        if none.is_deserted() { none.failure } else { Self::NoLeader(none.seen()) }
    }
}

async fn own_status(client: &Client, addresses: &[String]) -> Vec<Answer<GetReplicaStatusResponse>> {
    ask_each(client, addresses, PATIENCE, |channel| async move {
        cluster(channel).get_replica_status(within(GetReplicaStatusRequest {})).await
    })
    .await
}

async fn ask_each<T, F>(
    client: &Client,
    addresses: &[String],
    patience: Duration,
    ask: impl Fn(Channel) -> F,
) -> Vec<Answer<T>>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let asking = addresses.iter().map(|address| {
        let asked = client.channel(address).map(&ask);
        async move {
            let said = match asked {
                Ok(asked) => tokio::time::timeout(patience, asked)
                    .await
                    .unwrap_or_else(|_elapsed| Err(Status::unavailable(format!("no answer within {patience:?}"))))
                    .map(Response::into_inner),
                Err(failure) => Err(Status::unavailable(failure.to_string())),
            };
            Answer { address: address.clone(), said }
        }
    });
    join_all(asking).await
}
