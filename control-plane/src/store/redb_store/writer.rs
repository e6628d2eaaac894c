//! The writer: one thread that commits whatever has queued up in one transaction.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use redb::{ReadableTable as _, Table};
use tokio::sync::mpsc;

use super::super::{Event, Expect, StoreError, Stored, Write};
use super::{Answer, BATCH, COMPACTED, Command, Inner, LATEST, LOG, LogEntry, META, REVISION, away, backend};

/// Pause before a store that cannot be opened again is tried once more.
const REOPEN: Duration = Duration::from_millis(500);

pub(super) struct Writer {
    inner: Arc<Inner>,
    revision: u64,
    max_log: u64,
}

fn refuse(command: Command, error: &StoreError) {
    // A receiver that is gone gave up on its request.
    match command {
        Command::Write(_, answer) => drop(answer.send(Err(error.clone()))),
        Command::Compact(_, answer) => drop(answer.send(Err(error.clone()))),
    }
}

/// An answer that is kept back until the transaction is durable.
enum Pending {
    Write(Answer<u64>, Result<u64, StoreError>),
    Compact(Answer<()>, Result<(), StoreError>),
}

impl Writer {
    pub(super) fn new(inner: Arc<Inner>, revision: u64, max_log: u64) -> Self {
        Self {
            inner,
            revision,
            max_log,
        }
    }

    pub(super) fn run(mut self, mut receiver: mpsc::Receiver<Command>) {
        while let Some(first) = receiver.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(next) = receiver.try_recv()
            {
                batch.push(next);
            }
            if !self.commit(batch) {
                self.recover(&mut receiver);
            }
        }
    }

    /// Opens the store again after a failure. Until that is done, whoever writes is told.
    fn recover(&mut self, receiver: &mut mpsc::Receiver<Command>) {
        loop {
            match self.resume() {
                Ok(()) => return,
                Err(error) => tracing::error!(%error, "the store cannot be opened again, trying once more"),
            }
            std::thread::sleep(REOPEN);
            loop {
                match receiver.try_recv() {
                    Ok(command) => refuse(command, &away()),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            }
        }
    }

    fn resume(&mut self) -> Result<(), StoreError> {
        let (revision, compacted) = self.inner.reopen()?;
        self.inner.compacted.store(compacted, Ordering::Release);
        // A commit that ended in an error may be in the file all the same. Its writers were told that it failed, which a
        // client has to take for "not known"; watchers must see what is there.
        let seen = self.revision.max(compacted);
        let (events, _) = self.inner.logged(seen, revision, "", usize::MAX)?;
        self.revision = revision;
        self.inner.hub.publish(events);
        Ok(())
    }

    /// False if the disk or the database failed.
    fn commit(&mut self, batch: Vec<Command>) -> bool {
        let mut pending = Vec::with_capacity(batch.len());
        let mut batch = batch.into_iter();
        let outcome = self.transact(&mut batch, &mut pending);
        let failure = match outcome {
            Ok((revision, compacted, events)) => {
                self.revision = revision;
                self.inner.compacted.store(compacted, Ordering::Release);
                self.inner.hub.publish(events);
                None
            }
            Err(error) => {
                tracing::error!(%error, "nothing of this batch was written");
                Some(error)
            }
        };
        if let Some(error) = &failure {
            for command in batch {
                refuse(command, error);
            }
        }
        for answer in pending {
            // A receiver that is gone gave up on its request; the write stands.
            match (answer, &failure) {
                (Pending::Write(to, Ok(_)), Some(error)) => drop(to.send(Err(error.clone()))),
                (Pending::Write(to, result), _) => drop(to.send(result)),
                (Pending::Compact(to, Ok(())), Some(error)) => drop(to.send(Err(error.clone()))),
                (Pending::Compact(to, result), _) => drop(to.send(result)),
            }
        }
        failure.is_none()
    }

    /// One transaction for all of `batch`. Commands that are not reached stay in it.
    fn transact(
        &self,
        batch: &mut std::vec::IntoIter<Command>,
        pending: &mut Vec<Pending>,
    ) -> Result<(u64, u64, Vec<Arc<Event>>), StoreError> {
        let operation = "write to store";
        let mut revision = self.revision;
        let mut compacted = self.inner.compacted.load(Ordering::Acquire);
        let mut compact_to = compacted;
        let mut events = Vec::new();
        let database = self.inner.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(away)?;
        let txn = database.begin_write().map_err(backend(operation))?;
        {
            let mut latest = txn.open_table(LATEST).map_err(backend(operation))?;
            let mut log = txn.open_table(LOG).map_err(backend(operation))?;
            let mut meta = txn.open_table(META).map_err(backend(operation))?;
            for command in batch {
                match command {
                    Command::Write(write, answer) => {
                        let result = apply(&mut latest, &mut log, write, revision + 1);
                        match result {
                            Ok(changes) => {
                                revision = changes.last().map_or(revision, |event| event.revision);
                                events.extend(changes.into_iter().map(Arc::new));
                                pending.push(Pending::Write(answer, Ok(revision)));
                            }
                            Err(error @ (StoreError::Conflict { .. } | StoreError::Guard { .. })) => {
                                pending.push(Pending::Write(answer, Err(error)));
                            }
                            Err(error) => {
                                pending.push(Pending::Write(answer, Err(error.clone())));
                                return Err(error);
                            }
                        }
                    }
                    Command::Compact(to, answer) if to > revision => {
                        let error = StoreError::Future {
                            requested: to,
                            current: revision,
                        };
                        pending.push(Pending::Compact(answer, Err(error)));
                    }
                    Command::Compact(to, answer) => {
                        compact_to = compact_to.max(to);
                        pending.push(Pending::Compact(answer, Ok(())));
                    }
                }
            }
            if revision - compact_to > self.max_log {
                compact_to = revision - (self.max_log - self.max_log / 4);
            }
            if events.is_empty() && compact_to == compacted {
                return Ok((revision, compacted, events));
            }
            meta.insert(REVISION, revision).map_err(backend(operation))?;
            if compact_to > compacted {
                meta.insert(COMPACTED, compact_to).map_err(backend(operation))?;
                while log
                    .first()
                    .map_err(backend(operation))?
                    .is_some_and(|(at, _)| at.value() <= compact_to)
                {
                    log.pop_first().map_err(backend(operation))?;
                }
                compacted = compact_to;
            }
        }
        txn.commit().map_err(backend(operation))?;
        Ok((revision, compacted, events))
    }
}

