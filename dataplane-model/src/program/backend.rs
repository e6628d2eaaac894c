//! Steps on rows of `BACKENDS`.

use std::collections::HashMap;
use std::sync::Arc;

use dataplane_common::abi::{Backend, map_name};

use super::Programmer;
use super::error::ProgramError;
use super::held::{BackendRow, Resting};
use super::maps::{MapError, Maps, Write};
use crate::desired::{BackendState, SetBackend};
use crate::key::BackendKey;

impl<M: Maps> Programmer<M> {
    pub(super) fn put_backend(
        &mut self,
        backend: BackendKey,
        state: BackendState,
    ) -> Result<(), ProgramError> {
        if self.backends.contains_key(&backend) {
            // its state follows when all sets are as wished
            return Ok(());
        }
        let Some(id) = self.backend_ids.take() else {
            let max = self.maps.capacity().backends;
            return Err(ProgramError::Full {
                map: map_name::BACKENDS,
                needed: 1,
                free: 0,
                max,
            });
        };
        let row = Backend {
            addr: backend.addr,
            port: backend.port,
            protocol: backend.protocol.number(),
            state: state.number(),
            generation: self
                .maps
                .backend(id)
                .unwrap_or_default()
                .generation
                .wrapping_add(1),
            ..Backend::default()
        };
        let written = self
            .write(&Write::ResetStats { id })
            .and_then(|()| self.write(&Write::Backend { id, row }));
        if let Err(error) = written {
            self.backend_ids.give_back(id);
            return Err(error.into());
        }
        self.backends.insert(
            backend,
            BackendRow {
                id,
                state,
                refs: 0,
                active: 0,
            },
        );
        Ok(())
    }

    /// Gives a backend's row back if no set refers to it, else makes its state what the sets say.
    pub(super) fn settle_backend(&mut self, backend: BackendKey, now_ms: u64) -> Result<(), MapError> {
        self.unsettled.remove(&backend);
        let Some(row) = self.backends.get(&backend).copied() else {
            return Ok(());
        };
        if row.refs == 0 {
            self.resting.put(now_ms, Resting::Backend(row.id));
            self.backends.remove(&backend);
            return Ok(());
        }
        let state = if row.active > 0 {
            BackendState::Active
        } else {
            BackendState::Terminating
        };
        if row.state != state {
            let write = Write::BackendState {
                id: row.id,
                state: state.number(),
            };
            if let Err(error) = self.write(&write) {
                self.unsettled.insert(backend);
                return Err(error);
            }
            self.backends.insert(backend, BackendRow { state, ..row });
        }
        Ok(())
    }

    /// Ids of a set's members.
    pub(super) fn resolve(
        &self,
        set: &[SetBackend],
        lost: &HashMap<BackendKey, Arc<ProgramError>>,
    ) -> Result<Vec<(u32, SetBackend)>, ProgramError> {
        let mut out = Vec::with_capacity(set.len());
        for member in set {
            match self.backends.get(&member.backend) {
                Some(row) => out.push((row.id, *member)),
                None => {
                    let full = || {
                        Arc::new(ProgramError::Full {
                            map: map_name::BACKENDS,
                            needed: 1,
                            free: 0,
                            max: self.maps.capacity().backends,
                        })
                    };
                    return Err(ProgramError::Backend {
                        backend: member.backend,
                        source: lost.get(&member.backend).map_or_else(full, Arc::clone),
                    });
                }
            }
        }
        Ok(out)
    }

    pub(super) fn count_refs(&mut self, members: &[(u32, SetBackend)], add: bool) {
        for (_, member) in members {
            if let Some(row) = self.backends.get_mut(&member.backend) {
                let active = u32::from(member.state == BackendState::Active);
                if add {
                    row.refs += 1;
                    row.active += active;
                } else {
                    row.refs = row.refs.saturating_sub(1);
                    row.active = row.active.saturating_sub(active);
                }
            }
        }
    }
}
