//! Looking at a region that is not well: what was not looked at is never called well, and a leader is not needed to look.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use futures::future::join_all;
use tonic::Code;
use warren_proto::ids::{Digest, TemplateId};
use warren_proto::v1::*;
use warren_scheduler::raft::testing::CheckpointDirectory;
use warren_scheduler::state::command::{LogTime, TemplateSpec};
use warren_scheduler::state::{self, State};

use crate::fake::{Fake, error, silent_endpoint};
use crate::run::{Ran, command, run};

/// A group of `fakes` that answer and `silent` that do not, with ids from 1 on.
struct Group {
    fakes: Vec<Fake>,
    silent: Vec<String>,
}

impl Group {
    async fn start(fakes: usize, silent: usize) -> Self {
        let mut group = Self { fakes: Vec::new(), silent: Vec::new() };
        for _ in 0..fakes {
            group.fakes.push(Fake::start().await);
        }
        for _ in 0..silent {
            group.silent.push(silent_endpoint().await);
        }
        let members: Vec<Member> = group
            .addresses()
            .zip(1..)
            .map(|(api_address, replica_id)| {
                let role = if replica_id == 1 { MemberRole::Leader } else { MemberRole::Follower };
                let reachable = replica_id <= fakes as u64;
                Member { replica_id, api_address, role: role.into(), reachable, ..Default::default() }
            })
            .collect();
        for (fake, id) in group.fakes.iter().zip(1..) {
            let mut book = fake.book();
            book.status = GetClusterStatusResponse { members: members.clone(), leader_id: 1, ..Default::default() };
            book.replica.replica_id = id;
            book.replica.hashes = vec![StateHash { index: 256, hash: "ab".into() }];
        }
        group
    }

    /// Two of three are gone, and the third knows it.
    async fn without_a_leader() -> Self {
        let group = Self::start(1, 2).await;
        let no_leader = error(Code::Unavailable, ErrorReason::NoLeader, "no leader");
        group.fakes[0].fail("status", std::iter::repeat_n(no_leader, 1000));
        group
    }

    fn addresses(&self) -> impl Iterator<Item = String> {
        self.fakes.iter().map(|fake| fake.address.clone()).chain(self.silent.iter().cloned())
    }

    /// Only the first endpoint is named: the others are to be found. A leader that is there answers within the time; one that is
    /// not is looked for so long.
    async fn ctl(&self, arguments: &[&str]) -> Ran {
        let flags = ["--endpoints", &self.fakes[0].address, "--timeout", "2s"];
        run(command(&[&flags[..], arguments].concat()), b"").await
    }
}

#[tokio::test]
async fn a_group_that_was_seen_whole_is_well() {
    let group = Group::start(3, 0).await;
    for arguments in [&["raft", "status"][..], &["raft", "hash"], &["check"]] {
        group.ctl(arguments).await.ok();
    }
}

#[tokio::test]
async fn a_replica_that_does_not_answer_is_named_and_is_exit_code_5() {
    let group = Group::start(2, 1).await;
    for arguments in [&["raft", "status"][..], &["raft", "hash"], &["check"]] {
        let ran = group.ctl(arguments).await;
        assert_eq!(ran.code, 5, "{arguments:?}: {ran:?}");
        assert!(ran.stderr.contains(&format!("error: not reached: {}", group.silent[0])), "{arguments:?}: {ran:?}");
    }
    let hash = group.ctl(&["raft", "hash"]).await;
    assert!(hash.stderr.starts_with("equal on 2 of 3 replicas\n"), "{hash:?}");
    let status = group.ctl(&["raft", "status", "-o", "json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!((&status[1]["replicaId"], &status[2]["address"]), (&2.into(), &group.silent[0].as_str().into()));
    assert!(status[2]["error"].is_string(), "{status}");
}

#[tokio::test]
async fn rules_that_nobody_checked_do_not_hold() {
    let group = Group::start(3, 0).await;
    for fake in &group.fakes {
        fake.fail("check", [(); 2].map(|()| error(Code::Internal, ErrorReason::Internal, "no memory")));
    }
    let ran = group.ctl(&["check"]).await;
    assert_eq!(ran.code, 5, "{ran:?}");
    assert_eq!(ran.stderr.matches("NOT CHECKED: no memory").count(), 3, "{ran:?}");
    let ran = group.ctl(&["doctor"]).await;
    assert_eq!(ran.code, 5, "{ran:?}");
    let line = ran.stdout.lines().find(|line| line.contains(" rules ")).unwrap();
    assert!(line.starts_with("UNSEEN") && line.contains("checked on 0 of 3 replicas"), "{ran:?}");
}

#[tokio::test]
async fn a_broken_rule_outweighs_a_replica_that_was_not_reached() {
    let group = Group::start(2, 1).await;
    group.fakes[1].book().violations = vec!["node a is oversold".into()];
    for arguments in [&["check"][..], &["doctor"]] {
        let ran = group.ctl(arguments).await;
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.stdout.contains("1 violations"), "{ran:?}");
    }
}

#[tokio::test]
async fn hashes_without_an_index_in_common_are_not_called_equal() {
    let group = Group::start(2, 0).await;
    group.fakes[1].book().replica.hashes = vec![StateHash { index: 512, hash: "cd".into() }];
    let ran = group.ctl(&["raft", "hash"]).await;
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.stderr.starts_with("error: only 1 of 2 replicas could be compared"), "{ran:?}");
    let doctor = group.ctl(&["doctor"]).await;
    let line = doctor.stdout.lines().find(|line| line.contains("state hash")).unwrap();
    assert!(line.starts_with("UNSEEN"), "{doctor:?}");
}

