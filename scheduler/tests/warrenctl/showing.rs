//! What reading commands print, in every format.

use std::collections::BTreeMap;

use prost_types::Timestamp;
use warren_proto::v1::*;

use crate::fake::Fake;
use crate::run::{command, ctl, run, two_days_ago};

fn sandbox(id: &str, state: SandboxState) -> Sandbox {
    Sandbox {
        name: format!("tenants/default/sandboxes/{id}"),
        template: "templates/python".into(),
        resources: Some(Resources { cpu_milli: 250, memory_bytes: 256 << 20, disk_bytes: 1 << 30, pids: 256, gpus: 0 }),
        state: state.into(),
        create_time: Some(two_days_ago()),
        ..Default::default()
    }
}

async fn three_sandboxes() -> Fake {
    let fake = Fake::start().await;
    let running = Sandbox { node: "nodes/n1".into(), epoch: 1, ..sandbox("a", SandboxState::Running) };
    let reason = Some(StateReason { code: "SHORT_OF_CPU".into(), message: "no node has 64 vCPU free".into() });
    let pending = Sandbox { reason, ..sandbox("b", SandboxState::Pending) };
    let exit_status = Some(ExitStatus { code: 3, ..Default::default() });
    let stopped = Sandbox { exit_status, node: "nodes/n2".into(), ..sandbox("c", SandboxState::Stopped) };
    for sandbox in [running, pending, stopped] {
        fake.book().sandboxes.insert(sandbox.name.clone(), sandbox);
    }
    let other = Sandbox { name: "tenants/other/sandboxes/z".into(), ..sandbox("z", SandboxState::Running) };
    fake.book().sandboxes.insert(other.name.clone(), other);
    fake
}

#[tokio::test]
async fn a_list_is_a_table_without_borders_over_all_pages() {
    let fake = three_sandboxes().await;
    let expected = "\
SANDBOX   STATE     NODE   TEMPLATE   CPU    MEMORY    AGE    REASON
a         RUNNING   n1     python     0.25   256 MiB   2d3h
b         PENDING   -      python     0.25   256 MiB   2d3h   SHORT_OF_CPU
c         STOPPED   n2     python     0.25   256 MiB   2d3h   exit 3
";
    assert_eq!(ctl(&fake, &["sandbox", "list"]).await.ok(), expected);
    assert_eq!(fake.book().lists, 2, "three sandboxes are two pages");
}

#[tokio::test]
async fn a_waiting_sandbox_shows_its_place_and_when_it_is_looked_at() {
    let fake = three_sandboxes().await;
    let name = sandbox("b", SandboxState::Pending).name;
    let retry_time = Some(Timestamp { seconds: 1_700_000_000, nanos: 0 });
    fake.book().sandboxes.entry(name).and_modify(|b| (b.queue_position, b.retry_time) = (3, retry_time));
    let shown = ctl(&fake, &["sandbox", "show", "b"]).await.ok();
    let line = |label: &str| shown.lines().find(|line| line.starts_with(label)).unwrap_or_default().to_owned();
    assert!(line("Queue").ends_with("place 3 of its tenant"), "{shown}");
    assert!(line("Looked at").ends_with("2023-11-14T22:13:20Z at the latest"), "{shown}");
    assert!(line("Reason").contains("SHORT_OF_CPU"), "{shown}");
    let shown = ctl(&fake, &["sandbox", "show", "a"]).await.ok();
    assert!(!shown.contains("Queue") && !shown.contains("Looked at"), "{shown}");
}

#[tokio::test]
async fn names_are_resource_names() {
    let fake = three_sandboxes().await;
    let all = ctl(&fake, &["sandbox", "list", "-o", "name"]).await.ok();
    assert_eq!(all, "tenants/default/sandboxes/a\ntenants/default/sandboxes/b\ntenants/default/sandboxes/c\n");
    let all = ctl(&fake, &["sandbox", "list", "--all-tenants", "-o", "name"]).await.ok();
    assert!(all.ends_with("tenants/other/sandboxes/z\n"), "{all}");
    let other = ctl(&fake, &["--tenant", "other", "sandbox", "list", "-o", "name"]).await.ok();
    assert_eq!(other, "tenants/other/sandboxes/z\n");
}

/// Two timestamps that people can check.
fn fixed() -> Sandbox {
    Sandbox {
        command: vec!["python3".into(), "-u".into()],
        environment: BTreeMap::from([("B".into(), "2".into()), ("A".into(), "1".into())]),
        create_time: Some(Timestamp { seconds: 1_700_000_000, nanos: 500_000_000 }),
        output_tail: b"bye\n".to_vec(),
        revision: u64::MAX,
        exit_status: Some(ExitStatus { code: 137, signal: 9, oom_killed: true }),
        epoch: 2,
        ..sandbox("a", SandboxState::Stopped)
    }
}

