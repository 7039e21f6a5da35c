//! Checkpoints: the whole state in one plain file, never in sled.
//!
//! A file is written under a temporary name, synced, renamed, and the directory synced; only then does it count. Records carry
//! their length and CRC, the last one says how many stand before it: a file that was cut off or changed is found out.

mod pace;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pace::Paced;
use prost::Message;
use warren_proto::v1 as pb;
use warren_proto::v1::stored_checkpoint_record::Record;

use super::codec::entity::{answer_from, answer_to, replica_from, replica_to, tenant_from, tenant_to};
use super::codec::log::{log_id_from, log_id_to, membership_from, membership_to};
use super::codec::region::{event_from, event_to, region_from, region_to};
use super::codec::{CodecError, RUN_NEWER, VERSION};
use super::log_store::make_directory;
use super::types::{CheckpointMeta, StoredMembership, members};
use crate::state::State;
use crate::state::command::{LedgerId, LogTime};
use crate::state::event::{EventRing, Position};
use crate::state::node::Node;
use crate::state::sandbox::Sandbox;
use crate::state::template::Template;
use crate::state::tenant::{self, Tenant};
use warren_proto::ids::Epoch;

/// Checkpoints that stay on disk: the newest, and the one before it should the newest turn out damaged.
const KEPT: usize = 2;

/// Largest record that is believed: the largest node, with its sandboxes' names, is well below.
const MAX_RECORD_BYTES: u32 = 64 << 20;

/// Bytes of events in a checkpoint (rule 11 of the design).
const MAX_EVENT_BYTES: usize = 64 << 20;

/// Records are written together: each is a few hundred bytes.
const BUFFER_BYTES: usize = 64 << 10;

const PREFIX: &str = "checkpoint-";
const SUFFIX: &str = ".warren";

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("checkpoint {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("checkpoint {path} is damaged: {what}")]
    Damaged { path: PathBuf, what: String },
    #[error("checkpoint {path}: {what}: {RUN_NEWER}")]
    TooNew { path: PathBuf, what: String },
}

/// A whole checkpoint on disk, held open: it can be sent although a newer one replaces it meanwhile.
#[derive(Debug, Clone)]
pub struct CheckpointFile {
    pub file: Arc<File>,
    pub path: PathBuf,
    pub size_bytes: u64,
    /// Of a file that was received: it is removed when nobody needs it any more, unless it was renamed into place.
    pub received: Option<Arc<Temporary>>,
}

/// A file under a temporary name.
#[derive(Debug)]
pub struct Temporary {
    pub path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _renamed_or_never_made = fs::remove_file(&self.path);
    }
}

/// A backup on disk; it is removed when it is dropped.
#[derive(Debug)]
pub struct Backup {
    pub file: File,
    pub size_bytes: u64,
    _temporary: Temporary,
}

/// What a checkpoint holds.
#[derive(Debug)]
pub struct Loaded {
    pub state: State,
    pub meta: CheckpointMeta,
    pub file: CheckpointFile,
}

/// The directory of one replica's checkpoints.
#[derive(Debug, Clone)]
pub struct CheckpointDirectory {
    path: PathBuf,
    /// Held while files are put in place and old ones removed: one may be written while another is installed.
    changing: Arc<Mutex<()>>,
}

