//! Steps on rows of `BACKENDS`.

use std::sync::Arc;

use dataplane_common::abi::{Backend, map_name};
use hashbrown::{HashMap, HashSet};

use super::Programmer;
use super::error::ProgramError;
use super::held::{BackendRow, Member, Resting};
use super::maps::{MapError, Maps, Write, backend_node};
use crate::desired::{BackendState, SetBackend};
use crate::key::BackendKey;

/// Backends that could not be programmed, and why.
pub(super) type Lost = HashMap<BackendKey, Arc<ProgramError>>;

pub(super) const fn node(local: bool) -> u32 {
    if local {
        backend_node::LOCAL
    } else {
        backend_node::REMOTE
    }
}

impl<M: Maps> Programmer<M> {
    /// The row of a backend, made if there is none. What the sets say of it is written when it is settled.
    pub(super) fn put_backend(&mut self, backend: BackendKey) -> Result<u32, ProgramError> {
        if let Some(id) = self.backends.find(&backend) {
            return Ok(id);
        }
        let Some(id) = self.backend_ids.take() else {
            return Err(self.no_backend_row());
        };
        let (state, local) = (BackendState::Active, false);
        let row = Backend {
            addr: backend.addr,
            port: backend.port,
            protocol: backend.protocol.number(),
            state: state.number(),
            node: node(local),
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
        let row = BackendRow {
            key: backend,
            state,
            local,
            unsettled: false,
            refs: 0,
            actives: 0,
            locals: 0,
        };
        self.backends.insert(id, row);
        Ok(id)
    }

    fn no_backend_row(&self) -> ProgramError {
        ProgramError::Full {
            map: map_name::BACKENDS,
            needed: 1,
            free: 0,
            max: self.maps.capacity().backends,
        }
    }

    /// Gives a backend's row back if no set refers to it and it is not kept, else makes it what the sets say.
    pub(super) fn settle_backend(
        &mut self,
        id: u32,
        kept: &HashSet<BackendKey>,
        now_ms: u64,
    ) -> Result<(), MapError> {
        let Some(&row) = self.backends.get(id) else {
            return Ok(());
        };
        if row.refs == 0 && kept.contains(&row.key) {
            return Ok(());
        }
        if row.refs == 0 {
            self.resting.put(now_ms, Resting::Backend(id));
            self.backends.remove(id);
            // the row's next backend is not suspected for it
            self.suspects.retain(|suspect| *suspect != id);
            return Ok(());
        }
        let state = if row.actives > 0 {
            BackendState::Active
        } else {
            BackendState::Terminating
        };
        let local = row.locals > 0;
        let result = self.settle_row(id, &row, state, local);
        if result.is_err() {
            self.backends.touch(id);
        }
        result
    }

    fn settle_row(
        &mut self,
        id: u32,
        row: &BackendRow,
        state: BackendState,
        local: bool,
    ) -> Result<(), MapError> {
        if row.local != local {
            self.write(&Write::BackendNode {
                id,
                node: node(local),
            })?;
            if let Some(row) = self.backends.get_mut(id) {
                row.local = local;
            }
        }
        if row.state != state {
            self.write(&Write::BackendState {
                id,
                state: state.number(),
            })?;
            if let Some(row) = self.backends.get_mut(id) {
                row.state = state;
            }
        }
        Ok(())
    }

    /// Ids of a set's members.
    pub(super) fn resolve(&self, set: &[SetBackend], lost: &Lost) -> Result<Box<[Member]>, ProgramError> {
        let find = |member: &SetBackend| match self.backends.find(&member.backend) {
            Some(id) => Ok(Member::new(id, member)),
            None => Err(ProgramError::Backend {
                backend: member.backend,
                source: lost
                    .get(&member.backend)
                    .map_or_else(|| Arc::new(self.no_backend_row()), Arc::clone),
            }),
        };
        let mut out = Vec::with_capacity(set.len());
        for member in set {
            out.push(find(member)?);
        }
        Ok(out.into())
    }

    /// A set with these members came or went.
    pub(super) fn count_members(&mut self, members: &[Member], add: bool) {
        for member in members {
            self.count(
                member.id(),
                add,
                u32::from(member.active()),
                u32::from(member.local()),
            );
        }
    }

    /// A table with these backends came or went.
    pub(super) fn count_ids(&mut self, ids: &[u32], add: bool) {
        for id in ids {
            self.count(*id, add, 0, 0);
        }
    }

    fn count(&mut self, id: u32, add: bool, active: u32, local: u32) {
        if let Some(row) = self.backends.get_mut(id) {
            if add {
                row.refs += 1;
                row.actives += active;
                row.locals += local;
            } else {
                row.refs = row.refs.saturating_sub(1);
                row.actives = row.actives.saturating_sub(active);
                row.locals = row.locals.saturating_sub(local);
            }
            self.backends.touch(id);
        }
    }

    /// A member as others name it.
    pub(super) fn member(&self, member: Member) -> Option<SetBackend> {
        let row = self.backends.get(member.id())?;
        Some(SetBackend {
            backend: row.key,
            state: if member.active() {
                BackendState::Active
            } else {
                BackendState::Terminating
            },
            local: member.local(),
        })
    }
}
