//! Why this replica cannot go on, told once to whoever ends the process: a replica whose Raft has stopped looks alive and does
//! nothing.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::error;

/// The first cause, once there is one. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Failure(Arc<watch::Sender<Option<String>>>);

impl Default for Failure {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Failure {
    /// Says why it cannot go on. What follows from the first cause is not told.
    pub fn report(&self, cause: String) {
        self.0.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                error!(%cause, "this replica cannot go on");
                *known = Some(cause);
            }
            first
        });
    }

    pub fn cause(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Returns once it cannot go on.
    pub async fn wait(&self) -> String {
        let mut causes = self.0.subscribe();
        match causes.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            // The sender lives as long as `self`.
            Err(_) => std::future::pending().await,
        }
    }
}
