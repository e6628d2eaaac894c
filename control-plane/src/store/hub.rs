//! Tells watchers about changes without ever waiting for one of them.
//!
//! Each resource (`/registry/<group>/<plural>/`) is a topic with a short ring of its latest events, shared by all its
//! watchers. A watcher that falls behind the ring reads the store's log instead, so a slow one costs no memory and never
//! blocks the writer.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::Event;

/// Events kept per topic.
const RING_EVENTS: usize = 512;
/// Bytes of keys and values kept per topic.
const RING_BYTES: usize = 1 << 20;

/// A lock that survives a panic of its holder: the data behind it is always consistent between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Ring {
    /// Every event of the topic after this revision is in `events`.
    floor: u64,
    bytes: usize,
    events: VecDeque<Arc<Event>>,
}

/// The latest events of one resource.
#[derive(Debug)]
pub(super) struct Topic {
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

/// What a topic knows about the time after a revision.
#[derive(Debug)]
pub(super) enum After {
    /// These events, complete unless `limit` of them were returned.
    Events(Vec<Arc<Event>>),
    /// Too old for the ring.
    Gone,
}

impl Topic {
    /// Up to `limit` events after `revision` whose key starts with `prefix`, and the revision up to which that is complete.
    pub(super) fn after(&self, revision: u64, prefix: &str, limit: usize) -> After {
        let ring = lock(&self.ring);
        if revision < ring.floor {
            return After::Gone;
        }
        let start = ring.events.partition_point(|event| event.revision <= revision);
        After::Events(
            ring.events
                .range(start..)
                .filter(|event| event.key.starts_with(prefix))
                .take(limit)
                .cloned()
                .collect(),
        )
    }

    /// Wakes up at each change of the topic.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn push(&self, event: Arc<Event>) {
        let mut ring = lock(&self.ring);
        ring.bytes += size(&event);
        ring.events.push_back(event);
        while ring.events.len() > RING_EVENTS || ring.bytes > RING_BYTES {
            let Some(old) = ring.events.pop_front() else { break };
            ring.bytes -= size(&old);
            ring.floor = old.revision;
        }
    }
}

fn size(event: &Event) -> usize {
    event.key.len()
        + event.value.as_ref().map_or(0, bytes::Bytes::len)
        + event.previous.as_ref().map_or(0, |(_, value)| value.len())
}

#[derive(Debug)]
struct Topics {
    /// What was in the log before this process published anything.
    start: u64,
    by_name: HashMap<String, Arc<Topic>>,
}

/// All topics and the newest published revision.
#[derive(Debug)]
pub(super) struct Hub {
    topics: Mutex<Topics>,
    published: watch::Sender<u64>,
}

impl Hub {
    pub(super) fn new(revision: u64) -> Self {
        Self {
            topics: Mutex::new(Topics {
                start: revision,
                by_name: HashMap::new(),
            }),
            published: watch::Sender::new(revision),
        }
    }

    /// The newest revision that every topic has seen.
    pub(super) fn published(&self) -> u64 {
        *self.published.borrow()
    }

    /// Wakes up when the published revision changes.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    /// The topic that `key_or_prefix` belongs to.
    pub(super) fn topic(&self, key_or_prefix: &str) -> Arc<Topic> {
        let name = topic_name(key_or_prefix);
        let mut topics = lock(&self.topics);
        if let Some(topic) = topics.by_name.get(name) {
            return Arc::clone(topic);
        }
        // A topic without events has had none since the start: whoever stands at `start` or later has missed nothing.
        let ring = Ring {
            floor: topics.start,
            bytes: 0,
            events: VecDeque::new(),
        };
        let topic = Arc::new(Topic {
            ring: Mutex::new(ring),
            changed: watch::Sender::new(()),
        });
        topics.by_name.insert(name.to_owned(), Arc::clone(&topic));
        topic
    }

    /// Begins anew at `revision`: what happened before is not known here, only to the log.
    pub(super) fn restart(&self, revision: u64) {
        let mut topics = lock(&self.topics);
        topics.start = revision;
        for topic in topics.by_name.values() {
            let mut ring = lock(&topic.ring);
            ring.events.clear();
            ring.bytes = 0;
            ring.floor = revision;
        }
        self.published.send_replace(revision);
        for topic in topics.by_name.values() {
            topic.changed.send_replace(());
        }
    }

    /// Makes durable events visible, oldest first.
    pub(super) fn publish(&self, events: Vec<Arc<Event>>) {
        let Some(last) = events.last().map(|event| event.revision) else {
            return;
        };
        let mut touched: Vec<Arc<Topic>> = Vec::new();
        for event in events {
            let topic = self.topic(&event.key);
            topic.push(event);
            if !touched.iter().any(|known| Arc::ptr_eq(known, &topic)) {
                touched.push(topic);
            }
        }
        // Topics first: whoever reads `published` and then a topic finds all events up to it there.
        self.published.send_replace(last);
        for topic in touched {
            topic.changed.send_replace(());
        }
    }
}

/// The first three segments of a key: `/registry/<group>/<plural>/`.
fn topic_name(key: &str) -> &str {
    key.match_indices('/').nth(3).map_or(key, |(at, _)| &key[..=at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_is_the_resource() {
        assert_eq!(
            topic_name("/registry/core/services/default/web"),
            "/registry/core/services/"
        );
        assert_eq!(topic_name("/registry/core/services/"), "/registry/core/services/");
        assert_eq!(topic_name("/registry/core"), "/registry/core");
    }

    #[test]
    fn ring_forgets_the_oldest_and_says_so() {
        let hub = Hub::new(0);
        let event = |revision| {
            Arc::new(Event {
                revision,
                key: "/registry/a/b/c".into(),
                value: None,
                previous: None,
            })
        };
        hub.publish((1..=RING_EVENTS as u64 + 10).map(event).collect());
        let topic = hub.topic("/registry/a/b/");
        assert!(matches!(topic.after(9, "/registry/a/b/", 1), After::Gone));
        let After::Events(events) = topic.after(10, "/registry/a/b/", 1) else {
            panic!("gone")
        };
        assert_eq!(events[0].revision, 11);
        let After::Events(events) = topic.after(0, "/registry/a/b/", 1) else {
            return;
        };
        panic!("events before the floor: {events:?}");
    }
}
