//! What is to be looked at, and when: each key once, failed ones again later and later.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// A work queue. A key that is being worked on is not handed out again until [`Queue::done`] or [`Queue::failed`].
#[derive(Debug)]
pub(super) struct Queue<K> {
    due: HashMap<K, Instant>,
    order: BTreeSet<(Instant, K)>,
    busy: HashSet<K>,
    failures: HashMap<K, u32>,
}

impl<K: Ord + Hash + Clone> Queue<K> {
    pub(super) fn new() -> Self {
        Self {
            due: HashMap::new(),
            order: BTreeSet::new(),
            busy: HashSet::new(),
            failures: HashMap::new(),
        }
    }

    /// Looks at the key at that time, or earlier if that was planned.
    pub(super) fn add_at(&mut self, key: K, at: Instant) {
        match self.due.get(&key) {
            Some(planned) if *planned <= at => return,
            Some(planned) => {
                self.order.remove(&(*planned, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), at);
        self.order.insert((at, key));
    }

    /// When there will be something to do; `None` if that depends on others.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.order
            .iter()
            .find(|(_, key)| !self.busy.contains(key))
            .map(|(at, _)| *at)
    }

    /// A key whose time has come, which is busy from now on.
    pub(super) fn take(&mut self) -> Option<K> {
        let now = Instant::now();
        let entry = self
            .order
            .iter()
            .take_while(|(at, _)| *at <= now)
            .find(|(_, key)| !self.busy.contains(key))
            .cloned()?;
        self.order.remove(&entry);
        let (_, key) = entry;
        self.due.remove(&key);
        self.busy.insert(key.clone());
        Some(key)
    }

    /// The work on the key went well.
    pub(super) fn done(&mut self, key: &K) {
        self.busy.remove(key);
        self.failures.remove(key);
    }

    /// The work on the key failed; returns after which time it is tried again.
    pub(super) fn failed(&mut self, key: &K) -> Duration {
        self.busy.remove(key);
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let wait = FIRST_RETRY
            .saturating_mul(2_u32.saturating_pow((*failures).min(16)))
            .min(LAST_RETRY);
        *failures = failures.saturating_add(1);
        self.add_at(key.clone(), Instant::now() + wait);
        wait
    }
}

/// Sleeps until that time, for ever without one.
pub(super) async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_worked_on_once_at_a_time() {
        let mut queue = Queue::new();
        queue.add_at("a", Instant::now());
        queue.add_at("a", Instant::now());
        assert_eq!(queue.take(), Some("a"));
        queue.add_at("a", Instant::now());
        assert_eq!((queue.take(), queue.next_due()), (None, None));
        queue.done(&"a");
        assert_eq!((queue.take(), queue.take()), (Some("a"), None));
    }

    #[test]
    fn failures_wait_longer_and_longer() {
        let mut queue = Queue::new();
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            let wait = queue.failed(&"a");
            assert!(wait >= last && wait <= LAST_RETRY);
            last = wait;
        }
        assert_eq!(last, LAST_RETRY);
        assert_eq!(queue.take(), None, "not yet");
        queue.done(&"a");
        assert_eq!(queue.failed(&"a"), FIRST_RETRY);
    }
}
