//! What every controller has in common: watches tell what changed, a queue says what to look at, and the requests for several
//! keys are on their way at the same time, one batch per key.

use std::collections::HashMap;
use std::fmt::{Debug, Display};
use std::hash::Hash;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use k8s_openapi::serde::de::DeserializeOwned;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::queue::{Queue, sleep_until};

/// Changes of all that a controller watches.
pub(crate) type Changes<C> = BoxStream<'static, Result<C, watcher::Error>>;

/// Tells what changes among these objects, and lists them again after an interruption. `slim` takes away what the controller does
/// not read; which field was whose, none reads.
pub(crate) fn watch<K, C: 'static>(
    api: Api<K>,
    config: watcher::Config,
    slim: fn(&mut K),
    change: impl Fn(watcher::Event<K>) -> C + Send + 'static,
) -> Changes<C>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, config)
        .modify(move |object| {
            object.meta_mut().managed_fields = None;
            slim(object);
        })
        .default_backoff()
        .map(move |event| event.map(&change))
        .boxed()
}

/// What came of the requests for a key, and why not all were done.
type Outcome<D> = (D, Result<(), String>);

/// What is to be done about a key: requests, if any, and when to look again at the latest.
pub(super) struct Next<D> {
    pub(super) requests: Option<BoxFuture<'static, Outcome<D>>>,
    pub(super) again: Option<Duration>,
}

impl<D> Next<D> {
    /// Nothing until something changes.
    pub(super) fn nothing() -> Self {
        Self {
            requests: None,
            again: None,
        }
    }

    /// Nothing until that time has passed, or until something changes.
    pub(super) fn later(again: Option<Duration>) -> Self {
        Self {
            requests: None,
            again,
        }
    }

    /// These requests.
    pub(super) fn requests(
        requests: impl Future<Output = Outcome<D>> + Send + 'static,
        again: Option<Duration>,
    ) -> Self {
        Self {
            requests: Some(Box::pin(requests)),
            again,
        }
    }
}

/// Decides, without waiting for anything, what is to be done.
pub(super) trait Controller {
    /// What is looked at.
    type Key: Ord + Hash + Clone + Debug;
    /// What the watches tell.
    type Change;
    /// What came of the requests for a key.
    type Done: Send + 'static;

    /// Whose doing it is, for the log.
    const NAME: &'static str;
    /// Keys whose requests are on their way at the same time.
    const PARALLEL: usize;
    /// How long changes are collected before a key is looked at: many come together.
    const BATCH: Duration;

    /// Whether all watches have told everything once: nothing is decided before.
    fn is_complete(&self) -> bool;

    /// Takes in a change and returns what it concerns.
    fn observe(&mut self, change: Self::Change) -> Vec<Self::Key>;

    /// What to do about the key.
    fn decide(&mut self, key: &Self::Key) -> Next<Self::Done>;

    /// Takes in what came of the requests; true if the key is to be looked at again although they went well.
    fn done(&mut self, key: &Self::Key, done: Self::Done) -> bool;
}

/// Runs a controller until `shutdown` is cancelled. The API may come and go meanwhile.
pub(super) async fn drive<C: Controller>(
    controller: C,
    mut changes: Changes<C::Change>,
    shutdown: CancellationToken,
) {
    let mut runner = Runner {
        controller,
        queue: Queue::new(),
        tasks: JoinSet::new(),
        running: HashMap::new(),
    };
    loop {
        let due = runner.next_due();
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(change) = changes.next() => runner.observe(change),
            Some(done) = runner.tasks.join_next_with_id() => runner.finished(done),
            () = sleep_until(due) => runner.start(),
        }
    }
}

struct Runner<C: Controller> {
    controller: C,
    queue: Queue<C::Key>,
    tasks: JoinSet<Outcome<C::Done>>,
    running: HashMap<Id, C::Key>,
}

impl<C: Controller> Runner<C> {
    fn observe(&mut self, change: Result<C::Change, watcher::Error>) {
        match change {
            Ok(change) => {
                let at = Instant::now() + C::BATCH;
                for key in self.controller.observe(change) {
                    self.queue.add_at(key, at);
                }
            }
            Err(error) => tracing::warn!(%error, "{}: watch interrupted, trying again", C::NAME),
        }
    }

    fn next_due(&self) -> Option<Instant> {
        if !self.controller.is_complete() || self.tasks.len() >= C::PARALLEL {
            return None;
        }
        self.queue.next_due()
    }

    fn start(&mut self) {
        while self.tasks.len() < C::PARALLEL
            && let Some(key) = self.queue.take()
        {
            let next = self.controller.decide(&key);
            if let Some(again) = next.again {
                self.queue.add_at(key.clone(), Instant::now() + again);
            }
            match next.requests {
                None => self.queue.done(&key),
                Some(requests) => {
                    let task = self.tasks.spawn(requests);
                    self.running.insert(task.id(), key);
                }
            }
        }
    }

    fn finished(&mut self, done: Result<(Id, Outcome<C::Done>), JoinError>) {
        let id = match &done {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(key) = self.running.remove(&id) else {
            return;
        };
        match done {
            Ok((_, (done, result))) => {
                let again = self.controller.done(&key, done);
                match result {
                    Err(error) => self.failed(&key, &error),
                    Ok(()) => {
                        self.queue.done(&key);
                        if again {
                            self.queue.add_at(key, Instant::now() + C::BATCH);
                        }
                    }
                }
            }
            Err(error) => self.failed(&key, &error),
        }
    }

    fn failed(&mut self, key: &C::Key, error: &impl Display) {
        let wait = self.queue.failed(key);
        tracing::warn!(?key, %error, retry_in = ?wait, "{}: not all was done, trying again", C::NAME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys are numbers; the requests for 1 end badly and those for 2 panic, once each.
    #[derive(Default)]
    struct Numbers {
        decided: Vec<u32>,
        stop: CancellationToken,
    }

    impl Controller for Numbers {
        type Key = u32;
        type Change = u32;
        type Done = u32;
        const NAME: &'static str = "numbers";
        const PARALLEL: usize = 2;
        const BATCH: Duration = Duration::ZERO;

        fn is_complete(&self) -> bool {
            true
        }

        fn observe(&mut self, change: u32) -> Vec<u32> {
            vec![change]
        }

        fn decide(&mut self, key: &u32) -> Next<u32> {
            self.decided.push(*key);
            let (key, first) = (
                *key,
                self.decided.iter().filter(|known| *known == key).count() == 1,
            );
            Next::requests(
                async move {
                    assert!(key != 2 || !first, "the task panics");
                    let result = if key == 1 && first {
                        Err("bad".into())
                    } else {
                        Ok(())
                    };
                    (key, result)
                },
                None,
            )
        }

        fn done(&mut self, _: &u32, done: u32) -> bool {
            let count = |key| self.decided.iter().filter(|known| **known == key).count();
            if count(1) == 2 && count(2) == 2 && count(3) == 2 {
                self.stop.cancel();
            }
            done == 3 && count(3) == 1
        }
    }

    #[tokio::test]
    async fn what_fails_or_panics_is_tried_again_and_what_wants_to_is_looked_at_again() {
        let stop = CancellationToken::new();
        let numbers = Numbers {
            stop: stop.clone(),
            ..Numbers::default()
        };
        let changes = futures::stream::iter([1, 2, 3].map(Ok)).boxed();
        // Ends only when each key was decided twice.
        tokio::time::timeout(Duration::from_secs(60), drive(numbers, changes, stop))
            .await
            .unwrap();
    }
}
