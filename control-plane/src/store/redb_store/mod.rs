//! The embedded implementation: one redb file, one writer thread that commits whatever has queued up in one transaction.

mod import;
mod writer;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use redb::{Database, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::hub::Hub;
use super::log_watch::{History, LogWatch, Past};
use super::{Event, Page, Range, Store, StoreError, Stored, Watch, Write};
pub use import::Import;
use writer::Writer;

/// key -> (revision, value).
const LATEST: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("latest");
/// revision -> (key, new value, revision of the previous value or 0, previous value).
const LOG: TableDefinition<'_, u64, LogEntry<'static>> = TableDefinition::new("log");
type LogEntry<'a> = (&'a str, Option<&'a [u8]>, u64, &'a [u8]);
/// Counters by name: see the constants below.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: &str = "format";
const REVISION: &str = "revision";
const COMPACTED: &str = "compacted";
/// The layout of the tables above. A store of another format is refused, not guessed at.
const FORMAT_VERSION: u64 = 1;
/// Writes in one transaction: enough to share an fsync, few enough to answer soon.
const BATCH: usize = 256;

/// How a [`RedbStore`] is opened.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes of pages cached in memory.
    pub cache_bytes: usize,
    /// When the log holds more events than this, its oldest quarter is compacted.
    pub max_log: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 16 << 20,
            max_log: 20_000,
        }
    }
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

enum Command {
    Write(Write, Answer<u64>),
    Compact(u64, Answer<()>),
}

struct Inner {
    path: PathBuf,
    options: Options,
    /// Nothing while it is opened again after a failure of the disk.
    database: RwLock<Option<Database>>,
    hub: Hub,
    compacted: AtomicU64,
}

/// A [`Store`] in one file.
pub struct RedbStore {
    inner: Arc<Inner>,
    commands: Option<mpsc::Sender<Command>>,
    writer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedbStore")
            .field("revision", &self.inner.hub.published())
            .finish_non_exhaustive()
    }
}

fn backend<E: Display>(operation: &'static str) -> impl Fn(E) -> StoreError {
    move |error| StoreError::Backend {
        operation,
        message: error.to_string(),
    }
}

impl RedbStore {
    /// Opens the store at `path`, creating it if needed.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it open; [`StoreError::Backend`] when the file cannot be used.
    pub fn open(path: &Path, options: Options) -> Result<Self, StoreError> {
        let database = open(path, options)?;
        let (revision, compacted) = prepare(&database)?;
        let inner = Arc::new(Inner {
            path: path.to_owned(),
            options,
            database: RwLock::new(Some(database)),
            hub: Hub::new(revision),
            compacted: compacted.into(),
        });
        let (commands, receiver) = mpsc::channel(BATCH * 4);
        let writer = Writer::new(Arc::clone(&inner), revision, options.max_log.max(1));
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(receiver))
            .map_err(backend("start store writer"))?;
        Ok(Self {
            inner,
            commands: Some(commands),
            writer: Some(writer),
        })
    }

    async fn command<T>(&self, make: impl FnOnce(Answer<T>) -> Command) -> Result<T, StoreError> {
        let commands = self.commands.as_ref().ok_or(StoreError::Closed)?;
        let (answer, answered) = oneshot::channel();
        commands
            .send(make(answer))
            .await
            .map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for RedbStore {
    /// Waits for the writes that are queued, so that the file is free for the next process afterwards.
    fn drop(&mut self) {
        self.commands = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer thread panicked");
        }
    }
}

fn open(path: &Path, options: Options) -> Result<Database, StoreError> {
    Database::builder()
        .set_cache_size(options.cache_bytes)
        .create(path)
        .map_err(|error| {
            let path = path.display().to_string();
            match error {
                redb::DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path },
                other => StoreError::Backend {
                    operation: "open store",
                    message: format!("{path}: {other}"),
                },
            }
        })
}

