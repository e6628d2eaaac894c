//! A watcher: it takes what the hub has, and reads the history when it is too slow for that.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::hub::{After, Hub, Topic};
use super::{Event, StoreError, Watch};

/// Events that a watcher takes at a time.
const READ_AHEAD: usize = 128;

/// Events, and the revision up to which they are all there are.
pub(super) type Past = (Vec<Arc<Event>>, u64);

/// A store's past.
pub(super) trait History: Send + Sync {
    /// What tells watchers of the present.
    fn hub(&self) -> &Hub;

    /// About `limit` events after `revision` whose key starts with `prefix`, and the revision up to which that is complete.
    fn log_after(
        self: Arc<Self>,
        revision: u64,
        prefix: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Past, StoreError>>;
}

/// A watcher: a position in the history, and a few events read ahead.
pub(super) struct LogWatch {
    history: Arc<dyn History>,
    topic: Arc<Topic>,
    changed: watch::Receiver<()>,
    prefix: String,
    /// Everything up to this revision is in `buffer` or was delivered.
    read: u64,
    buffer: VecDeque<Arc<Event>>,
}

impl LogWatch {
    /// Watches what follows `revision`. `changed` was subscribed before that revision was checked.
    pub(super) fn new(
        history: Arc<dyn History>,
        topic: Arc<Topic>,
        changed: watch::Receiver<()>,
        prefix: &str,
        revision: u64,
    ) -> Self {
        Self {
            history,
            topic,
            changed,
            prefix: prefix.to_owned(),
            read: revision,
            buffer: VecDeque::new(),
        }
    }

    /// Takes what the topic's ring has. False when the ring no longer reaches back far enough.
    fn fill(&mut self) -> bool {
        let published = self.history.hub().published();
        match self.topic.after(self.read, &self.prefix, READ_AHEAD) {
            After::Gone => false,
            After::Events(events) => {
                let complete = events.len() < READ_AHEAD;
                self.buffer.extend(events);
                // The ring may already hold events newer than `published`.
                let last = self.buffer.back().map_or(0, |event| event.revision);
                self.read = if complete {
                    self.read.max(published).max(last)
                } else {
                    last
                };
                true
            }
        }
    }

    async fn next_event(&mut self) -> Result<Arc<Event>, StoreError> {
        loop {
            if let Some(event) = self.buffer.pop_front() {
                return Ok(event);
            }
            // Seen before reading, so that a change during the read wakes us up again.
            self.changed.borrow_and_update();
            if !self.fill() {
                let history = Arc::clone(&self.history);
                let (events, complete) = history
                    .log_after(self.read, self.prefix.clone(), READ_AHEAD)
                    .await?;
                self.buffer.extend(events);
                self.read = complete;
                continue;
            }
            if self.buffer.is_empty() {
                self.changed.changed().await.map_err(|_| StoreError::Closed)?;
            }
        }
    }
}

impl Watch for LogWatch {
    fn next(&mut self) -> BoxFuture<'_, Result<Arc<Event>, StoreError>> {
        self.next_event().boxed()
    }

    fn progress(&mut self) -> Option<u64> {
        if self.buffer.is_empty() && self.fill() && self.buffer.is_empty() {
            Some(self.read)
        } else {
            None
        }
    }
}
