//! What the main process wrote: kept with its stream and time, followed, and there after its end.

use std::time::Duration;

use tokio::time::timeout;
use warren_node_agent::clock;
use warren_node_agent::driver::{Driver, LogEvent, LogQuery, LogStream, Stream};

use super::world::*;

async fn text(mut log: Box<dyn LogStream>) -> String {
    let mut text = String::new();
    while let Some(event) = timeout(Duration::from_secs(60), log.next()).await.expect("silent").expect("reads") {
        match event {
            LogEvent::Entry { data, .. } => text.push_str(&String::from_utf8(data).expect("text")),
            LogEvent::Dropped { from, to } => text.push_str(&format!("[{from}..{to}]")),
        }
    }
    text
}

#[test]
fn a_log_is_followed_and_outlives_its_process() {
    with_each_runtime("logs", |world| async move {
        let before = clock::unix_now_ms();
        let key = world
            .start(
                "a",
                &[
                    "/bin/sh",
                    "-c",
                    "echo one; echo two >&2; while ! read x < /go; do sleep 0.01; done 2>/dev/null; echo $x; exit 3",
                ],
            )
            .await;
        let query = LogQuery::default();
        let mut first = world.driver.logs(&key, &LogQuery { follow: true, ..query.clone() }).await.expect("opens");
        let Some(LogEvent::Entry { offset: 0, unix_ms, stream: Stream::Stdout, .. }) =
            first.next().await.expect("reads")
        else {
            panic!("it begins with stdout")
        };
        assert!((before..=clock::unix_now_ms()).contains(&unix_ms));
        let following = tokio::spawn(text(first));
        // Another agent's.
        let other = world.restarted();
        let follower = other.logs(&key, &LogQuery { follow: true, tail_lines: Some(1), ..query.clone() }).await;
        let follower = tokio::spawn(text(follower.expect("opens")));
        world.sh(&key, "mkfifo /go; echo three > /go").await;
        assert_eq!(world.driver.wait(&key).await.expect("ends").exit, code(3));
        assert!(following.await.expect("task").ends_with("two\nthree\n"));
        assert!(follower.await.expect("task").ends_with("three\n"));
        let all = world.driver.logs(&key, &query).await.expect("opens");
        assert_eq!(text(all).await, "one\ntwo\nthree\n");
        let last = LogQuery { offset: 8, follow: true, ..query };
        assert_eq!(text(world.restarted().logs(&key, &last).await.expect("opens")).await, "three\n");
    });
}

#[test]
fn a_log_is_bounded_and_says_what_it_lost() {
    with_each_runtime("large logs", |world| async move {
        let key = world.start("a", &["/bin/sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x"]).await;
        let ended = world.driver.wait(&key).await.expect("ends");
        assert_eq!(ended.output_tail.len(), 4096);
        let mut log = world.driver.logs(&key, &LogQuery::default()).await.expect("opens");
        let Some(LogEvent::Dropped { from: 0, to }) = log.next().await.expect("reads") else { panic!("all is there") };
        assert!((20_000_000 - (8 << 20)..=20_000_000 - (4 << 20)).contains(&to), "{to}");
        assert_eq!(text(log).await.len() as u64, 20_000_000 - to);
    });
}
