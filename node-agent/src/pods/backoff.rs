//! How long a container that ended waits before it is started again: kubelet's times.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// A container that ran for so long begins again.
const FORGIVEN: Duration = Duration::from_secs(600);

/// Waits by container name.
#[derive(Debug, Default)]
pub(super) struct Backoff(HashMap<String, Wait>);

#[derive(Debug)]
struct Wait {
    /// The attempt whose end this follows.
    attempt: u32,
    delay: Duration,
    until: Instant,
}

impl Backoff {
    /// When a container whose `attempt` has ended after `ran` may start again, and how long it waits in all.
    pub(super) fn after(
        &mut self,
        name: &str,
        attempt: u32,
        ran: Duration,
        now: Instant,
    ) -> (Instant, Duration) {
        let wait = self.0.entry(name.to_owned()).or_insert(Wait {
            attempt,
            delay: Duration::ZERO,
            until: now,
        });
        if wait.attempt != attempt {
            wait.attempt = attempt;
            wait.delay = match wait.delay {
                _ if ran >= FORGIVEN => Duration::ZERO,
                Duration::ZERO => FIRST,
                delay => (delay * 2).min(LONGEST),
            };
            wait.until = now + wait.delay;
        }
        (wait.until, wait.delay)
    }

    /// The same for something that is tried again and again without a container, under a name of its own.
    pub(super) fn failed(&mut self, name: &str, now: Instant) -> Instant {
        let attempt = self.0.get(name).map_or(0, |wait| wait.attempt + 1);
        let first = attempt == 0;
        let (until, delay) = self.after(name, attempt, Duration::ZERO, now);
        if first {
            // What has failed just now fails again.
            if let Some(wait) = self.0.get_mut(name) {
                wait.delay = FIRST / 2;
                wait.until = now + FIRST / 2;
                return wait.until;
            }
        }
        debug_assert!(delay > Duration::ZERO);
        until
    }

    /// When what has failed may be tried again; nothing if it has not failed.
    pub(super) fn waits(&self, name: &str) -> Option<Instant> {
        self.0.get(name).map(|wait| wait.until)
    }

    /// It works.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_a_long_life_is_rewarded() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let mut delays = Vec::new();
        for attempt in 0..8 {
            let (until, delay) = backoff.after("c", attempt, Duration::from_secs(1), now);
            assert_eq!(until, now + delay);
            // asked again it is the same
            assert_eq!(backoff.after("c", attempt, Duration::ZERO, now + delay).0, until);
            delays.push(delay.as_secs());
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.after("c", 8, FORGIVEN, now).1, Duration::ZERO);
        assert_eq!(backoff.after("d", 3, Duration::ZERO, now).1, Duration::ZERO);
    }

    #[test]
    fn failures_wait_from_the_first_on() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let seconds: Vec<u64> = (0..4)
            .map(|_| (backoff.failed("s", now) - now).as_secs())
            .collect();
        assert_eq!(seconds, [5, 10, 20, 40]);
        assert_eq!(backoff.waits("s"), Some(now + Duration::from_secs(40)));
        backoff.forget("s");
        assert_eq!(backoff.waits("s"), None);
    }
}
