//! Steps on services: sets, configuration, access.

use dataplane_common::abi::{Service, SetWord, Slot, map_name};

use super::Programmer;
use super::alloc::Range;
use super::backend::Lost;
use super::error::ProgramError;
use super::held::{Applied, AppliedSet, Member, Resting, word};
use super::maps::{MapError, Maps, SetKind, Write};
use crate::desired::{DesiredService, Frontends, ServiceConfig};
use crate::diff::{Keeps, serves_all};
use crate::key::ServiceKey;

const SETS: [SetKind; 2] = [SetKind::Cluster, SetKind::Local];

impl<M: Maps> Programmer<M> {
    /// Makes a service what is wished, less what it keeps.
    pub(super) fn set_service(
        &mut self,
        key: &ServiceKey,
        wish: &DesiredService,
        keeps: Keeps,
        lost: &Lost,
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let sets = [
            self.resolve(&wish.cluster, lost)?,
            self.resolve(&wish.local, lost)?,
        ];
        let Some(id) = self.services.find(key) else {
            return self.add_service(key, wish, sets);
        };
        // Sets that traffic may need come before the flag that sends it there; emptied ones after it.
        for (which, set) in SETS.into_iter().zip(&sets) {
            if !set.is_empty() {
                self.change_set(id, which, set, now_ms)?;
            }
        }
        // who may enter by frontends that ask for ranges must be known before these, and until they are gone
        if !keeps.ranges {
            self.change_access(id, wish.config.affinity_seconds, &wish.source_ranges, now_ms)?;
        }
        if keeps.sets && !serves_all(wish) {
            return Ok(());
        }
        self.change_config(id, wish.config)?;
        if keeps.sets {
            return Ok(());
        }
        for (which, set) in SETS.into_iter().zip(&sets) {
            if set.is_empty() {
                self.change_set(id, which, set, now_ms)?;
            }
        }
        self.change_tables(id, now_ms)
    }

    fn add_service(
        &mut self,
        key: &ServiceKey,
        wish: &DesiredService,
        [cluster, local]: [Box<[Member]>; 2],
    ) -> Result<(), ProgramError> {
        let Some(id) = self.service_ids.take() else {
            return Err(ProgramError::Full {
                map: map_name::SERVICES,
                needed: 1,
                free: 0,
                max: self.maps.capacity().services,
            });
        };
        let mut new = Applied {
            key: Some(key.clone()),
            frontends: Frontends::default(),
            config: wish.config,
            cluster: self.set_of(cluster, wish.config),
            local: self.set_of(local, wish.config),
            tables: None,
            ranges: None,
            stale: false,
        };
        if let Err(error) = self.write_new(id, wish, &mut new) {
            self.arena.give_back(new.cluster.range);
            self.arena.give_back(new.local.range);
            if let Some(ranges) = new.ranges {
                // written, but nobody has read of them
                self.rest_ranges(0, &ranges);
            }
            self.service_ids.give_back(id);
            return Err(error);
        }
        self.count_members(&new.cluster.members, true);
        self.count_members(&new.local.members, true);
        self.services.insert(id, new);
        self.change_tables(id, 0)
    }

    /// Writes everything that a new service's row refers to, then the row.
    fn write_new(&mut self, id: u32, wish: &DesiredService, new: &mut Applied) -> Result<(), ProgramError> {
        new.cluster.range = self.lay_out(id, new.cluster.published())?;
        new.local.range = self.lay_out(id, new.local.published())?;
        new.ranges = self.lay_out_ranges(&wish.source_ranges)?;
        self.write(&Write::ResetServiceStats { id })?;
        let row = Service {
            cluster: word(new.cluster.range),
            local: word(new.local.range),
            algorithm: wish.config.algorithm,
            flags: wish.config.flags,
            affinity_seconds: wish.config.affinity_seconds,
            source_ranges: new.ranges_id(),
            ..Service::default()
        };
        Ok(self.write(&Write::Service { id, row })?)
    }

    fn set_of(&self, members: Box<[Member]>, config: ServiceConfig) -> AppliedSet {
        AppliedSet {
            left_out: self.left_out(&members, config),
            members,
            ..AppliedSet::default()
        }
    }

