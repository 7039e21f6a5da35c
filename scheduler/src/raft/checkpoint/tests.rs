//! A checkpoint comes back as it was, stays readable for ever, and is found out when a single byte of it changes.

use std::collections::BTreeSet;

use super::*;
use crate::raft::codec::samples;
use crate::raft::codec::tests::{hex, kept as kept_bytes};
use crate::raft::types::StoredMembership;

/// One of everything, every kind of sandbox.
fn state() -> State {
    let mut state = State { ledger_id: Some(LedgerId(0xabcd)), revision: 4242, ..State::default() };
    state.events = EventRing::starting_after(4242);
    (state.log_time, state.epoch_floor) = (LogTime(1_700_000_000_000), Epoch(9));
    let (id, replica) = samples::replica();
    state.replicas.insert(id, replica);
    state.nodes.insert(samples::node(), Arc::new(samples::whole_node()));
    state.templates.insert(samples::template_id(), Arc::new(samples::template()));
    let (id, tenant) = samples::owner();
    // Counted as the sandboxes come.
    state.tenants.insert(id, Tenant { sandboxes: 0, ..tenant });
    for (name, life) in samples::lives() {
        let mut sandbox = samples::sandbox(life);
        let id = name.replace('_', "-");
        sandbox.name = warren_proto::ids::SandboxName::parse(&format!("tenants/acme/sandboxes/{id}")).unwrap();
        state.put_sandbox(Arc::new(sandbox));
    }
    for (number, (_, scope, answer)) in
        (1..).zip(samples::answers().into_iter().filter(|(name, ..)| !name.ends_with("_2")))
    {
        state.requests.insert(scope, number, answer);
    }
    state
}

fn meta() -> CheckpointMeta {
    let last_membership = StoredMembership::new(Some(samples::log_id()), samples::membership());
    CheckpointMeta { last_log_id: Some(samples::log_id()), last_membership }
}

fn written() -> (tempfile::TempDir, CheckpointFile) {
    let directory = tempfile::tempdir().unwrap();
    let file = CheckpointDirectory::open(directory.path()).unwrap().write(&state(), &meta()).unwrap();
    (directory, file)
}

fn assert_same(loaded: &Loaded) {
    let (read, expected) = (&loaded.state, state());
    assert_eq!(loaded.meta, meta());
    assert_eq!((read.ledger_id, read.revision), (expected.ledger_id, expected.revision));
    assert_eq!((read.log_time, read.epoch_floor), (expected.log_time, expected.epoch_floor));
    assert_eq!(read.replicas, expected.replicas);
    assert!(read.indexes == expected.indexes && read.suspects == expected.suspects && read.down == expected.down);
    assert!(read.nodes == expected.nodes && read.templates == expected.templates);
    assert!(read.tenants == expected.tenants && read.sandboxes == expected.sandboxes);
    assert!(read.requests.iter().eq(expected.requests.iter()));
    let events = &read.events;
    assert!(events.after(Position::end_of(read.revision), 1).unwrap().is_empty());
}

#[test]
fn a_checkpoint_comes_back_as_it_was() {
    let (_directory, file) = written();
    assert_same(&read(&file.path).unwrap());
}

/// Every build's file is read; today's is written as it was.
#[test]
fn checkpoints_of_earlier_builds_are_read_and_todays_are_written_the_same() {
    let (directory, file) = written();
    let bytes = fs::read(&file.path).unwrap();
    let old = directory.path().join("old");
    for line in ["checkpoint_file", "checkpoint_2_file"] {
        let kept = kept_bytes(line);
        let kept = kept.unwrap_or_else(|| panic!("tests/golden/storage.txt lacks:\n{line} {}", hex(&bytes)));
        fs::write(&old, &kept).unwrap();
        assert_same(&read(&old).unwrap());
        let newest = line == "checkpoint_2_file";
        assert!(!newest || kept == bytes, "written otherwise now:\n{line} {}", hex(&bytes));
    }
}

