//! Steps on services: sets, configuration, frontends.

use std::collections::HashMap;
use std::sync::Arc;

use dataplane_common::abi::{FrontendKey, FrontendValue, Service, SetWord, Slot, map_name};

use super::Programmer;
use super::alloc::Range;
use super::error::ProgramError;
use super::held::{Applied, AppliedSet, Offers, Resting, pick, pick_mut, word};
use super::maps::{MapError, Maps, SetKind, Write};
use crate::desired::{ServiceConfig, SetBackend};
use crate::key::{BackendKey, ServiceKey};

impl<M: Maps> Programmer<M> {
    pub(super) fn set_service(
        &mut self,
        key: &ServiceKey,
        config: ServiceConfig,
        cluster: &[SetBackend],
        local: &[SetBackend],
        lost: &HashMap<BackendKey, Arc<ProgramError>>,
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let cluster = self.resolve(cluster, lost)?;
        let local = self.resolve(local, lost)?;
        match self.by_key.get(key).copied() {
            None => self.add_service(key, config, cluster, local),
            Some(id) => {
                // Sets that traffic may need come before the flag that sends it there; emptied ones after it.
                let grows = |set: &[(u32, SetBackend)]| !set.is_empty();
                for (which, set) in [(SetKind::Cluster, &cluster), (SetKind::Local, &local)] {
                    if grows(set) {
                        self.change_set(id, which, set, now_ms)?;
                    }
                }
                self.change_config(id, config)?;
                for (which, set) in [(SetKind::Cluster, &cluster), (SetKind::Local, &local)] {
                    if !grows(set) {
                        self.change_set(id, which, set, now_ms)?;
                    }
                }
                Ok(())
            }
        }
    }

    pub(super) fn add_service(
        &mut self,
        key: &ServiceKey,
        config: ServiceConfig,
        cluster: Vec<(u32, SetBackend)>,
        local: Vec<(u32, SetBackend)>,
    ) -> Result<(), ProgramError> {
        let Some(id) = self.service_ids.take() else {
            let max = self.maps.capacity().services;
            return Err(ProgramError::Full {
                map: map_name::SERVICES,
                needed: 1,
                free: 0,
                max,
            });
        };
        let laid_out = self
            .lay_out(id, &cluster)
            .and_then(|cluster_range| match self.lay_out(id, &local) {
                Ok(local_range) => Ok((cluster_range, local_range)),
                Err(error) => {
                    self.arena.give_back(cluster_range);
                    Err(error)
                }
            });
        let result = laid_out.and_then(|(cluster_range, local_range)| {
            let row = Service {
                cluster: word(cluster_range),
                local: word(local_range),
                algorithm: config.algorithm,
                flags: config.flags,
                ..Service::default()
            };
            let written = self.write(&Write::Service { id, row });
            written.map(|()| (cluster_range, local_range)).map_err(|error| {
                self.arena.give_back(cluster_range);
                self.arena.give_back(local_range);
                error.into()
            })
        });
        let (cluster_range, local_range) = match result {
            Ok(ranges) => ranges,
            Err(error) => {
                self.service_ids.give_back(id);
                return Err(error);
            }
        };
        self.count_refs(&cluster, true);
        self.count_refs(&local, true);
        let applied = Applied {
            key: Some(key.clone()),
            frontends: Offers::default(),
            config,
            cluster: AppliedSet {
                range: cluster_range,
                members: cluster,
                unknown: false,
            },
            local: AppliedSet {
                range: local_range,
                members: local,
                unknown: false,
            },
        };
        self.services.insert(id, applied);
        self.by_key.insert(key.clone(), id);
        Ok(())
    }

    /// Writes a set's slots into a new range that nothing refers to yet.
    pub(super) fn lay_out(
        &mut self,
        service: u32,
        members: &[(u32, SetBackend)],
    ) -> Result<Range, ProgramError> {
        let needed = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let Some(range) = self.arena.take(needed) else {
            let (free, max) = (self.arena.free(), self.maps.capacity().slots);
            return Err(ProgramError::Full {
                map: map_name::SLOTS,
                needed,
                free,
                max,
            });
        };
        if range.len > 0 {
            let slots: Vec<Slot> = members
                .iter()
                .map(|(backend, _)| Slot::new(*backend, service))
                .collect();
            if let Err(error) = self.write(&Write::Slots {
                base: range.base,
                slots: &slots,
            }) {
                self.arena.give_back(range);
                return Err(error.into());
            }
        }
        Ok(range)
    }