impl CheckpointDirectory {
    /// Makes the directory, and removes what was not finished.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        make_directory(path).map_err(io)?;
        for entry in fs::read_dir(path).map_err(io)? {
            let file = entry.map_err(io)?.path();
            if file.extension().is_some_and(|extension| extension == "tmp") {
                fs::remove_file(&file).map_err(io)?;
            }
        }
        Ok(Self { path: path.to_owned(), changing: Arc::default() })
    }

    /// The newest checkpoint that is whole; `None` where there is none at all. Each damaged one is reported through
    /// `damaged`; where all are, the newest one's error is the answer. One of a newer build ends it.
    pub fn load(&self, damaged: impl Fn(&CheckpointError)) -> Result<Option<Loaded>, CheckpointError> {
        let mut newest_error = None;
        for path in self.files()?.into_iter().rev() {
            match read(&path) {
                Ok(loaded) => return Ok(Some(loaded)),
                // It is whole; an older one would hide what is wrong.
                Err(error @ CheckpointError::TooNew { .. }) => return Err(error),
                Err(error) => {
                    damaged(&error);
                    newest_error.get_or_insert(error);
                }
            }
        }
        newest_error.map_or(Ok(None), Err)
    }

    /// Writes a checkpoint and makes it the newest.
    pub fn write(&self, state: &State, meta: &CheckpointMeta) -> Result<CheckpointFile, CheckpointError> {
        let temporary = self.temporary();
        write_file(&temporary, state, meta)?;
        self.adopt(&temporary, meta)
    }

    /// Writes a checkpoint that is not one of this replica's own: a backup.
    pub fn export(&self, state: &State, membership: StoredMembership) -> Result<Backup, CheckpointError> {
        let temporary = Temporary { path: self.temporary() };
        let meta = CheckpointMeta { last_log_id: None, last_membership: membership };
        let file = write_file(&temporary.path, state, &meta)?;
        let size_bytes = file.metadata().map(|data| data.len());
        let size_bytes = size_bytes.map_err(|source| CheckpointError::Io { path: temporary.path.clone(), source })?;
        // Read through another handle: this one was for writing.
        let file = File::open(&temporary.path)
            .map_err(|source| CheckpointError::Io { path: temporary.path.clone(), source })?;
        Ok(Backup { file, size_bytes, _temporary: temporary })
    }

    /// A name for a file that is being received or written.
    pub fn temporary(&self) -> PathBuf {
        self.path.join(format!("{:032x}.tmp", rand::random::<u128>()))
    }

    /// Makes a whole and synced file the newest checkpoint.
    pub fn adopt(&self, temporary: &Path, meta: &CheckpointMeta) -> Result<CheckpointFile, CheckpointError> {
        let index = meta.last_log_id.map_or(0, |log_id| log_id.index);
        let path = self.path.join(format!("{PREFIX}{index:020}{SUFFIX}"));
        let io = |source| CheckpointError::Io { path: path.clone(), source };
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        fs::rename(temporary, &path).map_err(io)?;
        File::open(&self.path).and_then(|directory| directory.sync_all()).map_err(io)?;
        // Opened before old ones go: an older one than those on disk may be removed at once.
        let opened = open_file(&path).map_err(io)?;
        let mut files = self.files()?;
        files.truncate(files.len().saturating_sub(KEPT));
        for old in files {
            fs::remove_file(&old).map_err(|source| CheckpointError::Io { path: old.clone(), source })?;
        }
        Ok(opened)
    }

    /// Whole checkpoints, oldest first.
    fn files(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let io = |source| CheckpointError::Io { path: self.path.clone(), source };
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
                files.push(entry.path());
            }
        }
        files.sort();
        Ok(files)
    }
}

fn open_file(path: &Path) -> io::Result<CheckpointFile> {
    let file = File::open(path)?;
    let size_bytes = file.metadata()?.len();
    Ok(CheckpointFile { file: Arc::new(file), path: path.to_owned(), size_bytes, received: None })
}

/// Writes and syncs a whole checkpoint.
pub(super) fn write_file(path: &Path, state: &State, meta: &CheckpointMeta) -> Result<File, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let file = Paced::new(File::create(path).map_err(io)?);
    let mut writer = RecordWriter { out: BufWriter::with_capacity(BUFFER_BYTES, file), records: 0 };
    write_records(&mut writer, state, meta).map_err(io)?;
    let file = writer.out.into_inner().map_err(|error| io(error.into_error()))?;
    file.finish().map_err(io)
}

struct RecordWriter<W> {
    out: W,
    records: u64,
}

impl<W: Write> RecordWriter<W> {
    fn put(&mut self, record: Record) -> io::Result<()> {
        let bytes = pb::StoredCheckpointRecord { record: Some(record) }.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.out.write_all(&length.to_le_bytes())?;
        self.out.write_all(&crc32c::crc32c(&bytes).to_le_bytes())?;
        self.out.write_all(&bytes)?;
        self.records += 1;
        Ok(())
    }
}