    /// Writes a set's slots into a new range that nothing refers to yet.
    pub(super) fn lay_out(
        &mut self,
        service: u32,
        backends: impl Iterator<Item = u32>,
    ) -> Result<Range, ProgramError> {
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        slots.extend(backends.map(|backend| Slot::new(backend, service)));
        let result = self.write_slots(&slots);
        self.slots = slots;
        result
    }

    fn write_slots(&mut self, slots: &[Slot]) -> Result<Range, ProgramError> {
        let needed = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let Some(range) = self.arena.take(needed) else {
            let (free, max) = (self.arena.free(), self.maps.capacity().slots);
            return Err(ProgramError::Full {
                map: map_name::SLOTS,
                needed,
                free,
                max,
            });
        };
        if range.len > 0
            && let Err(error) = self.write(&Write::Slots {
                base: range.base,
                slots,
            })
        {
            self.arena.give_back(range);
            return Err(error.into());
        }
        Ok(range)
    }

    /// Publishes a set with these members, less those that are suspected to have failed.
    pub(super) fn change_set(
        &mut self,
        id: u32,
        which: SetKind,
        members: &[Member],
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let Some(service) = self.services.get(id) else {
            return Ok(());
        };
        let old = service.set(which);
        let left_out = self.left_out(members, service.config);
        let ids = |members: &[Member]| members.iter().map(|m| m.id()).collect::<Vec<_>>();
        let same = !old.unknown && old.left_out == left_out && ids(&old.members) == ids(members);
        if same {
            if *old.members != *members {
                self.count_members(members, true);
                if let Some(service) = self.services.get_mut(id) {
                    let old = std::mem::replace(&mut service.set_mut(which).members, members.into());
                    self.count_members(&old, false);
                }
            }
            return Ok(());
        }
        let mut set = AppliedSet {
            members: members.into(),
            left_out,
            ..AppliedSet::default()
        };
        set.range = self.lay_out(id, set.published())?;
        if let Err(error) = self.write(&Write::Set {
            id,
            which,
            word: word(set.range),
        }) {
            self.arena.give_back(set.range);
            return Err(error.into());
        }
        self.count_members(members, true);
        if let Some(service) = self.services.get_mut(id) {
            let old = std::mem::replace(service.set_mut(which), set);
            self.note_released(id, &old.members, members);
            self.count_members(&old.members, false);
            self.rest_slots(old.range, now_ms);
        }
        Ok(())
    }

    pub(super) fn rest_slots(&mut self, range: Range, now_ms: u64) {
        if range.len > 0 {
            self.resting.put(now_ms, Resting::Slots(range));
        }
    }

    pub(super) fn change_config(&mut self, id: u32, config: ServiceConfig) -> Result<(), MapError> {
        let Some(service) = self.services.get(id) else {
            return Ok(());
        };
        let before = service.config;
        if (before.algorithm, before.flags) != (config.algorithm, config.flags) {
            self.write(&Write::Config {
                id,
                algorithm: config.algorithm,
                flags: config.flags,
            })?;
        }
        if let Some(service) = self.services.get_mut(id) {
            service.config = ServiceConfig {
                // written apart
                affinity_seconds: before.affinity_seconds,
                ..config
            };
        }
        Ok(())
    }

    /// Removes a service to which no frontend leads any more. Its row is emptied: who still holds its id is refused.
    pub(super) fn remove_service(&mut self, id: u32, now_ms: u64) -> Result<(), MapError> {
        if self.services.get(id).is_none_or(|s| !s.frontends.is_empty()) {
            return Ok(());
        }
        for which in SETS {
            self.write(&Write::Set {
                id,
                which,
                word: SetWord::default(),
            })?;
            // if the next write fails, a later wish for this service must not take the set for what it was
            if let Some(service) = self.services.get_mut(id) {
                service.set_mut(which).unknown = true;
            }
        }
        self.drop_tables(id, now_ms)?;
        let Some(service) = self.services.remove(id) else {
            return Ok(());
        };
        self.resting.put(now_ms, Resting::Service(id));
        let key = service.key.as_ref();
        let released: Vec<_> = service
            .members()
            .filter_map(|m| self.release_of(id, key, m.id()))
            .collect();
        self.released.extend(released);
        for set in [service.cluster, service.local] {
            self.count_members(&set.members, false);
            self.rest_slots(set.range, now_ms);
        }
        if let Some(ranges) = service.ranges {
            self.rest_ranges(now_ms, &ranges);
        }
        Ok(())
    }
}
