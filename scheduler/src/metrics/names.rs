//! The name of every metric, with its unit and what it says. No id, tenant or template is ever a label: the count of series does
//! not grow with what Warren runs.
//!
//! Operators of etcd and Nomad find what they look for under the same words: `has_leader`, `leader_changes`, `proposals_pending`,
//! `proposals_failed`, `log_sync_duration` (etcd's `wal_fsync`), `apply_duration`, `leases`, `placement_duration` (Nomad's
//! `plan.evaluate`), `sandboxes{state="pending"}` (Nomad's blocked evaluations).

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub const REQUESTS: &str = "warren_grpc_requests_total";
pub const REQUEST_SECONDS: &str = "warren_grpc_request_duration_seconds";

pub const IS_LEADER: &str = "warren_raft_is_leader";
pub const HAS_LEADER: &str = "warren_raft_has_leader";
pub const LEADER_CHANGES: &str = "warren_raft_leader_changes_total";
pub const TERM: &str = "warren_raft_term";
pub const LAST_LOG: &str = "warren_raft_last_log_index";
pub const APPLIED: &str = "warren_raft_applied_index";
pub const CHECKPOINT: &str = "warren_raft_checkpoint_index";
pub const CHECKPOINT_SECONDS: &str = "warren_raft_checkpoint_duration_seconds";
pub const SYNCS: &str = "warren_raft_log_syncs_total";
pub const SYNC_SECONDS: &str = "warren_raft_log_sync_duration_seconds";
pub const APPLY_SECONDS: &str = "warren_raft_apply_duration_seconds";
pub const COMMIT_SECONDS: &str = "warren_raft_commit_duration_seconds";
pub const PROPOSALS: &str = "warren_raft_proposals_total";
pub const PROPOSALS_PENDING: &str = "warren_raft_proposals_pending";
pub const PROPOSALS_FAILED: &str = "warren_raft_proposals_failed_total";
pub const MEMBERS: &str = "warren_raft_members";
pub const MEMBERS_SILENT: &str = "warren_raft_members_silent";

pub const NODES: &str = "warren_nodes";
pub const NODES_CORDONED: &str = "warren_nodes_cordoned";
pub const ORPHANS: &str = "warren_orphans";
pub const CAPACITY: &str = "warren_capacity";
pub const ASSIGNED: &str = "warren_assigned";
pub const SANDBOXES: &str = "warren_sandboxes";
pub const OLDEST_PENDING: &str = "warren_pending_oldest_age_seconds";
pub const PLACEMENT_SECONDS: &str = "warren_placement_duration_seconds";
pub const TENANTS: &str = "warren_tenants";
pub const SESSIONS: &str = "warren_agent_sessions";
pub const LEASES: &str = "warren_leases";
pub const RENEWALS: &str = "warren_lease_renewals_total";
pub const LAPSES: &str = "warren_lease_lapses_total";
pub const BRAKE: &str = "warren_brake_engaged";
pub const PAUSED: &str = "warren_paused";
pub const LEVEL: &str = "warren_level";
pub const KEPT_ANSWERS: &str = "warren_request_ids";
pub const EVENTS: &str = "warren_events_kept";
pub const LOG_TIME: &str = "warren_log_time_seconds";
pub const DISK_USED: &str = "warren_disk_used_ratio";
pub const RESIDENT: &str = "process_resident_memory_bytes";
pub const STARTED: &str = "process_start_time_seconds";

/// Tells the recorder what each of them says.
pub fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "gRPC calls that were answered here, by method and code");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "Time until a gRPC call's response began, by method");
    describe_raft();
    describe_region();
    describe_gauge!(DISK_USED, "Share of the data directory's disk that is used, from 0 to 1");
    describe_gauge!(RESIDENT, Unit::Bytes, "Resident memory of this process");
    describe_gauge!(STARTED, Unit::Seconds, "When this process started, since the Unix epoch");
}

fn describe_raft() {
    describe_gauge!(IS_LEADER, "1 while this replica leads");
    describe_gauge!(HAS_LEADER, "1 while this replica knows a leader");
    describe_counter!(LEADER_CHANGES, Unit::Count, "Changes of leader that this replica has seen");
    describe_gauge!(TERM, "Raft term");
    describe_gauge!(LAST_LOG, "Index of the last entry in this replica's log");
    describe_gauge!(APPLIED, "Index of the last entry that this replica has applied");
    describe_gauge!(CHECKPOINT, "Index of the last entry that the newest checkpoint holds");
    describe_histogram!(CHECKPOINT_SECONDS, Unit::Seconds, "Time to write a checkpoint, beside everything else");
    describe_counter!(SYNCS, Unit::Count, "Durable syncs of the log");
    describe_histogram!(SYNC_SECONDS, Unit::Seconds, "Time of a durable sync of the log");
    describe_histogram!(APPLY_SECONDS, Unit::Seconds, "Time to apply one entry, with all its commands");
    describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "From proposing an entry to its answer, on the leader");
    describe_counter!(PROPOSALS, Unit::Count, "Commands that were proposed here");
    describe_gauge!(PROPOSALS_PENDING, "Commands that wait to be proposed or committed here");
    describe_counter!(PROPOSALS_FAILED, Unit::Count, "Commands that were not committed, or perhaps not");
    describe_gauge!(MEMBERS, "Members of the group, by role");
    describe_gauge!(MEMBERS_SILENT, "Members that the leader does not hear; 0 where another leads");
}

fn describe_region() {
    describe_gauge!(NODES, "Nodes by state");
    describe_gauge!(NODES_CORDONED, "Nodes on which nothing more is placed");
    describe_gauge!(ORPHANS, "Instances that nodes report and the ledger does not know");
    describe_gauge!(CAPACITY, "What all nodes have, by dimension: cores, bytes, devices");
    describe_gauge!(ASSIGNED, "What sandboxes hold of it");
    describe_gauge!(SANDBOXES, "Sandboxes by state");
    describe_gauge!(OLDEST_PENDING, Unit::Seconds, "How long the oldest pending sandbox has waited");
    describe_histogram!(PLACEMENT_SECONDS, Unit::Seconds, "Time of one placement decision");
    describe_gauge!(TENANTS, "Tenants that have a sandbox or a quota");
    describe_gauge!(SESSIONS, "Agents that have a session with this replica");
    describe_gauge!(LEASES, "Nodes whose lease this leader watches");
    describe_counter!(RENEWALS, Unit::Count, "Leases that this leader granted");
    describe_counter!(LAPSES, Unit::Count, "Nodes that this leader found silent, by what followed");
    describe_gauge!(BRAKE, "1 while nothing more is declared down, because too many nodes fell silent at once");
    describe_gauge!(PAUSED, "1 while an operator paused it");
    describe_gauge!(LEVEL, "Level of the ledger's rules");
    describe_gauge!(KEPT_ANSWERS, "Answers in the table of request ids");
    describe_gauge!(EVENTS, "Events that watches can still read");
    describe_gauge!(LOG_TIME, Unit::Seconds, "The ledger's clock, since the Unix epoch");
}