    pub(super) fn change_set(
        &mut self,
        id: u32,
        which: SetKind,
        members: &[(u32, SetBackend)],
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let Some(old) = self.services.get(&id).map(|s| pick(s, which)) else {
            return Ok(());
        };
        let same = !old.unknown && old.members.iter().map(|m| m.0).eq(members.iter().map(|m| m.0));
        if !same {
            let range = self.lay_out(id, members)?;
            if let Err(error) = self.write(&Write::Set {
                id,
                which,
                word: word(range),
            }) {
                self.arena.give_back(range);
                return Err(error.into());
            }
            self.count_refs(members, true);
            let Some(service) = self.services.get_mut(&id) else {
                return Ok(());
            };
            let set = AppliedSet {
                range,
                members: members.to_vec(),
                unknown: false,
            };
            let old = std::mem::replace(pick_mut(service, which), set);
            self.count_refs(&old.members, false);
            if old.range.len > 0 {
                self.resting.put(now_ms, Resting::Slots(old.range));
            }
        } else if let Some(service) = self.services.get_mut(&id) {
            let old = std::mem::replace(&mut pick_mut(service, which).members, members.to_vec());
            self.count_refs(members, true);
            self.count_refs(&old, false);
        }
        Ok(())
    }

    pub(super) fn change_config(&mut self, id: u32, config: ServiceConfig) -> Result<(), ProgramError> {
        if self.services.get(&id).is_some_and(|s| s.config != config) {
            self.write(&Write::Config {
                id,
                algorithm: config.algorithm,
                flags: config.flags,
            })?;
            if let Some(service) = self.services.get_mut(&id) {
                service.config = config;
            }
        }
        Ok(())
    }

    pub(super) fn put_frontend(
        &mut self,
        key: &ServiceKey,
        frontend: FrontendKey,
        kind: u8,
    ) -> Result<(), ProgramError> {
        let Some(&id) = self.by_key.get(key) else {
            return Ok(());
        };
        let value = FrontendValue {
            service: id,
            kind,
            ..FrontendValue::default()
        };
        self.write(&Write::PutFrontend { key: frontend, value })?;
        if let Some(before) = self
            .by_frontend
            .insert(frontend, id)
            .filter(|before| *before != id)
            && let Some(service) = self.services.get_mut(&before)
        {
            service.frontends.remove(&frontend);
        }
        if let Some(service) = self.services.get_mut(&id) {
            service.frontends.insert(frontend, kind);
        }
        Ok(())
    }

    pub(super) fn delete_frontend(&mut self, id: u32, frontend: FrontendKey) -> Result<(), MapError> {
        self.write(&Write::DeleteFrontend { key: frontend })?;
        self.by_frontend.remove(&frontend);
        if let Some(service) = self.services.get_mut(&id) {
            service.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Removes a service to which no frontend leads any more. Its row is emptied: who still holds its id is refused.
    pub(super) fn remove_service(&mut self, id: u32, now_ms: u64) -> Result<(), MapError> {
        if self
            .services
            .get(&id)
            .is_none_or(|service| !service.frontends.is_empty())
        {
            return Ok(());
        }
        for which in [SetKind::Cluster, SetKind::Local] {
            self.write(&Write::Set {
                id,
                which,
                word: SetWord::default(),
            })?;
            // if the next write fails, a later wish for this service must not take the set for what it was
            if let Some(service) = self.services.get_mut(&id) {
                pick_mut(service, which).unknown = true;
            }
        }
        let Some(service) = self.services.remove(&id) else {
            return Ok(());
        };
        if let Some(key) = &service.key {
            self.by_key.remove(key);
        }
        self.resting.put(now_ms, Resting::Service(id));
        for set in [service.cluster, service.local] {
            self.count_refs(&set.members, false);
            if set.range.len > 0 {
                self.resting.put(now_ms, Resting::Slots(set.range));
            }
        }
        Ok(())
    }
}
