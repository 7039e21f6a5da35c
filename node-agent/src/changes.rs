//! Tells the session that what the node holds has changed. Only that: whoever listens looks up what, so any number of
//! changes between two looks is one.

use std::sync::Arc;

use tokio::sync::watch;

/// A bell that many ring and many hear.
#[derive(Debug, Clone)]
pub struct Changes(Arc<watch::Sender<()>>);

impl Default for Changes {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }
}

impl Changes {
    pub fn ring(&self) {
        self.0.send_replace(());
    }

    pub fn listen(&self) -> Listener {
        Listener(self.0.subscribe())
    }
}

/// Hears every change after its making.
#[derive(Debug)]
pub struct Listener(watch::Receiver<()>);

impl Listener {
    /// Waits for the next change; forever once nobody can ring.
    pub async fn heard(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