fn write_records<W: Write>(writer: &mut RecordWriter<W>, state: &State, meta: &CheckpointMeta) -> io::Result<()> {
    writer.put(Record::Header(header(state, meta)))?;
    let (floor, events) = tail(&state.events);
    writer.put(Record::Region(region_to(state, floor)))?;
    for (id, replica) in &state.replicas {
        writer.put(Record::Replica(replica_to(*id, replica)))?;
    }
    for node in state.nodes.values() {
        writer.put(Record::Node(node.as_ref().into()))?;
    }
    for template in state.templates.values() {
        writer.put(Record::Template(template.as_ref().into()))?;
    }
    for (id, tenant) in &state.tenants {
        writer.put(Record::Tenant(tenant_to(id, tenant)))?;
    }
    for sandbox in state.sandboxes.values() {
        writer.put(Record::Sandbox(sandbox.as_ref().into()))?;
    }
    for (scope, id, answer) in state.requests.iter() {
        writer.put(Record::Answer(answer_to(scope, id, answer)))?;
    }
    for event in events {
        writer.put(Record::Event(event))?;
    }
    let records = writer.records;
    writer.put(Record::End(pb::StoredCheckpointEnd { records }))
}

/// The newest events, as many as a checkpoint may carry, and the position after which they are whole.
fn tail(ring: &EventRing) -> (Position, Vec<pb::StoredEvent>) {
    let mut bytes = 0;
    let mut floor = ring.floor();
    let mut events = Vec::new();
    for event in ring.iter().rev() {
        let stored = event_to(event);
        bytes += stored.encoded_len();
        if bytes > MAX_EVENT_BYTES {
            floor = event.position;
            break;
        }
        events.push(stored);
    }
    events.reverse();
    (floor, events)
}

fn header(state: &State, meta: &CheckpointMeta) -> pb::StoredCheckpointHeader {
    pb::StoredCheckpointHeader {
        version: VERSION,
        ledger_id: state.ledger_id.map(|id| id.0.to_be_bytes().to_vec()).unwrap_or_default(),
        revision: state.revision,
        log_time_ms: state.log_time.0,
        epoch_floor: state.epoch_floor.0,
        last_log_id: meta.last_log_id.as_ref().map(log_id_to),
        membership: Some(membership_to(meta.last_membership.log_id().as_ref(), meta.last_membership.membership())),
    }
}

/// Reads and checks a whole checkpoint.
pub fn read(path: &Path) -> Result<Loaded, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let file = open_file(path).map_err(io)?;
    let mut reader = BufReader::new(file.file.as_ref());
    let (state, meta) = read_records(&mut reader).map_err(|error| match error.kind() {
        io::ErrorKind::Unsupported => CheckpointError::TooNew { path: path.to_owned(), what: error.to_string() },
        _ => CheckpointError::Damaged { path: path.to_owned(), what: error.to_string() },
    })?;
    Ok(Loaded { state, meta, file })
}

fn read_records(reader: &mut impl Read) -> io::Result<(State, CheckpointMeta)> {
    let mut builder = Builder::default();
    loop {
        let record = next_record(reader)?;
        if let Record::End(end) = record {
            return Ok(builder.finish(end.records)?);
        }
        builder.add(record)?;
    }
}

/// A checkpoint of `state`, written and read back in memory: for simulations. Who is in the group is the log's to say.
pub fn written_and_read(state: &State) -> io::Result<State> {
    let mut writer = RecordWriter { out: Vec::new(), records: 0 };
    write_records(&mut writer, state, &CheckpointMeta::default())?;
    let (mut read, _) = read_records(&mut writer.out.as_slice())?;
    read.set_members(state.voters.clone(), state.learners.clone());
    Ok(read)
}

fn next_record(reader: &mut impl Read) -> io::Result<Record> {
    let mut frame = [0u8; 8];
    reader.read_exact(&mut frame)?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = frame;
    let (length, crc) = (u32::from_le_bytes([l0, l1, l2, l3]), u32::from_le_bytes([c0, c1, c2, c3]));
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if length > MAX_RECORD_BYTES {
        return Err(invalid("a record is longer than any that is written"));
    }
    let mut bytes = vec![0u8; usize::try_from(length).map_err(io::Error::other)?];
    reader.read_exact(&mut bytes)?;
    if crc32c::crc32c(&bytes) != crc {
        return Err(invalid("a record's CRC is wrong"));
    }
    let record = pb::StoredCheckpointRecord::decode(bytes.as_slice()).map_err(CodecError::from)?;
    let unknown = || io::Error::new(io::ErrorKind::Unsupported, "a record of a kind that this build does not know");
    record.record.ok_or_else(unknown)
}

