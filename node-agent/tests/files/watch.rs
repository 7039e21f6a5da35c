//! Changes, whoever makes them.

use tokio::time::timeout;
use tonic::{Code, Streaming};
use warren_proto::v1::file_event::Kind;
use warren_proto::v1::watch_files_response::Message;
use warren_proto::v1::*;

use crate::lab::*;
use crate::support::{PATIENCE, removed};

async fn watch(lab: &Lab, path: &str) -> Streaming<WatchFilesResponse> {
    let request = WatchFilesRequest { path: path.into(), recursive: true, ..Default::default() };
    let mut stream = lab.files().watch_files(lab.with(request)).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.message, Some(Message::Ready(WatchReady {})));
    stream
}

async fn until(stream: &mut Streaming<WatchFilesResponse>, kind: Kind, path: &str) -> FileEvent {
    loop {
        let next = timeout(PATIENCE, stream.message()).await.unwrap_or_else(|_| panic!("never: {kind:?} {path}"));
        match next.unwrap().unwrap().message {
            Some(Message::Event(event)) if event.kind() == kind && event.path == path => return event,
            _ => {}
        }
    }
}

#[test]
fn what_processes_inside_and_clients_change_is_told() {
    with_lab("watch", |mut lab| async move {
        lab.sh("mkdir /w; echo > /w/old").await;
        let mut stream = watch(&lab, "/w").await;
        lab.sh("mkdir -p /w/a/b; echo x > /w/a/b/f").await;
        until(&mut stream, Kind::Created, "/w/a/b/f").await;
        // Of the template: changing it copies it up, below what is watched.
        let mut of_base = watch(&lab, "/etc").await;
        lab.sh("echo more >> /etc/shared").await;
        until(&mut of_base, Kind::Modified, "/etc/shared").await;
        lab.write("/w/new", b"by a client").await.unwrap();
        until(&mut stream, Kind::Created, "/w/new").await;
        lab.sh("busybox mv /w/a /w/c; echo y >> /w/c/b/f; busybox chmod 600 /w/old; busybox rm /w/new").await;
        assert_eq!(until(&mut stream, Kind::Moved, "/w/a").await.new_path, "/w/c");
        until(&mut stream, Kind::Modified, "/w/c/b/f").await;
        until(&mut stream, Kind::Attributes, "/w/old").await;
        until(&mut stream, Kind::Removed, "/w/new").await;
        // It ends with the sandbox.
        lab.peer.assign(3, &[removed("a", 1)]).await;
        lab.peer.until_phase("a", 1, sandbox_observation::Phase::Removed).await;
        let end = timeout(PATIENCE, async {
            loop {
                if let Err(status) = stream.message().await {
                    break status;
                }
            }
        });
        assert_eq!(
            refused(Err::<(), _>(end.await.unwrap())),
            (Code::FailedPrecondition, Some(ErrorReason::SandboxMoved))
        );
        lab
    });
}
