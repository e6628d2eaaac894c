//! A new store out of the content of another one.

use std::path::Path;

use redb::Database;

use super::{COMPACTED, LATEST, META, Options, REVISION, RedbStore, backend, open, prepare};
use crate::store::{StoreError, Stored};

const OPERATION: &str = "fill a new store";

/// A store that is being filled. Nothing of it is there before [`Import::finish`].
pub struct Import {
    // Ends before the database does.
    transaction: redb::WriteTransaction,
    database: Database,
}

impl RedbStore {
    /// Begins a new store at `path`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn import(path: &Path) -> Result<Import, StoreError> {
        let database = open(path, Options::default())?;
        prepare(&database)?;
        let transaction = database.begin_write().map_err(backend(OPERATION))?;
        Ok(Import {
            database,
            transaction,
        })
    }
}

impl Import {
    /// Puts keys with their revisions into it, as `source` gives them; returns what `source` does.
    ///
    /// # Errors
    /// Those of `source`, and when the disk fails.
    pub fn fill<T, E: From<StoreError>>(
        &mut self,
        source: impl FnOnce(&mut dyn FnMut(Stored) -> Result<(), E>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut latest = self
            .transaction
            .open_table(LATEST)
            .map_err(backend(OPERATION))
            .map_err(E::from)?;
        source(&mut |item| {
            latest
                .insert(item.key.as_str(), (item.revision, &*item.value))
                .map_err(backend(OPERATION))?;
            Ok(())
        })
    }

    /// Makes it durable. It goes on from `revision`, and has no history before that.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn finish(self, revision: u64) -> Result<(), StoreError> {
        {
            let mut meta = self.transaction.open_table(META).map_err(backend(OPERATION))?;
            for name in [REVISION, COMPACTED] {
                meta.insert(name, revision).map_err(backend(OPERATION))?;
            }
        }
        self.transaction.commit().map_err(backend(OPERATION))?;
        drop(self.database);
        Ok(())
    }
}
