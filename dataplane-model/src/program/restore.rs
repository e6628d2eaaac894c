//! After a restart: what the maps hold, read back.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dataplane_common::abi::{Backend, NO_ID, SetWord, backend_state};

use super::alloc::{Arena, Ids, Quarantine, Range};
use super::held::{Applied, AppliedSet, BackendRow, Offers};
use super::maps::{MapError, Maps};
use super::{Programmer, QUARANTINE_MS};
use crate::desired::{BackendState, ServiceConfig, SetBackend};
use crate::key::{BackendKey, Protocol};

impl<M: Maps> Programmer<M> {
    /// Reads back what the maps hold, so that ids stay what they were and a restart changes nothing. Services are known
    /// by their frontends until a complete list names them.
    ///
    /// # Errors
    ///
    /// If the frontends cannot be read.
    pub fn new(maps: M) -> Result<Self, MapError> {
        let capacity = maps.capacity();
        let mut restored = Self {
            services: HashMap::new(),
            by_key: HashMap::new(),
            by_frontend: HashMap::new(),
            backends: HashMap::new(),
            service_ids: Ids::new(capacity.services),
            backend_ids: Ids::new(capacity.backends),
            arena: Arena::new(capacity.slots),
            resting: Quarantine::new(QUARANTINE_MS),
            unsettled: BTreeSet::new(),
            pending: BTreeMap::new(),
            writes: 0,
            maps,
        };
        for (frontend, value) in restored.maps.frontends()? {
            let id = value.service;
            if !restored.services.contains_key(&id) {
                restored.restore_service(id);
            }
            restored.by_frontend.insert(frontend, id);
            if let Some(service) = restored.services.get_mut(&id) {
                service.frontends.insert(frontend, value.kind);
            }
        }
        Ok(restored)
    }

    /// A service is taken as it is found, its sets only as far as they make sense. An id that none of ours can have leaves
    /// its frontends orphaned: they are pruned, or lead elsewhere when claimed.
    fn restore_service(&mut self, id: u32) {
        if !self.service_ids.reserve(id) {
            return;
        }
        let row = self.maps.service(id).unwrap_or_default();
        let cluster = self.restore_set(id, row.cluster);
        let local = self.restore_set(id, row.local);
        let config = ServiceConfig {
            algorithm: row.algorithm,
            flags: row.flags,
        };
        self.services.insert(
            id,
            Applied {
                key: None,
                frontends: Offers::default(),
                config,
                cluster,
                local,
            },
        );
    }

    fn restore_set(&mut self, service: u32, word: SetWord) -> AppliedSet {
        let range = Range {
            base: word.base(),
            len: word.count(),
        };
        if !self.arena.reserve(range) {
            return AppliedSet {
                unknown: true,
                ..AppliedSet::default()
            };
        }
        let mut members = Vec::new();
        let mut unknown = false;
        for index in range.base..range.base + range.len {
            match self.maps.slot(index).filter(|slot| slot.service() == service) {
                Some(slot) => match self.restore_backend(slot.backend()) {
                    Some(member) => members.push((slot.backend(), member)),
                    None => unknown = true,
                },
                None => unknown = true,
            }
        }
        self.count_refs(&members, true);
        AppliedSet {
            range,
            members,
            unknown,
        }
    }

    fn restore_backend(&mut self, id: u32) -> Option<SetBackend> {
        let Backend {
            addr,
            port,
            protocol,
            state,
            ..
        } = self.maps.backend(id).filter(|_| id != NO_ID)?;
        let backend = BackendKey {
            addr,
            port,
            protocol: Protocol::from_number(protocol)?,
        };
        let state = match state {
            backend_state::ACTIVE => BackendState::Active,
            backend_state::TERMINATING => BackendState::Terminating,
            _ => return None,
        };
        match self.backends.get(&backend) {
            Some(row) if row.id == id => {}
            // two rows for one backend: the other one is the one to keep
            Some(_) => return None,
            None => {
                if !self.backend_ids.reserve(id) {
                    return None;
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
            }
        }
        Some(SetBackend {
            backend,
            state,
            local: false,
        })
    }
}
