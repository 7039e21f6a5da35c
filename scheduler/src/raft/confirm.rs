//! Leadership that very many ask to have confirmed at about the same time is confirmed to all of them by one round.
//!
//! A round begins after everybody that it answers has asked, so each is told of a quorum that answered later than its question.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::replica::ProposeError;

/// How long a round waits for others to join it. The nodes of a region renew some thousand leases a second, each with seconds to
/// spare, and a round is a message to every replica and back.
const GATHER: Duration = Duration::from_millis(20);

/// Askers that wait for a round to begin: a region's nodes, all at once after a failover.
pub(super) const QUEUE: usize = 16_384;

pub(super) type Answer = Result<(), ProposeError>;
pub(super) type Asker = oneshot::Sender<Answer>;

/// Runs until every sender is gone.
pub(super) async fn run<F: Future<Output = Answer>>(mut askers: mpsc::Receiver<Asker>, round: impl Fn() -> F) {
    let mut waiting = Vec::new();
    while askers.recv_many(&mut waiting, QUEUE).await > 0 {
        tokio::time::sleep(GATHER).await;
        while waiting.len() < QUEUE
            && let Ok(asker) = askers.try_recv()
        {
            waiting.push(asker);
        }
        let answer = round().await;
        for asker in waiting.drain(..) {
            let _asker_went_away = asker.send(answer.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_round_answers_those_who_asked_before_it_began_and_no_one_else() {
        let (asking, askers) = mpsc::channel(QUEUE);
        let begun = Arc::new(AtomicU64::new(0));
        let counter = begun.clone();
        tokio::spawn(run(askers, move || {
            counter.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(100)).map(|()| Err(ProposeError::Overloaded))
        }));
        let ask = || {
            let (answer, wait) = oneshot::channel();
            asking.try_send(answer).expect("room");
            wait
        };
        let early: Vec<_> = (0..1000).map(|_| ask()).collect();
        tokio::time::sleep(GATHER + Duration::from_millis(50)).await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        let late = ask();
        for wait in early {
            assert_eq!(wait.await, Ok(Err(ProposeError::Overloaded)));
        }
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        assert_eq!(late.await, Ok(Err(ProposeError::Overloaded)));
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