/// Creates the tables and reads the counters.
fn prepare(database: &Database) -> Result<(u64, u64), StoreError> {
    let operation = "prepare store";
    let txn = database.begin_write().map_err(backend(operation))?;
    let counters = {
        let mut meta = txn.open_table(META).map_err(backend(operation))?;
        txn.open_table(LATEST).map_err(backend(operation))?;
        txn.open_table(LOG).map_err(backend(operation))?;
        let mut read = |name, default| -> Result<u64, StoreError> {
            let found = meta
                .get(name)
                .map_err(backend(operation))?
                .map(|value| value.value());
            if let Some(found) = found {
                return Ok(found);
            }
            meta.insert(name, default).map_err(backend(operation))?;
            Ok(default)
        };
        let format = read(FORMAT, FORMAT_VERSION)?;
        if format != FORMAT_VERSION {
            let message = format!("it has format {format}, this program reads format {FORMAT_VERSION}");
            return Err(StoreError::Backend { operation, message });
        }
        // Revision 0 means "any" in the API, so nothing may ever be at it.
        (read(REVISION, 1)?, read(COMPACTED, 0)?)
    };
    txn.commit().map_err(backend(operation))?;
    Ok(counters)
}

/// What is said while the file is not open.
fn away() -> StoreError {
    StoreError::Backend {
        operation: "use store",
        message: "the disk failed, and the store cannot be opened again yet".to_owned(),
    }
}

impl Inner {
    /// Opens the file again: after an error of the disk (no space, above all) redb refuses everything until then. What was
    /// committed is there; returns the revision and what is compacted.
    fn reopen(&self) -> Result<(u64, u64), StoreError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // The file is locked until the old one is gone.
        drop(database.take());
        let fresh = open(&self.path, self.options)?;
        let counters = prepare(&fresh)?;
        *database = Some(fresh);
        Ok(counters)
    }

    fn snapshot(&self) -> Result<(ReadTransaction, u64, u64), StoreError> {
        let operation = "read from store";
        let txn = {
            let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
            let database = database.as_ref().ok_or_else(away)?;
            database.begin_read().map_err(backend(operation))?
        };
        let meta = txn.open_table(META).map_err(backend(operation))?;
        let counter = |name| -> Result<u64, StoreError> {
            Ok(meta
                .get(name)
                .map_err(backend(operation))?
                .map_or(0, |value| value.value()))
        };
        let counters = (counter(REVISION)?, counter(COMPACTED)?);
        Ok((txn, counters.0, counters.1))
    }

    fn list(&self, range: &Range) -> Result<Page, StoreError> {
        let operation = "read from store";
        let (txn, current, compacted) = self.snapshot()?;
        let revision = range.revision.unwrap_or(current);
        check_revision(revision, current, compacted)?;
        let latest = txn.open_table(LATEST).map_err(backend(operation))?;
        // What was different then: the first event after `revision` of a key says what the key held.
        let mut undo: BTreeMap<String, Option<Stored>> = BTreeMap::new();
        let log = txn.open_table(LOG).map_err(backend(operation))?;
        for entry in log.range(revision + 1..).map_err(backend(operation))? {
            let (_, value) = entry.map_err(backend(operation))?;
            let (key, _, old_revision, old) = value.value();
            if key.starts_with(&range.prefix) && range.after.as_deref().is_none_or(|after| key > after) {
                undo.entry(key.to_owned()).or_insert_with(|| {
                    (old_revision > 0).then(|| Stored {
                        key: key.to_owned(),
                        revision: old_revision,
                        value: Bytes::copy_from_slice(old),
                    })
                });
            }
        }
        let mut undo = undo.into_iter().peekable();
        let limit = if range.limit == 0 { usize::MAX } else { range.limit };
        let mut page = Page {
            items: Vec::new(),
            revision,
            remaining: 0,
        };
        let add = |page: &mut Page, item: &mut dyn FnMut() -> Stored| {
            if page.items.len() < limit {
                page.items.push(item());
            } else {
                page.remaining += 1;
            }
        };
        let from = range.after.as_deref().unwrap_or(&range.prefix);
        for entry in latest.range(from..).map_err(backend(operation))? {
            let (key, value) = entry.map_err(backend(operation))?;
            let key = key.value();
            if range.after.as_deref() == Some(key) {
                continue;
            }
            if !key.starts_with(&range.prefix) {
                break;
            }
            while let Some((_, old)) = undo.next_if(|(changed, _)| changed.as_str() < key) {
                if let Some(old) = old {
                    add(&mut page, &mut || old.clone());
                }
            }
            if let Some((_, old)) = undo.next_if(|(changed, _)| changed == key) {
                if let Some(old) = old {
                    add(&mut page, &mut || old.clone());
                }
                continue;
            }
            add(&mut page, &mut || {
                let (revision, value) = value.value();
                Stored {
                    key: key.to_owned(),
                    revision,
                    value: Bytes::copy_from_slice(value),
                }
            });
        }
        for (_, old) in undo {
            if let Some(old) = old {
                add(&mut page, &mut || old.clone());
            }
        }
        Ok(page)
    }

    fn read_log(&self, revision: u64, prefix: &str, limit: usize) -> Result<Past, StoreError> {
        // Nothing unpublished may be returned, or `published` would step back for the reader.
        self.logged(revision, self.hub.published(), prefix, limit)
    }

    /// What the log has after one revision and up to another.
    fn logged(&self, revision: u64, until: u64, prefix: &str, limit: usize) -> Result<Past, StoreError> {
        let operation = "read the store's log";
        let (txn, current, compacted) = self.snapshot()?;
        check_revision(revision, current, compacted)?;
        let log = txn.open_table(LOG).map_err(backend(operation))?;
        let mut events = Vec::new();
        for entry in log.range(revision + 1..=until).map_err(backend(operation))? {
            let (at, value) = entry.map_err(backend(operation))?;
            let (key, value, old_revision, old) = value.value();
            if !key.starts_with(prefix) {
                continue;
            }
            events.push(Arc::new(Event {
                revision: at.value(),
                key: key.to_owned(),
                value: value.map(Bytes::copy_from_slice),
                previous: (old_revision > 0).then(|| (old_revision, Bytes::copy_from_slice(old))),
            }));
            if events.len() == limit {
                return Ok((events, at.value()));
            }
        }
        Ok((events, until.max(revision)))
    }
}

