//! The revisioned store: every write gets the next revision of one global counter, which the API shows as resourceVersion.
//!
//! The shape is etcd's (one counter, compare-and-write, an event log that is compacted), so that etcd itself can take the embedded
//! store's place. Values are opaque bytes here; see `server::codec` for their layout.

mod etcd;
mod hub;
mod log_watch;
mod redb_store;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

pub use etcd::{EtcdOptions, EtcdStore};
pub use redb_store::{Import, Options, RedbStore};

/// A value with the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The key, for example `/registry/core/services/default/web`.
    pub key: String,
    /// The revision of the last write of this key.
    pub revision: u64,
    /// The value.
    pub value: Bytes,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The revision of the change.
    pub revision: u64,
    /// The key that changed.
    pub key: String,
    /// The new value; `None` when the key was deleted.
    pub value: Option<Bytes>,
    /// What the key held before, with its revision; `None` when it was created.
    pub previous: Option<(u64, Bytes)>,
}

/// What must hold for a key when a write is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key was last written at this revision.
    Revision(u64),
}

/// One write: a value (or a deletion) and everything that it depends on, applied as a whole or not at all.
#[derive(Debug, Clone)]
pub struct Write {
    /// The key to write.
    pub key: String,
    /// What `key` must be at that moment.
    pub expect: Expect,
    /// The new value; `None` deletes.
    pub value: Option<Bytes>,
    /// Other keys that must be unchanged, for example the namespace that an object is created in.
    pub guards: Vec<(String, Expect)>,
    /// Other keys that are written with it; `None` deletes. What they must be is for `guards` to say.
    pub also: Vec<(String, Option<Bytes>)>,
}

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Keys that start with this.
    pub prefix: String,
    /// Only keys after this one.
    pub after: Option<String>,
    /// At most so many; 0 means all.
    pub limit: usize,
    /// The state at this revision; `None` means now.
    pub revision: Option<u64>,
}

/// Part of a list.
#[derive(Debug, Clone)]
pub struct Page {
    /// In key order.
    pub items: Vec<Stored>,
    /// The revision whose state this is.
    pub revision: u64,
    /// How many more keys follow.
    pub remaining: u64,
}

/// Why the store did not do what it was asked to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The key that is written is not what [`Write::expect`] says.
    #[error("write {key}: the key has changed")]
    Conflict {
        /// The key.
        key: String,
        /// What it holds now.
        current: Option<Stored>,
    },
    /// A guard does not hold.
    #[error("write: {key}, which it depends on, has changed")]
    Guard {
        /// The guard's key.
        key: String,
    },
    /// The history that was asked for is gone.
    #[error("read at revision {requested}: compacted up to {compacted}")]
    Compacted {
        /// The revision that was asked for.
        requested: u64,
        /// The oldest revision that can be read or watched from.
        compacted: u64,
    },
    /// The revision that was asked for does not exist yet.
    #[error("read at revision {requested}: the store is at {current}")]
    Future {
        /// The revision that was asked for.
        requested: u64,
        /// The newest revision.
        current: u64,
    },
    /// Another process has the store open.
    #[error("open store {path}: another process uses it")]
    Locked {
        /// The file.
        path: String,
    },
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
    /// The disk or the database failed.
    #[error("{operation}: {message}")]
    Backend {
        /// What was being done.
        operation: &'static str,
        /// What went wrong.
        message: String,
    },
}

/// Changes of all keys under a prefix, in revision order, without gap or duplicate.
pub trait Watch: Send {
    /// The next change. Cancel-safe.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when the watcher is so slow that the log has been compacted past it; the watch is over then.
    fn next(&mut self) -> BoxFuture<'_, Result<Arc<Event>, StoreError>>;

    /// The revision up to which everything has been delivered, or `None` while a change waits to be read.
    fn progress(&mut self) -> Option<u64>;
}

/// A revisioned key-value store.
pub trait Store: Send + Sync {
    /// Whether other control planes write to it, too.
    fn is_shared(&self) -> bool {
        false
    }

    /// The value of `key` and the store's revision.
    fn get(&self, key: &str) -> BoxFuture<'_, Result<(Option<Stored>, u64), StoreError>>;

    /// Keys and values in key order.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Future`] for a revision that cannot be read.
    fn list(&self, range: Range) -> BoxFuture<'_, Result<Page, StoreError>>;

    /// Applies `write` durably and returns its revision.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] or [`StoreError::Guard`] when something else was there first; nothing is written then.
    fn write(&self, write: Write) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// All changes under `prefix` after `revision`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Future`] for a revision that cannot be watched from.
    fn watch(&self, prefix: &str, revision: u64) -> BoxFuture<'_, Result<Box<dyn Watch>, StoreError>>;

    /// Completes when the store's revision is at least `revision`.
    fn reached(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Forgets the history up to and including `revision`; the present state is untouched.
    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>>;
}
