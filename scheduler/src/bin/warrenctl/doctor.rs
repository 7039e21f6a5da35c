//! `doctor`: looks for what is wrong, and says what to do.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use warren_proto::v1::{
    CheckStateResponse, GetClusterStatusResponse, GetReplicaStatusResponse, ListSandboxesRequest, Node, NodeState,
    SandboxState,
};

use crate::client::{Client, sandboxes};
use crate::failure::{Failure, UNAVAILABLE, in_full};
use crate::output::{Format, Output, write};
use crate::raft::{Comparison, compare};
use crate::replicas::{Answer, Leaderless, NO_LEADER_ADVICE, NOBODY_ADVICE, group, votes};
use crate::table::{Table, age, last_segment};
use crate::{node, status};

/// Clocks that differ by more than this, in seconds, are worth a word; by more than a minute, log time may be held.
const CLOCK_WARN: i64 = 2;

/// Share of a disk from which on it is worth a word, in percent.
const DISK_WARN: u32 = 75;

/// The share from which on creates are refused, by default.
const DISK_FAIL: u32 = 90;

/// Before what to do: under ABOUT.
const ADVICE_INDENT: &str = "         ";

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Grade {
    Ok,
    Warn,
    /// It could not be looked at: nothing is known of it.
    Unseen,
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

/// Looks at everything that can be reached. Exit code 1 where something is wrong, 5 where something could not be looked at.
pub async fn run(client: &Client, output: &Output) -> Result<ExitCode, Failure> {
    let group = group(client).await?;
    let led = group.leader.is_ok();
    // Without a leader there is still what any replica has.
    let stale;
    let reading = if led {
        client
    } else {
        stale = client.reading_stale();
        &stale
    };
    let mut findings = match &group.leader {
        Ok(status) => of_group(status),
        Err(leaderless) => vec![of_leaderless(leaderless)],
    };
    let (answers, compared) = compare(client, &group).await;
    findings.extend(of_replicas(&answers));
    if compared.answered > 0 {
        findings.push(of_hashes(&answers, &compared));
        findings.push(of_rules(&group.checks(client).await));
        match node::all(reading).await {
            Ok(nodes) => findings.extend(of_nodes(&nodes)),
            Err(failure) => findings.push(unseen("nodes", &failure)),
        }
        findings.push(of_queue(reading).await.unwrap_or_else(|failure| unseen("queue", &failure)));
    }
    show(output, &findings)?;
    Ok(match findings.iter().map(|finding| finding.grade).max() {
        Some(Grade::Fail) => ExitCode::from(1),
        Some(Grade::Unseen) => ExitCode::from(UNAVAILABLE),
        Some(Grade::Ok | Grade::Warn) | None => ExitCode::SUCCESS,
    })
}

fn unseen(about: &'static str, failure: &Failure) -> Finding {
    finding(Grade::Unseen, about, format!("not looked at: {failure}"), "ask again once a scheduler answers")
}

fn of_leaderless(leaderless: &Leaderless) -> Finding {
    let advice = if leaderless.is_deserted() { NOBODY_ADVICE } else { NO_LEADER_ADVICE };
    finding(Grade::Unseen, "leader", format!("none: {}", leaderless.seen()), advice)
}

fn of_group(status: &GetClusterStatusResponse) -> Vec<Finding> {
    let voters = status.members.iter().filter(|member| votes(member)).count();
    let heard = status.members.iter().filter(|member| votes(member) && member.reachable).count();
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
                findings.push(finding(Grade::Unseen, "replica", seen, "start it, or replace it (`server leave`)"));
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
    if levels.is_empty() {
        return findings;
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
    findings
}

fn of_hashes(answers: &[Answer<GetReplicaStatusResponse>], compared: &Comparison) -> Finding {
    let Comparison { wrong, index, hashes, .. } = compared;
    let (count, all) = (hashes.len(), answers.len());
    if !wrong.is_empty() {
        let advice = "keep every data directory, `region pause placement`, and report this";
        return finding(Grade::Fail, "state hash", format!("different at {} indexes", wrong.len()), advice);
    }
    if count == all && compared.is_whole() {
        return finding(Grade::Ok, "state hash", format!("{count} replicas equal at {index}"), "");
    }
    let seen = match count {
        0 | 1 => format!("nothing to compare: {count} of {all} replicas have a hash of one index"),
        _ => format!("{count} of {all} replicas equal at {index}, the others not compared"),
    };
    finding(Grade::Unseen, "state hash", seen, "`raft status` shows who does not answer or is behind; look again then")
}

fn of_rules(checks: &[Answer<CheckStateResponse>]) -> Finding {
    let said = || checks.iter().filter_map(|answer| answer.said.as_ref().ok());
    let wrong: usize = said().map(|said| said.violations.len()).sum();
    if wrong > 0 {
        let advice = "see `warrenctl check`, and report this";
        return finding(Grade::Fail, "rules", format!("{wrong} violations"), advice);
    }
    let count = said().count();
    if count == checks.len() && count > 0 {
        return finding(Grade::Ok, "rules", format!("all hold on {} replicas", checks.len()), "");
    }
    let seen = format!("checked on {count} of {} replicas", checks.len());
    finding(Grade::Unseen, "rules", seen, "`warrenctl check` says why not on the others")
}

fn of_nodes(nodes: &[Node]) -> Vec<Finding> {
    if nodes.is_empty() {
        let advice = "start an agent on each host: `warren-node-agent --help`";
        return vec![finding(Grade::Warn, "nodes", "none is registered", advice)];
    }
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
            grade(!silent.is_empty(), Grade::Warn),
            "nodes",
            if silent.is_empty() { format!("{ready} ready") } else { format!("silent: {}", silent.join(", ")) },
            "start their agents; one that never comes back: `node forget`",
        ),
        finding(
            grade(cordoned > 0, Grade::Warn),
            "cordoned",
            if cordoned == 0 { "none".to_owned() } else { format!("{cordoned} nodes") },
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
        let request = client.reading(request.clone());
        async move { sandboxes(c).list_sandboxes(request).await }
    };
    let page = client.call(list).await?;
    let more = if page.next_page_token.is_empty() { "" } else { " or more" };
    let oldest = page.sandboxes.iter().min_by_key(|sandbox| sandbox.create_time.map_or(0, |time| time.seconds));
    let seen = match oldest {
        None => "empty".to_owned(),
        Some(oldest) => format!(
            "{}{more} waiting, the oldest for {}: {}",
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
        Grade::Unseen => "UNSEEN",
        Grade::Fail => "FAIL",
    };
    if output.format != Format::Table {
        let shown = findings.iter().map(
            |f| serde_json::json!({ "grade": word(f.grade), "about": f.about, "seen": f.seen, "advice": f.advice }),
        );
        return output.document(&shown.collect::<Vec<_>>());
    }
    let mut table = Table::new(&["GRADE", "ABOUT", "SEEN"]);
    for finding in findings {
        table.push(vec![word(finding.grade).to_owned(), finding.about.to_owned(), finding.seen.clone()]);
    }
    // What to do stands below what it is about: beside it the lines would be too long for a screen.
    let mut lines = table.to_string().lines().map(str::to_owned).collect::<Vec<_>>().into_iter();
    let mut text = lines.next().unwrap_or_default() + "\n";
    for (line, finding) in lines.zip(findings) {
        text += &(line + "\n");
        if finding.grade != Grade::Ok && !finding.advice.is_empty() {
            text += &format!("{ADVICE_INDENT}→ {}\n", finding.advice);
        }
    }
    write(&text)
}