/// What the second level adds comes back too: the region, and the tail of the events, so that a watch goes on.
#[test]
fn the_region_and_the_events_come_back() {
    let mut before = samples::region();
    before.revision = 20;
    before.events = EventRing::after_position(Position { index: 3, ordinal: 1 });
    before.events.restore(samples::event());
    before.put_node(Arc::new(samples::silent_node()));
    let directory = tempfile::tempdir().unwrap();
    let file = CheckpointDirectory::open(directory.path()).unwrap().write(&before, &meta()).unwrap();
    let after = read(&file.path).unwrap().state;
    assert_eq!(
        (&after.region, after.level, after.restored_floor),
        (&before.region, before.level, before.restored_floor)
    );
    assert_eq!(after.predecessors, before.predecessors);
    assert_eq!((&after.nodes, &after.down), (&before.nodes, &before.down));
    let from = Position { index: 3, ordinal: 1 };
    assert_eq!(after.events.after(from, 9), before.events.after(from, 9));
    assert_eq!(after.events.after(from, 9).unwrap().len(), 1);
    assert!(after.events.after(Position { index: 3, ordinal: 0 }, 9).is_err());
}

#[test]
fn one_of_a_newer_level_is_refused_and_no_older_one_hides_it() {
    let (directory, _older) = written();
    let checkpoints = CheckpointDirectory::open(directory.path()).unwrap();
    let later = CheckpointMeta { last_log_id: Some(crate::raft::types::LogId::new_term_index(7, 5000)), ..meta() };
    let newer = State { level: crate::state::level::Level::MAX.next(), ..state() };
    let newest = checkpoints.write(&newer, &later).unwrap();
    let error = checkpoints.load(|_| ()).unwrap_err();
    assert!(matches!(&error, CheckpointError::TooNew { path, .. } if *path == newest.path), "{error}");
    assert!(error.to_string().contains("run a newer build"), "{error}");
}

#[test]
fn one_changed_byte_or_a_missing_end_is_found_out() {
    let (directory, file) = written();
    let whole = fs::read(&file.path).unwrap();
    let path = directory.path().join("changed");
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 0x04;
        fs::write(&path, &changed).unwrap();
        assert!(matches!(read(&path), Err(CheckpointError::Damaged { .. })), "byte {at} changed");
        fs::write(&path, &whole[..at]).unwrap();
        assert!(matches!(read(&path), Err(CheckpointError::Damaged { .. })), "cut at {at}");
    }
}

#[test]
fn a_damaged_newest_one_is_reported_and_the_older_one_is_loaded() {
    let (directory, older) = written();
    let checkpoints = CheckpointDirectory::open(directory.path()).unwrap();
    let later = CheckpointMeta { last_log_id: Some(crate::raft::types::LogId::new_term_index(7, 5000)), ..meta() };
    let newest = checkpoints.write(&state(), &later).unwrap();
    let size = newest.size_bytes;
    fs::OpenOptions::new().write(true).open(&newest.path).unwrap().set_len(size - 1).unwrap();
    let reported = std::cell::RefCell::new(Vec::new());
    let loaded = checkpoints.load(|error| reported.borrow_mut().push(error.to_string())).unwrap().unwrap();
    assert_eq!(loaded.file.path, older.path);
    assert_eq!(reported.borrow().len(), 1);
    fs::write(&older.path, b"").unwrap();
    match checkpoints.load(|_| ()) {
        Err(CheckpointError::Damaged { path, .. }) => assert_eq!(path, newest.path, "the newest says why"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_stay_and_what_was_not_finished_goes() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoints = CheckpointDirectory::open(&directory.path().join("checkpoints")).unwrap();
    for index in [10, 200, 3000] {
        let last_log_id = Some(crate::raft::types::LogId::new_term_index(7, index));
        checkpoints.write(&state(), &CheckpointMeta { last_log_id, ..meta() }).unwrap();
    }
    fs::write(checkpoints.temporary(), b"half").unwrap();
    let again = CheckpointDirectory::open(&directory.path().join("checkpoints")).unwrap();
    let names: BTreeSet<_> = fs::read_dir(&again.path).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(again.files().unwrap().into_iter().collect::<BTreeSet<_>>(), names);
    assert_eq!(names.len(), KEPT);
}

#[test]
fn a_received_file_outlives_the_call_but_not_its_last_owner() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("received.tmp");
    fs::write(&path, b"x").unwrap();
    let received = Some(Arc::new(Temporary { path: path.clone() }));
    let file = CheckpointFile { received, ..open_file(&path).unwrap() };
    let held_by_raft = file.clone();
    drop(file);
    assert!(path.exists());
    drop(held_by_raft);
    assert!(!path.exists());
}