#[tokio::test]
async fn without_a_leader_each_replica_is_asked_and_what_is_missing_is_said() {
    let group = Group::without_a_leader().await;
    let [second, third] = &group.silent[..] else { panic!("two are silent") };
    let said = format!(
        "no leader: 1 of 3 voters answer and 2 must; missing: replica 2 ({second}), replica 3 ({third})\nhint: start the missing"
    );
    let commands = [&["status"][..], &["raft", "status"], &["raft", "hash"], &["check"]];
    let runs = join_all(commands.map(|arguments| group.ctl(arguments))).await;
    for ran in &runs {
        assert_eq!(ran.code, 5, "{ran:?}");
        assert!(ran.stderr.contains(&said), "{ran:?}");
    }
    let [_, status, _, check] = &runs[..] else { panic!("four were run") };
    let rows: Vec<Vec<&str>> = status.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1][..6], ["1", &group.fakes[0].address, "none", "9", "0", "41"]);
    assert_eq!((rows[2][1], rows[3][1]), (second.as_str(), third.as_str()));
    assert!(check.stdout.contains(": all rules hold at revision 41"), "{check:?}");
}

#[tokio::test]
async fn a_doctor_without_a_leader_looks_at_what_is_left() {
    let group = Group::without_a_leader().await;
    let node = Node { name: "nodes/n1".into(), state: NodeState::Ready.into(), ..Default::default() };
    group.fakes[0].book().nodes = vec![node];
    let ran = group.ctl(&["doctor"]).await;
    assert_eq!(ran.code, 5, "{ran:?}");
    for about in ["leader", "replica", "disk", "clocks", "builds", "state hash", "rules", "nodes", "orphans", "queue"] {
        assert!(ran.stdout.lines().any(|line| line.contains(&format!(" {about} "))), "{about}: {ran:?}");
    }
    assert!(ran.stdout.contains("none: 1 of 3 voters answer and 2 must"), "{ran:?}");
    assert!(group.fakes[0].book().freshness.iter().all(|asked| asked == "stale"), "a read waits for a leader");
}

#[tokio::test]
async fn a_doctor_that_reaches_nobody_calls_nothing_well() {
    let dead = silent_endpoint().await;
    let ran = run(command(&["--endpoints", &dead, "--timeout", "1s", "doctor"]), b"").await;
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(!ran.stdout.contains("OK") && ran.stdout.contains("is a scheduler listening there?"), "{ran:?}");
}

#[tokio::test]
async fn a_bundle_without_a_leader_has_what_is_left_and_says_what_is_not() {
    let group = Group::without_a_leader().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bundle.tar.gz");
    let ran = group.ctl(&["debug", "bundle", &file.display().to_string()]).await;
    assert_eq!(ran.code, 5, "{ran:?}");
    let list = Command::new("tar").arg("-tzf").arg(&file).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let own = group.fakes[0].address.replace(':', "_");
    for name in [&format!("replicas/{own}.json"), &format!("metrics/{own}.txt"), "nodes.jsonl", "sandboxes.jsonl"] {
        assert!(list.contains(name), "{name}: {list}");
    }
    let missing = Command::new("tar").arg("-xzOf").arg(&file).arg("missing.txt").output().unwrap();
    let missing = String::from_utf8(missing.stdout).unwrap();
    assert!(missing.contains("a leader: 1 of 3 voters") && missing.contains(&group.silent[1]), "{missing}");
}

/// A file as `server backup` writes it.
fn backup(directory: &Path, state: &State) -> PathBuf {
    let checkpoints = CheckpointDirectory::open(directory).expect("a directory");
    checkpoints.write(state, &Default::default()).expect("a checkpoint").path
}

async fn check(file: &Path) -> Ran {
    run(command(&["check", &file.display().to_string()]), b"").await
}

#[tokio::test]
async fn a_backup_is_checked_without_a_region() {
    let directory = tempfile::tempdir().unwrap();
    let file = backup(directory.path(), &State { revision: 7, ..State::default() });
    let shown = check(&file).await.ok();
    assert_eq!(shown, format!("{}: all rules hold at revision 7\n", file.display()));
}

#[tokio::test]
async fn a_backup_in_which_a_rule_is_broken_is_exit_code_1() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = State::default();
    let spec = TemplateSpec {
        digest: Digest([1; 32]),
        size_bytes: 1,
        default_command: Vec::new(),
        environment: Default::default(),
        working_directory: String::new(),
    };
    let id = TemplateId::parse("box").unwrap();
    let template = state::template::Template { id, spec, created: LogTime(1), users: 5, revision: 1 };
    state.templates.insert(template.id.clone(), Arc::new(template));
    let ran = check(&backup(directory.path(), &state)).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stdout.contains("1 violations at revision 0\n  template box counts its users wrongly"), "{ran:?}");
}

#[tokio::test]
async fn a_backup_that_is_damaged_or_cut_off_is_not_called_well() {
    let directory = tempfile::tempdir().unwrap();
    let file = backup(directory.path(), &State { revision: 7, ..State::default() });
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for damaged in [&flipped[..], &whole[..whole.len() - 1], &[]] {
        std::fs::write(&file, damaged).unwrap();
        let ran = check(&file).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
        assert!(ran.stderr.contains("is damaged: "), "{ran:?}");
    }
    let missing = check(&directory.path().join("nothing")).await;
    assert_eq!((missing.code, missing.stdout.as_str()), (1, ""), "{missing:?}");
}
