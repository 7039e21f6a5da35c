//! The one thread that writes: what waits for it goes to disk together, with one sync.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot};
use warren_proto::ids::SandboxName;

use super::store::Store;
use super::{Entry, JournalError, record};

/// Operations that wait for the writer: each action of a sandbox has one at a time, and a node runs a few hundred.
const QUEUE: usize = 1024;
/// Operations that one sync covers at most: more would only delay the first of them.
const MAX_DRAINED: usize = 256;

/// One record, new or gone.
#[derive(Debug)]
pub struct Change {
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

impl Change {
    pub fn put((sandbox, entry): (&SandboxName, &Entry)) -> Self {
        Self { key: sandbox.to_string().into_bytes(), value: Some(record::encode(sandbox, entry)) }
    }

    pub fn forget(sandbox: &SandboxName) -> Self {
        Self { key: sandbox.to_string().into_bytes(), value: None }
    }
}

/// What the writer is asked to do.
#[derive(Debug)]
pub struct Operation {
    pub changes: Vec<Change>,
    /// Hears when they are on disk.
    pub done: Option<oneshot::Sender<Result<(), JournalError>>>,
}

/// Starts the thread; it closes the store and ends when every sender is gone.
pub fn start(store: Store) -> io::Result<(mpsc::Sender<Operation>, JoinHandle<()>)> {
    let (queue, waiting) = mpsc::channel(QUEUE);
    let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || run(&store, waiting))?;
    Ok((queue, thread))
}

fn run(store: &Store, mut waiting: mpsc::Receiver<Operation>) {
    let mut broken: Option<JournalError> = None;
    while let Some(first) = waiting.blocking_recv() {
        let mut operations = vec![first];
        while operations.len() < MAX_DRAINED
            && let Ok(next) = waiting.try_recv()
        {
            operations.push(next);
        }
        if broken.is_none() {
            let changes = operations.iter_mut().flat_map(|operation| std::mem::take(&mut operation.changes));
            if let Err(error) = store.write(changes) {
                tracing::error!(%error, "the journal cannot be written: nothing more is started; what runs goes on");
                broken = Some(JournalError::Broken { reason: error.to_string() });
            }
        }
        for done in operations.into_iter().filter_map(|operation| operation.done) {
            // Nobody waits any more: the agent is stopping.
            let _ = done.send(broken.clone().map_or(Ok(()), Err));
        }
    }
}