const FIXED_JSON: &str = r#"{
  "name": "tenants/default/sandboxes/a",
  "template": "templates/python",
  "command": [
    "python3",
    "-u"
  ],
  "environment": {
    "A": "1",
    "B": "2"
  },
  "workingDirectory": "",
  "labels": {},
  "resources": {
    "cpuMilli": 250,
    "memoryBytes": 268435456,
    "diskBytes": 1073741824,
    "pids": 256,
    "gpus": 0
  },
  "annotations": {},
  "secretEnvironment": {},
  "restartPolicy": "RESTART_POLICY_UNSPECIFIED",
  "onIsolation": "ON_ISOLATION_UNSPECIFIED",
  "onDeadline": "ON_DEADLINE_UNSPECIFIED",
  "priority": 0,
  "state": "SANDBOX_STATE_STOPPED",
  "node": "",
  "epoch": 2,
  "createTime": "2023-11-14T22:13:20.500Z",
  "exitStatus": {
    "code": 137,
    "signal": 9,
    "oomKilled": true
  },
  "outputTail": "YnllCg==",
  "revision": 18446744073709551615,
  "etag": "",
  "secretNames": [],
  "restartCount": 0,
  "queuePosition": 0,
  "gpuUuids": []
}
"#;

#[tokio::test]
async fn json_is_protobufs_with_plain_numbers_and_all_fields() {
    let fake = Fake::start().await;
    fake.book().sandboxes.insert(fixed().name, fixed());
    let shown = ctl(&fake, &["sandbox", "show", "a", "-o", "json"]).await.ok();
    assert_eq!(shown, FIXED_JSON);
    let by_full_name = ctl(&fake, &["-o", "json", "sandbox", "show", "tenants/default/sandboxes/a"]).await.ok();
    assert_eq!(by_full_name, FIXED_JSON);
}

#[tokio::test]
async fn json_lines_and_yaml_say_the_same() {
    let fake = Fake::start().await;
    fake.book().sandboxes.insert(fixed().name, fixed());
    let expected: serde_json::Value = serde_json::from_str(FIXED_JSON).expect("json");
    let lines = ctl(&fake, &["sandbox", "list", "-o", "jsonl"]).await.ok();
    assert_eq!(lines.lines().count(), 1, "one object, one line");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&lines).expect("json"), expected);
    let yaml = ctl(&fake, &["sandbox", "show", "a", "-o", "yaml"]).await.ok();
    assert!(yaml.starts_with("name: tenants/default/sandboxes/a\ntemplate: templates/python\n"), "{yaml}");
    assert_eq!(serde_yaml_ng::from_str::<serde_json::Value>(&yaml).expect("yaml"), expected);
    let list = ctl(&fake, &["sandbox", "list", "-o", "json"]).await.ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&list).expect("json"), serde_json::json!([expected]));
}

#[tokio::test]
async fn show_tells_a_person_what_is_known() {
    let fake = Fake::start().await;
    let sandbox = Sandbox { create_time: Some(two_days_ago()), ..fixed() };
    fake.book().sandboxes.insert(sandbox.name.clone(), sandbox);
    let expected = "\
Name:         tenants/default/sandboxes/a
State:        STOPPED
Node:         -
Epoch:        2
Template:     templates/python
Command:      python3 -u
Environment:  A=1, B=2
CPU:          0.25
Memory:       256 MiB
Disk:         1 GiB
Processes:    at most 256
Created:      2d3h ago
Exit:         code 137, signal 9, out of memory
Output:       bye
";
    let shown = ctl(&fake, &["sandbox", "show", "a"]).await.ok();
    assert_eq!(collapse(&shown), collapse(expected));
}