fn check_revision(requested: u64, current: u64, compacted: u64) -> Result<(), StoreError> {
    if requested > current {
        return Err(StoreError::Future { requested, current });
    }
    if requested < compacted {
        return Err(StoreError::Compacted { requested, compacted });
    }
    Ok(())
}

/// Runs a read of unknown size where it may block.
fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> BoxFuture<'static, Result<T, StoreError>> {
    async move {
        tokio::task::spawn_blocking(read)
            .await
            .map_err(backend("read from store"))?
    }
    .boxed()
}

impl History for Inner {
    fn hub(&self) -> &Hub {
        &self.hub
    }

    fn log_after(
        self: Arc<Self>,
        revision: u64,
        prefix: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Past, StoreError>> {
        blocking(move || self.read_log(revision, &prefix, limit))
    }
}

impl Store for RedbStore {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<(Option<Stored>, u64), StoreError>> {
        // One key is a handful of cached pages: handing it to another thread would cost more than reading it.
        let result = (|| {
            let operation = "read from store";
            let (txn, revision, _) = self.inner.snapshot()?;
            let latest = txn.open_table(LATEST).map_err(backend(operation))?;
            let found = latest.get(key).map_err(backend(operation))?;
            let found = found.map(|found| {
                let (revision, value) = found.value();
                Stored {
                    key: key.to_owned(),
                    revision,
                    value: Bytes::copy_from_slice(value),
                }
            });
            Ok((found, revision))
        })();
        std::future::ready(result).boxed()
    }

    fn list(&self, range: Range) -> BoxFuture<'_, Result<Page, StoreError>> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.list(&range))
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.command(|answer| Command::Write(write, answer)).boxed()
    }

    fn watch(&self, prefix: &str, revision: u64) -> BoxFuture<'_, Result<Box<dyn Watch>, StoreError>> {
        let result = (|| {
            let topic = self.inner.hub.topic(prefix);
            let changed = topic.subscribe();
            let (_, current, compacted) = self.inner.snapshot()?;
            check_revision(revision, current, compacted)?;
            let inner = Arc::clone(&self.inner);
            let watch = LogWatch::new(inner, topic, changed, prefix, revision);
            Ok(Box::new(watch) as Box<dyn Watch>)
        })();
        std::future::ready(result).boxed()
    }

    fn reached(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            let mut published = self.inner.hub.subscribe();
            published
                .wait_for(|at| *at >= revision)
                .await
                .map_err(|_| StoreError::Closed)?;
            Ok(())
        }
        .boxed()
    }

    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        self.command(move |answer| Command::Compact(revision, answer))
            .boxed()
    }
}
