//! `doctor`: looks for what is wrong, and says what to do.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use warren_proto::v1::{
    GetClusterStatusResponse, GetReplicaStatusResponse, ListSandboxesRequest, Node, NodeState, SandboxState,
};

use crate::client::{Client, sandboxes, within};
use crate::failure::{Failure, in_full};
use crate::output::{Format, Output, write};
use crate::raft::{Answer, checks, compare, replicas};
use crate::status::cluster_status;
use crate::table::{Table, age, last_segment};
use crate::{node, status};

/// Clocks that differ by more than this, in seconds, are worth a word; by more than a minute, log time may be held.
const CLOCK_WARN: i64 = 2;

/// Share of a disk from which on it is worth a word, in percent.
const DISK_WARN: u32 = 75;

/// The share from which on creates are refused, by default.
const DISK_FAIL: u32 = 90;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Grade {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
struct Finding {
    grade: Grade,
    about: &'static str,
    seen: String,
    /// What to do; empty when nothing.
    advice: &'static str,
}

fn finding(grade: Grade, about: &'static str, seen: impl Into<String>, advice: &'static str) -> Finding {
    Finding { grade, about, seen: seen.into(), advice }
}

/// The worse of the two grades when `bad` holds.
fn grade(bad: bool, otherwise: Grade) -> Grade {
    if bad { otherwise } else { Grade::Ok }
}

pub async fn run(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let mut findings = Vec::new();
    match cluster_status(client, client.deadline()).await {
        Ok(status) => {
            findings.extend(of_group(&status));
            let answers = replicas(client).await?;
            findings.extend(of_replicas(&answers));
            findings.push(of_rules(client).await?);
            findings.extend(of_nodes(&node::all(client).await?));
            findings.push(of_queue(client).await?);
        }
        Err(failure) => findings.push(finding(
            Grade::Fail,
            "leader",
            failure.to_string(),
            "start the schedulers; if most of their disks are lost: `warren-scheduler recover-quorum`",
        )),
    }
    show(output, &findings)?;
    let worst = findings.iter().map(|finding| finding.grade).max().unwrap_or(Grade::Ok);
    Ok(ExitCode::from(u8::from(worst == Grade::Fail)))
}

fn of_group(status: &GetClusterStatusResponse) -> Vec<Finding> {
    let votes = |role: i32| role == 1 || role == 2;
    let voters = status.members.iter().filter(|m| votes(m.role)).count();
    let heard = status.members.iter().filter(|m| votes(m.role) && m.reachable).count();
    let spare = heard > voters / 2 + 1;
    let attention = status::attention(status);
    vec![
        finding(Grade::Ok, "leader", format!("replica {}, term {}", status.leader_id, status.term), ""),
        finding(
            grade(!spare, if voters == 1 { Grade::Warn } else { Grade::Fail }),
            "quorum",
            format!("{heard} of {voters} voters are heard of"),
            "no further replica may fail: start the missing one, or replace it (`server join`, `server leave`)",
        ),
        finding(
            grade(!attention.is_empty(), Grade::Warn),
            "region",
            if attention.is_empty() { "nothing is paused or held".to_owned() } else { attention },
            "`region resume`, or `region release-brake` once you have looked at the silent nodes",
        ),
    ]
}

fn of_replicas(answers: &[Answer<GetReplicaStatusResponse>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut clocks = Vec::new();
    let mut levels = Vec::new();
    for Answer { address, said } in answers {
        let own = match said {
            Ok(own) => own,
            Err(status) => {
                let seen = format!("{address}: {}", in_full(status));
                findings.push(finding(Grade::Fail, "replica", seen, "start it, or replace it"));
                continue;
            }
        };
        clocks.extend(own.clock.map(|clock| clock.seconds));
        levels.push(own.max_level);
        let used = own.disk_used_percent;
        let disk = if used >= DISK_FAIL { Grade::Fail } else { grade(used >= DISK_WARN, Grade::Warn) };
        let seen = format!("replica {}: {used} % used", own.replica_id);
        findings.push(finding(
            disk,
            "disk",
            seen,
            "make room: at 90 % creates are refused, and a full disk stops the replica",
        ));
    }
    let here = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|now| i64::try_from(now.as_secs()).ok());
    clocks.extend(here);
    let apart = clocks.iter().max().zip(clocks.iter().min()).map_or(0, |(most, least)| most - least);
    let advice = "synchronise the hosts' clocks (chrony, systemd-timesyncd)";
    findings.push(finding(
        grade(apart > CLOCK_WARN, Grade::Warn),
        "clocks",
        format!("{apart} s apart at most"),
        advice,
    ));
    let mixed = levels.iter().any(|level| Some(level) != levels.first());
    findings.push(finding(
        grade(mixed, Grade::Warn),
        "builds",
        if mixed { "of different levels" } else { "all support the same level" },
        "finish the rolling upgrade: the newer rules hold once every replica supports them",
    ));
    let (wrong, best) = compare(answers);
    let same =
        best.map_or("nothing to compare".to_owned(), |(index, count)| format!("{count} replicas equal at {index}"));
    let seen = if wrong.is_empty() { same } else { format!("different at {} indexes", wrong.len()) };
    let advice = "keep every data directory, `region pause placement`, and report this";
    findings.push(finding(grade(!wrong.is_empty(), Grade::Fail), "state hash", seen, advice));
    findings
}

async fn of_rules(client: &Client) -> Result<Finding, Failure> {
    let checks = checks(client).await?;
    let wrong: usize =
        checks.iter().filter_map(|answer| answer.said.as_ref().ok()).map(|said| said.violations.len()).sum();
    let seen = if wrong == 0 { "all hold".to_owned() } else { format!("{wrong} violations") };
    Ok(finding(grade(wrong > 0, Grade::Fail), "rules", seen, "see `warrenctl check`, and report this"))
}

fn of_nodes(nodes: &[Node]) -> Vec<Finding> {
    let silent: Vec<String> = nodes
        .iter()
        .filter(|node| node.state() != NodeState::Ready)
        .map(|node| format!("{} for {}", last_segment(&node.name), age(node.state_time.as_ref())))
        .collect();
    let orphans: Vec<&str> = nodes.iter().flat_map(|node| &node.orphans).map(String::as_str).collect();
    let cordoned = nodes.iter().filter(|node| node.cordoned).count();
    let ready = nodes.len().saturating_sub(silent.len());
    vec![
        finding(
            if nodes.is_empty() { Grade::Warn } else { grade(!silent.is_empty(), Grade::Warn) },
            "nodes",
            if silent.is_empty() { format!("{ready} ready") } else { format!("silent: {}", silent.join(", ")) },
            "start their agents; one that never comes back: `node forget`",
        ),
        finding(
            grade(cordoned > 0, Grade::Warn),
            "cordoned",
            format!("{cordoned} nodes"),
            "`node uncordon` when the work on them is done",
        ),
        finding(
            grade(!orphans.is_empty(), Grade::Warn),
            "orphans",
            if orphans.is_empty() { "none".to_owned() } else { orphans.join(", ") },
            "frozen, unknown to the ledger: look at them, then `node stop-orphan`",
        ),
    ]
}

async fn of_queue(client: &Client) -> Result<Finding, Failure> {
    let request = ListSandboxesRequest {
        parent: "tenants/-".to_owned(),
        states: vec![SandboxState::Pending.into()],
        page_size: 1000,
        ..ListSandboxesRequest::default()
    };
    let list = |c| {
        let request = within(request.clone());
        async move { sandboxes(c).list_sandboxes(request).await }
    };
    let page = client.call(list).await?;
    let more = if page.next_page_token.is_empty() { "" } else { " or more" };
    let oldest = page.sandboxes.iter().min_by_key(|sandbox| sandbox.create_time.map_or(0, |time| time.seconds));
    let seen = match oldest {
        None => "empty".to_owned(),
        Some(oldest) => format!(
            "{}{more} wait, the oldest for {}: {}",
            page.sandboxes.len(),
            age(oldest.create_time.as_ref()),
            oldest.reason.as_ref().map(|reason| reason.message.as_str()).unwrap_or_default()
        ),
    };
    Ok(finding(grade(oldest.is_some(), Grade::Warn), "queue", seen, "add nodes, or delete what is not needed"))
}

fn show(output: &Output, findings: &[Finding]) -> Result<(), Failure> {
    let word = |grade| match grade {
        Grade::Ok => "OK",
        Grade::Warn => "WARN",
        Grade::Fail => "FAIL",
    };
    if output.format != Format::Table {
        let shown = findings.iter().map(
            |f| serde_json::json!({ "grade": word(f.grade), "about": f.about, "seen": f.seen, "advice": f.advice }),
        );
        return output.document(&shown.collect::<Vec<_>>());
    }
    let mut table = Table::new(&["", "ABOUT", "SEEN", "DO"]);
    for finding in findings {
        let advice = if finding.grade == Grade::Ok { "" } else { finding.advice };
        table.push(vec![
            word(finding.grade).to_owned(),
            finding.about.to_owned(),
            finding.seen.clone(),
            advice.to_owned(),
        ]);
    }
    write(&table.to_string())
}