type Latest<'txn> = Table<'txn, &'static str, (u64, &'static [u8])>;
type Log<'txn> = Table<'txn, u64, LogEntry<'static>>;

fn read(latest: &Latest<'_>, key: &str) -> Result<Option<Stored>, StoreError> {
    let found = latest.get(key).map_err(backend("read from store"))?;
    Ok(found.map(|found| {
        let (revision, value) = found.value();
        Stored {
            key: key.to_owned(),
            revision,
            value: Bytes::copy_from_slice(value),
        }
    }))
}

fn holds(expect: Expect, current: Option<&Stored>) -> bool {
    match expect {
        Expect::Absent => current.is_none(),
        Expect::Revision(revision) => current.is_some_and(|current| current.revision == revision),
    }
}

fn apply(
    latest: &mut Latest<'_>,
    log: &mut Log<'_>,
    write: Write,
    revision: u64,
) -> Result<Vec<Event>, StoreError> {
    for (key, expect) in write.guards {
        if !holds(expect, read(latest, &key)?.as_ref()) {
            return Err(StoreError::Guard { key });
        }
    }
    let current = read(latest, &write.key)?;
    if !holds(write.expect, current.as_ref()) {
        return Err(StoreError::Conflict {
            key: write.key,
            current,
        });
    }
    let mut changes = Vec::with_capacity(write.also.len() + 1);
    // The log has one entry at each revision; the last one is that of the object.
    let mut at = revision;
    for (key, value) in write.also {
        let current = read(latest, &key)?;
        if current.is_some() || value.is_some() {
            changes.push(change(latest, log, at, key, value, current)?);
            at += 1;
        }
    }
    changes.push(change(latest, log, at, write.key, write.value, current)?);
    Ok(changes)
}

fn change(
    latest: &mut Latest<'_>,
    log: &mut Log<'_>,
    revision: u64,
    key: String,
    value: Option<Bytes>,
    current: Option<Stored>,
) -> Result<Event, StoreError> {
    let operation = "write to store";
    let previous = current.map(|current| (current.revision, current.value));
    let (old_revision, old) = previous
        .as_ref()
        .map_or((0, &[][..]), |(at, value)| (*at, value.as_ref()));
    log.insert(revision, (key.as_str(), value.as_deref(), old_revision, old))
        .map_err(backend(operation))?;
    match &value {
        Some(value) => drop(
            latest
                .insert(key.as_str(), (revision, value.as_ref()))
                .map_err(backend(operation))?,
        ),
        None => drop(latest.remove(key.as_str()).map_err(backend(operation))?),
    }
    Ok(Event {
        revision,
        key,
        value,
        previous,
    })
}
