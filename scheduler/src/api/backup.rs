//! A backup: a checkpoint of a linearizable state, made beside the others and streamed while the replica serves on.

use std::os::unix::fs::FileExt;
use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use warren_proto::v1::BackupResponse;

use super::{convert, status};
use crate::controller::Controller;
use crate::raft::Backup;

/// Bytes of one message.
const CHUNK_BYTES: usize = 1 << 20;

/// Chunks that are read ahead of the network.
const CHUNKS_AHEAD: usize = 4;

pub type BackupStream = Pin<Box<dyn Stream<Item = Result<BackupResponse, Status>> + Send>>;

/// Makes a backup and streams it.
pub async fn start(controller: &Controller) -> Result<BackupStream, Status> {
    let replica = controller.replica();
    let state = replica.read().await.map_err(|error| status::propose(&error))?;
    let backup = replica.back_up(&state).await.map_err(status::internal)?;
    let (out, chunks) = mpsc::channel(CHUNKS_AHEAD);
    let revision = state.revision;
    tokio::task::spawn_blocking(move || send(&backup, revision, &out));
    Ok(Box::pin(ReceiverStream::new(chunks)))
}

/// A file that cannot be read on ends with an error; the client sees that bytes are missing.
fn send(backup: &Backup, revision: u64, out: &mpsc::Sender<Result<BackupResponse, Status>>) {
    let mut at = 0;
    while at < backup.size_bytes {
        let left = usize::try_from(backup.size_bytes - at).unwrap_or(CHUNK_BYTES);
        let mut chunk = vec![0; CHUNK_BYTES.min(left)];
        if let Err(error) = backup.file.read_exact_at(&mut chunk, at) {
            let _gone = out.blocking_send(Err(status::internal(format!("read the backup: {error}"))));
            return;
        }
        at = at.saturating_add(chunk.len() as u64);
        let message = BackupResponse { chunk, size_bytes: convert::int(backup.size_bytes), revision };
        if out.blocking_send(Ok(message)).is_err() {
            return;
        }
    }
}
