//! From which state a read is answered: linearizable on the leader, or what this replica has, if the caller says so.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use super::status;
use crate::controller::Controller;
use crate::state::State;

/// `stale`: what this replica has applied will do.
pub const CONSISTENCY: &str = "warren-consistency";

/// At least this revision will do.
pub const MIN_REVISION: &str = "warren-min-revision";

/// How long a replica may take to reach a revision that a caller has seen elsewhere: far more than a heartbeat.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a caller wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    Linearizable,
    Stale,
    AtLeast(u64),
}

impl Consistency {
    fn parse(consistency: Option<&str>, min_revision: Option<&str>) -> Result<Self, Status> {
        if let Some(text) = min_revision {
            let wrong = || status::invalid_field(MIN_REVISION, "must be a revision, as a reply carries it");
            return text.parse().map(Self::AtLeast).map_err(|_| wrong());
        }
        match consistency {
            None | Some("linearizable") => Ok(Self::Linearizable),
            Some("stale") => Ok(Self::Stale),
            Some(_) => Err(status::invalid_field(CONSISTENCY, "must be `linearizable` or `stale`")),
        }
    }

    fn of(metadata: &MetadataMap) -> Result<Self, Status> {
        let text = |key| metadata.get(key).and_then(|value| value.to_str().ok());
        Self::parse(text(CONSISTENCY), text(MIN_REVISION))
    }
}

/// Whether a call asks to be answered by the replica that it reaches.
pub fn is_local(path: &str, headers: &HeaderMap) -> bool {
    let asks = headers.contains_key(MIN_REVISION) || headers.get(CONSISTENCY).is_some_and(|value| value == "stale");
    let method = path.rsplit('/').next().unwrap_or_default();
    asks && ["Get", "List", "Watch", "Wait"].iter().any(|prefix| method.starts_with(prefix))
}

/// The state that answers `request`.
pub async fn state<T>(controller: &Controller, request: &Request<T>) -> Result<Arc<State>, Status> {
    let replica = controller.replica();
    match Consistency::of(request.metadata())? {
        Consistency::Linearizable => replica.read().await.map_err(|error| status::propose(&error)),
        Consistency::Stale => Ok(replica.state()),
        Consistency::AtLeast(revision) => {
            let mut states = replica.watch_state();
            let reached = states.wait_for(|state| state.revision >= revision);
            match tokio::time::timeout(PATIENCE, reached).await {
                Ok(Ok(state)) => Ok(state.clone()),
                Ok(Err(_)) | Err(_) => Err(status::revision_not_reached(revision, replica.state().revision)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_says_what_it_wants_and_rubbish_is_refused() {
        assert_eq!(Consistency::parse(None, None).unwrap(), Consistency::Linearizable);
        assert_eq!(Consistency::parse(Some("stale"), None).unwrap(), Consistency::Stale);
        assert_eq!(Consistency::parse(None, Some("7")).unwrap(), Consistency::AtLeast(7));
        assert!(Consistency::parse(Some("strong"), None).is_err() && Consistency::parse(None, Some("x")).is_err());
    }

    #[test]
    fn only_reads_that_ask_for_it_are_answered_where_they_arrive() {
        let mut headers = HeaderMap::new();
        assert!(!is_local("/warren.v1.SandboxService/GetSandbox", &headers));
        headers.insert(CONSISTENCY, http::HeaderValue::from_static("stale"));
        assert!(is_local("/warren.v1.SandboxService/GetSandbox", &headers));
        assert!(!is_local("/warren.v1.SandboxService/CreateSandbox", &headers));
    }
}