/// Columns may be as wide as they like.
fn collapse(text: &str) -> Vec<String> {
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

fn node(id: &str, state: NodeState) -> Node {
    let half = Resources { cpu_milli: 1500, memory_bytes: 3 << 29, disk_bytes: 5 << 30, pids: 0, gpus: 0 };
    let all = Resources { cpu_milli: 4000, memory_bytes: 8 << 30, disk_bytes: 20 << 30, pids: 0, gpus: 0 };
    Node {
        name: format!("nodes/{id}"),
        state: state.into(),
        address: "127.0.0.1:7080".into(),
        capacity: Some(all),
        assigned: Some(half),
        sandbox_count: 6,
        register_time: Some(two_days_ago()),
        ..Default::default()
    }
}

#[tokio::test]
async fn nodes_show_what_they_have_left() {
    let fake = Fake::start().await;
    fake.book().nodes = vec![node("n1", NodeState::Ready), node("n2", NodeState::Down)];
    let expected = "\
NODE   STATE   SANDBOXES   CPU       MEMORY            DISK             ADDRESS          AGE
n1     READY   6           1.5 / 4   1.5 GiB / 8 GiB   5 GiB / 20 GiB   127.0.0.1:7080   2d3h
n2     DOWN    6           1.5 / 4   1.5 GiB / 8 GiB   5 GiB / 20 GiB   127.0.0.1:7080   2d3h
";
    assert_eq!(ctl(&fake, &["node", "list"]).await.ok(), expected);
    let shown = ctl(&fake, &["node", "show", "n1"]).await.ok();
    assert!(collapse(&shown).contains(&"Memory: 1.5 GiB / 8 GiB, 6.5 GiB free".to_owned()), "{shown}");
    assert_eq!(ctl(&fake, &["node", "show", "nodes/n2", "-o", "name"]).await.ok(), "nodes/n2\n");
}

#[tokio::test]
async fn the_fullest_node_comes_first_with_what_is_scarce_on_it() {
    let fake = Fake::start().await;
    let scarce = Resources { cpu_milli: 1000, memory_bytes: 7 << 30, disk_bytes: 0, pids: 0, gpus: 0 };
    let full = Node { assigned: Some(scarce), ..node("n2", NodeState::Ready) };
    fake.book().nodes = vec![node("n1", NodeState::Ready), full];
    let expected = "\
NODE   STATE   FULL     OF       SANDBOXES   CPU       MEMORY            DISK
n2     READY   87.5 %   memory   6           1 / 4     7 GiB / 8 GiB     0 B / 20 GiB
n1     READY   37.5 %   cpu      6           1.5 / 4   1.5 GiB / 8 GiB   5 GiB / 20 GiB
";
    assert_eq!(ctl(&fake, &["top", "nodes"]).await.ok(), expected);
}

#[tokio::test]
async fn templates_are_listed() {
    let fake = Fake::start().await;
    let digest = format!("sha256:{}", "ab".repeat(32));
    let holders = vec!["nodes/n1".into(), "nodes/n2".into()];
    let create_time = Some(two_days_ago());
    let name = "templates/python".to_owned();
    fake.book().templates =
        vec![Template { name, digest, size_bytes: 5 << 19, holders, create_time, ..Default::default() }];
    let expected = "\
TEMPLATE   SIZE      HOLDERS   DIGEST                AGE
python     2.5 MiB   2         sha256:abababababab   2d3h
";
    assert_eq!(ctl(&fake, &["template", "list"]).await.ok(), expected);
    assert_eq!(ctl(&fake, &["template", "show", "python", "-o", "name"]).await.ok(), "templates/python\n");
}

fn region() -> GetClusterStatusResponse {
    let member = |replica_id: u64, role: MemberRole, matched_index, reachable| Member {
        replica_id,
        api_address: format!("127.0.0.1:70{replica_id}0"),
        peer_address: format!("127.0.0.1:70{replica_id}1"),
        role: role.into(),
        matched_index,
        reachable,
    };
    let follower = MemberRole::Follower;
    GetClusterStatusResponse {
        ledger_id: "0190".into(),
        leader_id: 2,
        term: 5,
        revision: 120,
        members: vec![
            member(1, follower, 120, true),
            member(2, MemberRole::Leader, 121, true),
            member(3, follower, 21, false),
        ],
        node_count: 3,
        ready_node_count: 2,
        sandbox_counts: vec![
            StateCount { state: "PENDING".into(), count: 0 },
            StateCount { state: "RUNNING".into(), count: 97 },
            StateCount { state: "STOPPED".into(), count: 3 },
        ],
        capacity: Some(Resources { cpu_milli: 12_000, memory_bytes: 24 << 30, disk_bytes: 60 << 30, pids: 0, gpus: 0 }),
        assigned: Some(Resources { cpu_milli: 9700, memory_bytes: 6 << 30, disk_bytes: 0, pids: 0, gpus: 0 }),
        log_time: None,
        ..Default::default()
    }
}

#[tokio::test]
async fn status_is_the_region_at_a_glance() {
    let fake = Fake::start().await;
    fake.book().status = region();
    let expected = "\
Ledger:     0190
Leader:     replica 2, term 5, revision 120
Replicas:   2 of 3 reachable
Nodes:      2 of 3 ready
Sandboxes:  97 running, 3 stopped
CPU:        9.7 / 12
Memory:     6 GiB / 24 GiB
Disk:       0 B / 60 GiB

REPLICA   ROLE       API              PEER             MATCHED   REACHABLE   LAG
1         FOLLOWER   127.0.0.1:7010   127.0.0.1:7011   120       yes         1
2         LEADER     127.0.0.1:7020   127.0.0.1:7021   121       yes         0
3         FOLLOWER   127.0.0.1:7030   127.0.0.1:7031   21        no          100
";
    let shown = ctl(&fake, &["status"]).await.ok();
    assert_eq!(collapse(&shown), collapse(expected), "{shown}");
    let members = ctl(&fake, &["server", "members"]).await.ok();
    assert_eq!(collapse(&members), collapse(expected)[9..], "{members}");
    let json = ctl(&fake, &["server", "members", "-o", "json"]).await.ok();
    assert!(json.contains("    \"replicaId\": 2,\n") && json.contains("\"role\": \"MEMBER_ROLE_LEADER\""), "{json}");
    let json: serde_json::Value =
        serde_json::from_str(&ctl(&fake, &["status", "-o", "json"]).await.ok()).expect("json");
    assert_eq!((&json["leaderId"], &json["sandboxCounts"][1]["count"]), (&2.into(), &97.into()));
}

#[tokio::test]
async fn what_needs_no_region_needs_no_region() {
    let version = run(command(&["version"]), b"").await.ok();
    assert_eq!(version, format!("warrenctl {}\n", env!("CARGO_PKG_VERSION")));
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef warrenctl"), ("fish", "complete -c warrenctl")] {
        let script = run(command(&["completions", shell]), b"").await.ok();
        assert!(script.contains(mark) && script.contains("sandbox"), "{shell}: {script}");
    }
    assert!(run(command(&["--help"]), b"").await.ok().contains("Exit codes: 0 done"));
}