/// A state under construction.
#[derive(Default)]
struct Builder {
    state: State,
    meta: Option<CheckpointMeta>,
    /// Where the events begin; a checkpoint of the first level has none.
    events: Option<EventRing>,
    records: u64,
}

impl Builder {
    fn add(&mut self, record: Record) -> Result<(), CodecError> {
        self.records += 1;
        let state = &mut self.state;
        match record {
            Record::Header(header) => self.meta = Some(read_header(state, header)?),
            Record::Replica(replica) => {
                let (id, replica) = replica_from(replica)?;
                state.replicas.insert(id, replica);
            }
            Record::Node(node) => {
                let node = Node::try_from(node)?;
                state.put_node(Arc::new(node));
            }
            Record::Template(template) => {
                let template = Template::try_from(template)?;
                state.templates.insert(template.id.clone(), Arc::new(template));
            }
            Record::Tenant(tenant) => {
                let (id, tenant) = tenant_from(tenant)?;
                // Counted anew as the sandboxes come.
                state.tenants.insert(id, Tenant { sandboxes: 0, ..tenant });
            }
            Record::Sandbox(sandbox) => {
                let sandbox = sharing(state, Sandbox::try_from(sandbox)?);
                state.put_sandbox(Arc::new(sandbox));
            }
            Record::Answer(answer) => {
                let (scope, id, answer) = answer_from(answer)?;
                state.requests.insert(scope, id, answer);
            }
            Record::Region(region) => self.events = Some(EventRing::after_position(region_from(state, region)?)),
            Record::Event(event) => {
                let ring = self.events.as_mut().ok_or(CodecError::Missing { field: "checkpoint.region" })?;
                ring.restore(event_from(event)?);
            }
            Record::End(_) => {}
        }
        Ok(())
    }

    fn finish(mut self, records: u64) -> Result<(State, CheckpointMeta), CodecError> {
        let meta = self.meta.ok_or(CodecError::Missing { field: "checkpoint.header" })?;
        if records != self.records {
            return Err(CodecError::Malformed { field: "checkpoint.end" });
        }
        let none = EventRing::starting_after(self.state.revision);
        self.state.events = self.events.take().unwrap_or(none);
        let (voters, learners) = members(&meta.last_membership);
        self.state.set_members(voters, learners);
        Ok((self.state, meta))
    }
}

/// The sandbox, with its names as the state holds them already: a million of them do not hold each its own.
fn sharing(state: &mut State, mut sandbox: Sandbox) -> Sandbox {
    sandbox.name = tenant::shared_name(state, &sandbox.name);
    if let Some((template, _)) = state.templates.get_key_value(&sandbox.spec.template) {
        Arc::make_mut(&mut sandbox.spec).template = template.clone();
    }
    let node = sandbox.life.node().and_then(|id| state.nodes.get_mut(id));
    if let Some(node) = node.filter(|node| node.sandboxes.contains(&sandbox.name)) {
        Arc::make_mut(node).sandboxes.insert(sandbox.name.clone());
    }
    sandbox
}

fn read_header(state: &mut State, header: pb::StoredCheckpointHeader) -> Result<CheckpointMeta, CodecError> {
    super::codec::check_version(header.version, "checkpoint")?;
    state.ledger_id = match header.ledger_id.as_slice() {
        [] => None,
        bytes => {
            let id = bytes.try_into().map_err(|_| CodecError::Malformed { field: "ledger_id" })?;
            Some(LedgerId(u128::from_be_bytes(id)))
        }
    };
    state.revision = header.revision;
    state.log_time = LogTime(header.log_time_ms);
    state.epoch_floor = Epoch(header.epoch_floor);
    let membership = header.membership.ok_or(CodecError::Missing { field: "checkpoint.membership" })?;
    Ok(CheckpointMeta {
        last_log_id: header.last_log_id.as_ref().map(log_id_from),
        last_membership: membership_from(&membership)?,
    })
}