#[tokio::test]
async fn contexts_are_set_used_shown_and_removed() {
    let (fake, home) = (three_sandboxes().await, tempfile::tempdir().unwrap());
    let ctl = async |args: &[&str]| {
        let mut command = command(args);
        command.env("HOME", home.path());
        run(command, b"").await
    };
    let unset = ctl(&["context", "show"]).await;
    assert_eq!(unset.code, 2, "{unset:?}");
    assert!(unset.stderr.contains("context use"), "{unset:?}");
    ctl(&["context", "set", "here", "--endpoints", &fake.address, "--tenant", "other"]).await.ok();
    ctl(&["context", "set", "there", "--endpoints", "10.0.0.1:7070,10.0.0.2:7070", "--tls-ca", "/etc/ca.pem"])
        .await
        .ok();
    let expected = format!(
        "CURRENT   CONTEXT   ENDPOINTS                     TENANT   TLS\n\
         *         here      {:<27}   other    no\n          there     10.0.0.1:7070,10.0.0.2:7070   -        server\n",
        fake.address
    );
    assert_eq!(ctl(&["context", "list"]).await.ok(), expected);
    // The first one set is the one in use.
    assert_eq!(ctl(&["sandbox", "list", "-o", "name"]).await.ok(), "tenants/other/sandboxes/z\n");
    ctl(&["context", "set", "here", "--tenant", "default"]).await.ok();
    assert_eq!(ctl(&["sandbox", "list", "-o", "name"]).await.lines().len(), 3, "what was not given stayed");
    ctl(&["context", "use", "there"]).await.ok();
    let shown: serde_json::Value = serde_json::from_str(&ctl(&["context", "show", "-o", "json"]).await.ok()).unwrap();
    assert_eq!(
        (&shown["name"], &shown["current"], &shown["tls_ca"]),
        (&"there".into(), &true.into(), &"/etc/ca.pem".into())
    );
    assert_eq!(ctl(&["--context", "here", "sandbox", "list", "-o", "name"]).await.lines().len(), 3);
    let unknown = ctl(&["context", "use", "nowhere"]).await;
    assert!(unknown.code == 2 && unknown.stderr.contains("there"), "{unknown:?}");
    ctl(&["context", "remove", "there"]).await.ok();
    assert_eq!(ctl(&["context", "list", "-o", "name"]).await.ok(), "here\n");
}

#[tokio::test]
async fn reads_say_how_fresh_they_must_be() {
    let fake = three_sandboxes().await;
    ctl(&fake, &["sandbox", "list"]).await.ok();
    ctl(&fake, &["sandbox", "list", "--stale"]).await.ok();
    ctl(&fake, &["sandbox", "list", "--min-revision", "7"]).await.ok();
    let asked = fake.book().freshness.clone();
    let pages = |what: &str| vec![what.to_owned(); 2];
    assert_eq!(asked, [pages(""), pages("stale"), pages("7")].concat());
    assert_eq!(ctl(&fake, &["sandbox", "list", "--stale", "--min-revision", "7"]).await.code, 2);
}
